"""The quick way of a few tokens: what it gives, counts and refuses is what the general way does."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import moecomm
from moecomm import express
from moecomm.handle import HANDLE_TENSORS
from moecomm.testing import RankPool
from tests.unit._few_tokens import E, K, inputs, same, symmetric_buffer

H = 24
RESULTS = ("x", "expert_offsets", "tokens_per_expert", "row_weights")
COUNTED = ("dispatches", "combines", "rows_local", "rows_remote", "bytes_local", "bytes_remote", "leases", "copies")


@pytest.fixture(scope="module", params=[2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param, timeout_s=100.0) as started:
        yield started


def make_buffer(*, quick: bool = True, **changes: Any) -> moecomm.Buffer:
    buffer = symmetric_buffer(H, **changes)
    if not quick:
        buffer._calls._express = None
    return buffer


def was_quick(out: moecomm.Dispatched) -> bool:
    return type(getattr(out, "_maker", None)) is express.Kept


def compare_both_ways(rank: int, dtype: torch.dtype) -> int:
    num_quick = 0
    with make_buffer(dtype=dtype) as buffer, make_buffer(dtype=dtype, quick=False) as other:
        for step in range(10):
            x, idx, weights = inputs(rank, step, H)
            x = x.to(dtype)
            out, expected = buffer.dispatch(x, idx, weights), other.dispatch(x, idx, weights)
            num_quick += was_quick(out)
            rows = out.x * 3
            for bias in (None, x + 1, x.float() - 1)[: 3 if dtype != torch.float32 else 2]:
                for weighted in (None, False):
                    given: dict[str, Any] = {"bias": bias, "weighted": weighted}
                    y = buffer.combine(rows, out.handle, **given)  # before its tensors are made
                    same(y, other.combine(rows, expected.handle, **given), f"step {step}, {given}")
            for name in RESULTS:
                same(getattr(out, name), getattr(expected, name), f"step {step}, {name}")
            for name in HANDLE_TENSORS:
                same(getattr(out.handle, name), getattr(expected.handle, name), f"step {step}, handle.{name}")
            same(buffer.combine(rows, out.handle), other.combine(rows, expected.handle), f"step {step}, once more")
            replayed = buffer.dispatch(x, handle=out.handle)
            same(replayed.x, out.x, f"step {step}, replayed")
            other.dispatch(x, handle=expected.handle)
        counted, expected_counts = buffer.stats(), other.stats()
        assert {name: counted[name] for name in COUNTED} == {name: expected_counts[name] for name in COUNTED}
        same(counted["rows_of_expert"], expected_counts["rows_of_expert"], "rows_of_expert")
        assert all(counted[f"{phase}_s"] > 0 for phase in ("plan", "counts", "send", "wait", "arrange"))
    return num_quick


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_bits(pool: RankPool, dtype: torch.dtype) -> None:
    for num_quick in pool.run(compare_both_ways, dtype):
        assert num_quick == 9, "every dispatch but the first, before which nobody has said where to write"


def go_different_ways(rank: int) -> bool:
    """In one operation some ranks go one way and some the other, and come too late for those who look."""
    with make_buffer(dtype=torch.float32) as buffer:
        quickly = buffer._calls._express
        for step in range(8):
            buffer._calls._express = None if (step + rank) % 3 == 0 else quickly
            x, idx, weights = inputs(rank, step, H)
            time.sleep(0.02 * ((step + rank) % 2))
            out = buffer.dispatch(x, idx, weights)
            time.sleep(0.02 * (step % 2 == rank % 2))
            y = buffer.combine(out.x, out.handle)
            factors = torch.ones(len(x), K) if weights is None else weights
            expected = x * (factors * (idx >= 0)).sum(1, keepdim=True)
            assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6), f"step {step}: a row went astray"
    return True


def test_ranks_may_go_different_ways_and_wait_for_each_other(pool: RankPool) -> None:
    assert all(pool.run(go_different_ways))


def refuse_and_go_on(rank: int) -> tuple[str, bool]:
    with make_buffer(dtype=torch.float32) as buffer:
        x, idx, weights = inputs(rank, 0, H)
        for _ in range(2):
            buffer.dispatch(x, idx, weights)
        wrong = torch.zeros(2, K, dtype=torch.int64)
        wrong[1, 2] = E if rank else -2
        said = ""
        try:
            buffer.dispatch(x[:2], wrong[: len(x[:2])])
        except moecomm.RoutingError as error:
            said = str(error)
        out = buffer.dispatch(x, idx, weights)
        return said, was_quick(out) and torch.equal(out.x, buffer.dispatch(x, handle=out.handle).x)


def test_a_wrong_id_is_refused_before_anything_is_sent(pool: RankPool) -> None:
    for rank, (said, goes_on) in enumerate(pool.run(refuse_and_go_on)):
        assert f"rank {rank}: topk_idx[1, 2] names no expert: got {E if rank else -2}" in said, said
        assert goes_on


def keep_results(rank: int) -> bool:
    """What was handed out is the caller's, also after the buffer; a handle is a pytree, copied and changed."""
    kept = []
    with make_buffer(dtype=torch.float32) as buffer:
        for step in range(12):
            x, idx, weights = inputs(rank, 0, H)
            out = buffer.dispatch(x + step, idx, weights)
            kept.append((out, out.x.clone()))
        twin = copy.copy(out.handle)
        assert torch.equal(twin.recv_table, out.handle.recv_table) and not hasattr(twin, "_maker")
        same(buffer.combine(out.x, twin), buffer.combine(out.x, out.handle), "a copy of the handle")
        leaves, spec = torch.utils._pytree.tree_flatten(out)
        assert torch.equal(torch.utils._pytree.tree_unflatten(leaves, spec).handle.send_pos, twin.send_pos)
    for out, rows in kept:
        same(out.x, rows, "rows kept")
        assert out.expert_offsets is not None and int(out.expert_offsets[-1]) == len(rows)
        assert out.handle.num_tokens == len(x)
    try:
        buffer.dispatch(x, idx, weights)
    except moecomm.StaleHandleError:
        return True
    return False


