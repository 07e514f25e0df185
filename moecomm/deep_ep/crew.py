"""The ranks that take part in low-latency operations, what they wait for, and how they go on when some are lost.

A rank is left out because the caller says so (its mask), or because it was lost. When an operation fails for a lost
rank, the survivors agree who they are (`moecomm.Buffer.shrink`) and begin it anew; everything keeps the shapes and the
numbers of ranks and experts that it had, with nothing in the places of those that are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from moecomm import Pending
from moecomm.deep_ep.parcels import experts_of
from moecomm.deep_ep.refusals import demand
from moecomm.deep_ep.wire import Wire
from moecomm.errors import AbortedError, MoECommError, PeerLostError, StallError, UnsupportedError

_LOST = StallError, PeerLostError

Begin = Callable[[], Pending[Any]]


@final
class Crew:
    """Who takes part. enable_shrink: keep a mask, and go on without ranks that are lost."""

    def __init__(self, wire: Wire, enable_shrink: bool) -> None:
        self._wire = wire
        self._size, self._rank = wire.group.size, wire.group.rank
        self._mask = torch.zeros(self._size, dtype=torch.int32) if enable_shrink else None
        self._begun = 0

    # -- the mask ------------------------------------------------------------------------------------------------

    @property
    def mask(self) -> Tensor:
        """(R,) int32: 1 for each rank that is left out."""
        what, expected = "Shrink mode must be enabled", "a buffer with enable_shrink=True"
        demand(self._mask is not None, what, got="enable_shrink=False", expected=expected)
        assert self._mask is not None
        return self._mask

    @property
    def masked(self) -> Tensor | None:
        """The mask, if anybody is left out."""
        return self._mask if self._mask is not None and bool(self._mask.any()) else None

    def leave_out(self, rank: int, mask: bool) -> None:
        """Leave a rank out, or take it back; who was lost stays out."""
        self.mask[rank] = int(mask or rank not in self._wire.members)

    def take_back(self) -> None:
        """Leave nobody out who is not lost."""
        for rank in range(self._size):
            self.leave_out(rank, False)

    def without_masked(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """A (T, K) routing without the experts of ranks that are left out."""
        if self.masked is None:
            return topk_idx
        gone = torch.zeros(num_experts + 1, dtype=torch.bool)
        for rank in self.mask.nonzero().flatten().tolist():
            first, count = experts_of(num_experts, self._size, rank)
            gone[first : first + count] = True
        return topk_idx.masked_fill(gone.to(topk_idx.device)[topk_idx.long()], -1)

    # -- where experts are ---------------------------------------------------------------------------------------

    def placement(self, num_experts: int) -> tuple[tuple[int, ...], ...] | None:
        """The experts of the ranks that are not lost, numbered anew without a gap; None where all are there."""
        if len(self._wire.members) == self._size:
            return None
        placed, next_id = [], 0
        for rank in self._wire.members:
            count = experts_of(num_experts, self._size, rank)[1]
            placed.append(tuple(range(next_id, next_id + count)))
            next_id += count
        return tuple(placed)

    def renumbered(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """A (T, K) routing in the numbers of `placement`, without the experts of lost ranks."""
        placement = self.placement(num_experts)
        if placement is None:
            return topk_idx
        table = torch.full((num_experts + 1,), -1)
        for rank, ids in zip(self._wire.members, placement, strict=True):
            first, count = experts_of(num_experts, self._size, rank)
            table[first : first + count] = torch.tensor(ids, dtype=torch.int64)
        return table.to(topk_idx.device)[topk_idx.long()].to(topk_idx.dtype)

    def my_counts(self, expert_counts: Tensor, num_experts: int) -> Tensor:
        """(L, R) int64 rows that came from each rank, out of the counts of a handle."""
        placement = self.placement(num_experts)
        if placement is None:
            first, count = experts_of(num_experts, self._size, self._rank)
            return expert_counts[:, first : first + count].t().long()
        mine = placement[self._wire.group.rank]
        counts = torch.zeros(len(mine), self._size, dtype=torch.int64)
        counts[:, list(self._wire.members)] = expert_counts[:, list(mine)].t().long()
        return counts

    # -- operations ----------------------------------------------------------------------------------------------

    def start(self, begin: Begin, stats: Tensor | None) -> Callable[[], Any]:
        """Begin an operation; the result waits for it and gives what it gives, once.

        begin: called anew among the survivors when a rank is lost. stats: (R,) int64, the microseconds that this rank
        waited for each other are added.
        """
        number, self._begun = self._begun, self._begun + 1
        before = None if stats is None else self._wire.waited_s()
        under_way = self._begin(number, begin)

        @cache
        def finish() -> Any:
            result = self._finish(number, begin, under_way)
            if stats is not None and before is not None:
                spent_us = ((self._wire.waited_s() - before).clamp(min=0) * 1e6).ceil()
                stats.add_(spent_us.to(stats.device, torch.int64))
            return result

        return finish

    def _begin(self, number: int, begin: Begin) -> tuple[int, Pending[Any]]:
        """Begin among those that are left: how often ranks had been lost then, and what is under way."""
        while True:
            try:
                return self._wire.losses, begin()
            except _LOST as error:
                self._go_on(number, error)

    def _finish(self, number: int, begin: Begin, under_way: tuple[int, Pending[Any]]) -> Any:
        while True:
            losses, pending = under_way
            if losses == self._wire.losses:
                try:
                    return pending.wait()
                except _LOST as error:
                    self._go_on(number, error)
            under_way = self._begin(number, begin)

    def _go_on(self, number: int, error: MoECommError) -> None:
        """Agree with the other survivors who is left; raises if they cannot begin this operation anew."""
        wire = self._wire
        if self._mask is None:
            raise error
        if not isinstance(error, AbortedError):  # then its peers are those that told, and they live
            self._mask[[wire.members[peer] for peer in error.peers]] = 1
        try:
            wire.shrink()
        except UnsupportedError:
            raise error from None
        self._mask[[rank for rank in range(self._size) if rank not in wire.members]] = 1
        told = wire.group.all_gather_object(number, operation="low-latency mode")
        if len(set(told)) > 1:
            self._begun = max(told) + 1
            self._apart(told)

    def _apart(self, told: list[int]) -> NoReturn:
        """Some had ended an operation that others had not, which can have no common result any more."""
        lost = [rank for rank in range(self._size) if rank not in self._wire.members]
        where = ", ".join(f"rank {rank} in {number}" for rank, number in zip(self._wire.members, told, strict=True))
        raise PeerLostError(
            f"ranks {lost} were lost while the others were in different operations ({where})",
            remedy="begin the step again on all of them: the buffer goes on without the lost ranks",
            rank=self._rank,
            operation="low-latency mode",
            peers=lost,
        )
