"""Low-latency mode: every (token, expert) row in the slots of its expert, and a weighted sum at the source.

Legend: T tokens, H hidden, K top-k, E experts, R ranks, L experts of this rank, M most tokens of a rank, N rows got.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from moecomm import Dispatched, Pending
from moecomm.deep_ep.crew import Crew
from moecomm.deep_ep.events import EventOverlap, finished
from moecomm.deep_ep.fp8 import encode
from moecomm.deep_ep.parcels import checked_ids, experts_of
from moecomm.deep_ep.refusals import FLOATS, INDEX_DTYPES, demand, demand_count, demand_tensor, unsupported
from moecomm.deep_ep.shipments import LowLatencyHandle, Received, Shipment
from moecomm.deep_ep.wire import Space, Wire
from moecomm.memory.device import moves_by_kernels

Hook = Callable[[], None]


class LowLatencyMode:
    """The low-latency half of `Buffer`."""

    rank: int
    group_size: int
    _wire: Wire

    def _start_low_latency(self, enable_shrink: bool) -> None:
        self._crew = Crew(self._wire, enable_shrink)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing is left over that would have to be cleaned, whatever the normal mode did."""
        demand_count("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        demand_count("hidden", hidden)
        demand_count("num_experts", num_experts)

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
            dispatch_wait_recv_cost_stats: (R,) int64, the microseconds that this call waited for each other are added.
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
        num_max = num_max_dispatch_tokens_per_rank
        demand_count("num_max", num_max)
        demand_count("num_experts", num_experts)
        demand_tensor("x", x, None, None, dtypes=FLOATS)
        demand(len(x) <= num_max, "too many tokens", got=len(x), expected=f"at most {num_max}", remedy="raise num_max")
        demand_tensor("topk_idx", topk_idx, len(x), None, dtypes=INDEX_DTYPES)
        _one_way(async_finish, return_recv_hook)
        _, num_local = experts_of(num_experts, self.group_size, self.rank)
        _stats("cumulative_local_expert_recv_stats", cumulative_local_expert_recv_stats, num_local, torch.int32)
        _stats("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, self.group_size, torch.int64)
        idx = self._crew.without_masked(checked_ids(topk_idx, num_experts), num_experts)
        rows, scales = x.detach(), None
        if use_fp8:
            rows, scales = encode(x, round_scale, use_ue8m0)
        token = torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
        beside = token if scales is None else torch.cat([token, scales.view(torch.int32)], 1)
        num_slots = num_max * self.group_size
        # Rows are written where the caller wants them, unless those of somebody are left out, or come later.
        by_kernels = moves_by_kernels(x.device)
        stays = not (return_recv_hook or self._crew.masked is not None or by_kernels)
        shipment = Shipment(idx.clone(), num_experts, num_max, num_slots)
        mask = None if self._crew.masked is None else self._crew.mask.clone()
        make_room = partial(Received.room_for, num_local, num_slots, self.group_size, rows, scales)
        room = None if stays else make_room()

        def begin() -> Pending[Dispatched]:
            space, routing = self._routed(shipment)
            in_groups = space.placement is None and not by_kernels  # of a fixed size, on all ranks
            align = -num_slots if in_groups else 1
            how: dict[str, Any] = {"starts": return_recv_hook, "layout": "expert", "align": align}
            return self._wire.dispatch_async(space, rows, beside, routing, None, **how)

        arrive = self._crew.start(begin, dispatch_wait_recv_cost_stats)

        def receive() -> Received:
            out = arrive()
            counts = self._crew.my_counts(out.handle.expert_counts, num_experts)
            shipment.arrived(self._routed(shipment)[0], out.handle, counts, mask, self._wire.losses)
            if room is None and shipment.is_fixed:
                got = Received.where_it_is(out, counts, num_slots, None if scales is None else scales.dtype)
            else:
                got = make_room() if room is None else room
                got.fill(out, shipment)
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
            use_logfmt: send 10-bit logarithms, 64 % of the bytes of bfloat16 (`moecomm.quant`). zero_copy: rows are in
                the tensor that `get_next_low_latency_combine_buffer(handle)` gave, not in x; not both.
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
        given, quant, weights = x, "logfmt10" if use_logfmt else None, topk_weights.detach().contiguous()

        def begin() -> Pending[Tensor]:
            if shipment.losses != self._wire.losses:
                self._reroute(shipment, given)
            assert shipment.handle is not None and shipment.space is not None
            home = replace(shipment.handle, topk_weights=weights)
            left_out = (topk_idx < 0) & (home.topk_idx >= 0)
            if left_out.any():
                home = replace(home, send_pos=home.send_pos.masked_fill(left_out, -1))
            rows = shipment.rows_of(given)
            return self._wire.combine_async(shipment.space, rows, home, starts=return_recv_hook, quant=quant)

        arrive = self._crew.start(begin, combine_wait_recv_cost_stats)
        if out is None and not return_recv_hook:
            return arrive(), finished(async_finish), None
        result = x.new_empty(len(topk_idx), x.shape[2]) if out is None else out

        @cache
        def hook() -> None:
            result.copy_(arrive())

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

    def _routed(self, shipment: Shipment) -> tuple[Space, Tensor]:
        """Which routings a dispatch shares handles with, and its routing, among the ranks that are left."""
        num_experts, top_k = shipment.num_experts, shipment.topk_idx.shape[1]
        placement = self._crew.placement(num_experts)
        most_local = -(-num_experts // self.group_size)
        # Room for groups of a fixed size.
        num_tokens = max(shipment.num_max, -(-shipment.num_max * most_local // max(1, top_k)))
        space = Space(
            num_experts=num_experts if placement is None else sum(map(len, placement)),
            top_k=top_k,
            reduce="source",
            num_tokens=num_tokens,
            placement=placement,
        )
        return space, self._crew.renumbered(shipment.topk_idx, num_experts)

    def _reroute(self, shipment: Shipment, x: Tensor) -> None:
        """Plan the routing of a dispatch anew, among the ranks that are left, with rows of nothing. Collective."""
        space, idx = self._routed(shipment)
        rows = x.new_zeros(len(idx), x.shape[2])
        out = self._wire.dispatch(space, rows, idx[:, :1].int(), idx, None, layout="expert")
        shipment.rerouted(space, out.handle, self._wire.members, self._wire.losses)

    # -- ranks that are left out ---------------------------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of what follows, or (mask=False) take it back, if it was not lost."""
        known = isinstance(rank_to_mask, int) and 0 <= rank_to_mask < self.group_size
        demand(known, "rank_to_mask is no rank", got=rank_to_mask, expected=f"0 to {self.group_size - 1}")
        self._crew.leave_out(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for each rank that is left out, 0 for others, into (R,) int32."""
        demand_tensor("mask_status", mask_status, self.group_size, dtypes=(torch.int32,)).copy_(self._crew.mask)

    def low_latency_clean_mask_buffer(self) -> None:
        """Leave no rank out, but for those that were lost."""
        self._crew.take_back()


def _shipment(handle: Any) -> Shipment:
    what, got = "handle is none of a low-latency dispatch", type(handle).__name__
    demand(isinstance(handle, LowLatencyHandle), what, got=got, expected="what low_latency_dispatch() gave")
    shipment: Shipment = handle.shipment
    return shipment


def _one_way(async_finish: bool, return_recv_hook: bool) -> None:
    what = "async_finish and return_recv_hook exclude each other"
    demand(not (async_finish and return_recv_hook), what, got="both", expected="one of them")


def _stats(name: str, stats: Tensor | None, length: int, dtype: torch.dtype) -> None:
    if stats is not None:
        demand_tensor(name, stats, length, dtypes=(dtype,))
