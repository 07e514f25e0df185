"""Ranks that may die: forked from one warm process, so that a scenario costs a fork and not a start of Python.

`Nursery.run` forks a process per rank, forms a gloo group and calls `scenario(world, *args)` in each. A rank may
return, raise, be killed or hang; the outcome of every rank comes back, and nothing else of it stays.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pickle
import select
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import moecomm
from moecomm.testing import RankPool

START_S = 60.0
GRACE_S = 2.0
ASLEEP_LOOKS = 5


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: what it returned, or what it raised, or the signal that ended it (0 if none)."""

    result: Any = None
    error: BaseException | None = None
    trace: str = ""
    signal: int = 0
    hung: bool = False

    @property
    def went_well(self) -> bool:
        """Whether it returned."""
        return not self.hung and not self.signal and self.error is None


def results_of(outcomes: list[Outcome], killed: int | None = None) -> list[Any]:
    """What the ranks returned, None for the one that was killed; the first real trouble comes first."""
    for rank, outcome in sorted(enumerate(outcomes), key=lambda of: (of[1].hung, of[0])):
        if rank == killed:
            assert outcome.signal == signal.SIGKILL, f"rank {rank} was to be killed: {outcome}"
        elif not outcome.went_well:
            how = "hung" if outcome.hung else f"ended by signal {outcome.signal}" if outcome.signal else "failed"
            raise AssertionError(f"rank {rank} of {len(outcomes)} {how}\n{outcome.trace}")
    return [outcome.result for outcome in outcomes]


@dataclass(frozen=True)
class World:
    """What a scenario knows; `store` is for marks between ranks, apart from what is under test."""

    rank: int
    size: int
    store: dist.Store
    report: int  # the pipe to whoever waits for this rank

    def mark(self, name: str) -> None:
        """Say that this rank has come to that point."""
        self.store.set(f"{name}/{self.rank}", str(os.getpid()))

    def wait_for(self, name: str, *ranks: int) -> list[int]:
        """Wait until these ranks (default: all) have come to that point; their process ids."""
        ranks = ranks or tuple(range(self.size))
        return [int(self.store.get(f"{name}/{rank}")) for rank in ranks]

    def meet(self, name: str) -> None:
        """Wait for all ranks."""
        self.mark(name)
        self.wait_for(name)

    def meet_others(self, name: str, without: int) -> None:
        """Wait for all ranks but one."""
        self.mark(name)
        self.wait_for(name, *(rank for rank in range(self.size) if rank != without))

    def wait_until_asleep(self, name: str, *ranks: int) -> None:
        """Wait until these ranks have passed that mark and wait for something."""
        for pid in self.wait_for(name, *ranks):
            looks = 0
            while looks < ASLEEP_LOOKS:
                with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                    looks = looks + 1 if file.read().rpartition(")")[2].split()[0] == "S" else 0
                time.sleep(0.002)

    def die(self) -> None:
        """End by `kill -9`; the moment is left in the store."""
        self.note_death()
        os.kill(os.getpid(), signal.SIGKILL)

    def fork(self) -> int:
        """`os.fork`; nobody waits for the child."""
        pid = os.fork()
        if pid == 0:
            os.close(self.report)
        return pid

    def note_death(self) -> None:
        """Say that a rank dies now."""
        self.store.set("died", repr(time.monotonic()))

    def seconds_since_death(self) -> float:
        """Seconds since a rank called `die`; the clock is the machine's."""
        return time.monotonic() - float(self.store.get("died"))


class Nursery:
    """One process that ranks are forked from."""

    def __init__(self) -> None:
        self._pool = RankPool(1, backend=None, timeout_s=300.0)

    def __enter__(self) -> Nursery:
        self._pool.__enter__()
        self._pool.run(_warm_up)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.close()

    def run(
        self, scenario: Callable[..., Any], size: int, *args: Any, timeout_s: float = 60.0, backend: str | None = "gloo"
    ) -> list[Outcome]:
        """Run a scenario, a function at the top level of a module; the outcome of every rank."""
        return self._pool.run(_fork_ranks, scenario, size, args, timeout_s, backend, timeout_s=timeout_s + START_S)[0]


