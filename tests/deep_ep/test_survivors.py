"""The low-latency mode when ranks die: those that are left go on, and see nothing in the places of the dead."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from moecomm import deep_ep
from moecomm.deep_ep.crew import Crew
from moecomm.errors import PeerLostError
from moecomm.testing import assert_bitwise, run_ranks
from tests.deep_ep._world import World, expert, world
from tests.deep_ep.test_low_latency import MAX, check_received, weighted
from tests.deep_ep.test_normal import BF16, sent

E = 10


def without(given: World, *dead: int) -> World:
    """What is left when the dead send nothing and hold nothing."""
    gone = torch.tensor([e for e in range(E) if given.owner(e) in dead])
    idx = [torch.where(torch.isin(idx, gone), -1, idx) for idx in given.idx]
    for rank in dead:
        idx[rank] = torch.full_like(idx[rank], -1)
    return World(given.x, idx, given.weights, E)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def step(buffer: Any, rank: int, given: World, left: World, *, hooked: bool, dies: bool = False) -> None:
    """A dispatch, experts, a combine; with `dies` rank 2 does not live to see its end."""
    x, idx, weights = given.x[rank], given.idx[rank], given.weights[rank]
    how = {"use_fp8": False, "return_recv_hook": hooked}
    recv, count, handle, _, hook = buffer.low_latency_dispatch(x, idx, MAX, E, **how)
    if hook is not None:
        hook()
    check_received(rank, given if dies else left, recv, count, handle)
    if dies and rank == 2:
        die()
    home, _, hook = buffer.low_latency_combine(expert(rank, recv), idx, weights, handle, return_recv_hook=hooked)
    if hook is not None:
        hook()
    assert_bitwise(home, weighted(rank, left), "combined")


def masks(buffer: Any) -> list[int]:
    status = torch.zeros(4, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    found: list[int] = status.tolist()
    return found


def survive(rank: int) -> None:
    """Rank 2 dies between dispatch and combine, rank 0 before a dispatch."""
    given = world(tokens=(5, 4, 9, 3), hidden=128, dtype=BF16)
    buffer = deep_ep.Buffer(torch.distributed.group.WORLD, low_latency_mode=True, enable_shrink=True)
    for hooked in (False, True):
        step(buffer, rank, given, given, hooked=hooked)
    left = without(given, 2)
    step(buffer, rank, given, left, hooked=False, dies=True)
    assert masks(buffer) == [0, 0, 1, 0]
    buffer.low_latency_clean_mask_buffer()
    assert masks(buffer) == [0, 0, 1, 0], "who is dead cannot be taken back"
    for hooked in (True, False):
        step(buffer, rank, given, left, hooked=hooked)
    if rank == 0:
        die()
    left = without(given, 0, 2)
    for hooked in (True, False):
        step(buffer, rank, given, left, hooked=hooked)
    assert masks(buffer) == [1, 0, 1, 0]
    (codes, scales), count, *_ = buffer.low_latency_dispatch(given.x[rank], given.idx[rank], MAX, E)
    assert codes.shape[1] == scales.shape[1] == 4 * MAX
    assert count.tolist() == [len(list(left.entries(rank, e))) for e in range(len(count))]
    with pytest.raises(PeerLostError, match=r"ranks \[0, 2\] were lost: the low-latency mode goes on, nothing else"):
        sent(buffer, given, rank)


def test_the_others_go_on_when_ranks_die() -> None:
    run_ranks(survive, 4, timeout_s=150.0, expect_exit={0: -9, 2: -9})


def without_shrink(rank: int) -> None:
    given = world(tokens=(5, 4), hidden=24)
    buffer: Any = deep_ep.Buffer(torch.distributed.group.WORLD, low_latency_mode=True)
    x, idx = given.x[rank], given.idx[rank]
    buffer.low_latency_dispatch(x, idx, MAX, E, use_fp8=False)
    if rank == 1:
        die()
    with pytest.raises(PeerLostError, match="rank 1"):
        buffer.low_latency_dispatch(x, idx, MAX, E, use_fp8=False)


def test_without_enable_shrink_it_is_an_error() -> None:
    run_ranks(without_shrink, 2, timeout_s=100.0, expect_exit={1: -9})


class Wire:
    """What `Crew` uses of a wire, where rank 1 of three is lost and rank 2 was an operation ahead."""

    def __init__(self) -> None:
        self.group, self.losses = self, 0
        self.members: tuple[int, ...] = (0, 1, 2)
        self.size, self.rank = 3, 0

    def shrink(self) -> None:
        self.members, self.losses = (0, 2), 1

    def all_gather_object(self, number: int, operation: str) -> list[int]:
        return [number, number + 1]


def test_ranks_that_are_apart_begin_their_step_again() -> None:
    crew = Crew(Wire(), True)  # type: ignore[arg-type]

    def begin() -> Any:
        raise PeerLostError("rank 1 is gone", peers=[1])

    with pytest.raises(
        PeerLostError, match=r"ranks \[1\] were lost while .*\(rank 0 in 0, rank 2 in 1\): begin the step"
    ):
        crew.start(begin, None)
    assert crew.mask.tolist() == [0, 1, 0] and crew.placement(6) == ((0, 1), (2, 3))
    assert crew.renumbered(torch.tensor([[0, 1, 2, 3, 4, 5, -1]]), 6).tolist() == [[0, 1, -1, -1, 2, 3, -1]]
