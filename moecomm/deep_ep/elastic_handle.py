"""`EPHandle`: what a dispatch of the second API knows, under the names that its callers read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from moecomm import DispatchHandle
from moecomm.deep_ep.wire import Space


@final
@dataclass(eq=False, kw_only=True)
class EPHandle:
    """A routing. T tokens, K top-k, R ranks, L experts of this rank, N tokens received, X rows of do_expand.

    do_expand, num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: as given. topk_idx: (T, K), the caller's
    own with do_handle_copy=False. num_recv_tokens: N. num_expanded_tokens: X, 0 without do_expand.
    num_recv_tokens_per_expert_list: aligned counts; [] without do_cpu_sync.
    num_unaligned_recv_tokens_per_expert: (L,) int32. token_metadata_at_forward, channel_linked_list: None.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    num_unaligned_recv_tokens_per_expert: Tensor
    token_metadata_at_forward: None = None
    channel_linked_list: None = None
    route: Route = field(repr=False)
    ends: list[int] = field(repr=False)

    @cached_property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> Tensor:
        """(R,) int32 inclusive sums of the tokens that came from each rank."""
        return self.route.received().cumsum(0).to(self.route.local_NK.device, torch.int32)

    @cached_property
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """(L,) int32 inclusive sums of aligned counts; with do_expand the ends of experts' rows, without padding."""
        return torch.tensor(self.ends, dtype=torch.int32, device=self.route.local_NK.device)

    @cached_property
    def recv_src_metadata(self) -> Tensor:
        """(N, K + 2) int32: source rank * num_max + token; source rank * K + highest k that goes here; rows or -1."""
        route = self.route
        top_k = self.topk_idx.shape[1]
        lanes_NK = torch.where(route.local_NK >= 0, torch.arange(top_k, device=route.local_NK.device), -1)
        source = route.sources()
        meta = torch.full((len(source), top_k + 2), -1, dtype=torch.int32, device=source.device)
        meta[:, 0] = source * self.num_max_tokens_per_rank + route.token_N
        meta[:, 1] = source * top_k + lanes_NK.amax(1) if top_k else source * top_k
        if self.do_expand:
            meta[:, 2:] = route.handle.recv_table
        return meta

    @cached_property
    def dst_buffer_slot_idx(self) -> Tensor:
        """(T, K) int32 rank * num_max + slot, at the highest k of each rank that the token goes to; -1 elsewhere."""
        rank_TK = self.route.rank_TK
        slot_TR = torch.zeros(len(rank_TK), self.route.num_ranks + 1, dtype=torch.int32, device=rank_TK.device)
        slot_TR.scatter_(1, torch.where(rank_TK >= 0, rank_TK, self.route.num_ranks).long(), 1)
        slot_TR = slot_TR.cumsum(0, dtype=torch.int32) - 1
        slot = slot_TR.gather(1, rank_TK.clamp(min=0).long())
        return torch.where(rank_TK >= 0, rank_TK * self.num_max_tokens_per_rank + slot, -1).to(torch.int32)


@final
@dataclass(eq=False)
class Route:
    """The operation behind a handle.

    lanes: makes rank_TK, tokens: makes token_N, when somebody asks. local_NK: (N, K) int32, below 0 where a choice is
    not here. num_rows: of the tensor that the caller got.
    """

    space: Space
    handle: DispatchHandle
    rank: int
    num_ranks: int
    lanes: Callable[[], Tensor]
    tokens: Callable[[], Tensor]
    local_NK: Tensor
    num_rows: int

    @cached_property
    def rank_TK(self) -> Tensor:
        """(T, K) rank at the highest k that goes to it, -1 elsewhere."""
        return self.lanes()

    @cached_property
    def by_lanes(self) -> DispatchHandle:
        """The handle with ranks in the order of the highest choice that goes to each, for a source that sums ranks."""
        position_TK = self.handle.pair_pos.gather(1, self.rank_TK.clamp(min=0).long())
        return replace(self.handle, pair_pos=torch.where(self.rank_TK >= 0, position_TK, -1))

    @cached_property
    def token_N(self) -> Tensor:
        """(N,) int32 token of each pair at its source."""
        return self.tokens()

    def received(self) -> Tensor:
        """(R,) int64 tokens that came from each rank."""
        return self.handle.pair_counts[:, self.rank].long()

    def sources(self) -> Tensor:
        """(N,) int64 rank that each token came from."""
        return torch.repeat_interleave(torch.arange(self.num_ranks), self.received()).to(self.token_N.device)


def highest_lanes(rank_TK: Tensor) -> Tensor:
    """Keep of each token the last choice that goes to a rank; -1 elsewhere.

    >>> highest_lanes(torch.tensor([[0, 1, 0], [1, -1, 1]])).tolist()
    [[-1, 1, 0], [-1, -1, 1]]
    """
    lane_K = torch.arange(rank_TK.shape[1], device=rank_TK.device)
    later_KK = lane_K[:, None] < lane_K
    again_TK = ((rank_TK[:, :, None] == rank_TK[:, None, :]) & later_KK).any(2)
    return torch.where(again_TK, -1, rank_TK)
