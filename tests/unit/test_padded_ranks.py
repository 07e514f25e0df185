"""Layout "padded" between ranks: who skips a step is named, empty batches, old rows never come back, waits are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.overlap import Batch, Timeline, interleave
from moecomm.testing import RankPool

H, K, E, M = 32, 2, 4, 8


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=100.0) as started:
        yield started


def make_buffer(**changes: Any) -> moecomm.Buffer:
    given: dict[str, Any] = {"num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": M}
    return moecomm.Buffer(None, **(given | {"dtype": torch.float32, "timeout_s": 20.0} | changes))


def inputs(rank: int, step: int, tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    idx = torch.rand(tokens, E, generator=generator).topk(K).indices
    return torch.randn(tokens, H, generator=generator), idx, torch.rand(tokens, K, generator=generator)


def run_step(buffer: moecomm.Buffer, rank: int, step: int, tokens: int = 4) -> Tensor:
    x, idx, weights = inputs(rank, step, tokens)
    out = buffer.dispatch(x, idx, weights, layout="padded")
    y = buffer.combine(out.x, out.handle)
    return (y - x * weights.sum(1, keepdim=True)).abs().amax(1, keepdim=True) if tokens else y[:, :1]


def skip_a_combine(rank: int, transport: str) -> tuple[str, tuple[int, ...]]:
    with make_buffer(transport=transport) as buffer:
        run_step(buffer, rank, 0)
        out = buffer.dispatch(*inputs(rank, 1), layout="padded")
        try:
            if rank == 0:
                buffer.combine(out.x, out.handle)
            else:
                buffer.dispatch(*inputs(rank, 2), layout="padded")
        except moecomm.DesyncError as error:
            return str(error), error.peers
        return "nothing was raised", ()


@pytest.mark.parametrize("transport", ["symmetric", "collective"])
def test_a_rank_that_skips_a_step_is_named_at_the_next_wait(pool: RankPool, transport: str) -> None:
    for rank, (said, peers) in enumerate(pool.run(skip_a_combine, transport)):
        assert peers == (1 - rank,) and f"rank {1 - rank} called" in said and "layout=padded" in said, said


def stop_early(rank: int) -> tuple[str, tuple[int, ...]]:
    with make_buffer(timeout_s=1.0) as buffer:
        run_step(buffer, rank, 0)
        if rank == 1:
            time.sleep(2.0)
            return "slept", ()
        try:
            run_step(buffer, rank, 1)
        except moecomm.StallError as error:
            return str(error), error.peers
        return "nothing was raised", ()


def test_a_rank_that_does_nothing_is_named_when_time_is_up(pool: RankPool) -> None:
    (said, peers), _ = pool.run(stop_early)
    assert peers == (1,) and "waiting for rank 1" in said, said


def run_empty(rank: int) -> float:
    """T is 0 on one rank, on the other, on both, on none, with and without a combine between."""
    worst = 0.0
    with make_buffer() as buffer:
        for step, tokens in enumerate([(0, 3), (3, 0), (0, 0), (4, 8), (0, 0), (8, 1)]):
            for again in range(2):
                error = run_step(buffer, rank, 2 * step + again, tokens[rank])
                worst = max(worst, float(error.max()) if error.numel() else 0.0)
            buffer.dispatch(*inputs(rank, step, tokens[rank]), layout="padded")
    return worst


def test_empty_batches(pool: RankPool) -> None:
    assert max(pool.run(run_empty)) < 1e-5


def wait_for_a_slow_rank(rank: int) -> tuple[list[float], list[int], int]:
    with make_buffer() as buffer:
        rows = 0
        for step in range(5):
            if rank == 1:
                time.sleep(0.02)
            x, idx, weights = inputs(rank, step)
            out = buffer.dispatch(x, idx, weights, layout="padded")
            rows += int(out.tokens_per_expert.sum())
            buffer.combine(out.x, out.handle)
        rows += int(buffer.dispatch(*inputs(rank, 9)).tokens_per_expert.sum())  # other layouts count as well
        stats = buffer.stats()
        return stats["waited_s"].tolist(), stats["rows_of_expert"].tolist(), rows


def test_stats_tell_whom_this_rank_waited_for(pool: RankPool) -> None:
    of_ranks = pool.run(wait_for_a_slow_rank)
    (waited, per_expert, rows), (of_slow, _, _) = of_ranks
    assert waited[0] == 0 and of_slow[1] == 0 and waited[1] > 0.05, of_ranks
    assert waited[1] > of_slow[0], "the slow rank waits less than those who wait for it"
    assert len(per_expert) == E // 2 and sum(per_expert) == rows


def overlap(rank: int) -> tuple[bool, float]:
    def batch(step: int, buffer: moecomm.Buffer) -> Batch[Tensor]:
        x, idx, weights = inputs(rank, step)
        for _ in range(4):
            out = yield "dispatch", buffer.dispatch_async(x, idx, weights, layout="padded")
            x = yield "combine", buffer.combine_async(torch.tanh(out.x), out.handle)
        return x

    results, timeline = [], Timeline()
    with make_buffer() as buffer:
        for in_turns in (False, True):
            batches = [batch(step, buffer) for step in range(2)]
            results.append(interleave(batches, timeline if in_turns else None, in_turns=in_turns))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True)), timeline.hidden_share


def test_two_batches_in_turns_give_the_same_bits(pool: RankPool) -> None:
    for same, share in pool.run(overlap):
        assert same and 0 < share <= 1
