"""The two gradients of `reduce`: by its rows and by its weights.

Legend: P sums, J entries per sum, N rows, H hidden, L local experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of, narrow, widen
from moecomm.kernels.permute import padding_rows
from moecomm.kernels.reduce import BY_ENTRY, BY_ROW, sum_inputs
from moecomm.kernels.rows import Arriving, contiguous_rows, row_at, used
from moecomm.kernels.sync import wait_for_all
from moecomm.kernels.wire import ROWS, area_of
from torch import Tensor

DOT_LANES = tl.constexpr(512)


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
    COLUMNS: tl.constexpr = SUM.columns
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
        for j in tl.static_range(0, COLUMNS):
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
            zero = tl.full((SUM.block,), 0, tl.float32)
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
        max_programs: upper bound for the grid's first axis; what fits on the GPU unless told.

    >>> table = torch.tensor([[0, 1]], dtype=torch.int32)
    >>> reduce_grad_rows(torch.tensor([[1.0, 2.0]]), table, torch.tensor([0.5, 2.0]), num_rows=2).tolist()
    [[0.5, 1.0], [2.0, 4.0]]
    """
    sums = sum_inputs(grad_out, table, weights, num_rows=num_rows)
    form, local = sums.form, 0 if groups is None else groups.shape[1]
    out = torch.empty(num_rows, form.hidden, dtype=form.dtype, device=table.device)
    geometry = sums.geometry(out)
    num_sums = sums.table.shape[0]
    warps, blocks = sums.warps(geometry), -(-form.hidden // geometry.block)
    work = max(num_sums, local * (align - 1))
    launch(
        _reduce_grad_rows_kernel,
        (num_programs(work, table, max_programs, warps=warps, columns=blocks), blocks),
        *(out, sums.rows, sums.table, sums.weights, groups, sums.wire_row, sums.link, num_sums, align),
        num_warps=warps,
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
        total = tl.full((DOT_LANES,), 0, tl.float32)
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
                mask=row + tl.full((1,), 0, tl.int32) >= 0,
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
        max_programs: upper bound for the grid; what fits on the GPU unless told.

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
        (num_programs(table.numel(), table, max_programs, warps=1),),
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
