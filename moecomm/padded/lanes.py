"""Padded rows over any transport: the lanes of layout "expert", and a copy into place at their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import empty_rows
from moecomm.core import Core
from moecomm.operations import Parcel, Route, contiguous_lane, finish_out, out_parcels, send
from moecomm.padded.generation import Generation, Kinds, Mover, bytes_of_row, encode_home, encoded
from moecomm.plan import first_bad_entry, plan_send, settle
from moecomm.quant import QuantSpec, dequantize
from moecomm.rows import copy_rows, reduce_rows
from moecomm.transport.base import Exchange, as_bytes


@dataclass(eq=False, slots=True)
class Trip:
    """What leads the rows of one dispatch home. recv_rows: place of every row that arrived, sorted by source rank."""

    route: Route
    pos_TK: Tensor
    exchange: Exchange
    payloads: Sequence[Tensor]
    recv_rows: Tensor | None = None
    home: Exchange | None = None


@final
class LaneMover(Mover):
    """Counts are exchanged first, so it is not fast; what it gives is the same, bit for bit."""

    def __init__(self, core: Core, max_tokens: int, top_k: int, hidden: int) -> None:
        self._core = core
        self._max_tokens, self._top_k, self._hidden = max_tokens, top_k, hidden
        placement, tables = core.tables.placement, core.tables
        self._world, self._local = placement.num_ranks, placement.experts_per_rank[core.rank]
        self._per_expert = self._world * max_tokens
        self._mine = slice(int(tables.rank_starts[core.rank]), int(tables.rank_starts[core.rank + 1]))
        self._total = torch.zeros(self._local, dtype=torch.int64, device=tables.device)
        self._areas: dict[tuple[int, int, int], Tensor] = {}

    # -- out ------------------------------------------------------------------------------------------------------

    def check(self, topk_idx_TK: Tensor) -> tuple[int, bool] | None:
        tables = self._core.tables
        bad = first_bad_entry(topk_idx_TK, tables.placement.num_experts)
        if bad is not None:
            return bad, False
        slot = self._slots_of(topk_idx_TK)
        full = (slot >= self._max_tokens).view(-1).nonzero()
        return (int(full[0]), True) if len(full) else None

    def _slots_of(self, topk_idx_TK: Tensor) -> Tensor:
        """(T, K) int64 how many earlier entries name the same expert; -1 for none."""
        flat = self._core.tables.flat_of_expert[topk_idx_TK.long()].view(-1)
        num_experts = self._core.tables.placement.num_experts
        order = torch.sort(flat, stable=True).indices
        counts = torch.bincount(flat, minlength=num_experts + 1)
        starts = counts.cumsum(0) - counts
        slot = torch.empty_like(flat)
        slot[order] = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
        return torch.where(flat < num_experts, slot, -1).view(topk_idx_TK.shape)

    def send(
        self,
        g: Generation,
        payloads: Sequence[Tensor],
        topk_idx_TK: Tensor,
        topk_weights_TK: Tensor | None,
        tag: str,
        spec: QuantSpec | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        core, payloads = self._core, encoded(payloads, spec)
        idx = topk_idx_TK.clone().long()
        weights = torch.ones(idx.shape, device=idx.device) if topk_weights_TK is None else topk_weights_TK.clone()
        plan = plan_send(idx, core.tables)
        gathered = core.transport.gather_counts(tag, plan.counts)
        counts, slots_S, _ = settle(plan, gathered, core.tables, core.rank, 1, by_slot=True)
        route = Route(counts, plan.order_S, slots_S, plan.pair_tokens_Q, idx.shape[1])
        exchange = send(core, tag, out_parcels(core, route, payloads, None, idx), agreed=True)
        g.trip = Trip(route, plan.pos_TK, exchange, payloads)
        local = core.tables.local_of_flat[core.tables.flat_of_expert[idx]]
        place = local * self._per_expert + core.rank * self._max_tokens + self._slots_of(idx)
        return idx, weights, torch.where(local < 0, -1, place).to(torch.int32)

    def receive(self, g: Generation, tag: str, out: Sequence[Tensor] | None) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        trip: Trip = g.trip
        arrived = finish_out(self._core, trip.exchange, trip.route, trip.payloads, weighted=False)
        counts_WL = trip.route.counts.expert_counts[:, self._mine]
        places = self._places(np.ascontiguousarray(counts_WL.T))
        rows = [part for part in (arrived.rows, arrived.scales) if part is not None]
        areas = self._rows_in(g.index, g.kinds) if out is None else out
        device = rows[0].device
        order = torch.from_numpy(places).to(device)
        for part, area in zip(rows, areas, strict=True):
            if len(part):
                copy_rows(as_bytes(area.flatten(0, 1)), as_bytes(part), torch.arange(len(part), device=device), order)
        trip.recv_rows = order[torch.from_numpy(trip.route.counts.recv_slots()).to(device)]
        begins = np.arange(self._world, dtype=np.int32) * self._max_tokens
        ranges = np.stack([np.broadcast_to(begins, counts_WL.T.shape), begins + counts_WL.T], 2).astype(np.int32)
        per_expert = counts_WL.sum(0, dtype=np.int32)
        self._total += torch.from_numpy(per_expert).to(device)
        return areas, torch.from_numpy(ranges).to(device), torch.from_numpy(per_expert).to(device)

    def _places(self, counts_LW: np.ndarray) -> np.ndarray:
        """Row in (L * W * M) of every row that arrived, sorted by (local expert, source rank, token, k)."""
        runs = counts_LW.ravel().astype(np.int64)
        starts = np.arange(len(runs)) * self._max_tokens
        before = np.cumsum(runs) - runs
        return np.repeat(starts - before, runs) + np.arange(int(runs.sum()))

    def _rows_in(self, area: int, kinds: Kinds) -> list[Tensor]:
        """Tensors of those kinds, one behind the other, that are made once."""
        views = []
        for number, kind in enumerate(kinds):
            row_bytes = bytes_of_row(kind)
            key = area, number, row_bytes
            if key not in self._areas:
                device = self._core.tables.device
                self._areas[key] = empty_rows(self._local * self._per_expert, row_bytes, torch.uint8, device)
            views.append(self._areas[key].view(kind[0]).view(self._local, self._per_expert, *kind[1]))
        return views

    # -- home -----------------------------------------------------------------------------------------------------

    def home_rows(self, g: Generation, kinds: Kinds) -> list[Tensor]:
        return self._rows_in(2 + g.index, kinds)

    def lead_home(self, g: Generation, rows: Tensor, spec: QuantSpec | None, number: int, tag: str) -> Kinds:
        trip: Trip = g.trip
        payloads = [rows]
        if spec is not None:
            payloads = self.home_rows(g, spec.kinds(self._hidden))
            encode_home(g, rows, spec, payloads)
        kinds = tuple((part.dtype, tuple(part.shape[2:])) for part in payloads)
        lanes = [contiguous_lane(trip.route.moved_WW.T, self._core.rank, bytes_of_row(kind)) for kind in kinds]
        homes = None if self._core.integrity is None else trip.route.order_S // trip.route.top_k
        parcels = [
            Parcel(lane, part.flatten(0, 1), trip.recv_rows, homes=homes)
            for lane, part in zip(lanes, payloads, strict=True)
        ]
        trip.home = send(self._core, tag, parcels)
        return kinds

    def sum_home(
        self,
        g: Generation,
        out_TH: Tensor,
        kinds: Kinds,
        number: int,
        tag: str,
        weights_TK: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        trip: Trip = g.trip
        assert trip.home is not None
        came = trip.home.wait()
        rows = [part.view(dtype).view(len(part), *shape) for part, (dtype, shape) in zip(came, kinds, strict=True)]
        decoded = rows[0] if len(rows) == 1 else dequantize(rows[0], rows[1], torch.float32, self._hidden)
        reduce_rows(out_TH, decoded, trip.pos_TK, weights_TK, bias)
        trip.home.release()
        trip.home = None

    def free(self, g: Generation, tag: str) -> None:
        """Nobody reads or writes another rank's memory here."""

    @property
    def rows_of_expert(self) -> Tensor:
        return self._total.clone()
