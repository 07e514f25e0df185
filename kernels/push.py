"""Rows and what belongs to them, straight into the peers' memory.

Legend: T tokens, K top-k, H hidden, W ranks, M max tokens per rank, G scale columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of, widen
from moecomm.kernels.layout import SendLayout
from moecomm.kernels.quant import GROUP, encode_groups, has_fp8, quantize_ref
from moecomm.kernels.rows import RowFormat, as_words, contiguous_rows, row_at, row_geometry, used, warps_for
from moecomm.kernels.sync import may_send, signal_ref, signal_when_all_arrived
from moecomm.kernels.wire import COUNTS, META, ROWS, STALLED, Link, Wire, area_of, view_memory
from torch import Tensor

_GROUPS_AT_ONCE = 32  # of 128 elements each


@triton.jit
def _push_beside_rows(token, generation, pair_row, meta, link, WIRE: tl.constexpr):
    """Copy a token's metadata to every rank that gets its row."""
    WORLD: tl.constexpr = WIRE.world
    word = tl.arange(0, WIRE.meta_p2)
    inside = word < WIRE.meta_words
    source = row_at(meta.to(tl.int64), token, 4 * WIRE.meta_words, tl.int32, True)
    value = tl.load(source + word, mask=inside)
    for rank in tl.static_range(0, WORLD):
        pair = tl.load(pair_row + token * WIRE.world + rank)
        row = link.rank * link.max_tokens + (pair - rank * link.max_tokens)
        target = row_at(area_of(link, generation, META, rank, WIRE), row, 4 * WIRE.meta_words, tl.int32, True)
        tl.store(target + word, value, mask=used(inside, pair))


