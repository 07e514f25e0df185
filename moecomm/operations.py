"""Dispatch and combine as data flow: plan, move, arrange. No checks, no autograd.

Every operation is a `start_*` that sends, and returns its `finish` that waits and arranges. The same route carries
rows out (dispatch) and, transposed, home (combine, and the gradient of dispatch).

Legend: T tokens, K top-k, W ranks, S entries (token, k) sent, Q pairs (token, rank) sent, P pairs received, N rows
received.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import empty_rows
from moecomm.core import Core
from moecomm.handle import DispatchHandle
from moecomm.plan import Counts, SendPlan, merge_keys, node_counts, node_places, plan_send, settle
from moecomm.quant import QuantSpec, dequantize, quantize
from moecomm.rows import can_scatter, reduce_rows, scatter_rows, scatter_sums
from moecomm.transport.base import Exchange, Lane, Merge, as_bytes


@dataclass(eq=False, slots=True)
class Route:
    """Where rows go, planned: enough to send out and to lead home. slots_S is None in layout "rank".

    node_counts: see `Lane`.
    """

    counts: Counts
    order_S: Tensor
    slots_S: Tensor | None
    pair_tokens_Q: Tensor
    top_k: int
    node_counts: np.ndarray | None = None

    @property
    def moved_WW(self) -> np.ndarray:
        """(W, W) rows from each source to each destination: one per entry, or one per pair."""
        return self.counts.pair_counts if self.slots_S is None else self.counts.entries


def handle_counts(core: Core, handle: DispatchHandle) -> Counts:
    """The counts that a handle holds."""
    rank_starts = core.tables.rank_starts
    return Counts(handle.expert_counts.numpy(), handle.pair_counts.numpy(), rank_starts, core.rank, handle.align)


def groups_of(core: Core, handle: DispatchHandle, device: torch.device) -> tuple[Tensor, Tensor]:
    """End of each local expert's group, and its tokens: (L,) int32 each."""
    if not handle.pair_counts.numel():  # static sizes: see moecomm.fused
        ends, tokens = handle.expert_counts.unbind()
        return ends.clone(), tokens.clone()
    counts = handle_counts(core, handle)
    return torch.from_numpy(counts.expert_offsets).to(device), torch.from_numpy(counts.tokens_per_expert).to(device)


def routing_tag(handle: DispatchHandle) -> str:
    """What all ranks must have in common in the routing of a handle: a check sum of the counts."""
    return f"routing={zlib.crc32(handle.expert_counts.numpy().tobytes()):08x}"


def route_of(core: Core, handle: DispatchHandle) -> Route:
    """The route that a handle stands for."""
    counts = handle_counts(core, handle)
    slots_S = handle.send_slots if handle.layout == "expert" else None
    return Route(counts, handle.send_order, slots_S, handle.pair_tokens, handle.topk_idx.shape[1])


# -- moving ------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Parcel:
    """One payload to move: (N, ...) rows, `rows[index // every]`, or sums of rows; sorted by destination.

    homes: the token of each row that arrives here in turn, where the receiver knows it and the sender does not.
    """

    lane: Lane
    rows: Tensor
    index: Tensor | None = None
    every: int = 1
    table_PK: Tensor | None = None
    weights_N: Tensor | None = None
    homes: Tensor | None = None

    def put_all(self, exchange: Exchange, number: int) -> bool:
        """Write all sections at once, if that is possible and pays."""
        num_bytes = self.lane.num_sent * self.lane.row_bytes
        summed = None if self.table_PK is None else self.rows.dtype
        if not (self.rows.is_cpu and self.rows.is_contiguous() and can_scatter(num_bytes, summed)):
            return False
        outputs = exchange.outputs(number)
        if outputs is None:
            return False
        if self.table_PK is None:
            scatter_rows(outputs, self.rows, self.lane.row_bytes, self.index, self.every, self.lane.send_slots)
        else:
            scatter_sums(outputs, self.rows, self.table_PK, self.weights_N)
        return True

    def put(self, exchange: Exchange, number: int, dst: int, section: slice) -> None:
        """Write one section."""
        if self.table_PK is not None:
            area = exchange.area(number, dst, section).view(self.rows.dtype)
            reduce_rows(area, self.rows, self.table_PK[section], self.weights_N)
        elif self.index is not None:
            index = self.index[section] if self.every == 1 else self.index[section] // self.every
            exchange.put(number, dst, as_bytes(self.rows), index)
        else:
            exchange.area(number, dst, section).copy_(as_bytes(self.rows)[section])


