"""Which rank holds which expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index

from moecomm.errors import ConfigError

_MOST = 1 << 20  # experts, or ranks: their lists are written out on every rank


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Say where every expert lives.

    Args:
        experts_of_rank: for each rank the global expert ids it holds, in local order (local id = position).
            Every id in [0, E) appears exactly once; a rank may hold none.
        replicas_of_rank: for each rank the global ids of other ranks' experts whose parameters it has as well. No row
            goes there, until `Buffer.shrink` finds the holder dead. () or one list per rank.

    Raises:
        ConfigError: an id is missing, doubled or out of range.

    >>> placement = ExpertPlacement(((0, 3), (1, 2)))
    >>> placement.num_experts, placement.num_ranks, placement.experts_of_rank[1]
    (4, 2, (1, 2))
    >>> placement.rank_of_expert, placement.local_of_expert
    ((0, 1, 1, 0), (0, 0, 1, 1))
    >>> ExpertPlacement(((0, 1), (2,), ()), ((), (), (0, 1))).held_by([1, 2])  # rank 0 is dead
    [[2], [0, 1]]
    """

    experts_of_rank: tuple[tuple[int, ...], ...]
    replicas_of_rank: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        held = _lists("experts_of_rank", self.experts_of_rank)
        object.__setattr__(self, "experts_of_rank", held)
        object.__setattr__(self, "replicas_of_rank", _lists("replicas_of_rank", self.replicas_of_rank))
        ids = sorted(e for experts in held for e in experts)
        if not held or not ids or ids != list(range(len(ids))):
            raise ConfigError(
                "experts_of_rank does not hold every expert exactly once",
                got=held,
                expected=f"each id from 0 to {max(len(ids) - 1, 0)} once",
                remedy="list the global expert ids of each rank",
            )
        self._check_replicas(len(ids))

    def _check_replicas(self, num_experts: int) -> None:
        replicas = self.replicas_of_rank
        if replicas and len(replicas) != len(self.experts_of_rank):
            expected = f"one list for each of {len(self.experts_of_rank)} ranks"
            raise ConfigError("replicas_of_rank is for another number of ranks", got=len(replicas), expected=expected)
        for rank, experts in enumerate(replicas):
            others = set(range(num_experts)) - set(self.experts_of_rank[rank])
            if len(set(experts)) != len(experts) or not others.issuperset(experts):
                raise ConfigError(
                    f"replicas_of_rank[{rank}] does not list experts of other ranks",
                    got=experts,
                    expected=f"ids below {num_experts} that rank {rank} does not hold, each once",
                )

    @classmethod
    def uniform(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Place contiguous blocks in rank order; the first E mod W ranks hold one expert more.

        >>> ExpertPlacement.uniform(5, 2).experts_of_rank
        ((0, 1, 2), (3, 4))
        """
        for name, value in (("num_experts", num_experts), ("num_ranks", num_ranks)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
                is_large = isinstance(value, int) and value > _MOST
                expected = f"one of at most {_MOST}" if is_large else "an integer of at least 1"
                raise ConfigError(f"{name} is no count", got=repr(value), expected=expected)
        base, extra = divmod(num_experts, num_ranks)
        starts = [rank * base + min(rank, extra) for rank in range(num_ranks + 1)]
        return cls(tuple(tuple(range(a, b)) for a, b in pairwise(starts)))

    @classmethod
    def explicit(
        cls, experts_of_rank: Sequence[Sequence[int]], replicas_of_rank: Sequence[Sequence[int]] = ()
    ) -> ExpertPlacement:
        """Place experts as listed: `experts_of_rank[rank]` in local order; who else has their parameters."""
        held, replicas = _lists("experts_of_rank", experts_of_rank), _lists("replicas_of_rank", replicas_of_rank)
        return cls(held, replicas)

    def held_by(self, members: Sequence[int]) -> list[list[int]]:
        """The experts of each of these ranks when there are no others: its own in local order, then those taken over.

        An expert whose holder is not there goes where a replica is: to whom has fewest experts so far, then to the
        lower rank. One without a replica is in no list.
        """
        held = [list(self.experts_of_rank[rank]) for rank in members]
        orphans = set(range(self.num_experts)).difference(*held)
        for expert in sorted(orphans) if self.replicas_of_rank else ():
            able = [i for i, rank in enumerate(members) if expert in self.replicas_of_rank[rank]]
            if able:
                held[min(able, key=lambda i: len(held[i]))].append(expert)
        return held

    @property
    def num_experts(self) -> int:
        """E, experts in all."""
        return sum(map(len, self.experts_of_rank))

    @property
    def num_ranks(self) -> int:
        """W, ranks in the group."""
        return len(self.experts_of_rank)

    @property
    def flat_experts(self) -> tuple[int, ...]:
        """Global ids sorted by (rank, local id): the *flat order* that plans count in."""
        return tuple(e for experts in self.experts_of_rank for e in experts)

    @property
    def experts_per_rank(self) -> tuple[int, ...]:
        """L of every rank."""
        return tuple(map(len, self.experts_of_rank))

    @property
    def rank_of_expert(self) -> tuple[int, ...]:
        """For each global id the rank that holds it."""
        rank_of = {e: rank for rank, experts in enumerate(self.experts_of_rank) for e in experts}
        return tuple(rank_of[e] for e in range(self.num_experts))

    @property
    def local_of_expert(self) -> tuple[int, ...]:
        """For each global id its local id on the rank that holds it."""
        local_of = {e: i for experts in self.experts_of_rank for i, e in enumerate(experts)}
        return tuple(local_of[e] for e in range(self.num_experts))


def _lists(name: str, given: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    try:
        return tuple(tuple(index(expert) for expert in experts) for experts in given)
    except (TypeError, ValueError, RuntimeError):  # the last one by tensors
        raise ConfigError(f"{name} is no list of expert lists", got=str(given), expected="[[0, 1], [2, 3]]") from None
