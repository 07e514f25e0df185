"""Combine from fixed places: experts leave rows where they are, or they are copied there, and the source reads them.

Legend: T tokens, K top-k, H hidden, L local experts, W ranks, M max tokens per rank; see `slots`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of, narrow, widen
from moecomm.kernels.padded import (  # noqa: F401 - padded_send is for the examples
    encoded_ref,
    padded_send,
    places_ref,
    write_row_ref,
)
from moecomm.kernels.quant import GROUP, decode_e4m3, has_fp8
from moecomm.kernels.rows import Row, as_words, contiguous_rows, row_at, used
from moecomm.kernels.slots import (  # noqa: F401 - loopback_slots is for the examples
    DONE,
    EXPONENTS,
    INT8,
    LANES,
    OWNER,
    PLAIN,
    STALE,
    Slots,
    beside_offset,
    beside_words,
    copy_slot,
    encode_slot,
    fp8_row,
    loopback_slots,
    row_of,
    slot_warps,
)
from moecomm.kernels.sync import may_send, signal_ref, signal_when_all_arrived, wait_for_all, wait_ref
from moecomm.kernels.wire import ROWS, STALLED, Wire, area_of, view_memory
from torch import Tensor

_BLOCK_BYTES = 4096  # of a row, per program


class Home(NamedTuple):
    """The geometry of sums, known when kernels are compiled.

    hidden: H. block: elements per program. aligned: whether every row starts at a multiple of 16 bytes. quant: how rows
    travel (`slots`). scales: per row. offset: where in an area they begin.
    """

    hidden: int
    block: int
    aligned: bool
    quant: int
    scales: int
    offset: int


@triton.jit(do_not_specialize=["number"])
def _padded_return_kernel(
    rows,
    beside,
    slots,
    number,
    WIRE: tl.constexpr,
    LOCAL: tl.constexpr,
    ROW: tl.constexpr,
    QUANT: tl.constexpr,
    LANES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    link = slots.home
    sequence = tl.load(link.state) + 1
    is_fresh = tl.load(slots.book + OWNER) == number
    if (is_fresh == 0) & (tl.program_id(0) == 0):
        tl.store(slots.notes + STALE, number + 1)
    if may_send(link) & is_fresh:
        if rows is not None:
            WORD: tl.constexpr = rows.dtype.element_ty
            BESIDE: tl.constexpr = tl.int32 if beside is None else beside.dtype.element_ty
            area, base = area_of(link, 0, ROWS, link.rank, WIRE), rows.to(tl.int64)
            for part in range(tl.program_id(0), LOCAL * WIRE.world * LANES, tl.num_programs(0)):
                run = part // LANES
                begin, end = tl.load(slots.ranges + 2 * run), tl.load(slots.ranges + 2 * run + 1)
                first = run // WIRE.world * (WIRE.world * link.max_tokens)
                for at in range(begin + part % LANES, end, LANES):
                    row = first + at
                    if QUANT == PLAIN:
                        source = 0 if beside is None else beside.to(tl.int64)
                        copy_slot(area, area + ROW.scale_offset, base, source, row, row, WORD, BESIDE, ROW)
                    else:
                        encode_slot(area, area + ROW.scale_offset, base, row, row, WORD, ROW, QUANT, HARDWARE)
        signal_when_all_arrived(link, sequence, WIRE)


def padded_return(
    rows: Tensor | None,
    slots: Slots,
    *,
    wire: Wire,
    number: int,
    beside: Tensor | None = None,
    quant: int = 0,
    max_programs: int | None = None,
) -> None:
    """Let rows go home: copy those that came, or what became of them, to where peers read; then signal.

    Args:
        rows: (L * W * M, H), or None: they are where they are read. Only those in `slots.ranges` are looked at.
        slots: the generation.
        wire: the shape of the wire.
        number: of the dispatch. If its rows are gone nothing is sent, and that is noted.
        beside: (L * W * M, B) that travels beside rows, or None.
        quant: 0, or how scales travel (`slots`): rows of float32, float16 or bfloat16 become FP8 on the way.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> wire, zero = Wire.of(world=1, top_k=1, max_local=1, row_bytes=16), torch.zeros(1, dtype=torch.int32)
    >>> ((slots, _),), memory = loopback_slots(wire, 2, zero, zero, area_bytes=16)
    >>> slots.book[0], slots.ranges[0, 0, 1] = 7, 1  # one row of dispatch 7 came
    >>> padded_return(torch.tensor([[5.0], [6.0]]), slots, wire=wire, number=7)
    >>> view_memory(int(slots.home.peers[0, 0, 0]), (2,), torch.float32).tolist(), slots.home.state.tolist()
    ([5.0, 0.0], [1, 0])
    """
    local, programs, warps = len(slots.tokens), 1, 1
    row, given = Row(0, 4, 1, 0, True, 0, 1, 0), None
    if rows is not None:
        rows, row = _checked(rows, beside, slots, wire, quant)
        warps = slot_warps(row, quant)
        programs = num_programs(local * wire.world * LANES, rows, max_programs, warps=warps)
        given = rows if quant else as_words(rows, row)
    launch(
        _padded_return_kernel,
        (programs,),
        *(given, None if beside is None else beside_words(beside), slots, number),
        num_warps=warps,
        WIRE=wire,
        LOCAL=local,
        ROW=row,
        QUANT=quant,
        LANES=LANES,
        HARDWARE=rows is not None and has_fp8(rows),
    )


def padded_return_ref(
    rows: Tensor | None,
    slots: Slots,
    *,
    wire: Wire,
    number: int,
    beside: Tensor | None = None,
    quant: int = 0,
    max_programs: int | None = None,
) -> None:
    """`padded_return` in plain torch; this rank's memory must be CPU memory of this process."""
    link = slots.home
    if int(slots.book[int(OWNER)]) != number:
        slots.notes[int(STALE)] = number + 1
        return
    if int(link.status[int(STALLED)]):
        return
    if rows is not None:
        rows, row = _checked(rows, beside, slots, wire, quant)
        if quant:
            rows, beside = encoded_ref(rows, quant)
        for place in places_ref(slots.ranges, wire.world * link.max_tokens):
            write_row_ref(int(link.peers[0, int(ROWS), link.rank]), rows, beside, place, place, row.scale_offset)
    signal_ref(link, wire)


