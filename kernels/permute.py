"""Rows into expert groups, and back.

Legend: P pairs (token, destination rank) received, N rows of the expert layout, L local experts, H hidden, J columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels.rows import Arriving, RowFormat, as_words, contiguous_rows, row_at, row_geometry, used, warps_for
from moecomm.kernels.sync import wait_for_all
from moecomm.kernels.wire import ROWS, area_of
from torch import Tensor


@triton.jit
def scales_at(scales, row, ROW: tl.constexpr):
    """Pointers to the scales of a row."""
    return scales + tl.cast(row, tl.int64) * ROW.scale_words + tl.arange(0, ROW.scale_p2)


@triton.jit
def zero_row(out, out_scales, weights, row, wanted, ROW: tl.constexpr):
    """Zero a row, its scales and its weight, unless `wanted` is negative."""
    CHUNKS: tl.constexpr = ROW.chunks
    WORD: tl.constexpr = out.dtype.element_ty
    for chunk in tl.static_range(0, CHUNKS):
        column = chunk * ROW.block + tl.arange(0, ROW.block)
        target = row_at(out.to(tl.int64), row, ROW.words * ROW.word_bytes, WORD, ROW.aligned)
        zero = tl.zeros_like(column).to(WORD)
        tl.store(target + column, zero, mask=used(column < ROW.words, wanted))  # row access
    if ROW.scale_words > 0:
        group = tl.arange(0, ROW.scale_p2)
        zero = tl.full((ROW.scale_p2,), 0, tl.float32)
        tl.store(scales_at(out_scales, row, ROW), zero, mask=used(group < ROW.scale_words, wanted))
    if weights is not None:
        tl.store(weights + row, 0.0, mask=wanted >= 0)


@triton.jit
def zero_padding(out, out_scales, weights, ends, tokens, align, num_rows, ROW: tl.constexpr, LOCAL: tl.constexpr):
    """Zero the rows, scales and weights between the last token of each group and its padded end."""
    most = tl.maximum(align - 1, 1)
    for item in range(tl.program_id(0), LOCAL * (align - 1), tl.num_programs(0)):
        local = item // most
        end, count = tl.load(ends + local), tl.load(tokens + local)
        row = end - (count + align - 1) // align * align + count + item % most
        zero_row(out, out_scales, weights, row, tl.minimum(end, num_rows) - 1 - row, ROW)


@triton.jit
def zero_rest(out, out_scales, weights, ends, num_rows, ROW: tl.constexpr, LOCAL: tl.constexpr):
    """Zero the rows, scales and weights behind the last group."""
    begin = 0
    if LOCAL > 0:
        begin = tl.load(ends + LOCAL - 1)
    for row in range(begin + tl.program_id(0), num_rows, tl.num_programs(0)):
        zero_row(out, out_scales, weights, row, 0, ROW)


@triton.jit(do_not_specialize=["num_pairs", "align", "num_rows"])
def _permute_kernel(
    out,
    out_scales,
    rows,
    table,
    wire_row,
    groups,
    link,
    num_pairs,
    align,
    num_rows,
    WIRE: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOCAL: tl.constexpr,
    ZERO_REST: tl.constexpr,
):
    CHUNKS: tl.constexpr = ROW.chunks
    WORD: tl.constexpr = out.dtype.element_ty
    OUT_BYTES: tl.constexpr = ROW.words * ROW.word_bytes
    if link is not None:
        sequence = tl.load(link.state)
        if wait_for_all(link, sequence, WIRE) == 0:
            return
        base = area_of(link, sequence & 1, ROWS, link.rank, WIRE)
    for pair in range(tl.program_id(0), num_pairs, tl.num_programs(0)):
        if link is not None:
            at = tl.load(wire_row + pair)
            source = row_at(base, at, WIRE.row_bytes, WORD, ROW.aligned)
        else:
            source = row_at(rows.to(tl.int64), pair, OUT_BYTES, WORD, ROW.aligned)
            at = 0
        for chunk in tl.static_range(0, CHUNKS):
            column = chunk * ROW.block + tl.arange(0, ROW.block)
            value = tl.load(source + column, mask=used(column < ROW.words, at), other=0)  # row access
            for j in tl.static_range(0, COLUMNS):
                row = tl.load(table + tl.cast(pair, tl.int64) * COLUMNS + j)
                target = row_at(out.to(tl.int64), row, OUT_BYTES, WORD, ROW.aligned)
                tl.store(target + column, value, mask=used(column < ROW.words, row))  # row access
        if ROW.scale_words > 0:
            group = tl.arange(0, ROW.scale_p2)
            inside = used(group < ROW.scale_words, at)
            source = row_at(base + ROW.scale_offset, at, WIRE.row_bytes, tl.float32, True)
            scale = tl.load(source + group, mask=inside)
            for j in tl.static_range(0, COLUMNS):
                row = tl.load(table + tl.cast(pair, tl.int64) * COLUMNS + j)
                tl.store(scales_at(out_scales, row, ROW), scale, mask=used(inside, row))
    if groups is not None:
        zero_padding(out, out_scales, None, groups, groups + LOCAL, align, num_rows, ROW, LOCAL)
        if ZERO_REST:
            zero_rest(out, out_scales, None, groups, num_rows, ROW, LOCAL)


def permute(
    rows: Tensor | Arriving,
    table: Tensor,
    groups: Tensor | None = None,
    *,
    num_rows: int,
    align: int = 1,
    zero_rest: bool = False,
    max_programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Copy each pair's row to the rows of the expert layout that its entries name; (num_rows, H) and their scales.

    Rows that no entry names are undefined, but for the padding of the groups, which is zero. So is what a pair gives
    whose place in the wire is -1.

    Args:
        rows: (P, H) any dtype, or rows that are arriving, with their scales if they have any.
        table: (P, J) int32 row of the result, -1 for none; no row twice.
        groups: (2, L) int32: end of each padded group; tokens of each group. None: no padding.
        num_rows: N.
        align: rows, multiple to which groups are padded.
        zero_rest: whether the rows behind the last group become zero too.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> rows, table = torch.tensor([[1.0], [2.0]]), torch.tensor([[0, 4], [1, -1]], dtype=torch.int32)
    >>> out, _ = permute(rows, table, torch.tensor([[4, 8], [2, 1]], dtype=torch.int32), num_rows=8, align=4)
    >>> out.flatten().tolist()
    [1.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    """
    table, form = checked_table(table, rows), form_of(rows)
    out, scales = empty_rows(num_rows, form, table.device)
    local = 0 if groups is None else groups.shape[1]
    link, wire, wire_row, source = None, None, None, None
    if isinstance(rows, Arriving):
        link, wire, wire_row = rows.link, rows.wire, rows.wire_row
        row = row_geometry(form, out)
    else:
        rows = contiguous_rows("rows", rows)
        row = row_geometry(form, out, rows)
        source = as_words(rows, row)
    num_pairs, warps = table.shape[0], warps_for(row.block * row.word_bytes)
    launch(
        _permute_kernel,
        (num_programs(max(num_pairs, local * (align - 1)), table, max_programs, warps=warps, queued=True),),
        *(as_words(out, row), scales, source, table, wire_row, groups, link, num_pairs, align, num_rows),
        num_warps=warps,
        WIRE=wire,
        ROW=row,
        COLUMNS=table.shape[1],
        LOCAL=local,
        ZERO_REST=zero_rest,
    )
    return out, scales


