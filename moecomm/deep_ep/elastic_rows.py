"""How the rows of `ElasticBuffer` travel, with and without do_expand.

Legend: T tokens, K top-k, R ranks, L experts of this rank, N tokens received, X rows of do_expand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from moecomm import ExpertPlacement
from moecomm.deep_ep.elastic_handle import EPHandle, Route, highest_lanes
from moecomm.deep_ep.parcels import Parcel, at_least, checked_ids, experts_of, padded_sums
from moecomm.deep_ep.refusals import FLOATS, demand, demand_tensor
from moecomm.deep_ep.wire import Space, Wire, own_weights, per_token, room_for


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What a dispatch was asked for. exact: as many rows as come, not as many as could."""

    num_experts: int
    num_max: int
    align: int
    exact: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of a rank to make room for: few different numbers, so that few buffers are made."""
        return room_for(self.num_max)


Sent = tuple[Any, Tensor | None, Tensor | None, EPHandle]


@final
class ElasticRows:
    """Sends rows over a wire. multiple_reduction: sum at the experts before rows of do_expand go home."""

    def __init__(self, wire: Wire, multiple_reduction: bool) -> None:
        self._wire, self._reduce = wire, "rank" if multiple_reduction else "source"
        self._rank, self._num_ranks = wire.group.rank, wire.group.size
        self._rank_of: dict[tuple[int, torch.device], Tensor] = {}

    def compact(self, parcel: Parcel, idx: Tensor, plan: Plan) -> Sent:
        """One row per token and rank."""
        dtype, idx = idx.dtype, checked_ids(idx, plan.num_experts)
        first, num_local = experts_of(plan.num_experts, self._num_ranks, self._rank)
        space = Space(num_experts=plan.num_experts, top_k=idx.shape[1], reduce=self._reduce, num_tokens=plan.num_tokens)
        if self._reduce == "rank":
            carried = replace(parcel, topk_idx=None)
            out = self._wire.dispatch(space, parcel.x, carried.beside(), idx, None, layout="rank")
            arrived, local, counts = carried.unpack(out.x[1]), out.handle.recv_table, out.tokens_per_expert
            kept = out.handle.topk_idx  # the caller may write his next routing to idx

            def lanes() -> Tensor:
                return highest_lanes(self._ranks(kept, plan.num_experts))
        else:  # an expert stands for a rank
            routing = highest_lanes(self._ranks(idx, plan.num_experts))
            space = replace(space, num_experts=self._num_ranks)
            out = self._wire.dispatch(space, parcel.x, parcel.beside(), routing, None, layout="expert")
            arrived = parcel.unpack(out.x[1])
            local, counts = arrived.localise(first, num_local)

            def lanes() -> Tensor:
                return routing

        room = None if plan.exact else plan.num_max * self._num_ranks
        num_rows = len(local) if room is None else room
        route = Route(
            space, out.handle, self._rank, self._num_ranks, lanes, lambda: arrived.origin[:, 0], local, num_rows
        )
        handle = _handle(route, plan, counts)
        recv_idx = at_least(local, room).to(dtype, copy=True)
        if room is not None:
            recv_idx[len(local) :] = -1
        weights = None if arrived.topk_weights is None else at_least(arrived.topk_weights.contiguous(), room)
        rows = at_least(out.x[0], room)
        return rows if arrived.scales is None else (rows, at_least(arrived.scales, room)), recv_idx, weights, handle

    def expanded(self, parcel: Parcel, idx: Tensor, plan: Plan) -> Sent:
        """One row per token and expert."""
        space = Space(num_experts=plan.num_experts, top_k=idx.shape[1], reduce=self._reduce, num_tokens=plan.num_tokens)
        idx = checked_ids(idx, plan.num_experts)
        bare = Parcel(parcel.x, parcel.scales, None, None, 1)
        out = self._wire.dispatch(
            space, parcel.x, bare.beside(), idx, parcel.topk_weights, layout="expert", align=plan.align
        )
        arrived, table = bare.unpack(out.x[1]), out.handle.recv_table
        assert out.row_weights is not None
        num_local = experts_of(plan.num_experts, self._num_ranks, self._rank)[1]
        room = None
        if not plan.exact:
            most = self._num_ranks * plan.num_max * min(idx.shape[1], num_local) + (plan.align - 1) * num_local
            room = -(-most // plan.align) * plan.align
        rows = at_least(out.x[0], room)
        kept = out.handle.topk_idx  # the caller may write his next routing to idx

        def tokens() -> Tensor:
            return arrived.origin[table.amax(1).long(), 0] if table.numel() else arrived.origin[:0, 0]

        def lanes() -> Tensor:
            return highest_lanes(self._ranks(kept, plan.num_experts))

        route = Route(space, out.handle, self._rank, self._num_ranks, lanes, tokens, table, len(rows))
        handle = _handle(route, plan, out.tokens_per_expert, num_expanded=len(out.x[0]))
        weights = None if parcel.topk_weights is None else at_least(out.row_weights, room)
        return rows if arrived.scales is None else (rows, at_least(arrived.scales, room)), None, weights, handle

    def replay(self, parcel: Parcel, handle: EPHandle) -> tuple[Any, Tensor | None, Tensor | None]:
        """Other rows along the route of a handle."""
        demand(
            isinstance(handle, EPHandle),
            "handle is no EPHandle",
            got=type(handle).__name__,
            expected="that of dispatch",
        )
        route, num_tokens = handle.route, len(handle.topk_idx)
        got = f"{len(parcel.x)} tokens"
        demand(len(parcel.x) == num_tokens, "x does not fit the handle", got=got, expected=num_tokens)
        room = route.num_rows
        beside, weights, scales = parcel.beside_again(), None, None
        came = self._wire.replay(route.space, parcel.x, beside, route.handle)
        rows = came if beside is None else came[0]
        if beside is not None:
            weights, scales = parcel.unpack_again(came[1])
        if weights is not None:
            weights = own_weights(weights, route.handle) if handle.do_expand else weights.contiguous()
            weights = at_least(weights, room)
        recv_x = at_least(rows, room) if scales is None else (at_least(rows, room), at_least(scales, room))
        if handle.do_expand:
            return recv_x, None, weights
        idx = at_least(route.local_NK, room).to(handle.topk_idx.dtype, copy=True)
        idx[len(route.local_NK) :] = -1
        return recv_x, idx, weights

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Lead rows and weights home."""
        route = handle.route
        num_rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        demand_tensor("x", x, None, None, dtypes=FLOATS)
        fits = len(x) in (num_rows, route.num_rows)
        demand(fits, "x does not fit the handle", got=f"{len(x)} rows", expected=f"{route.num_rows} rows")
        if topk_weights is not None:
            top_k = handle.topk_idx.shape[1]
            demand_tensor("topk_weights", topk_weights, len(x), *(() if handle.do_expand else (top_k,)))
            allowed = not handle.do_expand or route.space.reduce == "rank"
            what = "topk_weights cannot come home with rows of do_expand by themselves"
            demand(allowed, what, got="allow_multiple_reduction=False", expected="allow_multiple_reduction=True")
        in_order = route.handle
        if route.space.reduce == "rank" and len(route.rank_TK) and not self._wire.sums_by_node:
            in_order = route.by_lanes
        combined = self._wire.combine(route.space, x[:num_rows], in_order, bias=bias)
        if topk_weights is None:
            return combined, None
        if not handle.do_expand:
            weights = topk_weights[:num_rows].float().masked_fill(route.local_NK < 0, 0.0)
            return combined, self._wire.combine(route.space, weights, route.handle)
        table = route.handle.recv_table
        values = torch.nn.functional.pad(topk_weights[:num_rows].float(), (0, 1))[table.long()]
        return combined, self._wire.combine(route.space, values, per_token(route.handle))

    def _ranks(self, idx: Tensor, num_experts: int) -> Tensor:
        """(T, K) int32 rank of each choice, -1 for none."""
        key = num_experts, idx.device
        if key not in self._rank_of:
            ranks = ExpertPlacement.uniform(num_experts, self._num_ranks).rank_of_expert
            self._rank_of[key] = torch.tensor([*ranks, -1], dtype=torch.int32, device=idx.device)
        return self._rank_of[key][idx.long()]


def _handle(route: Route, plan: Plan, counts: Tensor, *, num_expanded: int | None = None) -> EPHandle:
    here = counts.tolist()
    padded, starts = padded_sums(here, plan.align)
    ends = [start + size for start, size in zip(starts, padded if num_expanded is None else here, strict=True)]
    return EPHandle(
        do_expand=num_expanded is not None,
        num_experts=plan.num_experts,
        expert_alignment=plan.align,
        num_max_tokens_per_rank=plan.num_max,
        num_sms=0,
        topk_idx=counts,
        num_recv_tokens=len(route.local_NK),
        num_expanded_tokens=num_expanded or 0,
        num_recv_tokens_per_expert_list=padded if plan.exact else [],
        num_unaligned_recv_tokens_per_expert=counts.to(torch.int32),
        route=route,
        ends=ends,
    )