def _warm_up(rank: int) -> None:
    """Compile the row loops once: forked ranks inherit them."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for reduce in ("rank", "source"):
            make = {"num_experts": 2, "hidden": 8, "top_k": 2, "max_tokens_per_rank": 4}
            with moecomm.Buffer(**make, dtype=dtype, reduce=reduce) as buffer:  # type: ignore[arg-type]
                x, weights = torch.ones(4, 8, dtype=dtype, requires_grad=True), torch.ones(4, 2, requires_grad=True)
                out: Any = buffer.dispatch(x, torch.zeros(4, 2).long(), weights)
                buffer.combine(out.x, out.handle, bias=x.detach()).sum().backward()


def _fork_ranks(
    _: int, scenario: Callable[..., Any], size: int, args: tuple[Any, ...], timeout_s: float, backend: str | None
) -> list[Outcome]:
    token = uuid.uuid4().hex
    pipes: list[int] = []
    pids: list[int] = []
    log = tempfile.TemporaryFile()  # noqa: SIM115
    for rank in range(size):
        ours, theirs = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            for other in pipes:
                os.close(other)
            _be_rank(rank, size, token, scenario, args, theirs, log, backend)
        os.close(theirs)
        pipes.append(ours)
        pids.append(pid)
    try:
        return _collect(pids, pipes, time.monotonic() + timeout_s, log)
    finally:
        for pid, pipe in zip(pids, pipes, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.close(pipe)
            os.waitpid(pid, 0)
        log.close()


def _collect(pids: list[int], pipes: list[int], deadline: float, log: Any) -> list[Outcome]:
    """Wait for every rank; a rank that found something wrong cuts the others short, as they would wait in vain."""
    said: dict[int, bytes] = dict.fromkeys(pipes, b"")
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(pids):
        waiting = [pipe for pipe in pipes if pipe not in outcomes]
        ready = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            return [
                outcomes[pipe] if pipe in outcomes else _hung(pid, log) for pid, pipe in zip(pids, pipes, strict=True)
            ]
        for pipe in ready:
            if chunk := os.read(pipe, 1 << 16):
                said[pipe] += chunk
                continue
            status = os.waitid(os.P_PID, pids[pipes.index(pipe)], os.WEXITED | os.WNOWAIT)
            killed = 0 if status is None or status.si_code == os.CLD_EXITED else status.si_status
            outcomes[pipe] = pickle.loads(said[pipe]) if said[pipe] else Outcome(signal=killed)
            if isinstance(outcomes[pipe].error, AssertionError):
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return [outcomes[pipe] for pipe in pipes]


def _hung(pid: int, log: Any) -> Outcome:
    os.kill(pid, signal.SIGUSR1)  # print the stacks
    time.sleep(0.5)
    log.seek(0)
    return Outcome(hung=True, trace=log.read().decode(errors="replace")[-6000:])


def _be_rank(
    rank: int,
    size: int,
    token: str,
    scenario: Callable[..., Any],
    args: tuple[Any, ...],
    pipe: int,
    log: Any,
    backend: str | None,
) -> None:
    """Never returns: the process ends without the clean-up that belongs to its parent."""
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    try:
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
        if backend is not None:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"group_{token}", store),
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=60),
            )
        outcome = Outcome(result=scenario(World(rank, size, dist.PrefixStore(f"marks_{token}", store), pipe), *args))
    except BaseException as error:
        outcome = Outcome(error=_carried(error), trace="".join(traceback.format_exception(error)))
    with contextlib.suppress(BaseException):
        said = pickle.dumps(outcome)
        while said:
            said = said[os.write(pipe, said) :]
    os._exit(0)


def _carried(error: BaseException) -> BaseException:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
