"""Fixed places for rows: one generation of layout "padded", as kernels are given it.

The memory of one rank holds, for each of two generations, an area of rows on their way out, one of rows on their way
home, and a table of counts; then six lines of signal words: out, home and "free", two generations of each. Row
`(local * W + source) * M + slot` of an area is the slot-th that a source sends to a local expert. What may travel
beside rows lies in the same area, behind room for all rows.

Legend: T tokens, K top-k, E experts, L local experts, W ranks, M max tokens per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels._numeric import widen
from moecomm.kernels.quant import GROUP, encode_groups
from moecomm.kernels.rows import Row, RowFormat, row_at, row_geometry, used, warps_for
from moecomm.kernels.wire import FIELDS, LATE, Link, Wire
from torch import Tensor

OWNER, DONE = tl.constexpr(0), tl.constexpr(1)  # words of `Slots.book`
FULL, STALE, REPEATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # words of `Slots.notes`
# How rows travel: as they are, or as FP8 with scales as float32 numbers, as powers of two, or as their exponents; or as
# int8 with one scale per row, which kernels only read.
PLAIN, FLOAT_SCALES, POWER_OF_TWO, EXPONENTS, INT8 = (tl.constexpr(number) for number in range(5))
LANES = 4  # programs that share the rows of one (expert, source)

_AREA_BYTES = 256  # areas begin at multiples of this
_BESIDE_BYTES = 64  # and what lies beside rows at multiples of this
_NUM_LINES = 6
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_GROUPS_AT_ONCE = 16  # of 128 elements each


class Slots(NamedTuple):
    """One generation on one rank: its links, and what stays on the device between kernels.

    out, home: links whose rows area is that of rows on their way out, or home; each with numbers of its own.
    rank_of_expert, local_of_expert: (E,) int32 by global expert id.
    topk_idx, topk_weights, places: (M, K) int64, float32, int32: the routing of the last dispatch, and the row of every
        entry at its expert's rank, -1 for none.
    ranges: (L, W, 2) int32 first row and end of what each rank sent to each local expert. tokens: (L,) int32 their sum.
    totals: (L,) int64 of all dispatches of both generations.
    book: (2,) int64: the number that the host gave to the dispatch whose rows are here; how many dispatches of this
        generation are done with.
    notes: (3,) int64, zero as long as all is well: the first entry for which there was no slot (see
        `wire.decode_bad_id`); 1 + the number of a dispatch that was combined after its rows were gone; 1 + the number
        of one that would have overwritten rows still in use.
    """

    out: Link
    home: Link
    rank_of_expert: Tensor
    local_of_expert: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    places: Tensor
    ranges: Tensor
    tokens: Tensor
    totals: Tensor
    book: Tensor
    notes: Tensor


def slots_bytes(wire: Wire, area_bytes: int) -> int:
    """Bytes of one rank's memory, which must be zero before the first operation.

    >>> slots_bytes(Wire.of(world=2, top_k=1, max_local=1, row_bytes=16), area_bytes=100)
    3072
    """
    area, counts, line = _sizes(wire, area_bytes)
    return 4 * area + 2 * counts + _NUM_LINES * line


def _sizes(wire: Wire, area_bytes: int) -> tuple[int, int, int]:
    """Bytes of an area, of a table of counts, and of a line of signal words."""
    sizes = area_bytes, 4 * wire.world * wire.counts_width, 8 * wire.world
    area, counts, line = map(_rounded, sizes)
    return area, counts, line


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _AREA_BYTES) * _AREA_BYTES


def split_areas(memory: Tensor, area_bytes: int) -> list[Tensor]:
    """The areas out 0, out 1, home 0 and home 1 in one rank's memory."""
    starts = [number * _rounded(area_bytes) for number in range(4)]
    return [memory[start : start + area_bytes] for start in starts]