def permute_ref(
    rows: Tensor | Arriving,
    table: Tensor,
    groups: Tensor | None = None,
    *,
    num_rows: int,
    align: int = 1,
    zero_rest: bool = False,
    max_programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`permute` in plain torch."""
    table, form = checked_table(table, rows), form_of(rows)
    out, out_scales = empty_rows(num_rows, form, table.device)
    values, scales = rows.read() if isinstance(rows, Arriving) else (rows, None)
    pair, column = (table >= 0).nonzero().unbind(1)
    target = table[pair, column].long()
    padding = target[:0] if groups is None else padding_rows(groups, align, num_rows if zero_rest else None)
    for result, source in ((out, values), (out_scales, scales)):
        if result is not None and source is not None:
            result.view(torch.uint8)[target] = source.contiguous().view(torch.uint8)[pair]
            result.view(torch.uint8)[padding] = 0
    return out, out_scales


def padding_rows(groups: Tensor, align: int, num_rows: int | None = None) -> Tensor:
    """Rows between the last token of each group and its padded end, and all behind them up to `num_rows`.

    >>> padding_rows(torch.tensor([[4, 8], [2, 4]], dtype=torch.int32), align=4).tolist()
    [2, 3]
    """
    ends, tokens = groups.tolist()
    runs = [range(end - -count % align, end) for end, count in zip(ends, tokens, strict=True)]
    runs.append(range(ends[-1] if ends else 0, num_rows or 0))
    return torch.tensor([row for run in runs for row in run], dtype=torch.int64, device=groups.device)


@triton.jit(do_not_specialize=["num_rows"])
def _unpermute_kernel(out, rows, index, num_rows, ROW: tl.constexpr):
    CHUNKS: tl.constexpr = ROW.chunks
    WORD: tl.constexpr = out.dtype.element_ty
    BYTES: tl.constexpr = ROW.words * ROW.word_bytes
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        at = tl.load(index + row)
        source = row_at(rows.to(tl.int64), at, BYTES, WORD, ROW.aligned)
        target = row_at(out.to(tl.int64), row, BYTES, WORD, ROW.aligned)
        for chunk in tl.static_range(0, CHUNKS):
            column = chunk * ROW.block + tl.arange(0, ROW.block)
            value = tl.load(source + column, mask=used(column < ROW.words, at), other=0)  # row access
            tl.store(target + column, value, mask=column < ROW.words)  # row access


def unpermute(rows: Tensor, index: Tensor, *, max_programs: int | None = None) -> Tensor:
    """Copy rows back: row i of the (Q, H) result is `rows[index[i]]`, or zero where the index is negative.

    With the table of `permute` as index this undoes it; with token numbers it packs rows for sending.

    Args:
        rows: (N, H) any dtype.
        index: (Q,) int32 row of `rows`, -1 for none.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> unpermute(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1, 0], dtype=torch.int32)).flatten().tolist()
    [2.0, 0.0, 1.0]
    """
    rows, index = contiguous_rows("rows", rows), index.contiguous()
    assert index.ndim == 1 and index.dtype == torch.int32, f"index {tuple(index.shape)} {index.dtype}: not (Q,) int32"
    out, _ = empty_rows(index.shape[0], form_of(rows), rows.device)
    if out.numel():
        row = row_geometry(RowFormat(rows.shape[1], rows.dtype), rows, out)
        warps = warps_for(row.block * row.word_bytes)
        grid = (num_programs(index.shape[0], rows, max_programs, warps=warps, queued=True),)
        words = as_words(out, row), as_words(rows, row)
        launch(_unpermute_kernel, grid, *words, index, index.shape[0], num_warps=warps, ROW=row)
    return out


def unpermute_ref(rows: Tensor, index: Tensor, *, max_programs: int | None = None) -> Tensor:
    """`unpermute` in plain torch."""
    out = rows.new_zeros(index.shape[0], rows.shape[1])
    out.view(torch.uint8)[index >= 0] = rows.contiguous().view(torch.uint8)[index[index >= 0].long()]
    return out


def form_of(rows: Tensor | Arriving) -> RowFormat:
    """What the rows hold."""
    return rows.form if isinstance(rows, Arriving) else RowFormat(rows.shape[1], rows.dtype)


def empty_rows(num_rows: int, form: RowFormat, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Room for rows, and for their scales if they have any."""
    out = torch.empty(num_rows, form.hidden, dtype=form.dtype, device=device)
    if not form.scale_columns:
        return out, None
    return out, torch.empty(num_rows, form.scale_columns, dtype=torch.float32, device=device)


def checked_table(table: Tensor, rows: Tensor | Arriving) -> Tensor:
    """The table, contiguous, if it fits the rows."""
    assert table.ndim == 2 and table.dtype == torch.int32, f"table {tuple(table.shape)} {table.dtype}: not (P, J) int32"
    if isinstance(rows, Arriving):
        num_rows = table.shape[0] if rows.wire_row is None else rows.wire_row.shape[0]
    else:
        num_rows = rows.shape[0]
    assert table.shape[0] == num_rows, f"table of {table.shape[0]} pairs for {num_rows} rows"
    return table.contiguous()