def send(core: Core, tag: str, parcels: Sequence[Parcel], *, agreed: bool = False) -> Exchange:
    """Open an exchange, fill every lane for every destination, commit."""
    with core.phase("send"):
        lanes = [parcel.lane for parcel in parcels]
        watch = None if core.integrity is None else core.integrity.watch(tag, parcels)
        exchange = core.transport.open(tag, lanes if watch is None else [*lanes, *watch.lanes], agreed=agreed)
        for number, parcel in enumerate(parcels):
            _fill(core, exchange, number, parcel)
        if watch is not None:
            for number, parcel in enumerate(watch.seal(exchange), start=len(parcels)):
                _fill(core, exchange, number, parcel)
        count_traffic(core, lanes)
        exchange.commit()
    return exchange if watch is None else watch.checked(exchange)


def _fill(core: Core, exchange: Exchange, number: int, parcel: Parcel) -> None:
    if not parcel.put_all(exchange, number):
        for dst, section in exchange.sections(parcel.lane, core.rank):
            parcel.put(exchange, number, dst, section)


def contiguous_lane(rows_WW: np.ndarray, rank: int, row_bytes: int, *, repeats: bool = False) -> Lane:
    """The lane in which rank s sends `rows_WW[s, d]` rows to rank d, where they lie sorted by source."""
    return Lane(
        repeats=repeats,
        row_bytes=row_bytes,
        out_rows=rows_WW.sum(0, dtype=np.int64),
        send_counts=rows_WW[rank],
        send_starts=rows_WW[:rank].sum(0, dtype=np.int64),
        recv_counts=rows_WW[:, rank],
    )


def out_lane(route: Route, row_bytes: int, *, repeats: bool = False) -> Lane:
    """The lane of rows on their way out: into expert groups, or one per pair."""
    counts = route.counts
    if route.slots_S is None:
        lane = contiguous_lane(counts.pair_counts, counts.rank, row_bytes, repeats=repeats)
        lane.node_counts = route.node_counts
        return lane
    return Lane(
        repeats=repeats,
        node_counts=route.node_counts,
        num_sent=len(route.slots_S),
        row_bytes=row_bytes,
        out_rows=counts.rows_of_rank,
        send_counts=counts.entries[counts.rank],
        send_slots=route.slots_S,
        recv_counts=counts.entries[:, counts.rank],
        recv_slots=counts.recv_slots,
    )


def home_parcel(core: Core, route: Route, rows: Tensor, *, packed: bool = False) -> Parcel:
    """One row per entry (layout "expert") or pair (layout "rank") on its way home, sorted by where it was.

    packed: the rows are those that arrived, in that order.
    """
    lane = contiguous_lane(route.moved_WW.T, core.rank, row_bytes_of(rows))
    if route.slots_S is None:
        return Parcel(lane, rows, homes=route.pair_tokens_Q)
    homes = None if core.integrity is None else route.order_S // route.top_k
    return Parcel(lane, rows, None if packed else _on(rows.device, route.counts.recv_slots()), homes=homes)


def row_bytes_of(rows: Tensor) -> int:
    """Bytes of one row of (N, ...) rows, N = 0 included."""
    return rows.element_size() * math.prod(rows.shape[1:])


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(device)


def count_traffic(core: Core, lanes: Sequence[Lane]) -> None:
    """Count the rows and bytes that this rank sends; those to itself apart."""
    core.count_lanes([(lane.num_sent, int(lane.send_counts[core.rank]), lane.row_bytes) for lane in lanes])


