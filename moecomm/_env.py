"""The environment variables of moecomm; the only place that reads them."""

from __future__ import annotations

import os

from moecomm.errors import ConfigError

# name -> (default, meaning); both are printed by `python -m moecomm info`.
VARIABLES = {
    "MOECOMM_TIMEOUT_S": ("60", "deadline of every wait in seconds, where the constructor gives none"),
    "MOECOMM_TRANSPORT": ("auto", "transport, where the constructor leaves it at auto"),
    "MOECOMM_CHECK": ("off", "check of arriving rows (off, cheap, full), where the constructor gives none"),
    "MOECOMM_RANKS_PER_NODE": ("", "pretend that every so many consecutive ranks form one node (tests)"),
}


def _read(name: str) -> str:
    return os.environ.get(name) or VARIABLES[name][0]


def timeout_s() -> float:
    """Default deadline in seconds."""
    text = _read("MOECOMM_TIMEOUT_S")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError("MOECOMM_TIMEOUT_S is no deadline", got=repr(text), expected="a positive number of seconds")
    return value


def transport() -> str:
    """Transport name that replaces "auto"."""
    return _read("MOECOMM_TRANSPORT")


def check() -> str:
    """How arriving rows are checked."""
    return _read("MOECOMM_CHECK")


def ranks_per_node() -> int | None:
    """Ranks per pretended node, or None to detect nodes."""
    text = _read("MOECOMM_RANKS_PER_NODE")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("MOECOMM_RANKS_PER_NODE is no rank count", got=repr(text), expected="a positive integer")
    return int(text)


def interprets_kernels() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU; it reads this when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "yes", "on", "y")


def allows_shared_devices() -> bool:
    """Whether torch lets several ranks have symmetric memory on one device; meant for tests."""
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0") == "1"


def launched() -> tuple[str, int, int, int, int]:
    """Who started this process ("torchrun", "mpiexec" or ""), its rank and W, and both on its own node.

    Only torchrun says the numbers; after mpiexec MPI knows them, and they are 0 and 1 here.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, local_size = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", str(size))
        return "torchrun", rank, size, int(local_rank), int(local_size)
    by_mpi = {"PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys()
    return ("mpiexec" if by_mpi else ""), 0, 1, 0, 1


def is_first() -> bool:
    """Whether this is rank 0, or alone, by what the launcher says; known before anybody is joined."""
    names = ("RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def values() -> dict[str, tuple[str, str, bool]]:
    """Name of every variable of moecomm -> its value, its meaning, and whether it was set."""
    return {name: (_read(name), meaning, name in os.environ) for name, (_, meaning) in VARIABLES.items()}


def threads() -> str:
    """OMP_NUM_THREADS, or nothing."""
    return os.environ.get("OMP_NUM_THREADS", "")


def rendezvous() -> tuple[str, int, int, int]:
    """Where the processes of a script of DeepEP's kind meet: address, port, number of nodes, number of this node."""
    read = os.environ.get
    numbers = read("MASTER_PORT", "8361"), read("WORLD_SIZE", "1"), read("RANK", "0")
    try:
        port, num_nodes, node = map(int, numbers)
    except ValueError:
        what = "MASTER_PORT, WORLD_SIZE and RANK are no numbers"
        raise ConfigError(
            what, got=repr(numbers), expected="a port, the number of nodes, the number of this node"
        ) from None
    return read("MASTER_ADDR", "127.0.0.1"), port, num_nodes, node


def gloo_interfaces() -> list[str]:
    """The network interfaces that torch's gloo backend is told to use."""
    return [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