def test_results_belong_to_the_caller(pool: RankPool) -> None:
    assert all(pool.run(keep_results))


def call_something_else(rank: int) -> tuple[str, tuple[int, ...]]:
    with make_buffer(dtype=torch.float32) as buffer:
        x, idx, weights = inputs(rank, 0, H)
        for _ in range(2):
            out = buffer.dispatch(x, idx, weights)
        try:
            if rank == 1:
                buffer.dispatch(x, idx, weights)
            else:
                buffer.combine(out.x, out.handle)
        except moecomm.DesyncError as error:
            return str(error), error.peers
    return "", ()


def test_who_calls_something_else_is_named() -> None:
    with RankPool(3, timeout_s=100.0) as pool:
        for said, _ in pool.run(call_something_else):
            assert "rank 1" in said and "dispatch" in said and "combine" in said, said


def break_off(rank: int) -> str:
    with make_buffer(dtype=torch.float32) as buffer:
        x, idx, weights = inputs(rank, 0, H)
        for _ in range(2):
            buffer.dispatch(x, idx, weights)
        if rank == 1:
            broken = mock.patch.object(express, "Kept", side_effect=MemoryError("no more"))
            with broken, pytest.raises(MemoryError):
                buffer.dispatch(x, idx, weights)
        else:
            buffer.dispatch(x, idx, weights)
        try:
            buffer.dispatch(x, idx, weights)
        except moecomm.PeerLostError as error:
            return str(error)
    return ""


def test_who_breaks_off_tells_the_others(pool: RankPool) -> None:
    for said in pool.run(break_off):
        assert "rank 1 broke off with MemoryError: no more" in said, said


def watched(rank: int) -> list[bool]:
    """Gradients, profilers, checks, other options: all these go the general way."""
    x, idx, weights = inputs(rank, 0, H)
    took = []
    with make_buffer(dtype=torch.float32) as buffer, make_buffer(dtype=torch.float32, check="full") as checked:
        options: tuple[dict[str, Any], ...] = ({}, {"align": 4}, {"layout": "rank"}, {"quant": "int8"})
        for given in options:
            took.append(was_quick(buffer.dispatch(x, idx, weights, **given)))
        took.append(was_quick(buffer.dispatch(x.clone().requires_grad_(), idx, weights)))
        took.append(was_quick(buffer.dispatch_async(x, idx, weights).wait()))
        with mock.patch.object(express, "is_profiling", lambda: True):
            took.append(was_quick(buffer.dispatch(x, idx, weights)))
        took += [was_quick(checked.dispatch(x, idx, weights)) for _ in range(2)]
    return took


def test_what_somebody_watches_goes_the_general_way(pool: RankPool) -> None:
    for took in pool.run(watched):
        assert not any(took)
