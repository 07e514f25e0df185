"""Every wait ends (promise 8): sleepers, leavers, exceptions and interrupts are reported by name on all ranks."""

from __future__ import annotations

import datetime
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import moecomm
from moecomm.group import Group
from tests.faults._ranks import Nursery, Scenes, SideBySide, World, results_of
from tests.faults._scenes import TRANSPORTS, Caught, build, catch, patience, right_step, tokens_of

TIMEOUT_S = 3.0  # all ranks must get as far as building a buffer within it, several scenes at a time
ROLL_CALL_S = 3.5  # on collective, to find out who is missing; the machine may be busy


def unusable(caught: Caught) -> bool:
    """Whether the buffer refuses to go on and says why."""
    after = caught.afterwards
    assert after is not None
    return type(after) is type(caught.error) and "failed earlier and cannot go on" in str(after)


# -- sleepers --------------------------------------------------------------------------------------------------------


def dispatch(buffer: moecomm.Buffer, out: Any, rank: int) -> Any:
    return buffer.dispatch(*tokens_of(rank))


def combine(buffer: moecomm.Buffer, out: Any, rank: int) -> Any:
    return buffer.combine(out.x, out.handle)


def wait_for_pending(buffer: moecomm.Buffer, out: Any, rank: int) -> Any:
    return buffer.dispatch_async(tokens_of(rank)[0], handle=out.handle).wait()


SLEEPY: dict[str, tuple[Callable[..., Any], str]] = {
    "dispatch": (dispatch, "dispatch"),
    "combine": (combine, "combine"),
    "pending": (wait_for_pending, "dispatch"),
}


def oversleep(world: World, transport: str, operation: str, sleeper: int) -> Caught:
    """One rank comes when all others have given up; then it calls twice, as its first combine may have all it needs."""
    buffer = build(transport, timeout_s=TIMEOUT_S)
    out = right_step(buffer, world)
    call = SLEEPY[operation][0]
    if world.rank != sleeper:
        caught = catch(lambda: call(buffer, out, world.rank), buffer=buffer)
        world.mark("gave up")
    else:
        world.wait_for("gave up", *(rank for rank in range(world.size) if rank != sleeper))
        caught = catch(lambda: [call(buffer, out, world.rank) for _ in range(2)], buffer=buffer)
    buffer.close()
    if transport == "symmetric":  # after a stall everybody lives, so they can go on together
        with build(transport) as second:
            right_step(second, world, 1)
    return caught


@pytest.fixture(scope="module")
def side_by_side(nursery: Nursery, request: pytest.FixtureRequest) -> SideBySide:
    """The scenes of this file that only wait: as many of them as are asked for, at the same time."""
    scenes: Scenes = {}
    for transport in TRANSPORTS:
        scenes |= {(transport, name): (oversleep, 3, transport, name, number) for number, name in enumerate(SLEEPY)}
        scenes |= {(transport, "slow"): (be_slow, 2, transport)}
        scenes |= {(transport, how): (leave, 3, transport, how) for how in ("close", "exception")}
        scenes |= {(transport, how): (break_off, 3, transport, how) for how in ("memory", "interrupt")}
    return SideBySide(nursery, scenes, request)


@pytest.mark.parametrize("operation", SLEEPY)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_sleeps_past_the_deadline_is_named(
    side_by_side: SideBySide, transport: str, operation: str
) -> None:
    sleeper = list(SLEEPY).index(operation)
    slack_s = 1.0 if transport == "symmetric" else ROLL_CALL_S
    for rank, caught in enumerate(results_of(side_by_side[transport, operation])):
        error = caught.error
        assert isinstance(error, moecomm.StallError) and unusable(caught), caught.text
        assert error.rank == rank and error.operation in ("dispatch", "combine") and error.seq is not None
        if rank == sleeper:
            assert caught.seconds < patience(2 * TIMEOUT_S + slack_s)
            assert "gave up" in caught.text, caught.text
        else:
            assert error.peers == (sleeper,) and error.operation == SLEEPY[operation][1], caught.text
            assert re.search(rf"ranks? \[?{sleeper}\b", error.what) and "raise timeout_s" in caught.text, caught.text
            # The one that waits longest tells the others, who may have begun to wait a little later.
            assert 0.5 * TIMEOUT_S <= caught.seconds < patience(TIMEOUT_S + slack_s)


