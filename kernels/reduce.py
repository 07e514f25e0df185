"""Weighted sums of rows in a fixed order, and their gradients.

    out[p] = round(bias[p] + sum over ascending j of w * rows[table[p, j]])

The sum is float32 and starts from the bias or +0; each product is rounded before it is added (never fused); an entry
below 0 is skipped; the sum is rounded once, at the end. What is not a number becomes the one NaN that torch writes.

Legend: P sums, J entries per sum, N rows, H hidden, L local experts, W ranks, M max tokens per rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of, narrow, widen
from moecomm.kernels.permute import padding_rows
from moecomm.kernels.rows import Arriving, RowFormat, contiguous_rows, row_at, used
from moecomm.kernels.sync import wait_for_all
from moecomm.kernels.wire import ROWS, Link, Wire, area_of
from torch import Tensor

NONE, BY_ROW, BY_ENTRY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_BLOCK_BYTES = 4096  # of a row, per program
DOT_LANES = tl.constexpr(512)


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
    first = tl.cast(p, tl.int64) * SUM.columns
    for j in tl.static_range(0, SUM.columns):
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
            total = tl.zeros((SUM.block,), tl.float32)
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
        max_programs: upper bound for the grid's first axis; 8 per multiprocessor unless told.

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
    grid = (num_programs(out.shape[0], table, max_programs), -(-form.hidden // geometry.block))
    launch(
        _reduce_kernel,
        grid,
        *(out, sums.rows, sums.table, sums.weights, bias, sums.link, out.shape[0]),
        num_warps=sums.warps(geometry),
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


@triton.jit(do_not_specialize=["num_sums", "align"])
def _reduce_grad_rows_kernel(
    grad_rows,
    grad_out,
    table,
    weights,
    groups,
    wire_row,
    link,
    num_sums,
    align,
    WIRE: tl.constexpr,
    SUM: tl.constexpr,
    ELEMENT: tl.constexpr,
    LOCAL: tl.constexpr,
):
    if link is not None:
        sequence = tl.load(link.state)
        if wait_for_all(link, sequence, WIRE) == 0:
            return
        base = area_of(link, sequence & 1, ROWS, link.rank, WIRE)
    else:
        base = grad_out.to(tl.int64)
    RESULT: tl.constexpr = grad_rows.dtype.element_ty
    RESULT_BYTES: tl.constexpr = SUM.hidden * (RESULT.primitive_bitwidth // 8)
    column = tl.program_id(1) * SUM.block + tl.arange(0, SUM.block)
    inside = column < SUM.hidden
    for p in range(tl.program_id(0), num_sums, tl.num_programs(0)):
        at = tl.cast(p, tl.int32)
        if wire_row is not None:
            at = tl.load(wire_row + p)
        source = row_at(base, at, SUM.row_bytes, ELEMENT, SUM.aligned)
        grad = widen(tl.load(source + column, mask=used(inside, at), other=0.0))  # row access
        first = tl.cast(p, tl.int64) * SUM.columns
        for j in tl.static_range(0, SUM.columns):
            row = tl.load(table + first + j)
            value = grad
            if SUM.weights == BY_ROW:
                value = grad * tl.load(weights + row, mask=row >= 0, other=0.0)
            if SUM.weights == BY_ENTRY:
                value = grad * tl.load(weights + first + j)
            target = row_at(grad_rows.to(tl.int64), row, RESULT_BYTES, RESULT, SUM.aligned)
            tl.store(target + column, narrow(value, RESULT), mask=used(inside, row))  # row access
    if groups is not None:
        most = tl.maximum(align - 1, 1)
        for item in range(tl.program_id(0), LOCAL * (align - 1), tl.num_programs(0)):
            end, tokens = tl.load(groups + item // most), tl.load(groups + LOCAL + item // most)
            row = end - (tokens + align - 1) // align * align + tokens + item % most
            target = row_at(grad_rows.to(tl.int64), row, RESULT_BYTES, RESULT, SUM.aligned)
            zero = tl.zeros((SUM.block,), tl.float32)
            tl.store(target + column, narrow(zero, RESULT), mask=used(inside, end - 1 - row))  # row access


def reduce_grad_rows(
    grad_out: Tensor | Arriving,
    table: Tensor,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    num_rows: int,
    align: int = 1,
    max_programs: int | None = None,
) -> Tensor:
    """Differentiate `reduce` by its rows: (num_rows, H), row table[p, j] is round(w * grad_out[p]).

    Rows that no entry names are undefined, but for the padding of the groups, which is zero.

    Args:
        grad_out: (P, H) float32, float16 or bfloat16, or rows that are arriving.
        table: (P, J) int32 row, -1 for none; no row twice.
        weights: (N,) float32 by row, (P, J) float32 by entry, or None: 1.
        groups: (2, L) int32 as in `permute`, or None: no padding.
        num_rows: N.
        align: rows, multiple to which groups are padded.
        max_programs: upper bound for the grid's first axis; 8 per multiprocessor unless told.

    >>> table = torch.tensor([[0, 1]], dtype=torch.int32)
    >>> reduce_grad_rows(torch.tensor([[1.0, 2.0]]), table, torch.tensor([0.5, 2.0]), num_rows=2).tolist()
    [[0.5, 1.0], [2.0, 4.0]]
    """
    sums = sum_inputs(grad_out, table, weights, num_rows=num_rows)
    form, local = sums.form, 0 if groups is None else groups.shape[1]
    out = torch.empty(num_rows, form.hidden, dtype=form.dtype, device=table.device)
    geometry = sums.geometry(out)
    num_sums = sums.table.shape[0]
    programs = num_programs(max(num_sums, local * (align - 1)), table, max_programs)
    launch(
        _reduce_grad_rows_kernel,
        (programs, -(-form.hidden // geometry.block)),
        *(out, sums.rows, sums.table, sums.weights, groups, sums.wire_row, sums.link, num_sums, align),
        num_warps=sums.warps(geometry),
        WIRE=sums.wire,
        SUM=geometry,
        ELEMENT=element_of("grad_out", form.dtype),
        LOCAL=local,
    )
    return out


def reduce_grad_rows_ref(
    grad_out: Tensor | Arriving,
    table: Tensor,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    num_rows: int,
    align: int = 1,
    max_programs: int | None = None,
) -> Tensor:
    """`reduce_grad_rows` in plain torch."""
    grad = grad_out.read()[0] if isinstance(grad_out, Arriving) else grad_out
    out = torch.empty(num_rows, grad.shape[1], dtype=grad.dtype, device=grad.device)
    p, j = (table >= 0).nonzero().unbind(1)
    row = table[p, j].long()
    value = grad[p].float()
    if weights is not None:
        value = value * (weights[row] if weights.ndim == 1 else weights[p, j])[:, None]
    out[row] = torch.where(value.isnan(), torch.nan, value).to(grad.dtype)
    if groups is not None:
        out[padding_rows(groups, align)] = 0
    return out


@triton.jit(do_not_specialize=["num_sums"])
def _reduce_grad_weights_kernel(
    grad_weights,
    grad_out,
    rows,
    table,
    wire_row,
    link,
    num_sums,
    WIRE: tl.constexpr,
    SUM: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    if link is not None:
        sequence = tl.load(link.state)
        if wait_for_all(link, sequence, WIRE) == 0:
            return
        base = area_of(link, sequence & 1, ROWS, link.rank, WIRE)
    else:
        base = grad_out.to(tl.int64)
    ROW: tl.constexpr = rows.dtype.element_ty
    ROW_BYTES: tl.constexpr = SUM.hidden * (ROW.primitive_bitwidth // 8)
    for item in range(tl.program_id(0), num_sums * SUM.columns, tl.num_programs(0)):
        p = item // SUM.columns
        at = p
        if wire_row is not None:
            at = tl.load(wire_row + p)
        row = tl.load(table + item)
        known = tl.minimum(row, at)
        grad = row_at(base, at, SUM.row_bytes, ELEMENT, SUM.aligned)
        other = row_at(rows.to(tl.int64), row, ROW_BYTES, ROW, SUM.aligned)
        total = tl.zeros((DOT_LANES,), tl.float32)
        for start in range(0, SUM.hidden, DOT_LANES):
            column = start + tl.arange(0, DOT_LANES)
            inside = used(column < SUM.hidden, known)
            left = widen(tl.load(grad + column, mask=inside, other=0.0))  # row access
            right = widen(tl.load(other + column, mask=inside, other=0.0))  # row access
            total = tl.where(inside, total + left * right, total)
        # The upper half onto the lower half, until one is left: the same order on every target.
        for half in tl.static_range(0, 9):
            total = tl.sum(tl.reshape(total, (2, 256 >> half)), axis=0)
        if SUM.weights == BY_ROW:
            tl.store(
                grad_weights + row + tl.arange(0, 1),
                narrow(total, tl.float32),
                mask=row + tl.zeros((1,), tl.int32) >= 0,
            )
        else:
            tl.store(grad_weights + item + tl.arange(0, 1), narrow(total, tl.float32))


def reduce_grad_weights(
    grad_out: Tensor | Arriving,
    rows: Tensor,
    table: Tensor,
    *,
    by_row: bool = False,
    max_programs: int | None = None,
) -> Tensor:
    """Differentiate `reduce` by its weights: the product of grad_out[p] and rows[table[p, j]], 0 where there is no row.

    The sum is float32 in a fixed order: column c belongs to partial sum c mod 512, which adds its products (each
    rounded) in ascending c; then the upper half of the partial sums is added to the lower half until one is left.

    Args:
        grad_out: (P, H) float32, float16 or bfloat16, or rows that are arriving.
        rows: (N, H) float32, float16 or bfloat16.
        table: (P, J) int32 row, -1 for none.
        by_row: give (N,) by row number (no row twice; 0 for rows without an entry) instead of (P, J) by entry.
        max_programs: upper bound for the grid; 8 per multiprocessor unless told.

    >>> table = torch.tensor([[0, -1]], dtype=torch.int32)
    >>> reduce_grad_weights(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), table).tolist()
    [[11.0, 0.0]]
    """
    sums = sum_inputs(grad_out, table, None, num_rows=rows.shape[0])
    rows = contiguous_rows("rows", rows)
    element_of("rows", rows.dtype)
    assert rows.shape[1] == sums.form.hidden, f"rows have {rows.shape[1]} columns, grad_out {sums.form.hidden}"
    table = sums.table
    if by_row:
        out = torch.zeros(rows.shape[0], dtype=torch.float32, device=table.device)
    else:
        out = torch.empty(table.shape, dtype=torch.float32, device=table.device)
    geometry = sums.geometry(rows)._replace(weights=BY_ROW.value if by_row else BY_ENTRY.value)
    launch(
        _reduce_grad_weights_kernel,
        (num_programs(table.numel(), table, max_programs),),
        *(out, sums.rows, rows, table, sums.wire_row, sums.link, table.shape[0]),
        num_warps=1,
        WIRE=sums.wire,
        SUM=geometry,
        ELEMENT=element_of("grad_out", sums.form.dtype),
    )
    return out


def reduce_grad_weights_ref(
    grad_out: Tensor | Arriving,
    rows: Tensor,
    table: Tensor,
    *,
    by_row: bool = False,
    max_programs: int | None = None,
) -> Tensor:
    """`reduce_grad_weights` in plain torch."""
    grad = grad_out.read()[0] if isinstance(grad_out, Arriving) else grad_out
    p, j = (table >= 0).nonzero().unbind(1)
    product = grad[p].float() * rows[table[p, j].long()].float()
    total = torch.zeros(p.shape[0], DOT_LANES.value, device=table.device)
    for block in product.split(DOT_LANES.value, dim=1):
        total[:, : block.shape[1]] += block
    while total.shape[1] > 1:
        low, high = total.chunk(2, dim=1)
        total = low + high
    dots = torch.where(total.isnan(), torch.nan, total)[:, 0]
    if by_row:
        out = torch.zeros(rows.shape[0], device=table.device)
        out[table[p, j].long()] = dots
    else:
        out = torch.zeros(table.shape, device=table.device)
        out[p, j] = dots
    return out


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
