"""What is here: versions, devices, links, MPI, memory, transports. Each is looked up by itself; it may be missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moecomm
from moecomm.group import Group
from moecomm.launch import Launch, environment_variables
from moecomm.memory.device import device_memory_support
from moecomm.memory.host import host_memory_support
from moecomm.topology import Topology
from moecomm.transport import ask

PACKAGES = ("numpy", "triton", "llvmlite", "mpi4py", "mpich", "transformers", "deep_ep", "matplotlib", "rich", "click")
_NET = Path("/sys/class/net")
_RDMA = Path("/sys/class/infiniband")


def collect(launch: Launch) -> dict[str, Any]:
    """Look everything up on this rank; a section that fails holds {"error": why} and the others are there.

    >>> from moecomm.launch import joined
    >>> with joined("cpu") as launch:
    ...     sorted(collect(launch))
    ['devices', 'environment', 'launch', 'links', 'memory', 'mpi', 'symmetric_memory', 'transports', 'versions']
    """
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": versions,
        "launch": lambda: _launch(launch),
        "devices": devices,
        "links": links,
        "memory": memory,
        "mpi": mpi,
        "symmetric_memory": lambda: symmetric_memory(launch),
        "transports": lambda: transports(launch),
        "environment": _environment,
    }
    found = {}
    for name, look in sections.items():
        try:
            found[name] = look()
        except Exception as error:  # whatever is broken here is what the reader wants to know
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def versions() -> dict[str, Any]:
    """Versions of moecomm, Python, torch and what else it can use; None for what is not installed.

    >>> versions()["moecomm"] == moecomm.__version__
    True
    """
    build = torch.version.cuda or torch.version.hip
    found: dict[str, Any] = {
        "moecomm": moecomm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__ + (f" (built for {build})" if build else ""),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _launch(launch: Launch) -> dict[str, Any]:
    return {
        "launcher": launch.launcher,
        "rank": launch.rank,
        "ranks": launch.size,
        "ranks_on_this_node": launch.local_size,
        "host": socket.gethostname(),
        "device": str(launch.device),
    }


def devices() -> dict[str, Any]:
    """CPU and GPUs, and which GPUs can reach each other's memory.

    >>> devices()["cpu_cores"] >= 1
    True
    """
    found: dict[str, Any] = {"cpu": _cpu_model(), "cpu_cores": len(os.sched_getaffinity(0)), "gpus": []}
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
            text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        except (RuntimeError, AssertionError) as error:
            text = f"error: {error}"
        found["gpus"].append(text)
    if len(found["gpus"]) > 1:
        found["gpu_peers"] = {index: _peers(index, len(found["gpus"])) for index in range(len(found["gpus"]))}
    return found


def _peers(index: int, count: int) -> list[int]:
    return [other for other in range(count) if other != index and torch.cuda.can_device_access_peer(index, other)]


def _cpu_model() -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def links() -> dict[str, Any]:
    """Network interfaces that are up, with their speed in Mbit/s where the driver says one, and RDMA devices.

    >>> "interfaces" in links()
    True
    """
    found: dict[str, Any] = {"interfaces": {}, "rdma": []}
    for path in sorted(_NET.iterdir()) if _NET.is_dir() else []:
        state, speed = _text(path / "operstate").strip(), _text(path / "speed").strip()
        if path.name != "lo" and state in ("up", "unknown"):
            known = speed.isdecimal() and int(speed) > 0
            found["interfaces"][path.name] = f"{speed} Mbit/s" if known else "speed unknown"
    if _RDMA.is_dir():
        for path in sorted(_RDMA.iterdir()):
            found["rdma"].append(f"{path.name}: {_text(path / 'ports/1/rate').strip() or 'rate unknown'}")
    return found


def memory() -> dict[str, Any]:
    """Memory of this machine in bytes: all, available, and the size of /dev/shm (which moecomm does not need).

    >>> memory()["total_bytes"] > 0
    True
    """
    lines = {line.split(":")[0]: line.split()[1] for line in _text(Path("/proc/meminfo")).splitlines() if line}
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "total_bytes": 1024 * int(lines["MemTotal"]),
        "available_bytes": 1024 * int(lines["MemAvailable"]),
        "dev_shm_bytes": shm.f_frsize * shm.f_blocks if shm else 0,
    }


def mpi() -> dict[str, Any]:
    """Which MPI there is, or why there is none.

    >>> sorted(mpi())[0] in ("available", "error")
    True
    """
    if importlib.util.find_spec("mpi4py") is None:
        return {"available": False, "reason": "mpi4py is not installed: pip install 'moecomm[mpi]'"}
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return {"available": False, "reason": f"mpi4py finds no MPI library: {str(error).splitlines()[0]}"}
    vendor, version = MPI.get_vendor()
    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    return {
        "available": True,
        "library": f"{vendor} {'.'.join(map(str, version))}",
        "threads": levels.get(MPI.Query_thread(), "multiple"),
        "ranks": MPI.COMM_WORLD.size,
    }


def symmetric_memory(launch: Launch) -> dict[str, Any]:
    """Whether ranks of a node can share memory, on the CPU and on a GPU, and why not."""
    group = Group.resolve(launch.group)
    host, device = host_memory_support(), device_memory_support(group, torch.device("cuda"))
    return {
        "cpu": {"ok": host is None, "reason": host or "memfd, passed over Unix sockets"},
        "gpu": {"ok": device is None, "reason": device or "torch symmetric memory"},
    }


def transports(launch: Launch) -> dict[str, Any]:
    """What each transport answers for these ranks, in the order in which "auto" asks. Collective."""
    group = Group.resolve(launch.group)
    topology = Topology.detect(group)
    answers = ask(group, topology, launch.device)
    nodes = [list(topology.ranks_of_node(node)) for node in range(topology.num_nodes)]
    return {
        "chosen": next((name for name, answer in answers.items() if answer.ok), None),
        "ranks_by_node": nodes,
        "answers": {name: {"ok": answer.ok, "reason": answer.reason} for name, answer in answers.items()},
    }


def _environment() -> dict[str, Any]:
    return {
        name: {"value": value, "meaning": meaning, "set": is_set}
        for name, (value, meaning, is_set) in environment_variables().items()
    }


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
