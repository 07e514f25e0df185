"""Ctrl-C at any line of moecomm, deaths and `abort()` while ranks shrink or are admitted: who goes on, who is told.

A rank is interrupted by its own trace function, at the n-th line that it runs in moecomm, so that no moment is missed
and each can be had again. Whoever waits for it must hear of it; then all `shrink`, and go on with the right sums.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import moecomm
from moecomm import membership
from moecomm.errors import MoECommError, PeerLostError, StallError
from moecomm.group import Group
from moecomm.testing.simulated import Faults, results_of, simulate, simulated_group
from tests.faults._ranks import Nursery, World
from tests.faults._ranks import results_of as process_results
from tests.simulated.test_joining import SHAPE, dead_of, step, steps_until_death

MOECOMM = str(Path(moecomm.__file__).parent)
TESTING = str(Path(MOECOMM, "testing"))  # the scheduler of the simulation is not to be interrupted
VICTIM = 1


@contextmanager
def interrupted_at(number: int) -> Iterator[list[str]]:
    """Ctrl-C at the line of that number; where it hit, nothing if it never came to that."""
    hit: list[str] = []
    left = number

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if not name.startswith(MOECOMM) or name.startswith(TESTING):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                hit.append(f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}")
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield hit
    finally:
        sys.settrace(None)


def tell(call: Callable[[], Any]) -> str:
    """What a call raises of moecomm."""
    try:
        call()
    except MoECommError as error:
        return f"{type(error).__name__} {error}"
    return ""


def interrupt_a_step(group: Group, number: int, hits: list[str]) -> list[str]:
    """Ctrl-C in the second step of the victim, which takes that step again if it was not done; what all then get."""
    buffer = moecomm.Buffer(group, **SHAPE, dtype=torch.float32)
    step(buffer, group.rank, set())
    group.barrier()
    if group.rank == VICTIM:
        try:
            with interrupted_at(number) as hit:
                step(buffer, 10 + group.rank, set())
        except KeyboardInterrupt:
            hits += hit
    rounds = range(int(buffer.stats()["combines"]), 4)  # Ctrl-C at the last line comes after all is done
    told = [tell(lambda round=round: step(buffer, 10 * round + group.rank, set())) for round in rounds]  # type: ignore[misc]
    group.exchange.world.wait(group.rank, lambda: False, 1.0)  # type: ignore[attr-defined]
    buffer.close()
    return told


Act = Callable[[moecomm.Buffer], Any]


def regroup(group: Group, num_first: int, act: Act, told: list[Any]) -> Any:
    """Of the first ranks of a world some die; the others shrink, take in who waits, and step until ten steps are right.

    The victim acts when it would shrink for the first time. told: what the ranks heard meanwhile. Gives the members.
    """
    exchange: Any = group.exchange
    world, rank = exchange.world, exchange.rank
    given: dict[str, Any] = {**SHAPE, "dtype": torch.float32}
    buffer: Any = None
    if rank < num_first:
        buffer = moecomm.Buffer(simulated_group(world, rank, list(range(num_first)), "first"), **given)
        assert steps_until_death(buffer, rank, 10**3, set())
    acts = [act] if rank == VICTIM else []
    for _ in range(20):
        try:
            if buffer is None:
                buffer = moecomm.Buffer.join(simulated_group(world, rank, [rank], "alone"), wait_s=400.0, **given)
            else:
                acts.pop()(buffer) if acts else shrink_and_admit(buffer)
        except (PeerLostError, StallError) as error:
            told.append((rank, f"{type(error).__name__} {error}"))
            if "nobody took this process in" in str(error):
                return "spare"
            continue
        members = buffer._rest.survivors.members
        if not steps_until_death(buffer, rank, 10, dead_of(buffer._rest.survivors.check.config.placement, members)):
            world.wait(rank, lambda: False, 1.0)
            buffer.close()
            return members
    raise AssertionError(f"it never came to an end: {told}")


def shrink_and_admit(buffer: moecomm.Buffer) -> None:
    if len(buffer.shrink()) < buffer._rest.survivors.check.config.placement.num_ranks:
        buffer.admit(timeout_s=60.0)


def judge(outcomes: list[Any], told: list[Any]) -> set[str]:
    """What all that live agree on."""
    assert all(outcome.error is None for outcome in outcomes), (told, outcomes)
    return {str(outcome.result) for outcome in outcomes if outcome.result not in (None, "spare")}


@pytest.mark.parametrize(
    ("second", "at", "notice_s"),
    [
        *((2, 80, 0.01), (2, 83, None), (0, 83, None)),  # with two meetings at two places, two groups went on
        *((0, 97, 0.01), (3, 110, 0.01), (2, 131, None)),
        *((4, at, 0.01) for at in range(6, 54, 12)),  # who comes dies
    ],
)
def test_a_death_at_any_moment_of_joining_is_survived(second: int, at: int, notice_s: float | None) -> None:
    told: list[Any] = []
    faults = Faults(kills={1: 60, second: at}, notice_s=notice_s)
    outcomes = simulate(regroup, 6, 4, shrink_and_admit, told, seed=at, faults=faults)
    assert outcomes[1].killed and outcomes[second].killed
    ends = judge(outcomes, told)
    assert len(ends) == 1 and len(next(iter(ends))) >= len("(0, 2, 3)"), (ends, told)


def test_after_an_interrupted_step_all_go_on_or_all_say_that_they_do_not() -> None:
    hit, seen = "", set()
    for number in range(1, 10**6, 23):
        hits: list[str] = []
        results = results_of(simulate(interrupt_a_step, 2, number, hits, seed=number))
        if not hits:
            break
        hit = hits[0]
        ends = {bool(told[-1]) for told in results}
        assert len(ends) == 1 and "Stall" not in str(results), (hits, results)
        seen.add(results[0][-1].split(" ")[0])
    assert seen == {"", "PeerLostError", "DesyncError"} and number > 500, (hit, number)


def test_an_interrupt_while_ranks_shrink_and_are_admitted_is_survived() -> None:
    for number in range(1, 10**6, 171):
        hits: list[str] = []
        told: list[Any] = []

        def interrupt(buffer: moecomm.Buffer, number: int = number, hits: list[str] = hits) -> None:
            try:
                with interrupted_at(number) as hit:
                    shrink_and_admit(buffer)
            except KeyboardInterrupt:
                hits += hit
                shrink_and_admit(buffer)

        outcomes = simulate(regroup, 4, 3, interrupt, told, seed=number, faults=Faults(kills={2: 60}))
        assert judge(outcomes, told) == {"(0, 1, 2)"}, (hits, told)
        if not hits:
            break
    assert number > 1500


@pytest.mark.parametrize("after_s", [1.0, 4.0, 21.0])
def test_abort_frees_who_shrinks_or_is_admitted(after_s: float) -> None:
    def abort_soon(buffer: moecomm.Buffer) -> None:
        world = buffer.group.exchange.world  # type: ignore[attr-defined]
        start_s = world.now_s
        world.after(after_s, lambda: buffer.abort("enough"))
        try:
            buffer.shrink(timeout_s=10.0)  # the third rank does not come, and nobody knows that it is dead
            buffer.admit(timeout_s=1000.0)
        finally:
            assert world.now_s - start_s < after_s + 5.0

    def play(group: Group) -> str:
        buffer = moecomm.Buffer(group, **SHAPE, dtype=torch.float32)
        step(buffer, group.rank, set())
        group.barrier()
        if group.rank == 2:
            return ""
        act = abort_soon if group.rank == VICTIM else lambda buffer: buffer.shrink(timeout_s=10.0) and buffer.admit()
        told = tell(lambda: act(buffer))
        assert "cannot go on" in tell(lambda: step(buffer, group.rank, set()))
        members = buffer.shrink(timeout_s=30.0)
        step(buffer, group.rank, dead_of(moecomm.ExpertPlacement.uniform(6, 3), members))
        group.exchange.world.wait(group.rank, lambda: False, 1.0)  # type: ignore[attr-defined]
        buffer.close()
        return told

    *told, _ = results_of(simulate(play, 3, seed=int(after_s), faults=Faults(notice_s=None)))
    assert all("AbortedError" in text and "rank 1 called abort(): enough" in text for text in told), told


def wait_for_victim(buffer: moecomm.Buffer, meeting: int) -> None:
    """Until it has come to a meeting: who broke one off is not waited for in the next."""
    _, home, _ = membership._whereabouts(buffer._core, buffer._rest)
    key = f"{home}shrink/{meeting}/here/{VICTIM}"
    assert buffer.group.board(membership._BOARD).wait([key], 30.0, bool) == {key}


def stop_a_process(world: World, how: str, where: str) -> tuple[str, float]:
    """Two of three processes wait for the third, or for one that joins; one of them is interrupted, or aborts."""
    buffer = moecomm.Buffer(**SHAPE, dtype=torch.float32, transport="symmetric")
    step(buffer, world.rank, set())
    world.meet("ready")
    if world.rank == 2:
        world.wait_for("over", 0, 1)
        return "", 0.0
    if where == "admit":
        assert buffer.shrink(timeout_s=1.0) == (0, 1)
    if world.rank == VICTIM:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act = buffer.abort if how == "abort" else lambda: os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.3, act).start()
    start, told = time.monotonic(), ""
    try:
        told = tell(lambda: buffer.shrink(timeout_s=60.0) if where == "shrink" else buffer.admit(timeout_s=60.0))
    except KeyboardInterrupt:
        told = "KeyboardInterrupt"
    seconds = time.monotonic() - start
    assert "cannot go on" in tell(lambda: step(buffer, 0, set()))
    if world.rank != VICTIM:
        wait_for_victim(buffer, meeting=int(where == "shrink"))  # the first one was broken off
    assert buffer.shrink(timeout_s=30.0 if world.rank == VICTIM else 2.0)[-2:] == (0, 1)
    step(buffer, world.rank, dead_of(moecomm.ExpertPlacement.uniform(6, 3), (0, 1)))
    world.mark("over")
    return told, seconds


@pytest.mark.parametrize(("how", "where"), [("abort", "admit"), ("interrupt", "admit"), ("interrupt", "shrink")])
def test_a_process_that_waits_for_others_can_be_stopped(nursery: Nursery, how: str, where: str) -> None:
    other, victim, _ = process_results(nursery.run(stop_a_process, 3, how, where))
    if how == "abort":
        assert "AbortedError" in victim[0] and "AbortedError" in other[0]
    else:
        assert victim[0] == "KeyboardInterrupt" and "rank 1 broke off with KeyboardInterrupt" in other[0], other
    assert max(other[1], victim[1]) < 30.0
