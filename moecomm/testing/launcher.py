"""Run functions on several ranks, each in a process of its own, and leave nothing behind.

The launcher hosts the rendezvous store itself on a port that the system picks, so no port is guessed; logs are files
without a name; processes kill themselves when the launcher is gone, however it ended.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import IO, Any

import torch.distributed as dist

from moecomm.testing._processes import Process, start
from moecomm.testing._worker import Answer, Join, Leave, Run

_START_S = 120.0  # a loaded machine takes long to import torch; not part of any test's own deadline
_GRACE_S = 3.0  # after the first failure the other ranks get this long to tell their side
_LEAVE_S = 60.0
_STACKS_S = 0.5
_POLL_S = 0.1
_LOG_TAIL_BYTES = 6000


class RankFailure(AssertionError):
    """One or more ranks failed; the message has every rank's traceback and the tail of its log.

    Attributes:
        failures: rank -> what happened to it, for the ranks that failed.
        errors: rank -> the exception it raised, where that could be carried over.
        timed_out: the ranks that had not returned at the deadline.
    """

    def __init__(
        self, message: str, failures: dict[int, str], errors: dict[int, BaseException], timed_out: tuple[int, ...]
    ) -> None:
        super().__init__(message)
        self.failures, self.errors, self.timed_out = failures, errors, timed_out


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str | None = "gloo",
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    expect_exit: Mapping[int, int] | None = None,
) -> list[Any]:
    """Call `fn(rank, *args)` in `world_size` new processes and return the results in rank order.

    Each process has one thread for torch, the environment variables of torchrun, and a process group, if a backend is
    given. On Linux it is forked from one that has imported torch and stays for the next call. Every rank must return
    and then end with exit code 0: its threads end and its `atexit` functions run, but a forked one tears no modules
    down. After the first failure, at the deadline, and when this process is interrupted, all ranks are killed with
    everything they started.

    Args:
        fn: defined at the top level of a module; arguments and result are pickled.
        world_size: W.
        args: passed on, the same for all ranks.
        backend: of `torch.distributed.init_process_group`, or None to form no group.
        timeout_s: seconds for `fn`, and the timeout of the process group; the start has a deadline of its own.
        env: environment variables on top of this process's.
        expect_exit: rank -> exit code of ranks that must die instead of returning, such as {1: -9}; they give None.

    Raises:
        RankFailure: a rank raised, died, or did not return in time.

    >>> import operator
    >>> run_ranks(operator.add, 2, 10, backend=None)
    [10, 11]
    """
    _home_of(fn)  # refuse what no rank can find before any is started
    expect_exit = dict(expect_exit or {})
    if not expect_exit.keys() <= set(range(world_size)):
        raise ValueError(f"expect_exit names ranks {sorted(expect_exit)}; expected ranks below {world_size}")
    with RankPool(world_size, backend, env=env, timeout_s=timeout_s) as pool:
        results = pool._run(fn, args, timeout_s, expect_exit)
        pool._leave(expect_exit)
    return results


class RankPool:
    """Keep `world_size` processes and run many functions on them: hundreds of cases for one start.

    A function that raises on some ranks and returns on others costs the pool a new process group; one that hangs, or
    that takes a rank down, costs it a new start. Either way the next `run` finds a working pool.

    Args:
        world_size: W.
        backend: of `torch.distributed.init_process_group`, or None to form no group.
        env: environment variables on top of this process's.
        timeout_s: seconds that each function may take, unless `run` says otherwise, and the process group's timeout.
        preload: modules that take long to import: where ranks are forked from one process, it imports them once.

    >>> import operator
    >>> with RankPool(2, backend=None) as pool:
    ...     pool.run(operator.add, 10), pool.run(operator.mul, 10)
    ([10, 11], [0, 10])
    """

    def __init__(
        self,
        world_size: int,
        backend: str | None = "gloo",
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        preload: Sequence[str] = (),
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is no rank count: got {world_size}; expected at least 1")
        self.world_size, self.backend, self.timeout_s = world_size, backend, timeout_s
        self._env, self._preload = dict(env or {}), tuple(preload)
        self._generation = 0
        self._ranks: list[_Rank] = []
        self._store: dist.TCPStore | None = None
        self._must_join = True

    def __enter__(self) -> RankPool:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call `fn(rank, *args)` on every rank and return what they return, in rank order.

        Args:
            fn: defined at the top level of a module; arguments and result are pickled.
            args: passed on, the same for all ranks.
            timeout_s: deadline in seconds; None means the pool's.

        Raises:
            RankFailure: a rank raised, died, or did not return in time.
        """
        return self._run(fn, args, self.timeout_s if timeout_s is None else timeout_s, {})

    def close(self) -> None:
        """Kill the ranks with everything they started; a later `run` starts them again."""
        ranks, self._ranks = self._ranks, []
        self._must_join = True
        for rank in ranks:
            rank.kill()
        self._store = None

    def _start(self) -> None:
        if not self._ranks:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
            try:
                for index in range(self.world_size):
                    self._ranks.append(_Rank.start(index, self._environment(index, self._store.port), self._preload))
            except BaseException:
                self.close()
                raise
        if self._must_join:
            self._generation += 1
            self._ask(self._join_request, "start", _START_S, {})
            self._must_join = False

    def _join_request(self, token: str) -> Join:
        assert self._store is not None
        return Join(token, self.backend, self.world_size, self._generation, self._store.port, self.timeout_s)

    def _run(
        self, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float, expect_exit: dict[int, int]
    ) -> list[Any]:
        module, path = _home_of(fn)
        call = pickle.dumps((fn, args))
        self._start()
        name = f"{module}.{getattr(fn, '__qualname__', fn)}"
        return self._ask(lambda token: Run(token, module, path, call), name, timeout_s, expect_exit)

    def _leave(self, expect_exit: dict[int, int]) -> None:
        """Let the ranks end by themselves and demand exit code 0."""
        alive = {rank.index: 0 for rank in self._ranks if rank.index not in expect_exit}
        self._ask(Leave, "exit", _LEAVE_S, {**expect_exit, **alive})

    def _ask(
        self, request: Callable[[str], Any], name: str, timeout_s: float, expect_exit: dict[int, int]
    ) -> list[Any]:
        """Send a request to all ranks and collect every answer or exit; on trouble see what can be kept."""
        tokens = [secrets.token_hex(8) for _ in self._ranks]
        try:
            for rank, token in zip(self._ranks, tokens, strict=True):
                rank.send(request(token))
            outcome = _collect(self._ranks, tokens, timeout_s, expect_exit)
            if not outcome.failures and not outcome.pending:
                return [outcome.answers[i].result if i in outcome.answers else None for i in range(self.world_size)]
            failure = self._failure(name, timeout_s, outcome)
        except BaseException:
            self.close()
            raise
        if outcome.pending or len(outcome.answers) < self.world_size:
            self.close()
        self._must_join = True
        raise failure from next(iter(failure.errors.values()), None)

    def _failure(self, name: str, timeout_s: float, outcome: _Outcome) -> RankFailure:
        if outcome.pending:
            for index in outcome.pending:
                self._ranks[index].print_stacks()
            time.sleep(_STACKS_S)  # a courtesy to the log, nothing waits for it
        failures, errors = dict(outcome.failures), {}
        for index in outcome.pending:
            why = f"did not return within {timeout_s:g} s" if outcome.timed_out else "was still busy"
            failures[index] = f"{why}; killed, its stacks are in the log"
        for index, answer in outcome.answers.items():
            if answer.error is not None:
                with contextlib.suppress(Exception):
                    errors[index] = pickle.loads(answer.error)
        parts = [f"{name} failed on ranks {sorted(failures)} of {self.world_size} (backend {self.backend})"]
        for rank in self._ranks:
            parts.append(f"--- rank {rank.index}: {failures.get(rank.index, 'returned')}".rstrip())
            log = rank.log_tail()
            if log:
                parts.append(f"--- rank {rank.index}, end of its log:\n{log}")
        timed_out = tuple(sorted(outcome.pending)) if outcome.timed_out else ()
        return RankFailure("\n".join(parts), failures, errors, timed_out)

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        return {
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": loopback,  # the host name need not lead anywhere
            **os.environ,
            **self._env,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here already: no rank shall host one
        }