# -- dispatch ----------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Arrived:
    """What a dispatch brought.

    weights: (N,) or (N, K) float32, None if none were sent. table: (P, K) int32, None in a replay. keys: (P,) int32 for
    sums per node, empty where there are none.
    """

    rows: Tensor
    scales: Tensor | None
    weights: Tensor | None
    table: Tensor | None
    keys: Tensor | None


@dataclass(eq=False, slots=True)
class Planned:
    """What a planned dispatch knows beside what arrived.

    route: None where only the device knows the counts. groups: (2, L) int32 there: end of each group, and its tokens.
    """

    arrived: Arrived
    route: Route | None
    plan: SendPlan
    groups: Tensor | None = None


def start_dispatch(
    core: Core, payloads: Sequence[Tensor], topk_idx_TK: Tensor, topk_weights_TK: Tensor | None, layout: str, align: int
) -> Callable[[], Planned]:
    """Plan a routing and send (T, ...) payloads along it, with the tables that lead their rows home."""
    if core.fused is not None:
        return core.fused.start_dispatch(core, payloads, topk_idx_TK, topk_weights_TK, layout, align)
    with core.phase("plan"):
        plan = plan_send(topk_idx_TK, core.tables)
    top_k = topk_idx_TK.shape[1]
    tag = dispatch_tag(payloads, topk_weights_TK, layout, align, top_k)
    nodes, told, places_TV = core.transport.node_of_rank, plan.counts, None
    if nodes is not None:
        with core.phase("plan"):
            places_TV, rows_V = node_places(plan.pair_pos_TW, nodes)
            told = np.concatenate([told, rows_V])
        with core.phase("send"):
            core.transport.send_ahead(tag, told, payloads, places_TV)
    with core.phase("counts"):
        gathered = core.transport.gather_counts(tag, told)
    with core.phase("plan"):
        by_slot = layout == "expert"
        counts, slots_S, table_QJ = settle(
            plan, gathered[:, : len(plan.counts)], core.tables, core.rank, align, by_slot=by_slot
        )
        route = Route(counts, plan.order_S, slots_S, plan.pair_tokens_Q, top_k)
        if nodes is not None and places_TV is not None:
            route.node_counts = node_counts(route.moved_WW, gathered[:, len(plan.counts) :], nodes)
            if core.merge_nodes is not None:  # one column more
                table_QJ = torch.cat([table_QJ, merge_keys(plan, places_TV, nodes)[:, None]], 1)
    parcels = out_parcels(core, route, payloads, topk_weights_TK, topk_idx_TK)
    parcels.append(Parcel(contiguous_lane(counts.pair_counts, core.rank, row_bytes_of(table_QJ)), table_QJ))
    exchange = send(core, tag, parcels, agreed=True)
    core.counters["dispatches"] += 1
    core.arrived(counts.tokens_per_expert)
    return lambda: Planned(finish_out(core, exchange, route, payloads, topk_weights_TK is not None), route, plan)


def start_replay(
    core: Core, payloads: Sequence[Tensor], topk_weights_TK: Tensor | None, handle: DispatchHandle
) -> Callable[[], Arrived]:
    """Send (T, ...) payloads along a planned route: no planning, no counts, no tables."""
    if core.fused is not None:
        return core.fused.start_replay(core, payloads, topk_weights_TK, handle)
    route = route_of(core, handle)
    tag = dispatch_tag(payloads, topk_weights_TK, handle.layout, handle.align, route.top_k)
    tag += f" replay {routing_tag(handle)}"
    exchange = send(core, tag, out_parcels(core, route, payloads, topk_weights_TK, handle.topk_idx))
    core.counters["replays"] += 1
    core.arrived(route.counts.tokens_per_expert)
    return lambda: finish_out(core, exchange, route, payloads, topk_weights_TK is not None)


def dispatch_tag(
    payloads: Sequence[Tensor], topk_weights_TK: Tensor | None, layout: str, align: int, top_k: int
) -> str:
    """What every rank must agree on in a dispatch."""
    kinds = ",".join(f"{str(payload.dtype).removeprefix('torch.')}{list(payload.shape[1:])}" for payload in payloads)
    weights = "none" if topk_weights_TK is None else "given"
    return f"dispatch layout={layout} align={align} top_k={top_k} weights={weights} payload={kinds}"


