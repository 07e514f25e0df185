"""Tensors that are laid out unusually, and defaults of torch that a caller has changed: nothing of it matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moecomm.testing import assert_bitwise
from tests.unit.test_checks import EXPERT_ORDER, TOPK_IDX, H, K, T, make


def strided(t: Tensor) -> list[Tensor]:
    """The same values in memory that is not packed: transposed, every other column, every other row, broken up."""
    wide, tall = t.new_zeros(t.shape[0], 2 * t.shape[1]), t.new_zeros(2 * t.shape[0], t.shape[1])
    wide[:, ::2], tall[::2] = t, t
    columns = t.new_empty(t.shape[1], t.shape[0]).copy_(t.t()).t()
    return [columns, wide[:, ::2], tall[::2]]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("reduce", ["rank", "source"])
@pytest.mark.parametrize("hidden", [1, H])
def test_strides_are_free(kind: int, reduce: str, hidden: int) -> None:
    with make(reduce, hidden=hidden) as buffer:
        x, weights, bias = torch.randn(T, hidden), torch.rand(T, K), torch.randn(T, hidden)
        expected: Any = buffer.dispatch(x, TOPK_IDX, weights)
        rows = torch.randn(expected.x.shape)
        y = buffer.combine(rows, expected.handle, bias=bias)
        out: Any = buffer.dispatch(strided(x)[kind], strided(TOPK_IDX)[kind], strided(weights)[kind])
        assert_bitwise(out.x, expected.x, "dispatched rows")
        assert_bitwise(out.row_weights, expected.row_weights, "row weights")
        assert_bitwise(buffer.combine(strided(rows)[kind], out.handle, bias=strided(bias)[kind]), y, "combined rows")
        again: Any = buffer.dispatch(strided(x)[kind], None, strided(weights)[kind], handle=out.handle)
        assert_bitwise(again.x, expected.x, "replayed rows")


def test_scales_may_lie_in_columns() -> None:
    with make(dtype=torch.float8_e4m3fn, hidden=64) as buffer:
        x, scales = torch.randint(0, 255, (T, 64), dtype=torch.uint8), torch.rand(4, T).t()
        rows, arrived = buffer.dispatch((x, scales), TOPK_IDX).x
        assert_bitwise(rows, x[EXPERT_ORDER], "rows")
        assert_bitwise(arrived, scales[EXPERT_ORDER], "scales")


def test_scales_may_be_nothing() -> None:
    with make(dtype=torch.int8) as buffer:
        x = torch.randint(0, 127, (T, H), dtype=torch.int8)
        rows, scales = buffer.dispatch((x, torch.empty(T, 0)), TOPK_IDX).x
        assert_bitwise(rows, x[EXPERT_ORDER], "rows")
        assert scales.shape == (len(EXPERT_ORDER), 0) and scales.dtype == torch.float32


def test_what_is_conjugated_or_negated_later_is_so_now() -> None:
    z = torch.randn(T, H, dtype=torch.complex64)
    with make(dtype=torch.complex64) as buffer:
        rows = buffer.dispatch((z.conj(), torch.empty(T, 0)), TOPK_IDX).x[0]
        assert_bitwise(rows, z.conj_physical()[EXPERT_ORDER], "conjugated rows")
    x, weights, bias = torch.randn(T, H), torch.rand(T, K), torch.randn(T, H)
    negated = torch._neg_view
    with make() as buffer:
        for layout in ("expert", "rank"):
            expected: Any = buffer.dispatch(-x, TOPK_IDX, -weights, layout=layout)
            out: Any = buffer.dispatch(negated(x), TOPK_IDX, negated(weights), layout=layout)
            assert_bitwise(out.x, expected.x, "dispatched rows")
            assert_bitwise(out.handle.row_weights, expected.handle.row_weights, "row weights")
            y = buffer.combine(-out.x, expected.handle, bias=-bias)
            assert_bitwise(buffer.combine(negated(out.x), out.handle, bias=negated(bias)), y, "combined rows")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, layout: str) -> None:
    def run() -> list[Tensor]:
        leaf, leaf_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        plain: Any = buffer.dispatch(x, TOPK_IDX, layout=layout)
        out: Any = buffer.dispatch(leaf, TOPK_IDX, leaf_weights, layout=layout)
        y = buffer.combine(out.x, out.handle)
        (y.sum() + out.handle.row_weights.sum()).backward()
        results = [plain.handle.row_weights, plain.handle.topk_weights, buffer.combine(plain.x, plain.handle), y]
        return [*results, *(leaf.grad for leaf in (leaf, leaf_weights))]

    x, weights = torch.randn(T, H), torch.rand(T, K)
    with make() as buffer:
        expected = run()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            results = run()
        finally:
            torch.set_default_dtype(before)
    for number, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_bitwise(result, wanted, f"result {number}")


@pytest.mark.parametrize("later", [False, True])
def test_the_default_device_changes_nothing(later: bool) -> None:
    x = torch.randn(T, H)
    with make() as buffer, torch.device("meta"):
        out: Any = buffer.dispatch_async(x, TOPK_IDX).wait() if later else buffer.dispatch(x, TOPK_IDX)
        y = buffer.combine_async(out.x, out.handle).wait() if later else buffer.combine(out.x, out.handle)
    assert_bitwise(out.x, x[EXPERT_ORDER], "rows")
    assert_bitwise(y, x * (TOPK_IDX >= 0).sum(1, keepdim=True) + 0.0, "sums")
