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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import moecomm
from moecomm.testing import RankPool

START_S = 60.0
GRACE_S = 2.0
ASLEEP_LOOKS = 5
AT_ONCE = 4  # scenes side by side


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
        scene = (scenario, size, args, timeout_s, backend)
        return self._pool.run(_run_scenes, [scene], timeout_s=timeout_s + START_S)[0][0]

    def run_side_by_side(self, scenes: Sequence[tuple[Any, ...]], timeout_s: float = 60.0) -> list[list[Outcome]]:
        """Run scenes (scenario, size, *args), several of them at a time; the outcomes of all ranks of each."""
        given = [(scenario, size, args, timeout_s, "gloo") for scenario, size, *args in scenes]
        return self._pool.run(_run_scenes, given, timeout_s=timeout_s * len(scenes) + START_S)[0]


# What `Nursery.run` takes, by a name: scenario, size, and its arguments.
Scenes = dict[tuple[str, str], tuple[Any, ...]]


class SideBySide:
    """Scenes that mostly wait, run several at a time when the first of them is asked for.

    Of these, the ones whose name is among the parameters of a test that was selected: what nobody looks at is not run.
    """

    def __init__(self, nursery: Nursery, scenes: Scenes, request: Any) -> None:
        asked = [set(map(str, item.callspec.params.values())) for item in _parametrized(request)]
        self._scenes = {
            name: scene for name, scene in scenes.items() if any({*name} - {"slow"} <= params for params in asked)
        }
        self._nursery, self._outcomes = nursery, dict[tuple[str, str], list[Outcome]]()

    def __getitem__(self, name: tuple[str, str]) -> list[Outcome]:
        if not self._outcomes:
            told = self._nursery.run_side_by_side(list(self._scenes.values()))
            self._outcomes = dict(zip(self._scenes, told, strict=True))
        return self._outcomes[name]


def _parametrized(request: Any) -> list[Any]:
    return [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]


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


@dataclass
class _Scene:
    """The ranks of one scene: processes, the pipes to them, what they have said, and what became of them."""

    pids: list[int]
    pipes: list[int]
    deadline: float
    log: Any
    said: dict[int, bytes]
    outcomes: dict[int, Outcome]

    def hear(self, pipe: int) -> None:
        """Take what a rank says, or that it ended; one that found something wrong cuts the others short."""
        if chunk := os.read(pipe, 1 << 16):
            self.said[pipe] += chunk
            return
        status = os.waitid(os.P_PID, self.pids[self.pipes.index(pipe)], os.WEXITED | os.WNOWAIT)
        killed = 0 if status is None or status.si_code == os.CLD_EXITED else status.si_status
        said = self.said[pipe]
        self.outcomes[pipe] = pickle.loads(said) if said else Outcome(signal=killed)
        if isinstance(self.outcomes[pipe].error, AssertionError):  # the others would wait in vain
            self.deadline = min(self.deadline, time.monotonic() + GRACE_S)

    def waiting(self) -> list[int]:
        return [pipe for pipe in self.pipes if pipe not in self.outcomes]

    def end(self) -> list[Outcome]:
        """Who has not ended hangs; nothing stays of any."""
        told = [
            self.outcomes[pipe] if pipe in self.outcomes else _hung(pid, self.log)
            for pid, pipe in zip(self.pids, self.pipes, strict=True)
        ]
        for pid, pipe in zip(self.pids, self.pipes, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.close(pipe)
            os.waitpid(pid, 0)
        self.log.close()
        return told


def _run_scenes(_: int, scenes: Sequence[tuple[Any, ...]]) -> list[list[Outcome]]:
    """Run scenes, up to AT_ONCE at a time."""
    running: dict[int, _Scene] = {}
    told: dict[int, list[Outcome]] = {}
    try:
        while len(told) < len(scenes):
            while len(running) < AT_ONCE and (number := len(running) + len(told)) < len(scenes):
                others = [pipe for scene in running.values() for pipe in scene.pipes]
                running[number] = _fork_ranks(*scenes[number], others=others)
            until = min(scene.deadline for scene in running.values())
            pipes = {pipe: scene for scene in running.values() for pipe in scene.waiting()}
            for pipe in select.select(list(pipes), [], [], max(0.0, until - time.monotonic()))[0]:
                pipes[pipe].hear(pipe)
            for number, scene in list(running.items()):
                if not scene.waiting() or time.monotonic() >= scene.deadline:
                    told[number] = running.pop(number).end()
        return [told[number] for number in range(len(scenes))]
    finally:
        for scene in running.values():
            scene.end()


def _fork_ranks(
    scenario: Callable[..., Any],
    size: int,
    args: Sequence[Any],
    timeout_s: float,
    backend: str | None,
    *,
    others: Sequence[int],
) -> _Scene:
    token, log = uuid.uuid4().hex, tempfile.TemporaryFile()  # noqa: SIM115
    scene = _Scene([], [], time.monotonic() + timeout_s, log, {}, {})
    for rank in range(size):
        ours, theirs = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            for pipe in (ours, *scene.pipes, *others):
                os.close(pipe)
            _be_rank(rank, size, token, scenario, args, theirs, scene.log, backend)
        os.close(theirs)
        scene.pipes.append(ours)
        scene.pids.append(pid)
        scene.said[ours] = b""
    return scene


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
    args: Sequence[Any],
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
