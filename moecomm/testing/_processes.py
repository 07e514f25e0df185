"""Processes for ranks: forked from a warm one, which has imported torch, or started afresh where that cannot be.

A start of Python with torch takes two seconds of processor time, a fork some milliseconds. The warm process has no
process group, no device and one thread; where a library starts more, ranks start afresh. A rank forked from it is a
session of its own, with its own log, environment and module path, and is waited for through the warm process, its
parent. Variables that are read when a library is loaded cannot change in a fork: for other values of those there is
another warm process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any, Protocol

from moecomm.shared_code import share

# Variables that are read once, by the interpreter or by a library that is loaded.
_LIBRARIES = "LD DYLD PYTHON OMP KMP GOMP MKL OPENBLAS MALLOC GLIBC TORCH PYTORCH ATEN TRITON CUDA HIP LLVM"
_READ_AT_START = tuple(_LIBRARIES.split())
CAN_FORK = sys.platform == "linux"  # elsewhere system libraries do not stand a fork without an exec
_READY = b"ready"
_MAX_WARM = 4  # of those without ranks the one that was used least recently ends
# Imported in the warm process if whoever starts it has them: functions of a test module need pytest, and so on.
_OPTIONAL = ("pytest", "hypothesis", "triton", "torch._dynamo", "matplotlib.figure", "moecomm.testing.conformance")
_WARM_CASES = ("plain", "float16_payload", "float32_payload", "quantised_pair")


class Process(Protocol):
    """A process of a rank; it leads a process group of its own."""

    pid: int

    def exit_code(self) -> int | None:
        """Exit code or minus the signal, None while alive; the number stays taken until `kill`."""

    def kill(self) -> None:
        """Kill the process with everything in its group, and wait for it."""


def start(rank: int, log: IO[bytes], env: dict[str, str], preload: tuple[str, ...] = ()) -> tuple[Process, Connection]:
    """Start a rank that serves requests on a connection and writes into a log; preload: modules that it will need."""
    ours, theirs = Pipe(duplex=True)
    try:
        if CAN_FORK and (warm := _warm(env, preload)).can_fork:
            return warm.fork(rank, theirs.fileno(), log.fileno(), env), ours
        return _Fresh(rank, theirs.fileno(), log, env), ours
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


def kept() -> tuple[set[int], set[int]]:
    """Process ids and descriptors that stay for later ranks: no leak, as they end with this process."""
    mine = [warm for warm in _all_warm.values() if warm.owner == os.getpid()]
    return {warm.popen.pid for warm in mine}, {warm.connection.fileno() for warm in mine}


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]


def _exit_code(pid: int) -> int | None:
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a process that was just forked leads no group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


class _Fresh:
    """A process of its own from the start."""

    def __init__(self, rank: int, connection: int, log: IO[bytes], env: dict[str, str]) -> None:
        code = f"from moecomm.testing._worker import serve; serve({connection}, {rank})"
        self._popen = subprocess.Popen(
            _python(code),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=[connection],
            start_new_session=True,  # so that all it starts can be killed with it
        )
        self.pid = self._popen.pid

    def exit_code(self) -> int | None:
        return _exit_code(self.pid)

    def kill(self) -> None:
        _kill_group(self.pid)
        self._popen.wait()


# -- the side of the launcher ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fork:
    rank: int
    env: dict[str, str]
    path: list[str]


@dataclass(frozen=True, slots=True)
class _Look:
    pid: int


@dataclass(frozen=True, slots=True)
class _Reap:
    pid: int


class _Forked:
    """A process forked from a warm one."""

    def __init__(self, warm: _Warm, pid: int) -> None:
        self._warm, self.pid = warm, pid

    def exit_code(self) -> int | None:
        return self._warm.ask(_Look(self.pid))

    def kill(self) -> None:
        _kill_group(self.pid)
        with contextlib.suppress(EOFError, OSError):  # without its parent nobody has to wait for it
            self._warm.ask(_Reap(self.pid))
        self._warm.ranks.discard(self.pid)


class _Warm:
    """A warm process, as the launcher sees it."""

    def __init__(self, env: Mapping[str, str], preload: tuple[str, ...]) -> None:
        self.owner, self._lock = os.getpid(), threading.Lock()
        self.connection, theirs = Pipe(duplex=True)
        modules = [name for name in _OPTIONAL if name in sys.modules] + list(preload)
        code = f"from moecomm.testing._processes import main; main({theirs.fileno()}, {modules!r})"
        with theirs:
            self.popen = subprocess.Popen(
                _python(code),
                stdin=subprocess.DEVNULL,
                env=dict(env),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it is not interrupted from a keyboard, and ends with its launcher
            )
        self.can_fork = bool(self.connection.recv_bytes() == _READY)
        self.ranks: set[int] = set()  # forked and not yet waited for

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and (self.popen.poll() is None or not self.can_fork)

    def fork(self, rank: int, connection: int, log: int, env: dict[str, str]) -> _Forked:
        pid = self.ask(_Fork(rank, env, list(sys.path)), [connection, log])
        self.ranks.add(pid)
        return _Forked(self, pid)

    def ask(self, request: _Fork | _Look | _Reap, descriptors: list[int] | None = None) -> Any:
        with self._lock:
            self.connection.send_bytes(pickle.dumps(request))
            if descriptors:
                with socket.socket(fileno=os.dup(self.connection.fileno())) as sock:
                    socket.send_fds(sock, [b"fds"], descriptors)
            return pickle.loads(self.connection.recv_bytes())

    def close(self) -> None:
        self.connection.close()
        if self.owner == os.getpid():
            self.popen.wait()


_all_warm: dict[tuple[frozenset[tuple[str, str]], tuple[str, ...]], _Warm] = {}
_starting = threading.Lock()


def _warm(env: Mapping[str, str], preload: tuple[str, ...]) -> _Warm:
    """The warm process for an environment, with these modules imported too."""
    key = frozenset((name, value) for name, value in env.items() if name.startswith(_READ_AT_START)), preload
    with _starting:
        warm = _all_warm.pop(key, None)
        if warm is not None and not warm.usable:
            warm.close()
            warm = None
        if warm is None:
            idle = [other for other, kept in _all_warm.items() if not kept.ranks]
            for other in idle[: max(0, len(_all_warm) - _MAX_WARM + 1)]:
                _all_warm.pop(other).close()
            warm = _Warm(env, preload)
        _all_warm[key] = warm
        return warm


@atexit.register
def _close_all() -> None:
    while _all_warm:
        _all_warm.popitem()[1].close()


# -- the side of the warm process ------------------------------------------------------------------------------------


def main(fd: int, modules: list[str]) -> None:
    """Fork a rank whenever the launcher asks for one; in the rank this returns when the rank has been served."""
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    _warm_up(modules)
    ready = len(os.listdir("/proc/self/task")) == 1  # a second thread would not survive a fork, but its locks would
    connection.send_bytes(_READY if ready else b"")
    if not ready:
        return
    gc.collect()
    gc.freeze()  # what is here by now is not looked through, and so not copied, in every rank
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if isinstance(request, _Fork):
            with socket.socket(fileno=os.dup(fd)) as sock:
                descriptors = socket.recv_fds(sock, 3, 2)[1]
            pid = os.fork()
            if pid == 0:
                connection.close()
                _be_rank(request, *descriptors)
                return
            for descriptor in descriptors:
                os.close(descriptor)
            answer: int | None = pid
        elif isinstance(request, _Look):
            answer = _exit_code(request.pid)
        else:
            answer = os.waitpid(request.pid, 0)[0]
        connection.send_bytes(pickle.dumps(answer))


def _warm_up(modules: list[str]) -> None:
    """Import what ranks need; where torch has no device that it might touch, compile the loops that move rows, too."""
    import torch

    for name in ("torch.distributed", "moecomm.testing._worker", *modules):
        importlib.import_module(name)
    torch.set_num_threads(1)
    share()
    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    if "triton" in modules and importlib.import_module("triton").knobs.runtime.interpret:
        _train(torch.bfloat16, "local")
        return
    _train(torch.bfloat16, "symmetric")  # the loops for signals, too
    if "moecomm.testing.conformance" not in modules:  # a program that starts a few ranks once
        return
    from moecomm.testing.cases import CASES
    from moecomm.testing.conformance import run_in_turn

    # In every dtype of a sum, with and without gradients: what is compiled and imported here is there in all ranks.
    run_in_turn(None, "local", [CASES[name] for name in _WARM_CASES], rounds=3)


def _train(dtype: Any, transport: str) -> None:
    """One step on one rank."""
    import torch

    import moecomm

    x, weights = torch.ones(4, 8, dtype=dtype, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    with moecomm.Buffer(
        num_experts=2, hidden=8, top_k=2, max_tokens_per_rank=4, dtype=dtype, transport=transport
    ) as buffer:
        out: Any = buffer.dispatch(x, torch.zeros(4, 2).long(), weights)
        buffer.combine(out.x, out.handle, bias=x.detach()).sum().backward()


def _be_rank(request: _Fork, connection: int, log: int) -> None:
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    environment = os.environ
    environment.clear()
    environment.update(request.env)
    sys.path[:] = request.path
    from moecomm.testing._worker import serve

    serve(connection, request.rank)
