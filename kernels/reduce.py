"""Weighted sums of rows in a fixed order.

    out[p] = round(bias[p] + sum over ascending j of w * rows[table[p, j]])

The sum is float32 and starts from the bias or +0; each product is rounded before it is added (never fused); an entry
below 0 is skipped; the sum is rounded once, at the end. What is not a number becomes the one NaN that torch writes.

Legend: P sums, J entries per sum, N rows, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of, narrow, widen
from moecomm.kernels.rows import Arriving, RowFormat, contiguous_rows, row_at, used
from moecomm.kernels.sync import wait_for_all
from moecomm.kernels.wire import ROWS, Link, Wire, area_of
from torch import Tensor

NONE, BY_ROW, BY_ENTRY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_BLOCK_BYTES = 4096  # of a row, per program


class Sum(NamedTuple):
    """The geometry of a sum, known when kernels are compiled.

    hidden: H. row_bytes: from row to row. columns: J. weights: NONE, BY_ROW or BY_ENTRY. block: elements per program.
    aligned: whether every row starts at a multiple of 16 bytes.
    """

    hidden: int
    row_bytes: int
    columns: int
    weights: int
    block: int
    aligned: bool


@triton.jit
def sum_rows(total, base, table, weights, p, column, SUM: tl.constexpr, ELEMENT: tl.constexpr):
    """`total` plus the weighted rows that entry p of the table names, at some columns."""
    COLUMNS: tl.constexpr = SUM.columns
    first = tl.cast(p, tl.int64) * SUM.columns
    for j in tl.static_range(0, COLUMNS):
        row = tl.load(table + first + j)
        source = row_at(base, row, SUM.row_bytes, ELEMENT, SUM.aligned)
        value = widen(tl.load(source + column, mask=used(column < SUM.hidden, row), other=0.0))  # row access
        if SUM.weights == BY_ROW:
            value = value * tl.load(weights + row, mask=row >= 0, other=0.0)
        if SUM.weights == BY_ENTRY:
            value = value * tl.load(weights + first + j)
        total = tl.where(row >= 0, total + value, total)
    return total


@triton.jit(do_not_specialize=["num_sums"])
def _reduce_kernel(
    out, rows, table, weights, bias, link, num_sums, WIRE: tl.constexpr, SUM: tl.constexpr, ELEMENT: tl.constexpr
):
    if link is not None:
        sequence = tl.load(link.state)
        if wait_for_all(link, sequence, WIRE) == 0:
            return
        base = area_of(link, sequence & 1, ROWS, link.rank, WIRE)
    else:
        base = rows.to(tl.int64)
    RESULT: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(1) * SUM.block + tl.arange(0, SUM.block)
    inside = column < SUM.hidden
    for p in range(tl.program_id(0), num_sums, tl.num_programs(0)):
        if bias is not None:
            BIAS: tl.constexpr = bias.dtype.element_ty
            source = row_at(bias.to(tl.int64), p, SUM.hidden * (BIAS.primitive_bitwidth // 8), BIAS, SUM.aligned)
            total = widen(tl.load(source + column, mask=inside, other=0.0))  # row access
        else:
            total = tl.full((SUM.block,), 0, tl.float32)
        total = sum_rows(total, base, table, weights, p, column, SUM, ELEMENT)
        target = row_at(out.to(tl.int64), p, SUM.hidden * (RESULT.primitive_bitwidth // 8), RESULT, SUM.aligned)
        tl.store(target + column, narrow(total, RESULT), mask=inside)  # row access


def reduce(
    rows: Tensor | Arriving,
    table: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_programs: int | None = None,
) -> Tensor:
    """Sum the rows that each entry of the table names: (P, H).

    Args:
        rows: (N, H) float32, float16 or bfloat16; or rows that are arriving, named by their place in the rows area.
        table: (P, J) int32 row, -1: skipped.
        weights: (N,) float32 by row, (P, J) float32 by entry, or None: rows are added as they are.
        bias: (P, H) float32, float16 or bfloat16, or None.
        dtype: of the result; that of the rows unless told.
        max_programs: upper bound for the grid's first axis; what fits on the GPU unless told.

    >>> rows, table = torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([[0, 1], [-1, 0]], dtype=torch.int32)
    >>> reduce(rows, table, torch.tensor([0.5, 2.0])).tolist()
    [[20.5, 41.0], [0.5, 1.0]]
    """
    sums = sum_inputs(rows, table, weights)
    form = sums.form
    result = form.dtype if dtype is None else dtype
    element_of("the result", result)
    out = torch.empty(sums.table.shape[0], form.hidden, dtype=result, device=table.device)
    if bias is not None:
        element_of("bias", bias.dtype)
        assert bias.shape == out.shape, f"bias has shape {tuple(bias.shape)}, expected {tuple(out.shape)}"
        bias = bias.contiguous()
    geometry = sums.geometry(out, bias)
    warps, blocks = sums.warps(geometry), -(-form.hidden // geometry.block)
    grid = (num_programs(out.shape[0], table, max_programs, warps=warps, columns=blocks), blocks)
    launch(
        _reduce_kernel,
        grid,
        *(out, sums.rows, sums.table, sums.weights, bias, sums.link, out.shape[0]),
        num_warps=warps,
        WIRE=sums.wire,
        SUM=geometry,
        ELEMENT=element_of("rows", form.dtype),
    )
    return out


def reduce_ref(
    rows: Tensor | Arriving,
    table: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_programs: int | None = None,
) -> Tensor:
    """`reduce` in plain torch."""
    values = rows.read()[0] if isinstance(rows, Arriving) else rows
    hidden = values.shape[1]
    total = torch.zeros(table.shape[0], hidden, device=table.device) if bias is None else bias.float()
    for j in range(table.shape[1] if values.shape[0] else 0):
        entry = table[:, j].long()
        row = entry.clamp(min=0)
        value = values[row].float()
        if weights is not None:
            value = value * (weights[row] if weights.ndim == 1 else weights[:, j])[:, None]
        total = torch.where((entry >= 0)[:, None], total + value, total)
    return torch.where(total.isnan(), torch.nan, total).to(values.dtype if dtype is None else dtype)


class SumInputs(NamedTuple):
    rows: Tensor | None
    table: Tensor
    weights: Tensor | None
    wire_row: Tensor | None
    link: Link | None
    wire: Wire | None
    form: RowFormat
    row_bytes: int

    def geometry(self, *tensors: Tensor | None) -> Sum:
        """The geometry of these sums, given what else is read or written row by row."""
        hidden, size = self.form.hidden, self.form.dtype.itemsize
        others = [t for t in (self.rows, *tensors) if t is not None]
        aligned = all(t.data_ptr() % 16 == 0 and hidden * t.element_size() % 16 == 0 for t in others)
        most = _BLOCK_BYTES // size
        even = hidden & -hidden  # largest power of two that divides it
        block = min(even, most) if even >= most // 2 else min(most, triton.next_power_of_2(hidden))
        mode = NONE if self.weights is None else BY_ROW if self.weights.ndim == 1 else BY_ENTRY
        aligned = aligned and hidden * size % 16 == 0
        return Sum(hidden, self.row_bytes, self.table.shape[1], mode.value, block, aligned)

    def warps(self, geometry: Sum) -> int:
        """Warps so that a thread holds 32 bytes of a row."""
        return max(1, min(8, geometry.block * self.form.dtype.itemsize // 1024))


def sum_inputs(
    rows: Tensor | Arriving, table: Tensor, weights: Tensor | None, *, num_rows: int | None = None
) -> SumInputs:
    assert table.ndim == 2 and table.dtype == torch.int32, f"table {tuple(table.shape)} {table.dtype}: not (P, J) int32"
    if isinstance(rows, Arriving):
        form, source = rows.form, None
        link, wire, wire_row, row_bytes = rows.link, rows.wire, rows.wire_row, rows.wire.row_bytes
        by_row = num_rows
    else:
        source = contiguous_rows("rows", rows)
        form = RowFormat(source.shape[1], source.dtype)
        link, wire, wire_row, row_bytes = None, None, None, form.row_bytes
        by_row = source.shape[0] if num_rows is None else num_rows
    element_of("rows", form.dtype)
    assert form.hidden > 0, "rows without elements cannot be summed"
    if weights is not None:
        shape = (by_row,) if weights.ndim == 1 else tuple(table.shape)
        assert weights.dtype == torch.float32 and tuple(weights.shape) == shape, (
            f"weights {tuple(weights.shape)} {weights.dtype}, expected {shape} float32"
        )
        weights = weights.contiguous()
    return SumInputs(source, table.contiguous(), weights, wire_row, link, wire, form, row_bytes)
