"""A cluster on one machine: network namespaces joined by a bridge, each playing a node with its own address and speed.

Needs root, iproute2 and util-linux. Every node has network, host name, process ids, /sys and /dev/shm of its own, and
belongs to a process that dies with this one: whatever way this process ends, `kill -9` included, the kernel takes
namespaces, interfaces and all processes inside away with it. Nothing appears in the network of the machine itself.

Bytes are counted as the interface sees them: a segment that leaves in one piece (up to 64 KiB) has one header.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, final

__all__ = ["Cluster", "Process", "why_not"]

_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname", "sleep")
_DEVICE = "eth0"
_SUBNET = "10.83.0"
_START_S = 20.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """The reason why there can be no cluster of namespaces here, or None.

    >>> why_not() is None or isinstance(why_not(), str)
    True
    """
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (packages iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Cluster(1):
            return None
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernel refuses: {error}"


@final
@dataclass
class Process:
    """A process on a node. `output` is what it has said so far, stdout and stderr together."""

    popen: subprocess.Popen[bytes]
    log: IO[bytes]

    @property
    def output(self) -> str:
        """Everything written so far."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """Wait for its exit code; raises subprocess.TimeoutExpired."""
        return self.popen.wait(timeout_s)

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Wait until it has said something; raises TimeoutError with what it has said instead."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            if time.monotonic() > deadline or (self.popen.poll() is not None and text not in self.output):
                raise TimeoutError(f"did not say {text!r} within {timeout_s:g} s, but:\n{self.output}")
            time.sleep(0.02)


@final
@dataclass
class Cluster:
    """Nodes node0, node1, ... at 10.83.0.1, 10.83.0.2, ..., which know each other by name.

    Args:
        num_nodes: how many.
        rate: of every link in each direction, as `tc` writes it; None for no limit.

    >>> if why_not() is None:
    ...     with Cluster(2, rate="1gbit") as cluster:
    ...         process = cluster.start(1, ["hostname"])
    ...         process.wait(10), process.output
    (0, 'node1\\n')
    """

    num_nodes: int
    rate: str | None = "1gbit"
    _pids: list[int] = field(default_factory=list)  # first the switch, then the nodes
    _holders: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _processes: list[Process] = field(default_factory=list)

    def __enter__(self) -> Cluster:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs on the nodes, and take them away; idempotent."""
        for holder in self._holders:
            holder.kill()
        for holder in self._holders:
            holder.wait()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(_START_S)
        for pid in self._pids:  # the network of a node is gone when its first process is
            deadline = time.monotonic() + _START_S
            while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
                time.sleep(0.005)
        self._holders, self._pids, self._processes = [], [], []

    def address(self, node: int) -> str:
        """The address of a node."""
        return f"{_SUBNET}.{node + 1}"

    def name(self, node: int) -> str:
        """The host name of a node."""
        return f"node{node}"

    def start(self, node: int, command: Sequence[str], env: Mapping[str, str] | None = None) -> Process:
        """Start a command on a node; `env` is added to the environment of this process."""
        log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        popen = subprocess.Popen(
            self.command(node, command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            preexec_fn=_die_with_parent,
        )
        self._processes.append(process := Process(popen, log))
        return process

    def command(self, node: int, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on a node, for launchers that want one."""
        pid = str(self._pids[node + 1])
        here = f"--wd={os.getcwd()}"
        return ["nsenter", "--target", pid, "--net", "--mount", "--uts", "--pid", here, "--", *command]

    def cut(self, node: int) -> None:
        """Pull the plug of a node."""
        self._on_switch(f"ip link set port{node} down")

    def mend(self, node: int) -> None:
        """Put it back."""
        self._on_switch(f"ip link set port{node} up")

    def counters(self, node: int) -> dict[str, int]:
        """tx_bytes and rx_bytes of a node's interface since it exists, from /sys/class/net."""
        files = [f"/sys/class/net/{_DEVICE}/statistics/{name}_bytes" for name in ("tx", "rx")]
        read = subprocess.run(self.command(node, ["cat", *files]), capture_output=True, check=True, text=True)
        return dict(zip(("tx_bytes", "rx_bytes"), map(int, read.stdout.split()), strict=True))

    # -- building --------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._hold("hostname switch; ip link add br0 type bridge; ip link set br0 up")
        hosts = "".join(f"{self.address(node)} {self.name(node)}\\n" for node in range(self.num_nodes))
        for node in range(self.num_nodes):
            self._hold(
                f"hostname {self.name(node)}; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /run;"
                " mount -t tmpfs tmpfs /dev/shm;"
                f" printf '127.0.0.1 localhost\\n{hosts}' > /run/hosts; mount --bind /run/hosts /etc/hosts;"
                " ip link set lo up"
            )
            self._connect(node)

    def _hold(self, setup: str) -> None:
        """Make a node and the process that it lives and dies with."""
        read, write = os.pipe()
        script = f"set -e; {setup}; echo ready >/proc/self/fd/{write}; exec sleep infinity"
        namespaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with tempfile.TemporaryFile() as errors:
            try:
                holder = subprocess.Popen(
                    ["unshare", *namespaces, "sh", "-c", script],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    pass_fds=[write],
                    preexec_fn=_die_with_parent,
                )
            finally:
                os.close(write)
            self._holders.append(holder)
            with os.fdopen(read, "rb") as ready:
                told = ready.readline()
            if not told:
                holder.wait(_START_S)
                errors.seek(0)
                raise OSError(f"cannot make a namespace: {errors.read().decode(errors='replace').strip()}")
        with open(f"/proc/{holder.pid}/task/{holder.pid}/children", encoding="ascii") as children:
            self._pids.append(int(children.read().split()[0]))

    def _connect(self, node: int) -> None:
        """Lay the cable between a node and the switch, and slow it down in both directions."""
        pid = self._pids[node + 1]
        self._on_switch(
            f"ip link add port{node} type veth peer name {_DEVICE} netns {pid}",
            f"ip link set port{node} master br0",
            f"ip link set port{node} up",
        )
        inside = [f"ip addr add {self.address(node)}/24 dev {_DEVICE}", f"ip link set {_DEVICE} up"]
        # Not what this machine happens to prefer: measurements are to agree. Every Linux has this one.
        inside.append("sh -c 'echo reno > /proc/sys/net/ipv4/tcp_congestion_control'")
        if self.rate is not None:
            # A burst of one unsplit segment; a queue long enough that TCP never loses one.
            shape = f"root tbf rate {self.rate} burst 128kb limit 16mb"
            self._on_switch(f"tc qdisc add dev port{node} {shape}")
            inside.append(f"tc qdisc add dev {_DEVICE} {shape}")
        _run_in_network(pid, inside)

    def _on_switch(self, *commands: str) -> None:
        _run_in_network(self._pids[0], commands)


def _run_in_network(pid: int, commands: Sequence[str]) -> None:
    """Run commands in the network of a process, with the process ids of this one."""
    for command in commands:
        done = subprocess.run(
            ["nsenter", "--target", str(pid), "--net", "--", *shlex.split(command)], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip()}")


def _die_with_parent() -> None:
    # In the child, before the command starts; the parent's death is its own.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