def out_parcels(
    core: Core, route: Route, payloads: Sequence[Tensor], topk_weights_TK: Tensor | None, topk_idx_TK: Tensor
) -> list[Parcel]:
    """The payloads, and the weights when there are any, on their way out."""
    index, every = (route.pair_tokens_Q, 1) if route.slots_S is None else (route.order_S, route.top_k)
    lanes = [out_lane(route, row_bytes_of(payload), repeats=True) for payload in payloads]
    parcels = [Parcel(lane, payload, index, every) for lane, payload in zip(lanes, payloads, strict=True)]
    if topk_weights_TK is None:
        return parcels
    if route.slots_S is not None:
        return [*parcels, Parcel(out_lane(route, 4), topk_weights_TK.reshape(-1, 1), route.order_S)]
    elsewhere_QK = ~entry_of_pair(core, route, topk_idx_TK)
    weights_QK = topk_weights_TK[route.pair_tokens_Q].masked_fill_(elsewhere_QK, 0)
    return [*parcels, Parcel(out_lane(route, 4 * route.top_k), weights_QK)]


def entry_of_pair(core: Core, route: Route, topk_idx_TK: Tensor) -> Tensor:
    """(Q, K) bool: which of the token's choices lie on the pair's rank."""
    rank_TK = core.tables.rank_of_expert(topk_idx_TK)
    pair_counts = _on(rank_TK.device, route.counts.pair_counts[core.rank])
    pair_ranks_Q = torch.repeat_interleave(torch.arange(len(pair_counts), device=rank_TK.device), pair_counts)
    return rank_TK[route.pair_tokens_Q] == pair_ranks_Q[:, None]


def finish_out(core: Core, exchange: Exchange, route: Route, payloads: Sequence[Tensor], weighted: bool) -> Arrived:
    """Wait for a dispatch and arrange what arrived: first the payloads, then weights, then the table with the keys."""
    with core.phase("wait"):
        arrived = exchange.wait()
    with core.phase("arrange"):
        rows = like_payload(exchange.own(0), payloads[0])
        rest = iter([lane.clone() for lane in arrived[1:]])
        exchange.release()
        scales = like_payload(next(rest), payloads[1]) if len(payloads) > 1 else None
        weights = next(rest).view(torch.float32) if weighted else None
        table = keys = None
        if (led := next(rest, None)) is not None:
            table = led.view(torch.int32)
            keys = table.new_empty(0)
            if table.shape[1] > route.top_k:
                table, keys = (part.clone() for part in table.tensor_split([route.top_k], 1))
        if route.slots_S is not None:
            weights = weights.view(-1) if weights is not None else None
            padding = route.counts.padding_rows()
            if padding.size:
                for part in (rows, scales, weights):
                    if part is not None:
                        as_bytes(part)[_on(part.device, padding)] = 0
    return Arrived(rows, scales, weights, table, None if keys is None else keys.view(-1))


def like_payload(rows: Tensor, payload: Tensor) -> Tensor:
    """View (N, row_bytes) uint8 as rows of the payload's dtype and shape."""
    shape = rows.shape[0], *payload.shape[1:]
    return rows.view(payload.dtype).view(shape) if rows.shape[1] else payload.new_empty(shape)


# -- combine -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False, slots=True)
class Homecoming:
    """What a combine leads home.

    rows: (N, H) rows to sum, None to lead home `carried` only. weighted: multiply them by the handle's weights.
    bias: (T, H) added at the source. carried: (N,) or (N, K) float32 values beside the rows, not summed.
    quant: how rows travel where each goes home by itself; None: as they are.
    """

    rows: Tensor | None
    weighted: bool = False
    bias: Tensor | None = None
    carried: Tensor | None = None
    quant: QuantSpec | None = None