@triton.jit
def _push_counts(counts, sequence, link, WIRE: tl.constexpr):
    """Tell every rank how much comes from here; the stamp lets a reader that polls tell them from old ones."""
    column = tl.arange(0, WIRE.counts_p2)
    inside = column < WIRE.counts_width
    for rank in range(tl.program_id(0), WIRE.world, tl.num_programs(0)):
        count = tl.load(counts + rank * WIRE.counts_width + column, mask=inside, other=0)
        base = area_of(link, sequence & 1, COUNTS, rank, WIRE)
        target = row_at(base, link.rank, 8 * WIRE.counts_width, tl.int64, False)
        tl.store(target + column, (sequence << 32) | count.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _push_kernel(x, scales, pair_row, meta, counts, link, num_tokens, WIRE: tl.constexpr, ROW: tl.constexpr):
    CHUNKS: tl.constexpr = ROW.chunks
    WORLD: tl.constexpr = WIRE.world
    sequence = tl.load(link.state) + 1
    generation = sequence & 1
    WORD: tl.constexpr = x.dtype.element_ty
    if may_send(link):
        for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
            source = row_at(x.to(tl.int64), token, ROW.words * ROW.word_bytes, WORD, ROW.aligned)
            for chunk in tl.static_range(0, CHUNKS):
                column = chunk * ROW.block + tl.arange(0, ROW.block)
                value = tl.load(source + column, mask=column < ROW.words)  # row access
                for rank in tl.static_range(0, WORLD):
                    pair = tl.load(pair_row + token * WIRE.world + rank)
                    row = link.rank * link.max_tokens + (pair - rank * link.max_tokens)
                    target = row_at(area_of(link, generation, ROWS, rank, WIRE), row, WIRE.row_bytes, WORD, ROW.aligned)
                    tl.store(target + column, value, mask=used(column < ROW.words, pair))  # row access
            if scales is not None:
                group = tl.arange(0, ROW.scale_p2)
                inside = group < ROW.scale_words
                scale = tl.load(scales + tl.cast(token, tl.int64) * ROW.scale_words + group, mask=inside)
                for rank in tl.static_range(0, WORLD):
                    pair = tl.load(pair_row + token * WIRE.world + rank)
                    row = link.rank * link.max_tokens + (pair - rank * link.max_tokens)
                    base = area_of(link, generation, ROWS, rank, WIRE) + ROW.scale_offset
                    target = row_at(base, row, WIRE.row_bytes, tl.float32, True)
                    tl.store(target + group, scale, mask=used(inside, pair))
            if meta is not None:
                _push_beside_rows(token, generation, pair_row, meta, link, WIRE)
        if counts is not None:
            _push_counts(counts, sequence, link, WIRE)
        signal_when_all_arrived(link, sequence, WIRE)


def push(
    x: Tensor,
    sent: SendLayout,
    link: Link,
    *,
    wire: Wire,
    scales: Tensor | None = None,
    replay: bool = False,
    max_programs: int | None = None,
) -> None:
    """Write every token's row into the slot it has at each rank that needs it, then signal all ranks.

    Args:
        x: (T, H) any dtype; rows are copied as bytes.
        sent: what `layout` found for these tokens.
        link: this rank's end of the wire.
        wire: the shape of the wire.
        scales: (T, G) float32 that travel behind each row, or None.
        replay: leave out metadata and counts, which the receivers have kept.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> from moecomm.kernels.layout import layout
    >>> from moecomm.kernels.wire import loopback
    >>> wire = Wire.of(world=1, top_k=1, max_local=1, row_bytes=16)
    >>> (link,), memory = loopback(wire, max_tokens=2)
    >>> ids = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    >>> sent = layout(torch.tensor([[0], [0]]), None, *ids, wire=wire, max_tokens=2, status=link.status)
    >>> push(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int32), sent, link, wire=wire)
    >>> view_memory(int(link.peers[1, 0, 0]), (2, 4), torch.int32).tolist()  # operation 1 uses generation 1
    [[1, 2, 3, 4], [5, 6, 7, 8]]
    """
    x, scales, form = _checked(x, scales, sent, wire)
    row = row_geometry(form, x)
    meta, counts = (None, None) if replay else (sent.meta, sent.counts)
    tables = sent.pair_row, meta, counts
    warps = warps_for(row.block * row.word_bytes)
    grid = (num_programs(x.shape[0], x, max_programs, warps=warps, queued=_sends_many(wire)),)
    launch(_push_kernel, grid, as_words(x, row), scales, *tables, link, x.shape[0], num_warps=warps, WIRE=wire, ROW=row)


def push_ref(
    x: Tensor,
    sent: SendLayout,
    link: Link,
    *,
    wire: Wire,
    scales: Tensor | None = None,
    replay: bool = False,
    max_programs: int | None = None,
) -> None:
    """`push` in plain torch; all ranks' buffers must be CPU memory of this process."""
    x, scales, form = _checked(x, scales, sent, wire)
    if int(link.status[int(STALLED)]):
        return
    sequence = int(link.state[0]) + 1
    if not replay:
        _push_tables_ref(sent, link, wire, sequence)
    for token, rank in (sent.pair_row >= 0).nonzero().tolist():
        slot = int(sent.pair_row[token, rank]) - rank * link.max_tokens
        place = int(link.peers[sequence & 1, int(ROWS), rank]) + (link.rank * link.max_tokens + slot) * wire.row_bytes
        view_memory(place, (form.row_bytes,), torch.uint8).copy_(x[token].view(torch.uint8))
        if scales is not None:
            view_memory(place + form.scale_offset, scales.shape[1:], torch.float32).copy_(scales[token])
    signal_ref(link, wire)


def _push_tables_ref(sent: SendLayout, link: Link, wire: Wire, sequence: int) -> None:
    for token, rank in (sent.pair_row >= 0).nonzero().tolist():
        row = int(sent.pair_row[token, rank]) + (link.rank - rank) * link.max_tokens
        place = int(link.peers[sequence & 1, int(META), rank]) + row * 4 * wire.meta_words
        view_memory(place, (wire.meta_words,), torch.int32).copy_(sent.meta[token])
    for rank in range(wire.world):
        place = int(link.peers[sequence & 1, int(COUNTS), rank]) + link.rank * 8 * wire.counts_width
        view_memory(place, (wire.counts_width,), torch.int64).copy_((sequence << 32) | sent.counts[rank].long())


@triton.jit(do_not_specialize=["num_tokens"])
def _push_quantized_kernel(
    x,
    pair_row,
    meta,
    counts,
    link,
    num_tokens,
    WIRE: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_AT_ONCE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ALIGNED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    WORLD: tl.constexpr = WIRE.world
    sequence = tl.load(link.state) + 1
    generation = sequence & 1
    WORD: tl.constexpr = x.dtype.element_ty
    if may_send(link):
        for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
            source = row_at(x.to(tl.int64), token, HIDDEN * (WORD.primitive_bitwidth // 8), WORD, ALIGNED)
            for start in tl.static_range(0, GROUPS, GROUPS_AT_ONCE):
                group = start + tl.arange(0, GROUPS_AT_ONCE)
                column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
                inside = column < HIDDEN
                value = tl.load(source + column, mask=inside, other=0.0)  # row access
                code, scale = encode_groups(widen(value), POWER_OF_TWO, HARDWARE)
                for rank in tl.static_range(0, WORLD):
                    pair = tl.load(pair_row + token * WIRE.world + rank)
                    row = link.rank * link.max_tokens + (pair - rank * link.max_tokens)
                    base = area_of(link, generation, ROWS, rank, WIRE)
                    target = row_at(base, row, WIRE.row_bytes, tl.uint8, ALIGNED)
                    tl.store(target + column, code, mask=used(inside, pair))  # row access
                    target = row_at(base + SCALE_OFFSET, row, WIRE.row_bytes, tl.float32, True)
                    tl.store(target + group, scale, mask=used(group < GROUPS, pair))
            if meta is not None:
                _push_beside_rows(token, generation, pair_row, meta, link, WIRE)
        if counts is not None:
            _push_counts(counts, sequence, link, WIRE)
        signal_when_all_arrived(link, sequence, WIRE)


def push_quantized(
    x: Tensor,
    sent: SendLayout,
    link: Link,
    *,
    wire: Wire,
    power_of_two: bool = False,
    replay: bool = False,
    max_programs: int | None = None,
) -> None:
    """`push` of rows that become FP8 with one scale per 128 elements on the way; the bytes are those of `quantize`.

    Args:
        x: (T, H) float32, float16 or bfloat16.
        power_of_two: whether scales are rounded up to a power of two.

    >>> from moecomm.kernels.layout import layout
    >>> from moecomm.kernels.wire import loopback
    >>> wire = Wire.of(world=1, top_k=1, max_local=1, row_bytes=20)
    >>> (link,), memory = loopback(wire, max_tokens=2)
    >>> ids = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    >>> sent = layout(torch.tensor([[0]]), None, *ids, wire=wire, max_tokens=2, status=link.status)
    >>> push_quantized(torch.tensor([[448.0, 2.0, -1.0, 0.5]]), sent, link, wire=wire)
    >>> view_memory(int(link.peers[1, 0, 0]), (4,), torch.float8_e4m3fn).float().tolist()
    [448.0, 2.0, -1.0, 0.5]
    >>> view_memory(int(link.peers[1, 0, 0]) + 16, (1,), torch.float32).tolist()
    [1.0]
    """
    x, form = _checked_quantized(x, sent, wire)
    element_of("x", x.dtype)
    at_once = min(_GROUPS_AT_ONCE, triton.next_power_of_2(form.scale_columns))
    meta, counts = (None, None) if replay else (sent.meta, sent.counts)
    warps = max(1, at_once // 8)
    launch(
        _push_quantized_kernel,
        (num_programs(x.shape[0], x, max_programs, warps=warps, queued=_sends_many(wire)),),
        *(x, sent.pair_row, meta, counts, link, x.shape[0]),
        num_warps=warps,
        WIRE=wire,
        HIDDEN=form.hidden,
        GROUPS=form.scale_columns,
        GROUPS_AT_ONCE=at_once,
        SCALE_OFFSET=form.scale_offset,
        ALIGNED=form.hidden % 16 == 0 and x.data_ptr() % 16 == 0,
        POWER_OF_TWO=power_of_two,
        HARDWARE=has_fp8(x),
    )


def push_quantized_ref(
    x: Tensor,
    sent: SendLayout,
    link: Link,
    *,
    wire: Wire,
    power_of_two: bool = False,
    replay: bool = False,
    max_programs: int | None = None,
) -> None:
    """`push_quantized` in plain torch; all ranks' buffers must be CPU memory of this process."""
    codes, scales = quantize_ref(x, power_of_two=power_of_two)
    push_ref(codes, sent, link, wire=wire, scales=scales, replay=replay)


def _sends_many(wire: Wire) -> bool:
    """Whether a row is written often enough to pay for the arrival of a program of its own."""
    return min(wire.top_k, wire.world) >= 4


def _checked(x: Tensor, scales: Tensor | None, sent: SendLayout, wire: Wire) -> tuple[Tensor, Tensor | None, RowFormat]:
    x = contiguous_rows("x", x)
    if scales is not None:
        assert scales.dtype == torch.float32 and scales.shape[0] == x.shape[0], "scales are (T, G) float32"
        scales = contiguous_rows("scales", scales)
    form = RowFormat(x.shape[1], x.dtype, 0 if scales is None else scales.shape[1])
    _check_fit(x, form, sent, wire)
    return x, scales, form


def _checked_quantized(x: Tensor, sent: SendLayout, wire: Wire) -> tuple[Tensor, RowFormat]:
    x = contiguous_rows("x", x)
    form = RowFormat(x.shape[1], torch.float8_e4m3fn, -(-x.shape[1] // int(GROUP)))
    _check_fit(x, form, sent, wire)
    return x, form


def _check_fit(x: Tensor, form: RowFormat, sent: SendLayout, wire: Wire) -> None:
    assert form.hidden > 0, "rows without elements cannot be pushed"
    assert form.wire_bytes <= wire.row_bytes, f"rows of {form.wire_bytes} bytes, the wire has room for {wire.row_bytes}"
    expected = (x.shape[0], wire.world)
    got = tuple(sent.pair_row.shape)
    assert got == expected, f"{x.shape[0]} rows, but the layout has shape {got}, expected {expected}"
