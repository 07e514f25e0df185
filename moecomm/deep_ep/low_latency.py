"""Low-latency mode: every (token, expert) row in the slots of its expert, and a weighted sum at the source.

Legend: T tokens, H hidden, K top-k, E experts, R ranks, L experts of this rank, M most tokens of a rank, N rows got.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, final

import torch
from torch import Tensor

from moecomm import Dispatched, DispatchHandle
from moecomm.deep_ep.events import EventOverlap, finished
from moecomm.deep_ep.parcels import experts_of
from moecomm.deep_ep.refusals import FLOATS, INDEX_DTYPES, demand, demand_tensor, unsupported
from moecomm.deep_ep.wire import Space, Wire
from moecomm.errors import PeerLostError, StallError
from moecomm.memory.device import moves_by_kernels
from moecomm.quant import QuantSpec, dequantize, quantize
from moecomm.rows import copy_rows, empty_rows

_SCALES = "float32", "power_of_two", "ue8m0"

Hook = Callable[[], None]


@final
class LowLatencyHandle(tuple[Tensor, Tensor, int, int, int]):
    """(packed_recv_src_info, layout_range, num_max, hidden, num_experts), and the operation behind it."""

    shipment: Shipment

    def __new__(cls, items: tuple[Tensor, Tensor, int, int, int], shipment: Shipment) -> LowLatencyHandle:
        self = super().__new__(cls, items)
        self.shipment = shipment
        return self


@final
@dataclass(eq=False, slots=True)
class Shipment:
    """A low-latency dispatch. handle and counts, (L, R) rows from each rank, are there once it has ended.

    is_fixed: the rows of an expert lie in a group of num_slots in the `moecomm.Buffer` too.
    """

    space: Space
    topk_idx: Tensor
    num_local: int
    num_slots: int
    is_fixed: bool
    finish: Callable[[], Received] | None = None
    received: Received | None = None
    handle: DispatchHandle | None = None
    counts: Tensor | None = None
    mask: Tensor | None = None
    staging: Tensor | None = None

    def arrived(self, handle: DispatchHandle, counts: Tensor, mask: Tensor | None) -> None:
        """Note what the dispatch brought."""
        self.handle, self.counts, self.mask = handle, counts, None if mask is None else mask.clone()

    def end(self) -> Received:
        """Receive, if that has not been done yet."""
        finish, self.finish = self.finish, None
        if finish is not None:
            self.received = finish()
        assert self.received is not None
        return self.received

    def hook(self) -> None:
        """What a caller gets to receive with."""
        self.end()

    def slots(self) -> Tensor:
        """(N,) int64 where the rows that came are among L * R * M, those of an expert by source; -1 if left out."""
        assert self.counts is not None
        counts = self.counts
        shown = counts if self.mask is None else counts.masked_fill(self.mask.bool(), 0)
        base = shown.cumsum(1) - shown + torch.arange(len(counts))[:, None] * self.num_slots
        run = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
        starts = counts.flatten().cumsum(0) - counts.flatten()
        slots = base.flatten()[run] + torch.arange(len(run)) - starts[run]
        return torch.where(shown.flatten()[run] > 0, slots, -1)

    def rows_of(self, x: Tensor, use_logfmt: bool) -> Tensor:
        """The rows to lead home of (L, R * M, H) expert outputs."""
        flat = _flat(x)
        if self.is_fixed and flat.is_contiguous() and not use_logfmt:
            return flat
        slots = self.slots().to(x.device)
        rows = torch.empty(len(slots), x.shape[2], dtype=x.dtype, device=x.device)
        copy_rows(rows, flat, slots)
        if use_logfmt:
            rows = dequantize(*quantize(rows, "logfmt10"), rows.dtype, rows.shape[1])
        if not self.is_fixed:
            return rows
        placed = empty_rows(self.num_local * self.num_slots, x.shape[2], x.dtype, x.device)
        copy_rows(placed, rows, torch.arange(len(slots), device=x.device), slots)
        return placed


class LowLatencyMode:
    """The low-latency half of `Buffer`."""

    rank: int
    group_size: int
    _wire: Wire

    def _start_low_latency(self, enable_shrink: bool) -> None:
        self._mask = torch.zeros(self.group_size, dtype=torch.int32) if enable_shrink else None

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing is left over that would have to be cleaned, whatever the normal mode did."""
        _count("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        _count("hidden", hidden)
        _count("num_experts", num_experts)

    @torch.no_grad()
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        use_nvfp4: bool = False,
        x_global_scale: Tensor | None = None,
    ) -> tuple[Any, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send every (token, expert) row to the slots of its expert. Collective.

        Args:
            x: (T, H) bfloat16, float16 or float32, T at most num_max_dispatch_tokens_per_rank.
            topk_idx: (T, K) global expert ids, -1 for none.
            num_max_dispatch_tokens_per_rank: M; num_experts: E; the same on all ranks.
            cumulative_local_expert_recv_stats: (L,) int32, the rows of each local expert are added.
            dispatch_wait_recv_cost_stats: (R,) int64, the microseconds that this call waited are added for all others.
            use_fp8: send e4m3 with one float32 scale per 128 columns. round_scale: scales are powers of two.
            use_ue8m0: and come as their exponents, four in an int32.
            return_recv_hook: return at once; `hook()` receives. async_finish: return an event; not both.

        Returns:
            (L, R * M, H) rows, or (FP8 rows, (L, R * M, S) scales, column-major): those of an expert come first, by
            source rank and token, what follows is uninitialised; (L,) int32 rows of each expert; the handle; an event;
            the hook.
        """
        if use_nvfp4 or x_global_scale is not None:
            raise unsupported("use_nvfp4")
        num_max, num_experts = _count("num_max", num_max_dispatch_tokens_per_rank), _count("num_experts", num_experts)
        demand_tensor("x", x, None, None, dtypes=FLOATS)
        demand(len(x) <= num_max, "too many tokens", got=len(x), expected=f"at most {num_max}", remedy="raise num_max")
        demand_tensor("topk_idx", topk_idx, len(x), None, dtypes=INDEX_DTYPES)
        _one_way(async_finish, return_recv_hook)
        first, num_local = experts_of(num_experts, self.group_size, self.rank)
        _stats("cumulative_local_expert_recv_stats", cumulative_local_expert_recv_stats, num_local, torch.int32)
        _stats("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, self.group_size, torch.int64)
        idx = self._unmasked(topk_idx if topk_idx.dtype.itemsize >= 4 else topk_idx.int(), num_experts)
        scales = None
        rows, token = x.detach(), torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
        if use_fp8:
            rows, scales = quantize(x, QuantSpec(scales=_SCALES[max(2 * use_ue8m0, round_scale)]))
            scales = _packed_exponents(scales) if use_ue8m0 else scales
        beside = token if scales is None else torch.cat([token, scales.view(torch.int32)], 1)
        num_slots = num_max * self.group_size
        # With groups of a fixed size rows are written where the caller wants them; else they are copied there.
        is_fixed = not (return_recv_hook or self._masks_any() or moves_by_kernels(x.device))
        most_local = -(-num_experts // self.group_size)
        num_tokens = max(num_max, -(-num_max * most_local // max(1, idx.shape[1])))  # room for groups of a fixed size
        space = Space(num_experts=num_experts, top_k=idx.shape[1], reduce="source", num_tokens=num_tokens)
        align = -num_slots if is_fixed else 1
        pending = self._wire.dispatch_async(space, rows, beside, idx, None, layout="expert", align=align)
        mask = None if is_fixed else self._mask
        shipment = Shipment(space, topk_idx.clone(), num_local, num_slots, is_fixed)
        room = Received.room_for(num_local, num_slots, self.group_size, rows, scales) if not is_fixed else None
        scale_dtype = None if scales is None else scales.dtype

        def receive() -> Received:
            out = self._waited(pending.wait, dispatch_wait_recv_cost_stats)
            counts = out.handle.expert_counts[:, first : first + num_local].t().long()  # (L, R)
            shipment.arrived(out.handle, counts, mask)
            got = Received.where_it_is(out, counts, num_slots, scale_dtype) if room is None else room
            if room is not None:
                room.fill(out, counts, shipment.slots(), mask)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(got.count)
            return got

        shipment.finish = receive
        got = shipment.end() if room is None else room
        if not return_recv_hook:
            shipment.end()
        recv_x = got.x if got.scales is None else (got.x, got.scales)
        handle = LowLatencyHandle((got.info, got.ranges, num_max, x.shape[1], num_experts), shipment)
        return recv_x, got.count, handle, finished(async_finish), shipment.hook if return_recv_hook else None

    @torch.no_grad()
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Lead rows home and sum them with weights, in float32 and ascending k, rounded once. Collective.

        Args:
            x: (L, R * M, H) expert outputs, float32, float16 or bfloat16, where dispatch gave the rows.
            topk_idx: (T, K) of that dispatch; entries that are -1 here are left out.
            topk_weights: (T, K) float32.
            handle: of that dispatch.
            use_logfmt: send 10-bit logarithms, see `moecomm.quant`. zero_copy: the rows are in the tensor that
                `get_next_low_latency_combine_buffer(handle)` gave, not in x; not both.
            return_recv_hook, async_finish: as dispatch.
            out: (T, H) for the result. combine_wait_recv_cost_stats: (R,) int64, as in dispatch.

        Returns:
            (T, H) sums, `out` if given; an event; the hook.
        """
        _one_way(async_finish, return_recv_hook)
        shipment = _shipment(handle)
        demand(
            not (zero_copy and use_logfmt), "zero_copy and use_logfmt exclude each other", got="both", expected="one"
        )
        num_local = experts_of(handle[4], self.group_size, self.rank)[1]
        demand_tensor("topk_idx", topk_idx, *shipment.topk_idx.shape, dtypes=INDEX_DTYPES)
        demand_tensor("topk_weights", topk_weights, *shipment.topk_idx.shape, dtypes=(torch.float32,))
        demand_tensor("x", x, num_local, shipment.num_slots, None, dtypes=FLOATS)
        if out is not None:
            demand_tensor("out", out, len(topk_idx), x.shape[2], dtypes=(x.dtype,))
        _stats("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats, self.group_size, torch.int64)
        if zero_copy:
            what, got = "zero_copy without a buffer", "none asked for"
            expected = "get_next_low_latency_combine_buffer(handle) before"
            demand(shipment.staging is not None, what, got=got, expected=expected)
            assert shipment.staging is not None
            x = shipment.staging
        shipment.end()
        rows = shipment.rows_of(x, use_logfmt)
        assert shipment.handle is not None
        home = replace(shipment.handle, topk_weights=topk_weights.detach().contiguous())
        left_out = (topk_idx < 0) & (home.topk_idx >= 0)
        if bool(left_out.any()):
            home = replace(home, send_pos=home.send_pos.masked_fill(left_out, -1))
        pending = self._wire.combine_async(shipment.space, rows, home)
        result = rows.new_empty(len(topk_idx), x.shape[2]) if out is None else out

        @cache
        def hook() -> None:
            result.copy_(self._waited(pending.wait, combine_wait_recv_cost_stats))

        if not return_recv_hook:
            hook()
        return result, finished(async_finish), hook if return_recv_hook else None

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """A (L, R * M, H) bfloat16 view to fill before `low_latency_combine(..., zero_copy=True)`; strided rows."""
        shipment, hidden = _shipment(handle), handle[3]
        if shipment.staging is None:
            num_local = experts_of(handle[4], self.group_size, self.rank)[1]
            room = torch.empty(
                num_local, shipment.num_slots, hidden + hidden // 64, dtype=torch.bfloat16, device=handle[0].device
            )
            shipment.staging = room[:, :, :hidden]
        return shipment.staging

    # -- ranks that are left out ---------------------------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of what follows, or (mask=False) take it back."""
        known = isinstance(rank_to_mask, int) and 0 <= rank_to_mask < self.group_size
        demand(known, "rank_to_mask is no rank", got=rank_to_mask, expected=f"0 to {self.group_size - 1}")
        self._masks()[rank_to_mask] = int(mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for each rank that is left out, 0 for others, into (R,) int32."""
        demand_tensor("mask_status", mask_status, self.group_size, dtypes=(torch.int32,)).copy_(self._masks())

    def low_latency_clean_mask_buffer(self) -> None:
        """Leave no rank out."""
        self._masks().zero_()

    def _masks(self) -> Tensor:
        what, expected = "Shrink mode must be enabled", "a buffer with enable_shrink=True"
        demand(self._mask is not None, what, got="enable_shrink=False", expected=expected)
        assert self._mask is not None
        return self._mask

    def _masks_any(self) -> bool:
        return self._mask is not None and bool(self._mask.any())

    def _unmasked(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """The routing without the experts of ranks that are left out."""
        if self._mask is None or not self._masks_any():
            return topk_idx
        gone = torch.zeros(num_experts + 1, dtype=torch.bool)
        for rank in self._mask.nonzero().flatten().tolist():
            first, count = experts_of(num_experts, self.group_size, rank)
            gone[first : first + count] = True
        return topk_idx.masked_fill(gone.to(topk_idx.device)[topk_idx.long()], -1)

    def _waited(self, wait: Callable[[], Any], stats: Tensor | None) -> Any:
        """Wait; say how long for whom, and leave out from now on who did not come."""
        begin = time.perf_counter_ns()
        try:
            result = wait()
        except (StallError, PeerLostError) as error:
            if self._mask is not None:
                self._mask[list(error.peers)] = 1
            raise
        if stats is not None:
            others = torch.arange(self.group_size, device=stats.device) != self.rank
            stats.add_(others * ((time.perf_counter_ns() - begin) // 1000))
        return result


@final
@dataclass(frozen=True, slots=True)
class Received:
    """What a low-latency dispatch gives: x (L, R * M, H), scales (L, R * M, S) column-major or None, count (L,) int32,
    info (L, R * M) int32 token of each row at its source, ranges (L, R) int64 `begin << 32 | count`."""

    x: Tensor
    scales: Tensor | None
    count: Tensor
    info: Tensor
    ranges: Tensor

    @classmethod
    def room_for(cls, num_local: int, num_slots: int, num_ranks: int, rows: Tensor, scales: Tensor | None) -> Received:
        """Tensors to fill."""
        x = empty_rows(num_local * num_slots, rows.shape[1], rows.dtype, rows.device)
        return cls(
            x=x.view(num_local, num_slots, rows.shape[1]),
            scales=None if scales is None else scales.new_empty(num_local, scales.shape[1], num_slots).transpose(1, 2),
            count=torch.empty(num_local, dtype=torch.int32, device=rows.device),
            info=torch.empty(num_local, num_slots, dtype=torch.int32, device=rows.device),
            ranges=torch.empty(num_local, num_ranks, dtype=torch.int64, device=rows.device),
        )

    @classmethod
    def where_it_is(cls, out: Dispatched, counts: Tensor, num_slots: int, scale_dtype: torch.dtype | None) -> Received:
        """What lies in groups of a fixed size."""
        rows, beside = (part.view(len(counts), num_slots, part.shape[1]) for part in out.x)
        scales = None
        if scale_dtype is not None:
            scales = beside[:, :, 1:].transpose(1, 2).contiguous().view(scale_dtype).transpose(1, 2)
        begin = counts.cumsum(1) - counts
        return cls(rows, scales, out.tokens_per_expert, beside[:, :, 0].contiguous(), begin << 32 | counts)

    def fill(self, out: Dispatched, counts: Tensor, slots: Tensor, mask: Tensor | None) -> None:
        """Put what came in its place; slots: of every row that came, -1 of those that are left out."""
        num_slots = self.info.shape[1]
        rows, beside = out.x
        shown = counts if mask is None else counts.masked_fill(mask.bool(), 0)
        self.count.copy_(shown.sum(1))
        self.ranges.copy_((shown.cumsum(1) - shown) << 32 | shown)
        slots = slots.to(rows.device)
        every = torch.arange(len(slots), device=rows.device)
        copy_rows(self.x.view(-1, self.x.shape[2]), rows, every, slots)
        kept = slots >= 0
        self.info.view(-1)[slots[kept]] = beside[kept, 0]
        if self.scales is not None:
            expert, slot = slots[kept] // num_slots, slots[kept] % num_slots
            self.scales[expert, slot] = beside[kept, 1:].view(self.scales.dtype)


def _packed_exponents(scales: Tensor) -> Tensor:
    """(T, ceil(G / 4)) int32: four exponents each, the lowest byte first, zeros behind the last."""
    return torch.nn.functional.pad(scales.view(torch.uint8), (0, -scales.shape[1] % 4)).view(torch.int32)


def _flat(x: Tensor) -> Tensor:
    """(L, S, H) with strided rows as (L * S, H), without a copy where that can be."""
    regular = x.stride(2) == 1 and x.stride(0) == x.stride(1) * x.shape[1]
    return x.as_strided((x.shape[0] * x.shape[1], x.shape[2]), (x.stride(1), 1)) if regular else x.flatten(0, 1)


def _shipment(handle: Any) -> Shipment:
    what, got = "handle is none of a low-latency dispatch", type(handle).__name__
    demand(isinstance(handle, LowLatencyHandle), what, got=got, expected="what low_latency_dispatch() gave")
    shipment: Shipment = handle.shipment
    return shipment


def _count(name: str, value: Any) -> int:
    demand(isinstance(value, int) and value > 0, f"{name} is no count", got=repr(value), expected="at least 1")
    return int(value)


def _one_way(async_finish: bool, return_recv_hook: bool) -> None:
    what = "async_finish and return_recv_hook exclude each other"
    demand(not (async_finish and return_recv_hook), what, got="both", expected="one of them")


def _stats(name: str, stats: Tensor | None, length: int, dtype: torch.dtype) -> None:
    if stats is not None:
        demand_tensor(name, stats, length, dtypes=(dtype,))
