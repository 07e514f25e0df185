"""`kill -9` of a rank (promise 8): the others raise PeerLostError that names it, at once; nobody waits for the dead."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import moecomm
from moecomm.testing import assert_bitwise
from tests.faults._ranks import Nursery, Scenes, SideBySide, World, results_of
from tests.faults._scenes import TRANSPORTS, Caught, build, catch, patience, right_step, rows_for, tokens_of

DEADLINE_S = {"symmetric": 20.0, "collective": 10.0}


class Act:
    """One rank in a scene in which `victim` dies; every method is one moment to die at."""

    def __init__(self, world: World, transport: str, victim: int) -> None:
        self.world, self.victim = world, victim
        self.buffer = build(transport, timeout_s=DEADLINE_S[transport])
        self.out: Any = right_step(self.buffer, world)
        self.x, self.topk_idx, self.weights = tokens_of(world.rank)
        self.dies = world.rank == victim
        self.others = [rank for rank in range(world.size) if rank != victim]
        world.meet("ready")

    def dispatch(self) -> Any:
        return self.buffer.dispatch(self.x, self.topk_idx, self.weights)

    def combine(self) -> Any:
        return self.buffer.combine(self.out.x, self.out.handle)

    def die_while_they(self, call: Callable[[], Any]) -> Caught:
        """The others are in `call` and wait when the victim dies outside of it."""
        if self.dies:
            self.world.wait_until_asleep("in", *self.others)
            self.world.die()
        self.world.mark("in")
        return catch(call, self.world, self.buffer)

    def before_they_call(self) -> Caught:
        if self.dies:
            self.world.die()
        self.world.store.wait(["died"])
        return catch(self.dispatch, self.world, self.buffer)

    def while_they_dispatch(self) -> Caught:
        return self.die_while_they(self.dispatch)

    def while_they_combine(self) -> Caught:
        return self.die_while_they(self.combine)

    def while_they_replay(self) -> Caught:
        return self.die_while_they(lambda: self.buffer.dispatch(self.x, handle=self.out.handle))

    def while_they_wait_for_a_pending(self) -> Caught:
        return self.die_while_they(lambda: self.buffer.combine_async(self.out.x, self.out.handle).wait())

    def while_they_run_backward(self) -> Caught:
        x = self.x.clone().requires_grad_()
        y = self.buffer.dispatch(x, self.topk_idx, self.weights)
        rows: Any = y.x
        return self.die_while_they(rows.sum().backward)

    def while_it_writes(self) -> Caught:
        return self.die_in("copy_rows", self.dispatch)

    def while_it_writes_sums(self) -> Caught:
        return self.die_in("reduce_rows", self.combine)

    def die_in(self, primitive: str, call: Callable[[], Any]) -> Caught:
        """The victim dies when it has written half of its first section, or of all where they are written at once."""
        if self.dies:
            self.buffer._calls._express = None  # the others may go the quick way; this one must stop half-way
            from moecomm import operations
            from moecomm.transport import collective, symmetric

            def half(out: torch.Tensor, *_: Any) -> None:
                self.world.wait_until_asleep("in", *self.others)
                out[: len(out) // 2] = 0
                self.world.die()

            def half_of_all(outs: np.ndarray, *rest: Any) -> None:
                self.world.wait_until_asleep("in", *self.others)
                outs[1] //= 2
                at_once(outs, *rest)
                self.world.die()

            at_once = getattr(operations, name := AT_ONCE[primitive])
            setattr(operations, name, half_of_all)
            for module in (operations, collective, symmetric):
                if hasattr(module, primitive):
                    setattr(module, primitive, half)
        self.world.mark("in")
        return catch(call, self.world, self.buffer)

    def while_it_waits(self) -> Caught:
        """All but one are in the dispatch; the one that is not kills the victim and then comes."""
        self.world.mark("in")
        killer = self.others[-1]
        if self.world.rank == killer:
            self.world.wait_until_asleep("in", *(rank for rank in range(self.world.size) if rank != killer))
            (pid,) = self.world.wait_for("in", self.victim)
            self.world.note_death()
            os.kill(pid, signal.SIGKILL)
        return catch(self.dispatch, self.world, self.buffer)


AT_ONCE = {"copy_rows": "scatter_rows", "reduce_rows": "scatter_sums"}
MOMENTS: dict[str, tuple[Callable[[Act], Caught], str]] = {
    "before they call": (Act.before_they_call, "dispatch"),
    "while they dispatch": (Act.while_they_dispatch, "dispatch"),
    "while they combine": (Act.while_they_combine, "combine"),
    "while they replay": (Act.while_they_replay, "dispatch"),
    "while they wait for a pending": (Act.while_they_wait_for_a_pending, "combine"),
    "while they run backward": (Act.while_they_run_backward, "combine"),
    "while it waits": (Act.while_it_waits, "dispatch"),
    "while it writes": (Act.while_it_writes, "dispatch"),
    "while it writes sums": (Act.while_it_writes_sums, "combine"),
}


def scene(world: World, transport: str, moment: str, victim: int) -> Caught:
    act = Act(world, transport, victim)
    caught = MOMENTS[moment][0](act)
    assert_bitwise(act.out.x, rows_for(act.buffer, world), "what was handed out before")
    act.buffer.close()
    return caught


def check(caught: Caught, rank: int, transport: str, operation: str, victim: int) -> None:
    error = caught.error
    assert isinstance(error, (moecomm.PeerLostError, moecomm.StallError)), caught.text
    assert error.rank == rank and error.operation == operation and caught.text.startswith(f"rank {rank}: {operation} #")
    assert error.peers == (victim,), caught.text
    assert str(victim) in caught.text
    if transport == "symmetric":
        assert isinstance(error, moecomm.PeerLostError)
        assert caught.since_death_s < patience(2.0)
    else:
        assert caught.since_death_s < patience(DEADLINE_S[transport])
    assert type(caught.afterwards) is type(error)
    assert "failed earlier and cannot go on" in str(caught.afterwards) and "build a new Buffer" in str(
        caught.afterwards
    )
    assert caught.afterwards is not None and caught.afterwards.peers == (victim,)


def cast_of(transport: str, moment: str) -> tuple[int, int]:
    """Sizes and victims take turns: rank 0 and the last one are special to a store and to a ring."""
    turn = list(MOMENTS).index(moment) + TRANSPORTS.index(transport)
    return ((3, 1), (2, 0), (4, 3), (3, 0))[turn % 4]


@pytest.fixture(scope="module")
def deaths(nursery: Nursery, request: pytest.FixtureRequest) -> SideBySide:
    """The scenes that are asked for, several at a time."""
    scenes: Scenes = {}
    for transport, moment in itertools.product(TRANSPORTS, MOMENTS):
        size, victim = cast_of(transport, moment)
        scenes[transport, moment] = (scene, size, transport, moment, victim)
    return SideBySide(nursery, scenes, request)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_others_learn_who_died(deaths: SideBySide, transport: str, moment: str) -> None:
    size, victim = cast_of(transport, moment)
    caught = results_of(deaths[transport, moment], killed=victim)
    for rank in range(size):
        if rank != victim:
            check(caught[rank], rank, transport, MOMENTS[moment][1], victim)


def work_until_the_end(world: World, seconds: float) -> Caught:
    """All ranks dispatch, combine and run backward without a pause, until one is killed from a thread of its own."""
    buffer = build("symmetric", num_segments=3)
    world.meet("ready")
    if world.rank == 1:
        threading.Timer(seconds, world.die).start()
    kept = []

    def work() -> None:
        for round in range(10**6):
            out = right_step(buffer, world, round)
            kept.append((round, out.x))
            x = tokens_of(world.rank, round)[0].requires_grad_()
            rows: Any = buffer.dispatch(x, handle=out.handle).x
            rows.sum().backward()

    caught = catch(work, world, buffer)
    for round, rows in kept:
        assert_bitwise(rows, rows_for(buffer, world, round), f"rows kept from round {round}")
    return caught


@pytest.mark.parametrize("turn", range(6))
def test_death_at_any_moment(nursery: Nursery, turn: int) -> None:
    seconds = 0.02 + 0.2 * random.Random(turn).random()
    caught = results_of(nursery.run(work_until_the_end, 3, seconds), killed=1)
    for rank in (0, 2):
        error = caught[rank].error
        assert isinstance(error, moecomm.PeerLostError) and error.peers == (1,), caught[rank].text
        assert caught[rank].since_death_s < patience(2.0)


def have_a_child(world: World) -> Caught | None:
    """Rank 1 forks a child that outlives it, as a data loader's worker does, and another that ends in good order."""
    buffer = build("symmetric")
    right_step(buffer, world)
    if world.rank == 1:
        good_child = world.fork()
        if good_child == 0:
            refused = catch(lambda: buffer.dispatch(*tokens_of(1)[:2])).error
            buffer.close()
            os._exit(7 if "cannot be reached from a forked process" in str(refused) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(good_child, 0)[1]) == 7
    right_step(buffer, world, 1)
    if world.rank == 1:
        orphan = world.fork()
        if orphan == 0:
            signal.pause()
        world.store.set("orphan", str(orphan))
        world.die()
    try:
        return catch(lambda: right_step(buffer, world, 2), world)
    finally:
        os.kill(int(world.store.get("orphan")), signal.SIGKILL)


