"""Signals: sequence numbers, who is late, and that refs do the same."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from moecomm.kernels.sync import (
    barrier,
    barrier_ref,
    may_send,
    signal,
    signal_ref,
    signal_when_all_arrived,
    wait,
    wait_ref,
)
from moecomm.kernels.wire import LATE, TAG_BITS, Link, Wire, buffer_bytes, loopback

from tests.kernels.checks.worlds import DEVICE

WORLDS = (1, 2, 3, 8)
cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="references read CPU memory")


def numbers(signals: torch.Tensor) -> torch.Tensor:
    """The sequence numbers in signal words."""
    return (signals >> int(TAG_BITS)).cpu()


def linked(world: int, max_spins: int = 4) -> tuple[list[Link], Wire, torch.Tensor]:
    wire = Wire.of(world, top_k=1, max_local=1, row_bytes=16)
    memory = torch.zeros(world, buffer_bytes(wire, max_tokens=2), dtype=torch.uint8, device=DEVICE)
    links, memory = loopback(wire, max_tokens=2, memory=memory, max_spins=max_spins)
    return links, wire, memory[:, -256:].view(torch.int64)[:, :world]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("operation", [signal, pytest.param(signal_ref, marks=cpu_only)])
def test_signal_against_reference(world: int, operation: Callable[[Link, Wire], None]) -> None:
    links, wire, signals = linked(world)
    for turn in range(1, 4):
        for link in links[:-1]:
            operation(link, wire)
        expected = torch.full((world, world), turn)
        expected[:, -1] = 0
        assert torch.equal(numbers(signals), expected), "word [at, from] is the sequence number"
    assert [link.state.tolist() for link in links] == [[3, 0]] * (world - 1) + [[0, 0]]


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("operation", [wait, pytest.param(wait_ref, marks=cpu_only)])
def test_wait_against_reference(world: int, operation: Callable[[Link, Wire], None]) -> None:
    links, wire, _ = linked(world)
    for link in links[1:]:
        signal(link, wire)
    operation(links[1], wire)  # rank 0 has not come
    assert links[1].status.tolist() == [0, 0, 1, 1] + [0] * (3 * world - 1)
    signal(links[1], wire)
    signal(links[0], wire)
    operation(links[0], wire)
    assert not links[0].status.any(), "a signal that is ahead is no late one"


@pytest.mark.parametrize("operation", [barrier, pytest.param(barrier_ref, marks=cpu_only)])
def test_barrier_against_reference(operation: Callable[[Link, Wire], None]) -> None:
    links, wire, signals = linked(2)
    operation(links[0], wire)
    assert links[0].status.tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0]
    links, wire, signals = linked(1)
    operation(links[0], wire)
    assert not links[0].status.any() and numbers(signals).tolist() == [[1]]


def test_nobody_signals_after_a_stall() -> None:
    links, wire, signals = linked(2)
    barrier(links[0], wire)
    signal(links[0], wire)
    assert numbers(signals).tolist() == [[1, 0], [1, 0]] and links[0].state.tolist() == [1, 0]


def test_the_first_stall_stays_noted_by_operation() -> None:
    links, wire, _ = linked(2)
    for link in links:
        signal(link, wire)
    signal(links[0], wire)
    wait(links[0], wire)
    assert links[0].status.tolist() == [0, 0, 2, 0, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("operation", [wait, pytest.param(wait_ref, marks=cpu_only)])
def test_ranks_that_do_different_things_stop(operation: Callable[[Link, Wire], None]) -> None:
    """Both notice, at once and for good, and neither sends again; a rank that is ahead has compared before."""
    links, wire, signals = linked(3, max_spins=10**9)
    links[1] = links[1]._replace(tag=77)
    for link in links[:2]:  # rank 2 never comes, and nobody waits for it
        signal(link, wire)
    for link in links[:2]:
        operation(link, wire)
        signal(link, wire)
    others = [link.status[int(LATE) + 3 : int(LATE) + 6].tolist() for link in links[:2]]
    assert others == [[3, 77, 0], [3, 77, 0]] and [int(link.status[2]) for link in links[:2]] == [1, 1]
    assert numbers(signals).tolist() == [[1, 1, 0]] * 3
    links, wire, signals = linked(2)
    signals[0] = torch.tensor([(1 << 24) | 3, (2 << 24) | 77])
    links[0].state[0] = 1
    operation(links[0], wire)
    assert not links[0].status.any(), "rank 1 is in operation 2 already"


@pytest.mark.parametrize("operation", [wait, pytest.param(wait_ref, marks=cpu_only)])
def test_nobody_waits_for_a_rank_that_has_ended(operation: Callable[[Link, Wire], None]) -> None:
    links, wire, _ = linked(2, max_spins=10**9)
    for link in links:
        signal(link, wire)
        link.status[int(LATE) + 4 :] = torch.tensor([0, 1])  # rank 1 is gone
    operation(links[0], wire)
    assert int(links[0].status[2]) == 0, "it had sent before it went"
    signal(links[0], wire)
    operation(links[0], wire)
    assert links[0].status.tolist() == [0, 0, 2, 0, 2, 0, 0, 0, 1]


@triton.jit
def _many_programs_kernel(out, link, WIRE: tl.constexpr):  # type: ignore[no-untyped-def]
    sequence = tl.load(link.state) + 1
    if may_send(link):
        tl.store(out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), sequence)
        signal_when_all_arrived(link, sequence, WIRE)


@pytest.mark.parametrize("grid", [(1, 1), (5, 1), (3, 4)])
def test_the_last_program_signals_for_all(grid: tuple[int, int]) -> None:
    """All programs see the same number, one signal goes out, and the count of arrivals is zero again."""
    links, wire, signals = linked(2)
    for turn in range(1, 3):
        out = torch.zeros(grid, dtype=torch.int64, device=DEVICE)
        _many_programs_kernel[grid](out, links[1], WIRE=wire)
        assert (
            (out == turn).all()
            and numbers(signals).tolist() == [[0, turn]] * 2
            and links[1].state.tolist() == [turn, 0]
        )


@cpu_only
def test_wait_sees_a_signal_that_comes_later() -> None:
    """Another thread of this process signals while the reference polls."""
    links, wire, _ = linked(2, max_spins=10**9)
    signal_ref(links[0], wire)
    later = threading.Timer(0.05, signal_ref, (links[1], wire))
    later.start()
    wait_ref(links[0], wire)
    later.join()
    assert not links[0].status.any()
