"""Dispatch into fixed places: one kernel that sends, one that receives. Nothing is asked for or moved twice.

Legend: T tokens, K top-k, H hidden, E experts, L local experts, W ranks, M max tokens per rank; see `slots`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of
from moecomm.kernels.layout import note_entry
from moecomm.kernels.quant import has_fp8, quantize_ref
from moecomm.kernels.rows import Row, as_words, contiguous_rows
from moecomm.kernels.slots import (  # noqa: F401 - loopback_slots is for the examples
    DONE,
    EXPONENTS,
    FLOAT_SCALES,
    FULL,
    LANES,
    OWNER,
    PLAIN,
    REPEATED,
    Slots,
    beside_words,
    copy_slot,
    encode_slot,
    fp8_row,
    loopback_slots,
    num_places,
    row_of,
    slot_warps,
)
from moecomm.kernels.sync import may_send, signal_ref, signal_when_all_arrived, wait_for_all, wait_ref
from moecomm.kernels.wire import BAD_ID, COUNTS, ROWS, STALLED, Wire, area_of, view_memory
from torch import Tensor


class _Scan(NamedTuple):
    """How many entries are looked at at once, and for how many experts they are counted at once."""

    entries: int = 512
    experts: int = 8


@triton.jit
def _tell_counts(link, slots, topk_idx, num_entries, num_experts, WIRE: tl.constexpr, SCAN: tl.constexpr):
    """Tell every rank how many rows each of its experts gets from here.

    `link` is that of `slots`: in tuples of tuples that a function is given, Triton 3.6 forgets integers that are 1.
    """
    step = tl.num_programs(0) * SCAN.experts
    for first in range(tl.program_id(0) * SCAN.experts, num_experts, step):
        expert = first + tl.arange(0, SCAN.experts)
        count = tl.full((SCAN.experts,), 0, tl.int32)
        for start in range(0, num_entries, SCAN.entries):
            entry = start + tl.arange(0, SCAN.entries)
            named = tl.load(topk_idx + entry, mask=entry < num_entries, other=-1)
            count += tl.sum((named[None, :] == expert[:, None]).to(tl.int32), 1)
        exists = expert < num_experts
        rank = tl.load(slots.rank_of_expert + expert, mask=exists, other=0)
        local = tl.load(slots.local_of_expert + expert, mask=exists, other=0)
        table = tl.load(link.peers + COUNTS * WIRE.world + rank, mask=exists, other=0).to(tl.pointer_type(tl.int32))
        place = table + (link.rank * WIRE.counts_width + local)
        tl.store(place, tl.minimum(count, link.max_tokens), mask=exists)


@triton.jit
def _place_entry(link, slots, topk_idx, entry, num_experts, WIRE: tl.constexpr, SCAN: tl.constexpr):
    """Row of an entry at its expert's rank, -1 for none, and that rank; both are kept, and what is wrong is noted."""
    expert = tl.load(topk_idx + entry)
    valid = (expert >= 0) & (expert < num_experts)
    earlier = tl.full((SCAN.entries,), 0, tl.int32)
    for start in range(0, entry, SCAN.entries):
        other = start + tl.arange(0, SCAN.entries)
        named = tl.load(topk_idx + other, mask=other < entry, other=-1)
        earlier += (named == expert).to(tl.int32)
    slot = tl.sum(earlier, 0)
    known = tl.where(valid, expert, 0)
    rank, local = tl.load(slots.rank_of_expert + known), tl.load(slots.local_of_expert + known)
    place = (local * WIRE.world + link.rank) * link.max_tokens + slot
    place = tl.where(valid & (slot < link.max_tokens), place, -1)
    tl.store(slots.places + entry, place)
    tl.store(slots.topk_idx + entry, expert.to(tl.int64))
    if (expert < -1) | (expert >= num_experts):
        note_entry(link.status + BAD_ID, entry, expert)
    if valid & (slot >= link.max_tokens):
        note_entry(slots.notes + FULL, entry, expert)
    return place, rank


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "number"])
def _padded_send_kernel(
    slots,
    x,
    beside,
    topk_idx,
    topk_weights,
    num_tokens,
    num_experts,
    number,
    WIRE: tl.constexpr,
    ROW: tl.constexpr,
    QUANT: tl.constexpr,
    SCAN: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    link = slots.out
    TOP_K: tl.constexpr = WIRE.top_k
    WORD: tl.constexpr = x.dtype.element_ty
    BESIDE: tl.constexpr = tl.int32 if beside is None else beside.dtype.element_ty
    sequence = tl.load(link.state) + 1
    is_free = tl.load(slots.book + DONE) + 1 == sequence
    if tl.program_id(0) == 0:
        if is_free:
            tl.store(slots.book + OWNER, number)
        else:
            tl.store(slots.notes + REPEATED, number + 1)
    if may_send(link) & is_free:
        num_entries = num_tokens * TOP_K
        _tell_counts(link, slots, topk_idx, num_entries, num_experts, WIRE, SCAN)
        for entry in range(tl.program_id(0), num_entries, tl.num_programs(0)):
            place, rank = _place_entry(link, slots, topk_idx, entry, num_experts, WIRE, SCAN)
            if topk_weights is not None:
                tl.store(slots.topk_weights + entry, tl.load(topk_weights + entry))
            else:
                tl.store(slots.topk_weights + entry, 1.0)
            area, token = area_of(link, 0, ROWS, rank, WIRE), entry // TOP_K
            if QUANT == PLAIN:
                source = 0 if beside is None else beside.to(tl.int64)
                copy_slot(area, area + ROW.scale_offset, x.to(tl.int64), source, place, token, WORD, BESIDE, ROW)
            else:
                encode_slot(area, area + ROW.scale_offset, x.to(tl.int64), place, token, WORD, ROW, QUANT, HARDWARE)
        signal_when_all_arrived(link, sequence, WIRE)


def padded_send(
    x: Tensor,
    topk_idx: Tensor,
    slots: Slots,
    *,
    wire: Wire,
    number: int,
    topk_weights: Tensor | None = None,
    beside: Tensor | None = None,
    quant: int = 0,
    max_programs: int | None = None,
) -> None:
    """Find the slot of every entry, write its row there, tell all ranks the counts, signal. Keep the routing.

    An id out of range, and an entry for which an expert has no slot left, are left out and noted.

    Args:
        x: (T, H) any dtype; rows are copied as bytes.
        topk_idx: (T, K) int32 or int64 global expert ids, -1 for none.
        slots: the generation; its last dispatch must be done with, else nothing is sent and that is noted.
        wire: the shape of the wire; `row_bytes` is not used.
        number: that the host gives to this dispatch.
        topk_weights: (T, K) float32, or None: all 1.
        beside: (T, B) that travels beside rows, or None.
        quant: 0, or how scales travel (`slots`): rows of float32, float16 or bfloat16 become FP8 on the way.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> wire, zero = Wire.of(world=1, top_k=2, max_local=2, row_bytes=16), torch.zeros(2, dtype=torch.int32)
    >>> ((slots, _),), memory = loopback_slots(wire, 2, zero, torch.arange(2, dtype=torch.int32), area_bytes=16)
    >>> x, ids = torch.tensor([[5.0], [7.0]]), torch.tensor([[1, -1], [1, 0]])
    >>> padded_send(x, ids, slots, wire=wire, number=0)
    >>> slots.places.tolist(), view_memory(int(slots.out.peers[0, 0, 0]), (4,), torch.float32).tolist()
    ([[2, -1], [3, 0]], [7.0, 0.0, 5.0, 7.0])
    """
    x, topk_idx, topk_weights, row = _checked(x, topk_idx, topk_weights, beside, slots, wire, quant)
    warps, queued = slot_warps(row, quant), x.shape[0] * wire.top_k
    launch(
        _padded_send_kernel,
        (num_programs(queued, x, max_programs, warps=warps, queued=True),),
        *(slots, x if quant else as_words(x, row), None if beside is None else beside_words(beside)),
        *(topk_idx, topk_weights, x.shape[0], len(slots.rank_of_expert), number),
        num_warps=warps,
        WIRE=wire,
        ROW=row,
        QUANT=quant,
        SCAN=_Scan(),
        HARDWARE=has_fp8(x),
    )


def padded_send_ref(
    x: Tensor,
    topk_idx: Tensor,
    slots: Slots,
    *,
    wire: Wire,
    number: int,
    topk_weights: Tensor | None = None,
    beside: Tensor | None = None,
    quant: int = 0,
    max_programs: int | None = None,
) -> None:
    """`padded_send` in plain torch; all ranks' memory must be CPU memory of this process."""
    x, topk_idx, topk_weights, row = _checked(x, topk_idx, topk_weights, beside, slots, wire, quant)
    link, num_experts = slots.out, len(slots.rank_of_expert)
    if int(slots.book[int(DONE)]) != int(link.state[0]):
        slots.notes[int(REPEATED)] = number + 1
        return
    slots.book[int(OWNER)] = number
    if int(link.status[int(STALLED)]):
        return
    rows, beside = (x, beside) if not quant else encoded_ref(x, quant)
    counts = [0] * num_experts
    for entry, expert in enumerate(topk_idx.flatten().tolist()):
        token, k = divmod(entry, wire.top_k)
        slots.topk_idx[token, k], slots.places[token, k] = expert, -1
        slots.topk_weights[token, k] = 1.0 if topk_weights is None else topk_weights[token, k]
        key = ((2**31 - 1 - entry) << 32) | (max(-(2**31), min(expert, 2**31 - 1)) & 0xFFFFFFFF)
        if not 0 <= expert < num_experts:
            link.status[int(BAD_ID)] = int(link.status[int(BAD_ID)]) if expert == -1 else max(key, int(link.status[0]))
        elif counts[expert] == link.max_tokens:
            slots.notes[int(FULL)] = max(key, int(slots.notes[int(FULL)]))
        else:
            place = int(slots.local_of_expert[expert]) * wire.world + link.rank
            place = place * link.max_tokens + counts[expert]
            counts[expert] += 1
            slots.places[token, k] = place
            area = int(link.peers[0, int(ROWS), int(slots.rank_of_expert[expert])])
            write_row_ref(area, rows, beside, token, place, row.scale_offset)
    for expert, count in enumerate(counts):
        table = int(link.peers[0, int(COUNTS), int(slots.rank_of_expert[expert])])
        word = link.rank * wire.counts_width + int(slots.local_of_expert[expert])
        view_memory(table + 4 * word, (1,), torch.int32)[0] = count
    signal_ref(link, wire)


def encoded_ref(x: Tensor, quant: int) -> tuple[Tensor, Tensor]:
    """FP8 codes and scales of (..., H) rows, with one of the ways in which scales travel."""
    codes, scales = quantize_ref(x, power_of_two=quant != int(FLOAT_SCALES))
    if quant == int(EXPONENTS):
        scales = (scales.view(torch.int32) >> 23).to(torch.uint8)
    return codes, scales


def write_row_ref(area: int, rows: Tensor, beside: Tensor | None, at: int, place: int, offset: int) -> None:
    """Write row `at` into a place of an area, and beside it."""
    for part, start in ((rows, area), (beside, area + offset)):
        if part is not None and part.numel():
            raw = part[at].contiguous().view(torch.uint8)
            view_memory(start + place * raw.numel(), raw.shape, torch.uint8).copy_(raw)


@triton.jit
def _padded_receive_kernel(
    out, out_beside, slots, WIRE: tl.constexpr, LOCAL: tl.constexpr, ROW: tl.constexpr, LANES: tl.constexpr
):
    link = slots.out
    arrived = wait_for_all(link, tl.load(link.state), WIRE)
    arrived = tl.where(tl.load(slots.notes + REPEATED) == 0, arrived, 0)  # then nothing was sent
    counts = area_of(link, 0, COUNTS, link.rank, WIRE).to(tl.pointer_type(tl.int32))
    if tl.program_id(0) == 0:
        source, local = tl.arange(0, WIRE.world_p2)[None, :], tl.arange(0, WIRE.local_p2)[:, None]
        exists = (source < WIRE.world) & (local < LOCAL)
        count = tl.load(counts + source * WIRE.counts_width + local, mask=exists, other=0) * arrived
        begin = source * link.max_tokens + tl.zeros_like(count)
        pair = slots.ranges + (local * WIRE.world + source) * 2
        tl.store(pair, begin, mask=exists)
        tl.store(pair + 1, begin + count, mask=exists)
        expert, tokens = tl.arange(0, WIRE.local_p2), tl.sum(count, 1)
        tl.store(slots.tokens + expert, tokens, mask=expert < LOCAL)
        total = tl.load(slots.totals + expert, mask=expert < LOCAL, other=0)
        tl.store(slots.totals + expert, total + tokens, mask=expert < LOCAL)
    if out is not None:
        WORD: tl.constexpr = out.dtype.element_ty
        BESIDE: tl.constexpr = tl.int32 if out_beside is None else out_beside.dtype.element_ty
        area = area_of(link, 0, ROWS, link.rank, WIRE)
        target = 0 if out_beside is None else out_beside.to(tl.int64)
        for part in range(tl.program_id(0), LOCAL * WIRE.world * LANES, tl.num_programs(0)):
            run = part // LANES
            local, source = run // WIRE.world, run % WIRE.world
            count = tl.load(counts + source * WIRE.counts_width + local) * arrived
            for slot in range(part % LANES, count, LANES):
                row = run * link.max_tokens + slot
                copy_slot(out.to(tl.int64), target, area, area + ROW.scale_offset, row, row, WORD, BESIDE, ROW)


def padded_receive(
    slots: Slots,
    *,
    wire: Wire,
    out: Tensor | None = None,
    out_beside: Tensor | None = None,
    max_programs: int | None = None,
) -> None:
    """Wait for the sends of all ranks, then say what came: `ranges`, `tokens` and `totals` of the slots.

    If the wait gives up nothing came, says the result.

    Args:
        slots: the generation.
        wire: the shape of the wire.
        out: (L * W * M, H) to copy the rows that came to, and no others; None: they stay where they are.
        out_beside: (L * W * M, B) likewise for what travels beside them.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> wire, zero = Wire.of(world=1, top_k=2, max_local=2, row_bytes=16), torch.zeros(2, dtype=torch.int32)
    >>> ((slots, _),), memory = loopback_slots(wire, 2, zero, torch.arange(2, dtype=torch.int32), area_bytes=16)
    >>> padded_send(torch.tensor([[5.0], [7.0]]), torch.tensor([[1, -1], [1, 0]]), slots, wire=wire, number=0)
    >>> padded_receive(slots, wire=wire)
    >>> slots.tokens.tolist(), slots.ranges.tolist()
    ([1, 2], [[[0, 1]], [[0, 2]]])
    """
    local = len(slots.tokens)
    if out is None:
        row = Row(0, 4, 1, 0, True, 0, 1, 0)
        programs, warps = 1, 1
        given: tuple[Tensor | None, Tensor | None] = None, None
    else:
        row = row_of(out, out_beside, slots, wire)
        warps = slot_warps(row, int(PLAIN))
        programs = num_programs(local * wire.world * LANES, out, max_programs, warps=warps)
        given = as_words(out, row), None if out_beside is None else beside_words(out_beside)
    options = {"WIRE": wire, "LOCAL": local, "ROW": row, "LANES": LANES}
    launch(_padded_receive_kernel, (programs,), *given, slots, num_warps=warps, **options)


def padded_receive_ref(
    slots: Slots,
    *,
    wire: Wire,
    out: Tensor | None = None,
    out_beside: Tensor | None = None,
    max_programs: int | None = None,
) -> None:
    """`padded_receive` in plain torch; this rank's memory must be CPU memory of this process."""
    link, local = slots.out, len(slots.tokens)
    wait_ref(link, wire)
    has_arrived = not int(link.status[int(STALLED)]) and not int(slots.notes[int(REPEATED)])
    table = view_memory(int(link.peers[0, int(COUNTS), link.rank]), (wire.world, wire.counts_width), torch.int32)
    counts = table[:, :local].T * int(has_arrived)
    slots.ranges[..., 0] = torch.arange(wire.world) * link.max_tokens
    slots.ranges[..., 1] = slots.ranges[..., 0] + counts
    slots.tokens.copy_(counts.sum(1))
    slots.totals.add_(counts.sum(1))
    if out is None:
        return
    row = row_of(out, out_beside, slots, wire)
    area = int(link.peers[0, int(ROWS), link.rank])
    for place in places_ref(slots.ranges, wire.world * link.max_tokens):
        for part, start in ((out, area), (out_beside, area + row.scale_offset)):
            if part is not None and part.numel():
                raw = part[place].view(torch.uint8)
                raw.copy_(view_memory(start + place * raw.numel(), raw.shape, torch.uint8))


def places_ref(ranges_LW: Tensor, rows_per_expert: int) -> list[int]:
    """All rows in the ranges."""
    return [
        local * rows_per_expert + row
        for local, of_rank in enumerate(ranges_LW.tolist())
        for begin, end in of_rank
        for row in range(begin, end)
    ]


def _checked(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    beside: Tensor | None,
    slots: Slots,
    wire: Wire,
    quant: int,
) -> tuple[Tensor, Tensor, Tensor | None, Row]:
    x, shape, link = contiguous_rows("x", x), tuple(topk_idx.shape), slots.out
    assert shape == (x.shape[0], wire.top_k), f"topk_idx has shape {shape}, expected {(x.shape[0], wire.top_k)}"
    assert topk_idx.dtype in (torch.int32, torch.int64), f"topk_idx is {topk_idx.dtype}, expected int32 or int64"
    assert shape[0] <= link.max_tokens, f"{shape[0]} tokens, at most {link.max_tokens} fit"
    assert num_places(wire, link.max_tokens) < 2**31 and shape[0] * shape[1] < 2**31, "rows are numbered in int32"
    if topk_weights is not None:
        kind = tuple(topk_weights.shape), topk_weights.dtype
        assert kind == (shape, torch.float32), f"topk_weights are {kind}, expected {shape} float32"
        topk_weights = topk_weights.contiguous()
    assert x.shape[1] > 0, "rows without elements cannot be sent"
    if quant:
        element_of("x", x.dtype)
        assert beside is None, "rows that become FP8 have scales beside them, and nothing else"
        row = fp8_row(x, x.shape[1], wire, link.max_tokens)
    else:
        row = row_of(x, beside, slots, wire)
    return x, topk_idx.contiguous(), topk_weights, row
