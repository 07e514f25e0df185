"""What all ranks send, so that each can say by itself what must arrive. Loops over tokens; nothing of moecomm in it.

Legend: T tokens, H hidden, K top-k, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class World:
    """Rows, choices and weights of every rank; experts lie in blocks, the first ranks hold those left over."""

    x: list[Tensor]
    idx: list[Tensor]
    weights: list[Tensor]
    num_experts: int

    @property
    def size(self) -> int:
        return len(self.x)

    def held(self, rank: int) -> range:
        each, extra = divmod(self.num_experts, self.size)
        first = rank * each + min(rank, extra)
        return range(first, first + each + (rank < extra))

    def pairs(self, rank: int) -> Iterator[tuple[int, int]]:
        """(source rank, token) of the rows that come to a rank, each token once."""
        for source, idx in enumerate(self.idx):
            for token, choices in enumerate(idx.tolist()):
                if any(choice in self.held(rank) for choice in choices):
                    yield source, token

    def entries(self, rank: int, expert: int) -> Iterator[tuple[int, int, int]]:
        """(source rank, token, k) of the rows of a rank's local expert."""
        for source, idx in enumerate(self.idx):
            for token, choices in enumerate(idx.tolist()):
                for k, choice in enumerate(choices):
                    if choice == self.held(rank)[expert]:
                        yield source, token, k

    def local(self, rank: int, source: int, token: int) -> list[int]:
        """The token's choices as local ids of that rank, -1 elsewhere."""
        held = self.held(rank)
        return [choice - held.start if choice in held else -1 for choice in self.idx[source][token].tolist()]

    def owner(self, expert: int) -> int:
        return next(rank for rank in range(self.size) if expert in self.held(rank))

    def ranks_of(self, source: int, token: int) -> list[int]:
        """Where the token goes, in the order of its highest choice there."""
        owners = [self.owner(e) if e >= 0 else -1 for e in self.idx[source][token].tolist()]
        return [owner for k, owner in enumerate(owners) if owner >= 0 and owner not in owners[k + 1 :]]


def world(
    tokens: tuple[int, ...] = (5, 0, 9, 3),
    hidden: int = 24,
    top_k: int = 3,
    num_experts: int = 10,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> World:
    """A world of uneven ranks, one of them without tokens, some choices masked, experts that do not come out even."""
    random = torch.Generator().manual_seed(seed)
    made = World([], [], [], num_experts)
    for count in tokens:
        made.x.append(torch.randn(count, hidden, generator=random).to(dtype))
        scores = torch.rand(count, num_experts, generator=random)
        idx = scores.topk(top_k, dim=1).indices
        made.idx.append(torch.where(torch.rand(count, top_k, generator=random) < 0.2, -1, idx))
        made.weights.append(torch.rand(count, top_k, generator=random))
    return made


def rows(tensors: list[Tensor], where: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Rows of (source rank, token)."""
    picked = [tensors[source][token] for source, token in where]
    return torch.stack(picked) if picked else like.new_empty(0, *like.shape[1:])


def expert(rank: int, x: Tensor) -> Tensor:
    """What the experts of a rank make of a row, without weights: another factor on every rank."""
    return (x.float() * (rank + 1.5) + 0.25).to(x.dtype)


def summed(parts: list[Tensor], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A float32 sum from left to right, rounded once."""
    total = torch.zeros_like(like, dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    return total.to(dtype)