def start_combine(
    core: Core, home: Homecoming, handle: DispatchHandle
) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """Lead rows home; `finish` gives the (T, H) sums and the carried values as (T, K)."""
    if core.fused is not None:
        return core.fused.start_combine(core, home, handle)
    route = route_of(core, handle)
    rows, parcels = home.rows, []
    if rows is not None and core.reduce == "rank":
        lane = contiguous_lane(route.counts.pair_counts.T, core.rank, row_bytes_of(rows))
        if core.merge_nodes is not None:
            _, recv_rows = node_places(handle.pair_pos, core.merge_nodes)
            lane = replace(lane, merge=Merge(dtype=rows.dtype, keys=handle.recv_keys, recv_rows=recv_rows))
        weights = handle.row_weights if home.weighted else None
        table, weights = (handle.recv_table, weights) if handle.layout == "expert" else (None, None)
        parcels = [Parcel(lane, rows, table_PK=table, weights_N=weights, homes=route.pair_tokens_Q)]
    elif rows is not None and home.quant is not None:
        arrived = _on(rows.device, route.counts.recv_slots())
        parcels = [home_parcel(core, route, part, packed=True) for part in quantize(rows[arrived], home.quant)]
    elif rows is not None:
        parcels = [home_parcel(core, route, rows)]
    if home.carried is not None:
        carried = home.carried if home.carried.ndim == 2 else home.carried[:, None]
        parcels.append(home_parcel(core, route, carried))
    carries = f"{'' if rows is None else 'rows'}{'' if home.carried is None else '+weights'}"
    tag = f"combine layout={handle.layout} top_k={route.top_k} weighted={home.weighted} carries={carries}"
    tag += "" if home.quant is None else f" quant={home.quant.format}"
    tag += f" {routing_tag(handle)}"
    exchange = send(core, tag, parcels)
    core.counters["combines"] += 1
    return lambda: finish_home(core, exchange, route, home, handle)


def home_table(core: Core, handle: DispatchHandle) -> Tensor:
    """(T, W) or (T, V) int32 where the sums of a token's ranks, or nodes, come home; -1 for none."""
    if core.merge_nodes is None:
        return handle.pair_pos
    places_TV, counts_V = node_places(handle.pair_pos, core.merge_nodes)
    starts_V = torch.from_numpy(np.cumsum(counts_V) - counts_V).to(places_TV)
    return torch.where(places_TV < 0, places_TV, places_TV + starts_V)


def finish_home(
    core: Core, exchange: Exchange, route: Route, home: Homecoming, handle: DispatchHandle
) -> tuple[Tensor | None, Tensor | None]:
    """Wait for a combine; sum what came home of every token in a fixed order."""
    with core.phase("arrange"):
        by_entry = handle.layout == "expert" and core.reduce == "source"
        table = None
        if home.rows is not None:
            table = handle.send_pos if by_entry else home_table(core, handle)
    with core.phase("wait"):
        arrived = exchange.wait()
    with core.phase("arrange"):
        summed = carried = None
        if home.rows is not None:
            assert table is not None
            summed = empty_rows(handle.num_tokens, home.rows.shape[1], home.rows.dtype, home.rows.device)
            weights = handle.topk_weights if by_entry and home.weighted else None
            reduce_rows(summed, _came_home(arrived, home, summed.shape[1]), table, weights, home.bias)
        if home.carried is not None:
            carried = torch.zeros(handle.topk_idx.shape, dtype=torch.float32, device=home.carried.device)
            came = arrived[-1].view(torch.float32)
            if route.slots_S is not None:
                carried.view(-1)[route.order_S] = came.view(-1)
            else:
                here_QK = entry_of_pair(core, route, handle.topk_idx)
                carried.index_add_(0, route.pair_tokens_Q, came.masked_fill(~here_QK, 0))
        exchange.release()
    return summed, carried


def _came_home(arrived: Sequence[Tensor], home: Homecoming, hidden: int) -> Tensor:
    """The rows that came, decoded."""
    assert home.rows is not None
    if home.quant is None:
        return arrived[0].view(home.rows.dtype)
    codes, scales = arrived[0].view(home.quant.code_dtype), arrived[1].view(home.quant.scale_dtype)
    return dequantize(codes, scales, torch.float32, hidden)