@triton.jit
def _decoded(area, place, group, inside, HOME: tl.constexpr):
    """float32 values of a row of codes, at some groups of 128 columns."""
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    codes = row_at(area, place, HOME.hidden, tl.uint8, HOME.aligned)
    code = tl.load(codes + column, mask=inside, other=0)  # row access
    if HOME.quant == INT8:
        scale = tl.load(row_at(area + HOME.offset, place, 4, tl.float32, False), mask=place >= 0, other=0.0)
        return code.to(tl.int8, bitcast=True).to(tl.float32) * scale
    known = used(group < HOME.scales, place)
    if HOME.quant == EXPONENTS:
        scales = row_at(area + HOME.offset, place, HOME.scales, tl.uint8, False)
        bits = tl.load(scales + group, mask=known, other=1).to(tl.int32)
        bits = tl.where(bits == 255, 0x7FC00000, tl.where(bits == 0, 0x400000, bits << 23))
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scales = row_at(area + HOME.offset, place, 4 * HOME.scales, tl.float32, False)
        scale = tl.load(scales + group, mask=known, other=0.0)
    return decode_e4m3(code) * scale[:, None]


@triton.jit(do_not_specialize=["number", "num_tokens"])
def _padded_sum_kernel(
    out,
    bias,
    weights,
    slots,
    number,
    num_tokens,
    WIRE: tl.constexpr,
    HOME: tl.constexpr,
):
    link = slots.home
    TOP_K: tl.constexpr = WIRE.top_k
    ELEMENT: tl.constexpr = out.dtype.element_ty
    ROW_BYTES: tl.constexpr = HOME.hidden * (ELEMENT.primitive_bitwidth // 8)
    is_fresh = tl.load(slots.book + OWNER) == number
    if (is_fresh == 0) & (tl.program_id(0) == 0):
        tl.store(slots.notes + STALE, number + 1)
    came = is_fresh.to(tl.int32)
    if is_fresh:
        came = wait_for_all(link, tl.load(link.state), WIRE)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(slots.book + DONE, tl.load(slots.out.state))
    if HOME.quant == PLAIN:
        column = tl.program_id(1) * HOME.block + tl.arange(0, HOME.block)
    else:
        GROUPS: tl.constexpr = HOME.block // GROUP
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        inside = column < HOME.hidden
        if bias is not None:
            BIAS: tl.constexpr = bias.dtype.element_ty
            source = row_at(bias.to(tl.int64), token, HOME.hidden * (BIAS.primitive_bitwidth // 8), BIAS, HOME.aligned)
            total = widen(tl.load(source + column, mask=inside, other=0.0))  # row access
        else:
            total = tl.full(column.shape, 0, tl.float32)
        for k in tl.static_range(0, TOP_K):
            entry = token * TOP_K + k
            place = tl.where(came != 0, tl.load(slots.places + entry), -1)
            expert = tl.where(place >= 0, tl.load(slots.topk_idx + entry), 0)
            area = area_of(link, 0, ROWS, tl.load(slots.rank_of_expert + expert), WIRE)
            if HOME.quant == PLAIN:
                row = row_at(area, place, ROW_BYTES, ELEMENT, HOME.aligned)
                value = widen(tl.load(row + column, mask=used(inside, place), other=0.0))  # row access
            else:
                value = _decoded(area, place, group, used(inside, place), HOME)
            if weights is not None:
                value = value * tl.load(weights + entry)
            total = tl.where(place >= 0, total + value, total)
        total = tl.where(came != 0, total, float("nan"))
        target = row_at(out.to(tl.int64), token, ROW_BYTES, ELEMENT, HOME.aligned)
        tl.store(target + column, narrow(total, ELEMENT), mask=inside)  # row access


def padded_sum(
    out: Tensor,
    slots: Slots,
    *,
    wire: Wire,
    number: int,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    quant: int = 0,
    max_programs: int | None = None,
) -> None:
    """Wait until all ranks let rows go home, then read and sum those of each token, in ascending k.

        out[t] = round(bias[t] + sum of w[t, k] * row of entry (t, k))

    in float32, each product rounded before it is added. If the wait gives up, or the rows are gone, `out` becomes NaN.

    Args:
        out: (T, H) float32, float16 or bfloat16, also the dtype of rows that travel as they are.
        slots: the generation; its last dispatch is then done with.
        wire: the shape of the wire.
        number: of the dispatch.
        weights: (T, K) float32, or None: rows are added as they are.
        bias: (T, H) float32, float16 or bfloat16, or None: 0.
        quant: how rows travel (`slots`).
        max_programs: upper bound for the grid's first axis; what fits on the GPU unless told.

    >>> wire, zero = Wire.of(world=1, top_k=2, max_local=1, row_bytes=16), torch.zeros(1, dtype=torch.int32)
    >>> ((slots, _),), memory = loopback_slots(wire, 2, zero, zero, area_bytes=16)
    >>> weights, y = torch.tensor([[0.5, 2.0]]), torch.empty(1, 1)
    >>> ids = torch.tensor([[0, 0]])
    >>> padded_send(torch.tensor([[3.0]]), ids, slots, wire=wire, number=0)
    >>> slots.ranges[0, 0, 1] = 2
    >>> padded_return(torch.tensor([[5.0], [6.0]]), slots, wire=wire, number=0)
    >>> padded_sum(y, slots, wire=wire, number=0, weights=weights)
    >>> y.tolist()
    [[14.5]]
    """
    weights, bias, home = _summed(out, weights, bias, slots, wire, quant)
    warps = max(1, min(8, home.block * (1 if quant else out.element_size()) // 1024))
    blocks = -(-home.hidden // home.block)
    launch(
        _padded_sum_kernel,
        (num_programs(out.shape[0], out, max_programs, warps=warps, columns=blocks), blocks),
        *(out, bias, weights, slots, number, out.shape[0]),
        num_warps=warps,
        WIRE=wire,
        HOME=home,
    )


def padded_sum_ref(
    out: Tensor,
    slots: Slots,
    *,
    wire: Wire,
    number: int,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    quant: int = 0,
    max_programs: int | None = None,
) -> None:
    """`padded_sum` in plain torch; all ranks' memory must be CPU memory of this process."""
    weights, bias, home = _summed(out, weights, bias, slots, wire, quant)
    link = slots.home
    if int(slots.book[int(OWNER)]) != number:
        slots.notes[int(STALE)] = number + 1
        out.fill_(torch.nan)
        return
    wait_ref(link, wire)
    slots.book[int(DONE)] = slots.out.state[0]
    if int(link.status[int(STALLED)]):
        out.fill_(torch.nan)
        return
    for token in range(out.shape[0]):
        total = torch.zeros(home.hidden) if bias is None else bias[token].float()
        for k in range(wire.top_k):
            place = int(slots.places[token, k])
            if place < 0:
                continue
            rank = int(slots.rank_of_expert[int(slots.topk_idx[token, k])])
            value = _value_ref(int(link.peers[0, int(ROWS), rank]), place, out.dtype, home)
            total = total + (value if weights is None else value * weights[token, k])
        out[token] = torch.where(total.isnan(), torch.nan, total).to(out.dtype)


def _value_ref(area: int, place: int, dtype: torch.dtype, home: Home) -> Tensor:
    """float32 values of a row that comes home."""
    if home.quant == int(PLAIN):
        return view_memory(area + place * home.hidden * dtype.itemsize, (home.hidden,), dtype).float()
    raw = view_memory(area + place * home.hidden, (home.hidden,), torch.uint8)
    if home.quant == int(INT8):
        return raw.view(torch.int8).float() * view_memory(area + home.offset + 4 * place, (1,), torch.float32)
    kind = torch.float8_e8m0fnu if home.quant == int(EXPONENTS) else torch.float32
    start = area + home.offset + place * home.scales * kind.itemsize
    scales = view_memory(start, (home.scales,), kind).float()
    return raw.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(int(GROUP))[: home.hidden]


def _summed(
    out: Tensor, weights: Tensor | None, bias: Tensor | None, slots: Slots, wire: Wire, quant: int
) -> tuple[Tensor | None, Tensor | None, Home]:
    """Weights and bias, one row after the other, and the geometry of the sums."""
    element_of("out", out.dtype)
    hidden, size, link = out.shape[1], out.element_size(), slots.out
    assert out.is_contiguous() and hidden > 0, f"out has shape {tuple(out.shape)} and strides {out.stride()}"
    assert out.shape[0] <= link.max_tokens, f"{out.shape[0]} tokens, at most {link.max_tokens} fit"
    if weights is not None:
        kind, wanted = (tuple(weights.shape), weights.dtype), ((out.shape[0], wire.top_k), torch.float32)
        assert kind == wanted, f"weights are {kind}, expected {wanted}"
        weights = weights.contiguous()
    if bias is not None:
        element_of("bias", bias.dtype)
        assert bias.shape == out.shape, f"bias has shape {tuple(bias.shape)}, expected {tuple(out.shape)}"
        bias = bias.contiguous()
    places = [hidden if quant else hidden * size]
    for tensor in (out, bias):
        places += [] if tensor is None else [tensor.data_ptr(), hidden * tensor.element_size()]
    most, even = _BLOCK_BYTES // (2 if quant else size), hidden & -hidden
    block = min(even, most) if even >= most // 2 else min(most, triton.next_power_of_2(hidden))
    block = max(block, int(GROUP)) if quant else block
    scales = 0 if not quant else 1 if quant == int(INT8) else -(-hidden // int(GROUP))
    offset = beside_offset(wire, link.max_tokens, hidden if quant else hidden * size)
    return weights, bias, Home(hidden, block, all(place % 16 == 0 for place in places), quant, scales, offset)


def _checked(rows: Tensor, beside: Tensor | None, slots: Slots, wire: Wire, quant: int) -> tuple[Tensor, Row]:
    rows, link = contiguous_rows("rows", rows), slots.home
    expected = len(slots.tokens) * wire.world * link.max_tokens
    assert rows.shape[0] == expected, f"{rows.shape[0]} rows, expected {expected}"
    if not quant:
        return rows, row_of(rows, beside, slots, wire)
    element_of("rows", rows.dtype)
    assert beside is None, "rows that become FP8 have scales beside them, and nothing else"
    return rows, fp8_row(rows, rows.shape[1], wire, link.max_tokens)
