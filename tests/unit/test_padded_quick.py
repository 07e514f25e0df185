"""Layout "padded" in one call of machine code per operation gives what the steps one by one give, in any mixture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.padded import slots
from moecomm.testing import RankPool
from tests.unit._few_tokens import E, K, M, inputs, same, symmetric_buffer

H = 32


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3, timeout_s=100.0) as started:
        yield started


def make_buffer(*, quick: bool = True, **changes: Any) -> moecomm.Buffer:
    buffer = symmetric_buffer(H, **changes)
    assert all(buffer._calls.padded.mover._trips)  # type: ignore[attr-defined]
    if not quick:
        go_slowly(buffer)
    return buffer


def go_slowly(buffer: moecomm.Buffer) -> list[Any]:
    """Take the quick way from a buffer; what to give back to it."""
    mover: Any = buffer._calls.padded.mover
    trips, mover._trips = mover._trips, [None, None]
    return trips


def rows_of(out: moecomm.Dispatched) -> list[Tensor]:
    assert out.ranges is not None
    return [out.x[e, begin:end] for e, of_rank in enumerate(out.ranges.tolist()) for begin, end in of_rank]


def compare_both_ways(rank: int, dtype: torch.dtype, streaming: bool) -> bool:
    limit = 0 if streaming else slots.STREAM_BYTES
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(slots, "STREAM_BYTES", limit))
        buffer = stack.enter_context(make_buffer(dtype=dtype))
        other = stack.enter_context(make_buffer(dtype=dtype, quick=False))
        for step in range(12):
            x, idx, weights = inputs(rank, step, H)
            x = x.to(dtype)
            out = buffer.dispatch(x, idx, weights, layout="padded")
            expected = other.dispatch(x, idx, weights, layout="padded")
            for name in ("ranges", "tokens_per_expert"):
                same(getattr(out, name), getattr(expected, name), f"step {step}, {name}")
            for name in ("topk_idx", "topk_weights", "places"):
                same(getattr(out.handle, name), getattr(expected.handle, name), f"step {step}, handle.{name}")
            for got, row in zip(rows_of(out), rows_of(expected), strict=True):
                same(got, row, f"step {step}, rows")
            given: dict[str, Any] = {"weighted": False if step % 4 == 3 else None}
            given["bias"] = (None, x + 1, x.float() - 1)[step % 3]
            rows = out.x.nan_to_num() * 3
            for _ in range(1 + step % 2):  # a second combine of a handle goes step by step
                if step % 4 < 2:
                    rows = buffer.combine_input(out.handle).copy_(rows)
                y = torch.empty_like(x) if step % 2 else None
                got = buffer.combine(rows, out.handle, out=y, **given)
                same(got, other.combine(rows, expected.handle, **given), f"step {step}, {given}")
        counted, expected_counts = buffer.stats(), other.stats()
        for name in ("dispatches", "combines", "rows_local", "rows_remote", "bytes_local", "bytes_remote"):
            assert counted[name] == expected_counts[name], name
        same(counted["rows_of_expert"], expected_counts["rows_of_expert"], "rows_of_expert")
    return True


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_bits(pool: RankPool, dtype: torch.dtype, streaming: bool) -> None:
    assert all(pool.run(compare_both_ways, dtype, streaming))


def go_different_ways(rank: int) -> bool:
    """In one operation some ranks go one way and some the other, and come too late for those who look."""
    with make_buffer(dtype=torch.float32) as buffer:
        mover: Any = buffer._calls.padded.mover
        trips = mover._trips
        for step in range(9):
            mover._trips = [None, None] if (step + rank) % 3 == 0 else trips
            x, idx, weights = inputs(rank, step, H)
            time.sleep(0.02 * ((step + rank) % 2))
            out = buffer.dispatch(x, idx, weights, layout="padded")
            time.sleep(0.02 * (step % 2 == rank % 2))
            if step == 7:
                continue  # nobody combines: the next one but one asks whether the rows are free
            y = buffer.combine(out.x, out.handle)
            factors = torch.ones(len(x), K) if weights is None else weights
            expected = x * (factors * (idx >= 0)).sum(1, keepdim=True)
            assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6), f"step {step}: a row went astray"
    return True


def test_ranks_may_go_different_ways_and_wait_for_each_other(pool: RankPool) -> None:
    assert all(pool.run(go_different_ways))


def refuse_and_go_on(rank: int) -> str:
    """A refused dispatch leaves the handles of its generation as they were, also if it was of fewer tokens."""
    with make_buffer(dtype=torch.float32) as buffer:
        x, idx, _ = inputs(rank, 0, H)
        x, idx = torch.cat([x, torch.ones(1, H)])[:M], torch.cat([idx, torch.zeros(1, K, dtype=idx.dtype)])[:M]
        first = buffer.dispatch(x, idx, layout="padded")
        rows = first.x.clone()
        buffer.dispatch(x, idx, layout="padded")
        expected = buffer.combine(rows, first.handle)
        said = ""
        try:
            buffer.dispatch(x[:0], idx[:0], torch.ones(1, K), layout="padded")
        except moecomm.ConfigError as error:
            said = str(error)
        wrong = torch.full((1, K), E)
        try:
            buffer.dispatch(torch.zeros(1, H), wrong, layout="padded")
        except moecomm.RoutingError as error:
            said = str(error)
        same(buffer.combine(rows, first.handle), expected, "after a refused dispatch")
        return said


def test_what_is_refused_was_not_begun(pool: RankPool) -> None:
    for rank, said in enumerate(pool.run(refuse_and_go_on)):
        assert f"rank {rank}: topk_idx[0, 0] names no expert: got {E}" in said, said