def be_slow(world: World, transport: str) -> int:
    """Each rank in turn is late, but not too late."""
    with build(transport) as buffer:
        for round in range(world.size):
            if world.rank == round:
                time.sleep(1.2)
            right_step(buffer, world, round)
        return int(buffer.stats()["combines"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_slow_rank_is_waited_for(side_by_side: SideBySide, transport: str) -> None:
    assert results_of(side_by_side[transport, "slow"]) == [2, 2]


def begin_early(world: World) -> float:
    """Rank 0 begins a collective on connections of its own, and waits for it long after; rank 1 comes in between."""
    group: Any = Group.resolve().duplicate(timeout_s=0.3)
    mine, theirs = torch.full((2,), float(world.rank)), torch.empty(2)
    world.meet("ready")
    if world.rank == 1:
        time.sleep(0.6)
    work = dist.all_to_all_single(theirs, mine, group=group.process_group, async_op=True)
    if world.rank == 0:
        time.sleep(0.9)
    work.wait(datetime.timedelta(seconds=20))
    world.meet("done")
    group.free()
    return float(theirs.sum())


def test_a_deadline_counts_from_when_somebody_waits(nursery: Nursery) -> None:
    """Not from when the collective began: gloo's own clock must not run out first."""
    assert results_of(nursery.run(begin_early, 2)) == [1.0, 1.0]


def stop_the_host(world: World, transport: str) -> Caught | None:
    """Rank 0, which also hosts the store of the group, is stopped; whoever asks that store waits for ever."""
    if world.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world.store.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(world.store.get("port")), is_master=False)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    buffer = build(transport, timeout_s=TIMEOUT_S)
    right_step(buffer, world)
    world.mark("ready")
    if world.rank == 0:
        signal.pause()
    (pid,) = world.wait_for("ready", 0)
    world.meet_others("about to stop", 0)
    os.kill(pid, signal.SIGSTOP)
    caught = catch(lambda: dispatch(buffer, None, world.rank), buffer=buffer)
    start = time.monotonic()
    buffer.close()
    assert time.monotonic() - start < patience(1.0), "close must not wait"
    world.meet_others("over", 0)
    os.kill(pid, signal.SIGKILL)
    return caught


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stopped_rank_that_hosts_the_store_stops_nobody_else(nursery: Nursery, transport: str) -> None:
    told = results_of(nursery.run(stop_the_host, 3, transport, backend=None), killed=0)
    for rank in (1, 2):
        caught: Caught = told[rank]
        assert isinstance(caught.error, moecomm.StallError) and unusable(caught), caught.text
        assert caught.error.operation == "dispatch" and caught.seconds < patience(TIMEOUT_S + 2 * ROLL_CALL_S)
        if transport == "symmetric":
            assert caught.error.peers == (0,)
        else:
            assert "the key-value store does not answer" in caught.text


# -- leavers ---------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """What user code raises."""


def leave(world: World, transport: str, how: str) -> Caught:
    """Rank 1 leaves in the middle; the others are in a combine and wait."""
    buffer = build(transport, timeout_s=20.0 if transport == "symmetric" else 3.0)
    out = right_step(buffer, world)
    others = [rank for rank in range(world.size) if rank != 1]
    if world.rank != 1:
        world.mark("in")
        caught = catch(lambda: combine(buffer, out, world.rank), buffer=buffer)
        buffer.close()
        return caught
    world.wait_until_asleep("in", *others)
    if how == "close":
        buffer.close()
        return catch(lambda: combine(buffer, out, world.rank))
    try:
        with buffer:
            raise UserError("between dispatch and combine")
    except UserError:
        return catch(lambda: combine(buffer, out, world.rank))


@pytest.mark.parametrize("how", ["close", "exception"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_leaves_is_named(side_by_side: SideBySide, transport: str, how: str) -> None:
    for rank, caught in enumerate(results_of(side_by_side[transport, how])):
        if rank == 1:
            assert isinstance(caught.error, moecomm.StaleHandleError), caught.text
            continue
        assert isinstance(caught.error, (moecomm.PeerLostError, moecomm.StallError)) and unusable(caught), caught.text
        assert caught.error.peers == (1,) and caught.error.operation == "combine", caught.text
        if transport == "symmetric":
            why = "closed its buffer" if how == "close" else "called abort(): UserError: between dispatch and combine"
            assert f"rank 1 {why}" in caught.text, caught.text
            assert caught.seconds < 10.0, "at once, not at the deadline"
        else:
            assert caught.seconds < patience(3.0 + ROLL_CALL_S)


def skip_a_step(world: World, transport: str) -> str:
    """An exception in user code between dispatch and combine that is caught: the rank goes on with the next step."""
    buffer = build(transport, timeout_s=TIMEOUT_S)

    def step(round: int) -> None:
        out: Any = buffer.dispatch(*tokens_of(world.rank, round))
        if world.rank == 1 and round == 2:
            raise UserError("between dispatch and combine")
        buffer.combine(out.x, out.handle)

    def train() -> None:
        for round in range(5):
            try:
                step(round)
            except UserError:
                continue

    caught = catch(train, buffer=buffer)
    assert isinstance(caught.error, moecomm.DesyncError) and unusable(caught), caught.text
    return caught.text


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_exception_that_skips_an_operation_is_a_disagreement(nursery: Nursery, transport: str) -> None:
    for rank, text in enumerate(results_of(nursery.run(skip_a_step, 3, transport))):
        assert "this rank called " + ("dispatch" if rank == 1 else "combine") in text
        assert rank == 1 or "rank 1 called dispatch" in text, text


# -- trouble inside an operation -------------------------------------------------------------------------------------


def break_off(world: World, transport: str, how: str) -> Caught | str:
    """Rank 1 runs out of memory, or is interrupted, inside an operation; the others wait in it."""
    buffer = build(transport, timeout_s=30.0)
    right_step(buffer, world)
    world.mark("in")
    if world.rank != 1:
        if how == "interrupt" and world.rank == 0:
            world.wait_until_asleep("in", 1)
            os.kill(world.wait_for("in", 1)[0], signal.SIGINT)
            world.mark("interrupted")
        world.wait_for("over", 1)
        return catch(lambda: dispatch(buffer, None, world.rank), buffer=buffer)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    broken = mock.patch("moecomm.operations.plan_send", side_effect=MemoryError("no more"))
    try:
        if how == "memory":
            buffer._calls._express = None  # which does not plan in Python
            with broken:
                dispatch(buffer, None, world.rank)
        dispatch(buffer, None, world.rank)
    except (MemoryError, KeyboardInterrupt) as error:
        world.mark("over")
        again = catch(lambda: dispatch(buffer, None, world.rank))
        return f"{type(error).__name__}; then {again.text}"
    raise AssertionError("rank 1 must not come this far")


@pytest.mark.parametrize("how", ["memory", "interrupt"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_breaks_off_tells_the_others(side_by_side: SideBySide, transport: str, how: str) -> None:
    told = results_of(side_by_side[transport, how])
    name = "MemoryError" if how == "memory" else "KeyboardInterrupt"
    assert told[1].startswith(
        f"{name}; then rank 1: this buffer failed earlier and cannot go on: rank 1 broke off with"
    )
    for rank in (0, 2):
        caught: Caught = told[rank]
        assert isinstance(caught.error, (moecomm.PeerLostError, moecomm.StallError)) and unusable(caught), caught.text
        assert caught.error.peers == (1,) and caught.error.operation == "dispatch", caught.text
        assert f"rank 1 broke off with {name}" in caught.text, caught.text
        assert caught.seconds < 20.0, "before the deadline"
