"""Handles of the normal mode: tuples, as DeepEP's callers index them, whose items are made when somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from moecomm import DispatchHandle
from moecomm.deep_ep.parcels import channel_tokens
from moecomm.deep_ep.wire import Space


@final
@dataclass(slots=True)
class Route:
    """What a normal dispatch knows. T tokens, R ranks, N rows received, C channels.

    handle: of the `moecomm.Buffer` that carried the rows. origin: (N, 2 + V) int32, see `Arrived`.
    given: (T, R) bool, the caller's own is_token_in_rank. num_rows: of the tensor that the caller got, N or
    num_worst_tokens.
    """

    space: Space
    handle: DispatchHandle
    rank: int
    origin: Tensor
    given: Tensor
    num_channels: int
    num_rows: int
    combined: bool = False

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.given.shape[1]

    @property
    def is_token_in_rank(self) -> Tensor:
        """(T, R) bool as it was dispatched, whatever has become of the caller's tensor."""
        return self.handle.pair_pos >= 0

    def received(self) -> Tensor:
        """(R,) int64 rows that came from each rank."""
        return self.handle.pair_counts[:, self.rank].long()

    def channels_of(self, is_token_in: Tensor) -> Tensor:
        """(R, C) int32 inclusive prefix over channels of the tokens sent to each rank (or node)."""
        num_tokens, num_groups = is_token_in.shape
        padded = torch.zeros(
            self.num_channels * channel_tokens(num_tokens, self.num_channels),
            num_groups,
            dtype=torch.int32,
            device=is_token_in.device,
        )
        padded[:num_tokens] = is_token_in
        return padded.view(self.num_channels, -1, num_groups).sum(1).cumsum(0).t().to(torch.int32).contiguous()

    def channels_received(self) -> Tensor:
        """(R, C) int32 where each channel begins among the rows of its source."""
        source = torch.repeat_interleave(torch.arange(self.num_ranks), self.received()).to(self.origin.device)
        flat = source * self.num_channels + self.origin[:, 1]
        counts = torch.bincount(flat, minlength=self.num_ranks * self.num_channels).view(self.num_ranks, -1)
        return (counts.cumsum(1) - counts).to(torch.int32)

    def heads(self, is_token_in: Tensor) -> Tensor:
        """(T, R) int32 place of each token in its channel; others: -1, after a combine -(place of the next one) - 1."""
        each = channel_tokens(len(is_token_in), self.num_channels)
        heads = torch.full(is_token_in.shape, -1, dtype=torch.int32, device=is_token_in.device)
        for begin in range(0, len(is_token_in), each):
            part = is_token_in[begin : begin + each]
            place = part.cumsum(0, dtype=torch.int32)
            rest = -place - 1 if self.combined else torch.full_like(place, -1)
            heads[begin : begin + each] = torch.where(part, place - 1, rest)
        return heads


class LazyTuple(tuple[Any, ...]):
    """A tuple whose items are computed once, when they are first read."""

    _makers: tuple[Callable[[], Any], ...]
    _made: dict[int, Any]
    route: Route

    def __new__(cls, makers: tuple[Callable[[], Any], ...], route: Route) -> LazyTuple:
        self = super().__new__(cls, (None,) * len(makers))
        self._makers, self._made, self.route = makers, {}, route
        return self

    def _item(self, index: int) -> Any:
        if index not in self._made:
            self._made[index] = self._makers[index]()
        return self._made[index]

    def __getitem__(self, index: Any) -> Any:
        found = range(len(self))[index]
        return self._item(found) if isinstance(found, int) else tuple(self._item(i) for i in found)

    def __iter__(self) -> Iterator[Any]:
        return (self._item(i) for i in range(len(self)))

    def __reduce__(self) -> Any:
        raise TypeError("a handle is of use in the process only that dispatched")

    def refresh(self, index: int) -> None:
        """Compute an item anew into the tensor that was handed out, if it was."""
        if index in self._made:
            self._made[index].copy_(self._makers[index]())


def normal_handle(route: Route) -> LazyTuple:
    """Prefix sums over ranks, channels, channels received; then recv_src_idx, is_token_in_rank and send_head."""
    device = route.origin.device
    makers = (
        lambda: route.handle.pair_counts.cumsum(0).to(device, torch.int32),
        lambda: route.channels_of(route.is_token_in_rank),
        route.channels_received,
        lambda: route.origin[:, 0].contiguous(),
        lambda: route.given,
        lambda: route.heads(route.is_token_in_rank),
    )
    return LazyTuple(makers, route)


def internode_handle(route: Route, ranks_per_node: int) -> LazyTuple:
    """The ten items that DeepEP has of several nodes; -1 for what concerns its forwarders: there are none.

    Those describe tokens that a rank passes on to others of its node: no rank here sees tokens that are not for it.
    """
    device = route.origin.device
    num_nodes = -(-route.num_ranks // ranks_per_node)

    def none(*shape: int) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    def source_meta() -> Tensor:
        node = torch.arange(route.num_ranks) // ranks_per_node
        meta = torch.empty(len(route.origin), 2, dtype=torch.int32, device=device)
        meta[:, 0] = torch.repeat_interleave(node, route.received())
        meta[:, 1] = route.origin[:, 2 + route.rank // ranks_per_node]
        return meta.view(torch.uint8)

    makers = (
        lambda: route.given,
        lambda: route.channels_of(nodes_of(route.is_token_in_rank, ranks_per_node)),
        lambda: route.channels_of(route.is_token_in_rank),
        lambda: none(num_nodes, route.num_channels),
        lambda: none(num_nodes),
        route.channels_received,
        lambda: route.received().cumsum(0).to(device, torch.int32),
        source_meta,
        lambda: route.heads(nodes_of(route.is_token_in_rank, ranks_per_node)),
        lambda: none(num_nodes, ranks_per_node),
    )
    return LazyTuple(makers, route)


def bits_of(is_token_in_rank: Tensor, ranks_per_node: int) -> Tensor:
    """(T, nodes) int32: for each node a bit for each of its ranks that the token goes to, the lowest for its first.

    A node with more than 31 ranks has bits for its first 31.

    >>> bits_of(torch.tensor([[True, True, False], [False, False, True]]), 2).tolist()
    [[3, 0], [0, 1]]
    """
    num_tokens, num_ranks = is_token_in_rank.shape
    padded = torch.nn.functional.pad(is_token_in_rank, (0, -num_ranks % ranks_per_node))
    each = padded.view(num_tokens, padded.shape[1] // ranks_per_node, ranks_per_node)
    bit = torch.tensor([1 << place & 0x7FFFFFFF for place in range(ranks_per_node)], device=padded.device)
    return (each * bit).sum(2).to(torch.int32)


def nodes_of(is_token_in_rank: Tensor, ranks_per_node: int) -> Tensor:
    """(T, nodes) bool which nodes each token goes to.

    >>> nodes_of(torch.tensor([[True, False, False], [False, False, True]]), 2).tolist()
    [[True, False], [False, True]]
    """
    num_tokens, num_ranks = is_token_in_rank.shape
    padded = torch.nn.functional.pad(is_token_in_rank, (0, -num_ranks % ranks_per_node))
    return padded.view(num_tokens, padded.shape[1] // ranks_per_node, ranks_per_node).any(2)