def slot_links(bases: Sequence[int], wire: Wire, area_bytes: int, like: Link) -> list[Link]:
    """The links out 0, out 1, home 0, home 1, free 0 and free 1 over memory that begins at `bases` in every rank.

    like: whose rank, limits and status they share.
    """
    area, counts, line = _sizes(wire, area_bytes)
    links = []
    for number in range(_NUM_LINES):
        generation = number % 2
        places = {0: number * area if number < 4 else 0, 2: 4 * area + generation * counts}
        places[3] = 4 * area + 2 * counts + number * line
        table = [[[base + places.get(field, 0) for base in bases] for field in range(FIELDS)]] * 2
        state = torch.zeros(2, dtype=torch.int64, device=like.state.device)
        links.append(like._replace(peers=torch.tensor(table, device=like.state.device), state=state))
    return links


def make_slots(links: Sequence[Link], rank_of_expert: Tensor, local_of_expert: Tensor, wire: Wire) -> list[Slots]:
    """Both generations of one rank over the links of `slot_links`."""
    device, link = links[0].state.device, links[0]
    local = int((rank_of_expert == link.rank).sum())
    totals = torch.zeros(local, dtype=torch.int64, device=device)
    notes = torch.zeros(3, dtype=torch.int64, device=device)
    kept = link.max_tokens, wire.top_k
    return [
        Slots(
            out=links[generation],
            home=links[2 + generation],
            rank_of_expert=rank_of_expert,
            local_of_expert=local_of_expert,
            topk_idx=torch.full(kept, -1, dtype=torch.int64, device=device),
            topk_weights=torch.ones(kept, device=device),
            places=torch.full(kept, -1, dtype=torch.int32, device=device),
            ranges=torch.zeros(local, wire.world, 2, dtype=torch.int32, device=device),
            tokens=torch.zeros(local, dtype=torch.int32, device=device),
            totals=totals,
            book=torch.tensor([-1, 0], device=device),
            notes=notes,
        )
        for generation in range(2)
    ]


def loopback_slots(
    wire: Wire, max_tokens: int, rank_of_expert: Tensor, local_of_expert: Tensor, area_bytes: int, spins: int = 1000
) -> tuple[list[list[Slots]], Tensor]:
    """Both generations of W ranks in this one process, and the memory behind them: (W, bytes) uint8.

    >>> wire, ids = Wire.of(world=2, top_k=1, max_local=1, row_bytes=16), torch.arange(2, dtype=torch.int32)
    >>> ranks, memory = loopback_slots(wire, 3, ids, torch.zeros_like(ids), area_bytes=96)
    >>> len(ranks), len(ranks[0]), ranks[1][0].out.rank, memory.shape
    (2, 2, 1, torch.Size([2, 3072]))
    """
    device = rank_of_expert.device
    memory = torch.zeros(wire.world, slots_bytes(wire, area_bytes), dtype=torch.uint8, device=device)
    bases = [rank_memory.data_ptr() for rank_memory in memory]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    made = []
    for rank in range(wire.world):
        status = torch.zeros(int(LATE) + 3 * wire.world, dtype=torch.int64, device=device)
        like = Link(none, none, status, rank, max_tokens, spins)
        made.append(make_slots(slot_links(bases, wire, area_bytes, like), rank_of_expert, local_of_expert, wire))
    return made, memory


def num_places(wire: Wire, max_tokens: int) -> int:
    """Rows for which an area has room: as many on every rank, whatever experts it has."""
    return (wire.counts_width - 1) * wire.world * max_tokens