@dataclass(slots=True)
class _Rank:
    """One process, the connection to it, and its log."""

    index: int
    process: Process
    connection: Connection
    log: IO[bytes]
    log_start: int = 0

    @classmethod
    def start(cls, index: int, env: dict[str, str], preload: tuple[str, ...]) -> _Rank:
        log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        try:
            return cls(index, *start(index, log, env, preload), log)
        except BaseException:
            log.close()
            raise

    def send(self, request: Any) -> None:
        self.log_start = os.fstat(self.log.fileno()).st_size
        with contextlib.suppress(OSError):  # a dead rank is found by _collect
            self.connection.send_bytes(pickle.dumps(request))

    def print_stacks(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)

    def log_tail(self) -> str:
        end = os.fstat(self.log.fileno()).st_size
        start = max(self.log_start, end - _LOG_TAIL_BYTES)
        return os.pread(self.log.fileno(), end - start, start).decode(errors="replace").rstrip()

    def kill(self) -> None:
        self.process.kill()
        self.connection.close()
        self.log.close()


@dataclass(slots=True)
class _Outcome:
    """What came of one request."""

    pending: set[int]
    timed_out: bool = False
    answers: dict[int, Answer] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def _collect(ranks: list[_Rank], tokens: list[str], timeout_s: float, expect_exit: dict[int, int]) -> _Outcome:
    """Wait until every rank has answered (or died, where that is expected), one has failed, or time is up."""
    outcome = _Outcome(pending={rank.index for rank in ranks})
    deadline = time.monotonic() + timeout_s
    given_up = float("inf")
    while outcome.pending:
        now = time.monotonic()
        outcome.timed_out = now >= deadline
        if now >= min(deadline, given_up):
            break
        waiting = [ranks[i].connection for i in outcome.pending if i not in outcome.answers]
        wait(waiting, timeout=min(_POLL_S, max(0.0, min(deadline, given_up) - now)))
        for index in sorted(outcome.pending):
            _look_at(ranks[index], tokens[index], expect_exit, outcome)
        outcome.pending -= outcome.failures.keys()
        if outcome.failures and given_up == float("inf"):
            given_up = time.monotonic() + _GRACE_S
    return outcome


