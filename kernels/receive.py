"""Wait for what peers pushed, work out where it belongs, and bring it into a layout: one kernel.

Legend: W ranks, M max tokens per rank, K top-k, L local experts, P pairs (source, token) received, N rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels.permute import empty_rows, padding_rows, scales_at, zero_padding, zero_rest, zero_row
from moecomm.kernels.rows import Arriving, Row, as_words, row_at, row_geometry, used, warps_for
from moecomm.kernels.sync import wait_for_all
from moecomm.kernels.wire import COUNTS, META, ROWS, ROWS_NEEDED, STALLED, Wire, area_of, view_memory
from torch import Tensor

EXPERT, PADDED, RANK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LAYOUTS = {"expert": EXPERT, "padded": PADDED, "rank": RANK}


class _Arrangement(NamedTuple):
    """How rows are to lie, known when the kernel is compiled. local: L."""

    layout: int
    local: int
    zero_rest: bool


class Received(NamedTuple):
    """What `receive` brought.

    x: (N, H) rows. scales: (N, G) float32, or None. weights: (N,) float32 weight of each row, 0 in padding; (P, K) in
        layout "rank".
    table: (P, K) int32 row of each entry, -1 elsewhere; local expert ids in layout "rank". Pairs are sorted by (source
        rank, token); those beyond the last are -1.
    wire_row: (P,) int32 source rank * M + slot of each pair, -1 beyond the last.
    token: (P,) int32 number of the pair's token at its source, -1 beyond the last.
    groups: (2, L) int32: end of each expert's group of rows; its tokens.
    """

    x: Tensor
    scales: Tensor | None
    weights: Tensor
    table: Tensor
    wire_row: Tensor
    token: Tensor
    groups: Tensor


@triton.jit
def _plan_groups(
    starts, groups, counts, align, num_rows, WIRE: tl.constexpr, LOCAL: tl.constexpr, LAYOUT: tl.constexpr
):
    """Write, for this program alone, where the run of each source begins in each group; then ends and tokens.

    Gives the rows that are needed, 0 if they fit.
    """
    source = tl.arange(0, WIRE.world_p2)[:, None]
    local = tl.arange(0, WIRE.local_p2)[None, :]
    place = counts + source * WIRE.counts_width + 1 + local
    exists = (source < WIRE.world) & (local < LOCAL)
    count = tl.load(place, mask=exists, other=0).to(tl.int32)  # the stamp is in the upper half
    tokens = tl.sum(count, 0)
    padded = tl.zeros_like(tokens) + align if LAYOUT == PADDED else (tokens + align - 1) // align * align
    local = tl.arange(0, WIRE.local_p2)
    padded = tl.where(local < LOCAL, padded, 0)
    ends = tl.cumsum(padded, 0)
    run = (ends - padded)[None, :] + tl.cumsum(count, 0) - count
    tl.store(starts + source * WIRE.local_p2 + local[None, :], run)
    tl.store(starts + WIRE.world_p2 * WIRE.local_p2 + local, ends)
    tl.store(starts + (WIRE.world_p2 + 1) * WIRE.local_p2 + local, tokens)
    tl.debug_barrier()  # other threads of this program read it
    if LAYOUT == PADDED:
        needed, room = tl.max(tokens, 0), align
    elif LAYOUT == EXPERT:
        needed, room = tl.max(ends, 0), num_rows
    else:
        needed, room = 0, num_rows
    if tl.program_id(0) == 0:
        if LAYOUT == EXPERT:  # whoever works through the groups must find no more than there are rows
            tokens = tl.maximum(tl.minimum(tokens, num_rows - (ends - padded)), 0)
            ends = tl.minimum(ends, num_rows)
        tl.store(groups + local, ends, mask=local < LOCAL)
        tl.store(groups + LOCAL + local, tokens, mask=local < LOCAL)
    return tl.where(needed > room, needed, 0)


@triton.jit
def _place_entries(
    weights,
    table,
    starts,
    meta,
    source,
    pair,
    first_expert,
    num_rows,
    WIRE: tl.constexpr,
    LOCAL: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Write a pair's weights and its line of the table; the line, (top_k_p2,) int32."""
    k = tl.arange(0, WIRE.top_k_p2)
    line = tl.cast(pair, tl.int64) * WIRE.top_k + k
    expert = tl.load(meta + k, mask=k < WIRE.top_k, other=-1) - first_expert
    mine = (expert >= 0) & (expert < LOCAL) & (k < WIRE.top_k)
    weight = tl.load(meta + 2 * WIRE.top_k + k, mask=mine, other=0).to(tl.float32, bitcast=True)
    if LAYOUT == RANK:
        row = tl.where(mine, expert, -1)
        tl.store(weights + line, weight, mask=k < WIRE.top_k)
    else:
        run = tl.load(starts + source * WIRE.local_p2 + expert, mask=mine, other=0)
        row = run + tl.load(meta + WIRE.top_k + k, mask=mine, other=0)
        limit = tl.load(starts + WIRE.world_p2 * WIRE.local_p2 + expert, mask=mine, other=0)
        row = tl.where(mine & (row < limit) & (row < num_rows), row, -1)
        tl.store(weights + row, weight, mask=row >= 0)
    tl.store(table + line, row, mask=k < WIRE.top_k)
    return row


