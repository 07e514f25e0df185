"""What a low-latency dispatch brought, where its rows lie, and how they go home.

Legend: T tokens, H hidden, R ranks, L experts of this rank, M most tokens of a rank, N rows got, S scales of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from moecomm import Dispatched, DispatchHandle
from moecomm.blocks import empty_rows
from moecomm.deep_ep.wire import Space
from moecomm.rows import copy_rows


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
    """A low-latency dispatch. handle, counts (L, R) of rows from each rank, space and losses: once it has ended.

    topk_idx: what was dispatched. losses: see `Wire`. is_fixed: the rows of an expert lie in a group of num_slots in
    the `moecomm.Buffer` too. kept: where the rows that are led home lie, if some that came are not.
    """

    topk_idx: Tensor
    num_experts: int
    num_max: int
    num_slots: int
    finish: Callable[[], Received] | None = None
    received: Received | None = None
    space: Space | None = None
    handle: DispatchHandle | None = None
    counts: Tensor | None = None
    mask: Tensor | None = None
    staging: Tensor | None = None
    is_fixed: bool = False
    losses: int = 0
    kept: Tensor | None = None

    def arrived(self, space: Space, handle: DispatchHandle, counts: Tensor, mask: Tensor | None, losses: int) -> None:
        """Note what the dispatch brought."""
        self.space, self.handle, self.counts, self.losses = space, handle, counts, losses
        self.is_fixed, self.mask = handle.align < 0, mask

    def rerouted(self, space: Space, handle: DispatchHandle, members: tuple[int, ...], losses: int) -> None:
        """Go on with the handle of the same routing among the ranks that are left."""
        assert self.counts is not None
        slots, runs = self.slots(), self.counts.flatten()
        lives = torch.zeros_like(self.counts, dtype=torch.bool)
        lives[:, list(members)] = True
        self.kept = slots[lives.flatten().repeat_interleave(runs)]
        self.counts = self.counts * lives
        self.space, self.handle, self.is_fixed, self.losses = space, handle, False, losses

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
        if self.kept is not None:
            return self.kept
        assert self.counts is not None
        return _slots(self.counts, self.num_slots, self.mask)

    def came_at(self) -> Tensor:
        """(N,) int64 where the rows that came lie in the `moecomm.Buffer`."""
        assert self.counts is not None
        return _slots(self.counts, self.num_slots) if self.is_fixed else torch.arange(int(self.counts.sum()))

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows to lead home of (L, R * M, H) expert outputs."""
        flat = flattened(x)
        if self.is_fixed and self.mask is None and flat.is_contiguous():
            return flat
        slots, at = self.slots().to(x.device), self.came_at().to(x.device)
        rows = empty_rows(len(flat) if self.is_fixed else len(slots), x.shape[2], x.dtype, x.device)
        shown = slots >= 0
        rows[at[~shown]] = 0  # of ranks that are left out, who want nothing either
        copy_rows(rows, flat, slots[shown], at[shown])
        return rows


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

    def fill(self, out: Dispatched, shipment: Shipment) -> None:
        """Put what came in its place, but for rows of ranks that are left out."""
        assert shipment.counts is not None
        num_slots = self.info.shape[1]
        (rows, beside), mask = out.x, shipment.mask
        counts = shipment.counts if mask is None else shipment.counts.masked_fill(mask.bool(), 0)
        self.count.copy_(counts.sum(1))
        self.ranges.copy_((counts.cumsum(1) - counts) << 32 | counts)
        slots, at = shipment.slots().to(rows.device), shipment.came_at().to(rows.device)
        slots, at = slots[slots >= 0], at[slots >= 0]
        copy_rows(self.x.view(-1, self.x.shape[2]), rows, at, slots)
        self.info.view(-1)[slots] = beside[at, 0]
        if self.scales is not None:
            self.scales[slots // num_slots, slots % num_slots] = beside[at, 1:].view(self.scales.dtype)


def _slots(counts: Tensor, num_slots: int, mask: Tensor | None = None) -> Tensor:
    """(N,) int64 place of every row: those of expert e from e * num_slots on, by source; -1 if its rank is masked."""
    shown = counts if mask is None else counts.masked_fill(mask.bool(), 0)
    base = shown.cumsum(1) - shown + torch.arange(len(counts))[:, None] * num_slots
    run = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
    starts = counts.flatten().cumsum(0) - counts.flatten()
    slots = base.flatten()[run] + torch.arange(len(run)) - starts[run]
    return slots if mask is None else torch.where(shown.flatten()[run] > 0, slots, -1)


def flattened(x: Tensor) -> Tensor:
    """(L, S, H) with strided rows as (L * S, H), without a copy where that can be."""
    regular = x.stride(2) == 1 and x.stride(0) == x.stride(1) * x.shape[1]
    return x.as_strided((x.shape[0] * x.shape[1], x.shape[2]), (x.stride(1), 1)) if regular else x.flatten(0, 1)
