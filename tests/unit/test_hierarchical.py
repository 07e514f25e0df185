"""What the hierarchical transport does where an operation waits for the one before it."""

from __future__ import annotations

import threading

import torch

import moecomm
from moecomm.testing import run_ranks
from moecomm.topology import Topology


def combine_behind_something(rank: int) -> bool:
    """Rows that are summed while something else moves reach the mates all the same."""
    torch.manual_seed(rank)
    x, ids, weights = torch.randn(8, 16), torch.randint(0, 8, (8, 2)), torch.rand(8, 2)
    nodes = Topology((0, 0, 1, 1))
    with moecomm.Buffer(
        transport="hierarchical", topology=nodes, num_experts=8, hidden=16, top_k=2, max_tokens_per_rank=8,
        dtype=torch.float32,
    ) as buffer:  # fmt: skip
        out = buffer.dispatch(x, ids, weights)
        expected = 2 * buffer.combine(out.x, out.handle)
        goes_on = threading.Event()
        buffer._core.transport.move(lambda: goes_on.wait(30))  # type: ignore[attr-defined]
        pending = buffer.combine_async(2 * out.x, out.handle)
        goes_on.set()
        return torch.equal(pending.wait(), expected)


def test_a_combine_behind_something_gives_the_same() -> None:
    assert run_ranks(combine_behind_something, 4) == [True] * 4
