"""What a rank sends where, from its own routing: slots and counts, by prefix sum.

Legend: T tokens, K top-k, E experts in flat order (sorted by (rank, local id)), W ranks, M max tokens per rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch
from moecomm.kernels.wire import BAD_ID, Wire
from torch import Tensor

_BLOCK_ENTRIES = 2048
_ENTRIES_PER_THREAD = 4  # with 8, registers spill on sm_100


class SendLayout(NamedTuple):
    """What `layout` found.

    meta: (T, meta_words) int32 that travel beside each row: K flat expert ids (-1: none), K numbers of the entry among
        this rank's entries for its expert, in (token, k) order (-1: none), K weights (float32 bits), the token.
    pair_row: (T, W) int32, for each pair (token, rank) its row w * M + slot, slots in token order; -1: not sent.
    counts: (W, counts_width) int32, per destination rank: pairs, then entries per local expert.
    """

    meta: Tensor
    pair_row: Tensor
    counts: Tensor


@triton.jit
def note_entry(word, entry, expert):
    """Note an entry with which something is wrong, and what it names; the first of all is kept."""
    shown = tl.minimum(tl.maximum(expert.to(tl.int64), -(2**31)), 2**31 - 1) & 0xFFFFFFFF
    tl.atomic_max(word, (tl.cast(2**31 - 1 - entry, tl.int64) << 32) | shown, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "max_tokens", "num_experts"])
def _layout_kernel(
    meta,
    pair_row,
    counts,
    status,
    topk_idx,
    topk_weights,
    flat_of_expert,
    expert_begin,
    num_tokens,
    max_tokens,
    num_experts,
    WIRE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    # Program w < W numbers the pairs for rank w; program W + e numbers the entries for flat expert e.
    program = tl.program_id(0)
    TOP_K: tl.constexpr = WIRE.top_k
    if program < WIRE.world:
        begin, end = tl.load(expert_begin + program), tl.load(expert_begin + program + 1)
        k = tl.arange(0, WIRE.top_k_p2)[None, :]
        num_pairs = tl.zeros((), tl.int32)
        for start in range(0, num_tokens, BLOCK_T):
            token = start + tl.arange(0, BLOCK_T)
            entry = token[:, None] * TOP_K + k
            inside = (token[:, None] < num_tokens) & (k < TOP_K)
            expert = tl.load(topk_idx + entry, mask=inside, other=-1)
            valid = (expert >= 0) & (expert < num_experts)
            flat = tl.load(flat_of_expert + expert, mask=valid, other=-1)
            here = tl.max(((flat >= begin) & (flat < end)).to(tl.int32), axis=1)
            slot = num_pairs + tl.cumsum(here, 0) - here
            row = tl.where(here > 0, program * max_tokens + slot, -1)
            tl.store(pair_row + token * WIRE.world + program, row, mask=token < num_tokens)
            num_pairs += tl.sum(here, 0)
            if program == 0:
                first = meta + token[:, None].to(tl.int64) * WIRE.meta_words
                tl.store(first + k, flat, mask=inside)
                tl.store(first + TOP_K + k, tl.full((BLOCK_T, WIRE.top_k_p2), -1, tl.int32), mask=inside & ~valid)
                if topk_weights is not None:
                    weight = tl.load(topk_weights + entry, mask=inside, other=0.0)
                else:
                    weight = tl.full((BLOCK_T, WIRE.top_k_p2), 1.0, tl.float32)
                tl.store(first + 2 * TOP_K + k, weight.to(tl.int32, bitcast=True), mask=inside)
                rest = tl.arange(0, WIRE.meta_p2)[None, :]
                own = (rest >= 3 * TOP_K) & (rest < WIRE.meta_words) & (token[:, None] < num_tokens)
                tl.store(first + rest, token[:, None] + tl.zeros_like(rest), mask=own)
                bad = inside & ((expert < -1) | (expert >= num_experts))
                worst = tl.min(tl.min(tl.where(bad, entry, 2**31 - 1), axis=1), axis=0)
                if worst < 2**31 - 1:
                    note_entry(status + BAD_ID, worst, tl.load(topk_idx + worst))
        tl.store(counts + program * WIRE.counts_width, num_pairs)
        column = tl.arange(0, WIRE.counts_p2)
        unused = (column > end - begin) & (column < WIRE.counts_width)
        tl.store(counts + program * WIRE.counts_width + column, tl.zeros_like(column), mask=unused)
    else:
        own = program - WIRE.world
        num_entries = tl.zeros((), tl.int32)
        for start in range(0, num_tokens * TOP_K, BLOCK_ENTRIES):
            entry = start + tl.arange(0, BLOCK_ENTRIES)
            inside = entry < num_tokens * TOP_K
            expert = tl.load(topk_idx + entry, mask=inside, other=-1)
            valid = (expert >= 0) & (expert < num_experts)
            mine = (tl.load(flat_of_expert + expert, mask=valid, other=-1) == own).to(tl.int32)
            number = num_entries + tl.cumsum(mine, 0) - mine
            token = entry // TOP_K
            place = token.to(tl.int64) * WIRE.meta_words + TOP_K + (entry - token * TOP_K)
            tl.store(meta + place, number, mask=mine > 0)
            num_entries += tl.sum(mine, 0)
        rank = tl.arange(0, WIRE.world_p2)
        ends = tl.load(expert_begin + 1 + rank, mask=rank < WIRE.world, other=2**31 - 1)
        home = tl.sum((ends <= own).to(tl.int32), 0)
        local = own - tl.load(expert_begin + home)
        tl.store(counts + home * WIRE.counts_width + 1 + local, num_entries)


def layout(
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    flat_of_expert: Tensor,
    expert_begin: Tensor,
    *,
    wire: Wire,
    max_tokens: int,
    status: Tensor,
) -> SendLayout:
    """Number the pairs and entries that this rank sends, in one launch and without a host round trip.

    Args:
        topk_idx: (T, K) int32 or int64 global expert ids, -1 for none. An id out of range is treated as none and its
            place noted in `status`; T is at most `max_tokens`.
        topk_weights: (T, K) float32, or None: all 1.
        flat_of_expert: (E,) int32 global expert id -> flat id.
        expert_begin: (W + 1,) int32 first flat id of each rank, then E.
        wire: the shape of the wire.
        max_tokens: M.
        status: int64, its first word is written (see `wire.decode_bad_id`).

    >>> wire, status = Wire.of(world=2, top_k=2, max_local=2, row_bytes=16), torch.zeros(5, dtype=torch.int64)
    >>> topk_idx, ids = torch.tensor([[3, 0], [0, 1]]), torch.arange(4, dtype=torch.int32)
    >>> found = layout(topk_idx, None, ids, torch.tensor([0, 2, 4], dtype=torch.int32), wire=wire, max_tokens=8,
    ...                status=status)
    >>> found.pair_row.tolist(), found.counts.tolist()  # token 0 goes to both ranks, token 1 to rank 0 only
    ([[0, 8], [1, -1]], [[2, 2, 1], [1, 0, 1]])
    >>> found.meta[:, :4].tolist()  # flat ids, then the how-manieth of this rank for that expert
    [[3, 0, 0, 0], [0, 1, 1, 0]]
    """
    topk_idx, topk_weights = _checked(topk_idx, topk_weights, flat_of_expert, expert_begin, wire, max_tokens)
    num_tokens, num_experts = topk_idx.shape[0], flat_of_expert.shape[0]
    out = _empty(num_tokens, wire, topk_idx.device)
    grid = (wire.world + num_experts,)
    block_t = min(triton.next_power_of_2(max(16, num_tokens)), max(16, _BLOCK_ENTRIES // wire.top_k_p2))
    block_entries = min(triton.next_power_of_2(max(16, num_tokens * wire.top_k)), _BLOCK_ENTRIES)
    inputs = topk_idx, topk_weights, flat_of_expert, expert_begin, num_tokens, max_tokens, num_experts
    blocks = {"BLOCK_T": block_t, "BLOCK_ENTRIES": block_entries}
    warps = max(1, min(16, max(block_t * wire.top_k_p2, block_entries) // (32 * _ENTRIES_PER_THREAD)))
    launch(_layout_kernel, grid, *out, status, *inputs, num_warps=warps, WIRE=wire, **blocks)
    return out


def layout_ref(
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    flat_of_expert: Tensor,
    expert_begin: Tensor,
    *,
    wire: Wire,
    max_tokens: int,
    status: Tensor,
) -> SendLayout:
    """`layout` in plain torch."""
    topk_idx, topk_weights = _checked(topk_idx, topk_weights, flat_of_expert, expert_begin, wire, max_tokens)
    (num_tokens, top_k), num_experts = topk_idx.shape, flat_of_expert.shape[0]
    ids = topk_idx.long()
    valid = (ids >= 0) & (ids < num_experts)
    bad = ((ids < -1) | (ids >= num_experts)).flatten().nonzero()
    if bad.numel():
        entry = int(bad[0])
        shown = max(-(2**31), min(int(ids.flatten()[entry]), 2**31 - 1)) & 0xFFFFFFFF
        status[int(BAD_ID)] = max(int(status[int(BAD_ID)]), ((2**31 - 1 - entry) << 32) | shown)
    flat = torch.where(valid, flat_of_expert.long()[ids.clamp(0, num_experts - 1)], -1)
    meta, pair_row, counts = _empty(num_tokens, wire, topk_idx.device)
    weights = torch.ones_like(ids, dtype=torch.float32) if topk_weights is None else topk_weights
    meta[:, :top_k] = flat
    hits = torch.nn.functional.one_hot(flat.flatten() + 1, num_experts + 1)
    earlier = (hits.cumsum(0) - hits).gather(1, flat.flatten()[:, None] + 1).view(num_tokens, top_k)
    meta[:, top_k : 2 * top_k] = torch.where(valid, earlier, -1)
    meta[:, 2 * top_k : 3 * top_k] = weights.contiguous().view(torch.int32)
    meta[:, 3 * top_k :] = torch.arange(num_tokens, device=meta.device)[:, None]
    counts.zero_()
    per_expert = hits.sum(0)[1:]
    for rank in range(wire.world):
        begin, end = int(expert_begin[rank]), int(expert_begin[rank + 1])
        here = ((flat >= begin) & (flat < end)).any(1).long()
        pair_row[:, rank] = torch.where(here > 0, rank * max_tokens + here.cumsum(0) - here, -1)
        counts[rank, 0] = here.sum()
        counts[rank, 1 : 1 + end - begin] = per_expert[begin:end]
    return SendLayout(meta, pair_row, counts)


def _checked(
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    flat_of_expert: Tensor,
    expert_begin: Tensor,
    wire: Wire,
    max_tokens: int,
) -> tuple[Tensor, Tensor | None]:
    shape = tuple(topk_idx.shape)
    assert topk_idx.ndim == 2 and shape[1] == wire.top_k, f"topk_idx has shape {shape}, expected (T, {wire.top_k})"
    assert topk_idx.dtype in (torch.int32, torch.int64), f"topk_idx is {topk_idx.dtype}, expected int32 or int64"
    assert shape[0] <= max_tokens, f"{shape[0]} tokens, at most {max_tokens} fit"
    assert wire.world * max_tokens < 2**31 and shape[0] * shape[1] < 2**31, "row numbers must fit in int32"
    assert flat_of_expert.dtype == expert_begin.dtype == torch.int32, "the expert tables are int32"
    assert expert_begin.shape == (wire.world + 1,), f"expert_begin has shape {tuple(expert_begin.shape)}"
    if topk_weights is not None:
        assert topk_weights.shape == shape and topk_weights.dtype == torch.float32, (
            f"topk_weights {tuple(topk_weights.shape)} {topk_weights.dtype}, expected {shape} float32"
        )
        topk_weights = topk_weights.contiguous()
    return topk_idx.contiguous(), topk_weights


def _empty(num_tokens: int, wire: Wire, device: torch.device) -> SendLayout:
    meta = torch.empty(num_tokens, wire.meta_words, dtype=torch.int32, device=device)
    pair_row = torch.empty(num_tokens, wire.world, dtype=torch.int32, device=device)
    counts = torch.empty(wire.world, wire.counts_width, dtype=torch.int32, device=device)
    return SendLayout(meta, pair_row, counts)