@triton.jit
def _copy_pair(out, out_scales, rows, at, pair, row, WIRE: tl.constexpr, ROW: tl.constexpr, LAYOUT: tl.constexpr):
    """Copy a pair's row, and its scales, to the rows of its line of the table; in layout "rank" to row `pair`."""
    CHUNKS: tl.constexpr = ROW.chunks
    WORD: tl.constexpr = out.dtype.element_ty
    COPIES: tl.constexpr = 1 if LAYOUT == RANK else WIRE.top_k
    k = tl.arange(0, WIRE.top_k_p2)
    data = row_at(rows, at, WIRE.row_bytes, WORD, ROW.aligned)
    for chunk in tl.static_range(0, CHUNKS):
        column = chunk * ROW.block + tl.arange(0, ROW.block)
        value = tl.load(data + column, mask=column < ROW.words)  # row access
        for j in tl.static_range(0, COPIES):
            to = pair if LAYOUT == RANK else tl.sum(tl.where(k == j, row, 0), 0)
            target = row_at(out.to(tl.int64), to, ROW.words * ROW.word_bytes, WORD, ROW.aligned)
            tl.store(target + column, value, mask=used(column < ROW.words, to))  # row access
    if ROW.scale_words > 0:
        group = tl.arange(0, ROW.scale_p2)
        data = row_at(rows + ROW.scale_offset, at, WIRE.row_bytes, tl.float32, True)
        scale = tl.load(data + group, mask=group < ROW.scale_words)
        for j in tl.static_range(0, COPIES):
            to = pair if LAYOUT == RANK else tl.sum(tl.where(k == j, row, 0), 0)
            tl.store(scales_at(out_scales, to, ROW), scale, mask=used(group < ROW.scale_words, to))


@triton.jit(do_not_specialize=["first_expert", "align", "num_pairs", "num_rows"])
def _receive_kernel(
    out,
    out_scales,
    weights,
    table,
    origin,
    groups,
    scratch,
    link,
    first_expert,
    align,
    num_pairs,
    num_rows,
    WIRE: tl.constexpr,
    ROW: tl.constexpr,
    TO: tl.constexpr,
):
    LOCAL: tl.constexpr = TO.local
    LAYOUT: tl.constexpr = TO.layout
    sequence = tl.load(link.state)
    if wait_for_all(link, sequence, WIRE) == 0:
        return
    generation = sequence & 1
    rows = area_of(link, generation, ROWS, link.rank, WIRE)
    meta_area = area_of(link, generation, META, link.rank, WIRE)
    counts = area_of(link, generation, COUNTS, link.rank, WIRE).to(tl.pointer_type(tl.int64))
    starts = scratch + tl.program_id(0) * ((WIRE.world_p2 + 2) * WIRE.local_p2)
    needed = _plan_groups(starts, groups, counts, align, num_rows, WIRE, LOCAL, LAYOUT)
    sources = tl.arange(0, WIRE.world_p2)
    pairs = tl.load(counts + sources * WIRE.counts_width, mask=sources < WIRE.world, other=0).to(tl.int32)
    ends = tl.cumsum(pairs, 0)
    total = tl.sum(pairs, 0)
    needed = tl.maximum(needed, tl.where(total > num_pairs, total, 0))
    if (tl.program_id(0) == 0) & (needed > 0):
        tl.store(link.status + ROWS_NEEDED, needed)
    for pair in range(tl.program_id(0), num_pairs, tl.num_programs(0)):
        if pair < total:
            source = tl.sum(((ends <= pair) & (sources < WIRE.world)).to(tl.int32), 0)
            at = source * link.max_tokens + pair - tl.sum(tl.where(sources < source, pairs, 0), 0)
            meta = row_at(meta_area, at, 4 * WIRE.meta_words, tl.int32, True)
            row = _place_entries(
                weights, table, starts, meta, source, pair, first_expert, num_rows, WIRE, LOCAL, LAYOUT
            )
            tl.store(origin + pair, at)
            tl.store(origin + num_pairs + pair, tl.load(meta + 3 * WIRE.top_k))
            _copy_pair(out, out_scales, rows, at, pair, row, WIRE, ROW, LAYOUT)
        else:
            k = tl.arange(0, WIRE.top_k_p2)
            line = tl.cast(pair, tl.int64) * WIRE.top_k + k
            tl.store(table + line, tl.full((WIRE.top_k_p2,), -1, tl.int32), mask=k < WIRE.top_k)
            tl.store(origin + pair, -1)
            tl.store(origin + num_pairs + pair, -1)
            if LAYOUT == RANK:
                tl.store(weights + line, tl.full((WIRE.top_k_p2,), 0, tl.float32), mask=k < WIRE.top_k)
                if TO.zero_rest:
                    zero_row(out, out_scales, None, pair, 0, ROW)
    if LAYOUT == EXPERT:
        group_ends = starts + WIRE.world_p2 * WIRE.local_p2
        zero_padding(out, out_scales, weights, group_ends, group_ends + WIRE.local_p2, align, num_rows, ROW, LOCAL)
        if TO.zero_rest:
            zero_rest(out, out_scales, weights, group_ends, num_rows, ROW, LOCAL)


