"""Every cell of the failure table, on three ranks in the middle of a loop; and the page that prints it."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import moecomm
from moecomm.testing.simulated import Faults, Outcome, simulate
from tests.faults import _table
from tests.faults._ranks import Nursery, SideBySide, World
from tests.faults._scenes import VICTIM, E, H, K, M, build, happen, loop, play, right_step, tokens_of

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = [name for name in _table.TRANSPORTS if name not in ("simulated", "mpi")]  # for mpi: test_mpi_faults.py
SLACK = 20.0  # the machine may be busy: a bound of the table is for one that is not


def build_for(transport: str, event: str) -> moecomm.Buffer:
    nodes = moecomm.Topology((0, 0, 1)) if transport == "hierarchical" else None
    return build(transport, timeout_s=_table.timeout_s(event), topology=nodes)


def cut_connections(world: World) -> None:
    """Shut down every connection of this process but that to the store of the test."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            peer, own = sock.getpeername(), sock.getsockname()
            spare = not (peer or own) if sock.family == socket.AF_UNIX else int(os.environ["MASTER_PORT"]) in peer[1:2]
            if not spare and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0:
                sock.shutdown(socket.SHUT_RDWR)


def run_out(world: World) -> None:
    """From now on there is no memory for what arrives."""
    from moecomm import express, operations

    def fail(*_: Any) -> None:
        raise MemoryError("out of memory")

    operations.out_parcels = fail  # type: ignore[assignment]  # this process ends soon
    express.Kept = fail  # type: ignore[assignment,misc]


def act(world: World, event: str, buffer: moecomm.Buffer) -> None:
    """What the victim does in the middle of round 3."""
    world.store.set("happened", repr(time.monotonic()))
    if event == "hung":
        for rank in (0, 2):
            world.store.get(f"over/{rank}")  # they give up, and this rank never comes back
        os._exit(0)
    if event == "cut":
        cut_connections(world)
    if event == "memory":
        run_out(world)
    happen(event, buffer)


def scene(world: World, transport: str, event: str) -> tuple[str, float, str, str]:
    """The loop on one rank: what it raised, how long after the event, what the buffer says then, what was printed."""
    buffer = build_for(transport, event)
    right_step(buffer, world)
    world.meet("ready")
    kind, ended, after, printed = play(buffer, event, lambda: act(world, event, buffer))
    seconds = ended - float(world.store.get("happened"))
    world.mark("over")
    return kind, seconds, after, printed


def judge(transport: str, event: str, outcomes: list[Any]) -> None:
    """Whether the cell is as the table says."""
    row, reports = _table.EVENTS[event], 0
    for rank, outcome in enumerate(outcomes):
        if rank == VICTIM and not row.culprit_gets:
            continue
        assert outcome.went_well, f"rank {rank}: {outcome.trace or outcome}"
        kind, seconds, after, printed = outcome.result
        wanted = row.culprit_gets if rank == VICTIM else _table.expected(event, transport)
        assert kind == wanted, f"rank {rank}: {kind} after {seconds:.1f} s, {after}"
        assert seconds < _table.bound_s(event, transport) + SLACK, f"rank {rank}: {seconds:.1f} s"
        assert "build a new Buffer" in after, after
        reports += printed.count("moecomm, rank")
        if "moecomm, rank" in printed:
            said = "last seen" in printed and f"what rank {rank} is doing" in printed and "in loop: " in printed
            assert said, printed
    assert reports <= 1, "one rank prints"
    if event in ("killed", "hung"):
        assert reports == 1, [outcome.result for outcome in outcomes]


@pytest.fixture(scope="module")
def cells(nursery: Nursery, request: pytest.FixtureRequest) -> SideBySide:
    """The scenes of the cells that are asked for, several at a time: most of them wait."""
    wanted = itertools.product(PROCESSES, _table.EVENTS)
    return SideBySide(nursery, {cell: (scene, 3, *cell) for cell in wanted}, request)


@pytest.mark.parametrize("event", _table.EVENTS)
@pytest.mark.parametrize("transport", PROCESSES)
def test_cell(cells: SideBySide, transport: str, event: str) -> None:
    judge(transport, event, cells[transport, event])


# -- simulated -------------------------------------------------------------------------------------------------------


def simulated_loop(group: Any, event: str) -> None:
    shape: dict[str, Any] = {"num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": M}
    buffer = moecomm.Buffer(group, **shape, dtype=torch.float32, timeout_s=_table.TIMEOUT_S)
    world = group.exchange.world

    def between(round: int) -> None:
        if round != 3 or group.rank != VICTIM:
            return
        if event == "hung":
            world.wait(group.rank, lambda: False, 1e6)
        if event == "disagree":
            buffer.dispatch(*tokens_of(group.rank), align=2)
        if event == "memory":
            with mock.patch("moecomm.operations.home_parcel", side_effect=MemoryError), buffer._core.guarded():
                raise MemoryError("out of memory")
        if event == "exception":
            raise ValueError("a mistake")
        if event == "interrupt":
            with buffer._core.guarded():
                raise KeyboardInterrupt
        if event == "abort":
            buffer.abort("enough")

    with buffer:
        loop(buffer, group.rank, between)


SIMULATED = {"killed": Faults(kills={VICTIM: 60}), "cut": Faults(drop=1.0)}


@pytest.mark.parametrize("event", _table.EVENTS)
def test_simulated_cell(event: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: list[Outcome] = simulate(simulated_loop, 3, event, seed=4, faults=SIMULATED.get(event))
    row = _table.EVENTS[event]
    for rank, outcome in enumerate(outcomes):
        if rank == VICTIM and not row.culprit_gets:
            assert outcome.killed or event == "hung"
            continue
        wanted = row.culprit_gets if rank == VICTIM and event != "cut" else _table.expected(event, "simulated")
        assert type(outcome.error).__name__ == wanted, outcome.trace


def test_the_page_is_what_the_table_says() -> None:
    assert (ROOT / "docs" / "failures.md").read_text(encoding="utf-8") == _table.render()


# -- abort -----------------------------------------------------------------------------------------------------------


def abort_from_a_thread(world: World, transport: str) -> tuple[str, str, float]:
    """Rank 2 never comes; the others wait for it until a thread of rank 0 gives up for all of them."""
    with build(transport, timeout_s=60.0) as buffer:
        right_step(buffer, world)
        world.meet("ready")
        if world.rank == 0:
            threading.Timer(0.3, buffer.abort, ("enough of it",)).start()
        start = time.monotonic()
        if world.rank == 2:
            world.wait_for("freed", 0, 1)
        try:
            buffer.dispatch(*tokens_of(world.rank))
        except moecomm.MoECommError as error:
            world.mark("freed")
            return type(error).__name__, str(error), time.monotonic() - start
    raise AssertionError("it was not freed")


@pytest.mark.parametrize("transport", ["symmetric", "collective"])
def test_abort_frees_everybody_who_waits(nursery: Nursery, transport: str) -> None:
    for outcome in nursery.run(abort_from_a_thread, 3, transport):
        assert outcome.went_well, outcome.trace
        kind, text, seconds = outcome.result
        assert kind == "AbortedError" and "rank 0 called abort(): enough of it" in text and seconds < 20.0, text


def test_abort_alone() -> None:
    with moecomm.Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1) as buffer:
        buffer.abort("one")
        buffer.abort("two")
        with pytest.raises(moecomm.AbortedError, match=r"rank 0 called abort\(\): one"):
            buffer.dispatch(torch.zeros(1, 1).bfloat16(), torch.zeros(1, 1).long())