def _look_at(rank: _Rank, token: str, expect_exit: dict[int, int], outcome: _Outcome) -> None:
    """Take the answer of one rank, or its exit code, if either has come."""
    code = rank.process.exit_code()  # before the answer: what a dead rank has said is in the connection by now
    if rank.index not in outcome.answers:
        with contextlib.suppress(EOFError, OSError):
            if rank.connection.poll():
                outcome.answers[rank.index] = pickle.loads(rank.connection.recv_bytes())
    answer = outcome.answers.get(rank.index)
    expected = expect_exit.get(rank.index)
    if answer is not None and (answer.failure is not None or answer.token != token):
        outcome.failures[rank.index] = f"raised\n{answer.failure}" if answer.failure else "answered out of turn"
    elif expected is not None:
        if code is not None and code == expected:
            outcome.pending.discard(rank.index)
        elif code is not None:
            outcome.failures[rank.index] = f"ended with exit code {code}, expected {expected}"
        elif answer is not None and expected != 0:
            outcome.failures[rank.index] = f"returned, expected exit code {expected}"
    elif answer is not None:
        outcome.pending.discard(rank.index)
    elif code is not None:
        outcome.failures[rank.index] = f"ended with exit code {code} without an answer"


def _home_of(fn: Callable[..., Any]) -> tuple[str, str | None]:
    """Name and file of the module that defines a function, for a process that must import it."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    if module is None or "<" in name or (module == "__main__" and path is None):
        raise TypeError(
            f"{fn!r} cannot be found by another process: expected a function at the top level of a module in a file"
        )
    return module, path