def receive(
    rows: Arriving,
    *,
    experts: tuple[int, int],
    num_pairs: int,
    num_rows: int,
    layout: str = "expert",
    align: int = 1,
    zero_rest: bool = False,
    max_programs: int | None = None,
) -> Received:
    """Wait for the pushes of all ranks and bring their rows into a layout.

    Rows are sorted by (local expert, source rank, source token, k). In layout "expert" each expert's group is padded
    with zero rows to a multiple of `align`; in layout "padded" it has room for exactly `align` rows, undefined beyond
    its tokens; layout "rank" is one row per pair, sorted by (source rank, token). What does not fit is left out and
    `link.status` says how many rows were needed; in layout "expert" the groups then end where the rows do. If the wait
    gives up nothing is read and results are undefined.

    Args:
        rows: the rows that are arriving; its `wire_row` is not used.
        experts: first flat id and number of this rank's experts.
        num_pairs: P, room for pairs: the exact number, or W * M for a static size.
        num_rows: N, room for rows: the exact number, or an upper bound (P in layout "rank").
        layout: "expert", "padded" or "rank".
        align: rows per multiple, or per group in layout "padded".
        zero_rest: whether the rows behind the last group, or pair, become zero too; not in layout "padded".
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> from moecomm.kernels.layout import layout as lay_out
    >>> from moecomm.kernels.push import push
    >>> from moecomm.kernels.rows import RowFormat
    >>> from moecomm.kernels.wire import Wire, loopback
    >>> wire = Wire.of(world=1, top_k=2, max_local=2, row_bytes=16)
    >>> (link,), memory = loopback(wire, max_tokens=2)
    >>> ids = torch.arange(2, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    >>> sent = lay_out(torch.tensor([[1, 0], [1, -1]]), None, *ids, wire=wire, max_tokens=2, status=link.status)
    >>> push(torch.tensor([[5.0], [7.0]]), sent, link, wire=wire)
    >>> form = RowFormat(1, torch.float32)
    >>> got = receive(Arriving(link, wire, form), experts=(0, 2), num_pairs=2, num_rows=4, align=2)
    >>> got.x.flatten().tolist(), got.groups.tolist(), got.table.tolist()
    ([5.0, 0.0, 5.0, 7.0], [[2, 4], [1, 2]], [[2, 0], [3, -1]])
    """
    wire, device, row, out = _prepare(rows, experts, num_pairs, num_rows, layout, align)
    count = experts[1]
    warps = warps_for(row.block * row.word_bytes)
    programs = num_programs(max(num_pairs, count * (align - 1)), out.table, max_programs, warps=warps)
    origin = torch.empty(2, num_pairs, dtype=torch.int32, device=device)
    scratch = torch.empty(programs, (wire.world_p2 + 2) * wire.local_p2, dtype=torch.int32, device=device)
    outputs = as_words(out.x, row), out.scales, out.weights, out.table, origin, out.groups, scratch
    launch(
        _receive_kernel,
        (programs,),
        *(*outputs, rows.link, experts[0], align, num_pairs, num_rows),
        num_warps=warps,
        WIRE=wire,
        ROW=row,
        TO=_Arrangement(_LAYOUTS[layout].value, count, zero_rest),
    )
    return out._replace(wire_row=origin[0], token=origin[1])