def beside_offset(wire: Wire, max_tokens: int, row_bytes: int) -> int:
    """Where in an area begins what travels beside rows.

    >>> beside_offset(Wire.of(world=2, top_k=1, max_local=1, row_bytes=16), 3, 10)
    64
    """
    return -(-num_places(wire, max_tokens) * row_bytes // _BESIDE_BYTES) * _BESIDE_BYTES


def beside_words(beside: Tensor) -> Tensor:
    """What travels beside rows as integers, as few as possible."""
    assert beside.is_contiguous(), f"what travels beside rows has strides {beside.stride()}"
    raw = beside.view(torch.uint8)
    return raw.view(next(to for size, to in _WORDS.items() if raw.shape[1] % size == raw.data_ptr() % size == 0))


def slot_warps(row: Row, quant: int) -> int:
    """Warps so that a thread holds 64 bytes of a row, or reads 32 elements that become FP8."""
    return max(1, row.block // 1024) if quant else warps_for(row.block * row.word_bytes)


def row_of(rows: Tensor, beside: Tensor | None, slots: Slots, wire: Wire) -> Row:
    """The geometry of rows one behind the other, in an area as in `rows`, with what is beside them."""
    columns = 0 if beside is None else beside_words(beside).shape[1]
    form = RowFormat(rows.shape[1], rows.dtype)
    offset, columns_p2 = (
        beside_offset(wire, slots.out.max_tokens, form.row_bytes),
        triton.next_power_of_2(max(columns, 1)),
    )
    return row_geometry(form, rows)._replace(scale_words=columns, scale_p2=columns_p2, scale_offset=offset)


def fp8_row(x: Tensor, hidden: int, wire: Wire, max_tokens: int) -> Row:
    """The geometry of rows that become FP8 on their way: so many bytes, and a scale for each 128."""
    groups = -(-hidden // int(GROUP))
    at_once = min(_GROUPS_AT_ONCE, triton.next_power_of_2(groups))
    aligned = hidden % 16 == 0 and x.data_ptr() % 16 == 0
    offset, block = beside_offset(wire, max_tokens, hidden), int(GROUP) * at_once
    return Row(hidden, 1, block, -(-hidden // block), aligned, groups, triton.next_power_of_2(groups), offset)


@triton.jit
def copy_slot(
    target, target_beside, source, source_beside, to, at, WORD: tl.constexpr, BESIDE: tl.constexpr, ROW: tl.constexpr
):
    """Copy row `at` to row `to`, and what lies beside it, between int64 addresses; nothing if `to` is below 0."""
    CHUNKS: tl.constexpr = ROW.chunks
    first = row_at(source, at, ROW.words * ROW.word_bytes, WORD, ROW.aligned)
    last = row_at(target, to, ROW.words * ROW.word_bytes, WORD, ROW.aligned)
    for chunk in tl.static_range(0, CHUNKS):
        column = chunk * ROW.block + tl.arange(0, ROW.block)
        inside = used(column < ROW.words, to)
        value = tl.load(first + column, mask=inside)  # row access
        tl.store(last + column, value, mask=inside)  # row access
    if ROW.scale_words > 0:
        WIDTH: tl.constexpr = ROW.scale_words * (BESIDE.primitive_bitwidth // 8)
        column = tl.arange(0, ROW.scale_p2)
        inside = used(column < ROW.scale_words, to)
        value = tl.load(row_at(source_beside, at, WIDTH, BESIDE, False) + column, mask=inside)
        tl.store(row_at(target_beside, to, WIDTH, BESIDE, False) + column, value, mask=inside)


@triton.jit
def encode_slot(
    target,
    target_beside,
    source,
    to,
    at,
    ELEMENT: tl.constexpr,
    ROW: tl.constexpr,
    SCALES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """As `copy_slot`, of elements that become FP8 on the way, with a scale for each 128 beside them."""
    CHUNKS: tl.constexpr = ROW.chunks
    AT_ONCE: tl.constexpr = ROW.block // GROUP
    POWER: tl.constexpr = SCALES != FLOAT_SCALES
    first = row_at(source, at, ROW.words * (ELEMENT.primitive_bitwidth // 8), ELEMENT, ROW.aligned)
    last = row_at(target, to, ROW.words, tl.uint8, ROW.aligned)
    for chunk in tl.static_range(0, CHUNKS):
        group = chunk * AT_ONCE + tl.arange(0, AT_ONCE)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = used(column < ROW.words, to)
        value = tl.load(first + column, mask=inside, other=0.0)  # row access
        code, scale = encode_groups(widen(value), POWER, HARDWARE)
        tl.store(last + column, code, mask=inside)  # row access
        inside = used(group < ROW.scale_words, to)
        if SCALES == EXPONENTS:
            exponent = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
            tl.store(row_at(target_beside, to, ROW.scale_words, tl.uint8, False) + group, exponent, mask=inside)
        else:
            tl.store(row_at(target_beside, to, 4 * ROW.scale_words, tl.float32, False) + group, scale, mask=inside)
