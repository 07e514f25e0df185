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
from moecomm.deep_ep.wire import Space
from moecomm.rows import copy_rows, empty_rows


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
        self.is_fixed = handle.align < 0
        self.mask = None if self.is_fixed or mask is None else mask.clone()

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
        counts = self.counts
        shown = counts if self.mask is None else counts.masked_fill(self.mask.bool(), 0)
        base = shown.cumsum(1) - shown + torch.arange(len(counts))[:, None] * self.num_slots
        run = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
        starts = counts.flatten().cumsum(0) - counts.flatten()
        slots = base.flatten()[run] + torch.arange(len(run)) - starts[run]
        return torch.where(shown.flatten()[run] > 0, slots, -1)

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows to lead home of (L, R * M, H) expert outputs."""
        flat = _flat(x)
        if self.is_fixed and flat.is_contiguous():
            return flat
        slots = self.slots().to(x.device)
        rows = torch.empty(len(slots), x.shape[2], dtype=x.dtype, device=x.device)
        copy_rows(rows, flat, slots)
        if not self.is_fixed:
            return rows
        placed = empty_rows(len(flat), x.shape[2], x.dtype, x.device)
        copy_rows(placed, rows, torch.arange(len(slots), device=x.device), slots)
        return placed


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


def _flat(x: Tensor) -> Tensor:
    """(L, S, H) with strided rows as (L * S, H), without a copy where that can be."""
    regular = x.stride(2) == 1 and x.stride(0) == x.stride(1) * x.shape[1]
    return x.as_strided((x.shape[0] * x.shape[1], x.shape[2]), (x.stride(1), 1)) if regular else x.flatten(0, 1)