def receive_ref(  # noqa: C901 - the slow reading, branch by branch
    rows: Arriving,
    *,
    experts: tuple[int, int],
    num_pairs: int,
    num_rows: int,
    layout: str = "expert",
    align: int = 1,
    zero_rest: bool = False,
    max_programs: int | None = None,
) -> Received:
    """`receive` in plain torch, sorting instead of counting; the buffer must be CPU memory of this process."""
    wire, _, _, out = _prepare(rows, experts, num_pairs, num_rows, layout, align)
    values, scales = rows._replace(wire_row=None).read()
    (first, count), top_k, by_pair = experts, wire.top_k, num_pairs if layout == "rank" else 0
    if int(rows.link.status[int(STALLED)]):
        return out
    meta, places = _arrived_ref(rows)
    for filled, value in ((out.table, -1), (out.wire_row, -1), (out.token, -1), (out.weights[:by_pair], 0)):
        filled.fill_(value)
    members: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for pair, at in enumerate(places):
        out.wire_row[pair], out.token[pair] = at, meta[at, 3 * top_k]
        if by_pair:
            _copy_row_ref(out, pair, values, scales, at)
        for k, expert in enumerate((meta[at, :top_k] - first).tolist()):
            if 0 <= expert < count:
                members[expert].append((pair, k))
    weights = meta[:, 2 * top_k : 3 * top_k].clone().view(torch.float32)
    end = 0
    for expert, entries in enumerate(members):
        begin, room = end, align if layout == "padded" else -(-len(entries) // align) * align
        end = begin + room
        out.groups[0, expert], out.groups[1, expert] = end, len(entries)
        for row, (pair, k) in enumerate(entries, begin):
            weight = weights[places[pair], k]
            if by_pair:
                out.table[pair, k], out.weights[pair, k] = expert, weight
            elif row < min(end, num_rows):
                out.table[pair, k], out.weights[row] = row, weight
                _copy_row_ref(out, row, values, scales, places[pair])
    padding = padding_rows(out.groups, align, num_rows if zero_rest else None)
    if layout == "expert":
        tokens, ends = out.groups[1], out.groups[0]
        begins = ends - (tokens + align - 1) // align * align
        out.groups[1], out.groups[0] = tokens.minimum(num_rows - begins).clamp(min=0), ends.clamp(max=num_rows)
    elif layout == "rank":
        padding = torch.arange(len(places) if zero_rest else num_rows, num_rows)
    padding = padding[padding < num_rows].long() if layout != "padded" else padding[:0]
    for part in (out.x.view(torch.uint8), out.scales, None if by_pair else out.weights):
        if part is not None:
            part[padding] = 0
    return out


def _arrived_ref(rows: Arriving) -> tuple[Tensor, list[int]]:
    """Metadata of all slots, and the places of those in use, sorted by (source rank, token)."""
    link, wire = rows.link, rows.wire
    area = link.peers[int(link.state[0]) & 1, :, link.rank]
    meta = view_memory(int(area[int(META)]), (wire.world * link.max_tokens, wire.meta_words), torch.int32)
    counts = view_memory(int(area[int(COUNTS)]), (wire.world, wire.counts_width), torch.int64)
    pairs = (counts[:, 0] & 0xFFFFFFFF).tolist()
    return meta, [source * link.max_tokens + slot for source in range(wire.world) for slot in range(pairs[source])]


def _prepare(
    rows: Arriving, experts: tuple[int, int], num_pairs: int, num_rows: int, layout: str, align: int
) -> tuple[Wire, torch.device, Row, Received]:
    assert layout in _LAYOUTS, f"layout {layout!r}, expected one of {sorted(_LAYOUTS)}"
    assert align >= 1, f"align is {align}, expected at least 1"
    link, wire, form, _ = rows
    assert 0 <= experts[1] < wire.counts_width, f"{experts[1]} experts, the wire has room for {wire.counts_width - 1}"
    assert form.wire_bytes <= wire.row_bytes, f"rows of {form.wire_bytes} bytes, the wire has room for {wire.row_bytes}"
    device, int32, top_k = link.state.device, torch.int32, wire.top_k
    by_pair = layout == "rank"
    assert not by_pair or num_rows == num_pairs, f"{num_rows} rows for {num_pairs} pairs"
    x, scales = empty_rows(num_rows, form, device)
    weights = torch.empty((num_pairs, top_k) if by_pair else (num_rows,), device=device)
    table = torch.empty(num_pairs, top_k, dtype=int32, device=device)
    wire_row, token = (torch.empty(num_pairs, dtype=int32, device=device) for _ in range(2))
    groups = torch.empty(2, experts[1], dtype=int32, device=device)
    row = row_geometry(form, x)
    return wire, device, row, Received(x, scales, weights, table, wire_row, token, groups)


def _copy_row_ref(out: Received, row: int, values: Tensor, scales: Tensor, at: int) -> None:
    out.x[row].view(torch.uint8).copy_(values[at].view(torch.uint8))
    if out.scales is not None:
        out.scales[row] = scales[at]