def test_a_child_does_not_hide_the_death_of_its_parent_nor_speak_for_it(nursery: Nursery) -> None:
    caught = results_of(nursery.run(have_a_child, 2), killed=1)[0]
    assert isinstance(caught.error, moecomm.PeerLostError) and caught.error.peers == (1,), caught.text
    assert caught.since_death_s < patience(2.0)


def die_while_building(world: World) -> Caught:
    """Rank 1 dies where all ranks are about to connect to each other."""
    from moecomm.memory.host import HostMemory

    died = mock.patch.object(HostMemory, "create", lambda _: world.die()) if world.rank == 1 else nullcontext()
    with died:
        return catch(lambda: build(timeout_s=2.0), world)


def test_death_inside_the_constructor(nursery: Nursery) -> None:
    caught = results_of(nursery.run(die_while_building, 3), killed=1)
    for rank in (0, 2):
        error = caught[rank].error
        assert isinstance(error, (moecomm.PeerLostError, moecomm.StallError)) and error.peers == (1,), caught[rank].text
        assert caught[rank].seconds < patience(5.0)


def start_again(world: World, size_left: int) -> int:
    """The survivors leave the dead rank behind and go on in a group of their own."""
    import torch.distributed as dist

    buffer = build("symmetric")
    right_step(buffer, world)
    if world.rank == size_left:
        world.die()
    caught = catch(lambda: right_step(buffer, world, 1), world)
    assert isinstance(caught.error, moecomm.PeerLostError)
    buffer.close()
    group = dist.ProcessGroup(dist.PrefixStore("again", world.store), world.rank, size_left)
    with moecomm.Buffer(group, num_experts=4, hidden=8, top_k=1, max_tokens_per_rank=4, dtype=torch.float32) as second:
        out: Any = second.dispatch(torch.ones(4, 8), torch.arange(4)[:, None])
        y = second.combine(out.x, out.handle)
        assert_bitwise(y, torch.ones(4, 8), "sums in the new group")
    return len(out.x)


def test_the_survivors_can_start_again(nursery: Nursery) -> None:
    assert results_of(nursery.run(start_again, 3, 2), killed=2) == [4, 4, None]
