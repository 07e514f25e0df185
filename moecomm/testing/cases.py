"""Named cases: small routings, each there for a reason, the same on every rank that asks.

A case gives every input as a pure function of (case name, rank, round), so each rank can make the inputs of all ranks
and run the oracle without talking to anybody. Token counts and routings change from round to round: buffers that
remember the last call are wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moecomm.placement import ExpertPlacement
from moecomm.testing.provenance import provenance_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape and one way of routing, for any number of ranks.

    Attributes:
        name: unique; seeds every random number of the case.
        why: what goes wrong in implementations that this case catches.
        num_experts: E.
        hidden: H.
        top_k: K.
        tokens: T of rank r in round i is `tokens[(r + i) % len(tokens)]`.
        pattern: how tokens choose experts, a key of `PATTERNS`.
        placed: which rank holds which expert, a key of `PLACEMENTS`.
        align: rows, padding of expert groups.
        dtype: of the payload; what is not float32, float16 or bfloat16 is dispatched as bytes and combined in bfloat16.
        scale_columns: float32 scales that travel with each token, 0 for none.
        has_weights: whether the router gives weights.
        index_dtype: dtype of topk_idx.
        extreme: whether expert rows hold NaN, infinities, signed zeros, subnormal and largest numbers.

    >>> case = CASES["ragged_tokens"]
    >>> [case.num_tokens(rank, round=0) for rank in range(3)], case.num_tokens(0, round=1)
    ([1, 17, 0], 17)
    >>> topk_idx, topk_weights = case.routing(rank=1, round=0, world_size=2)
    >>> topk_idx.shape, topk_weights.dtype
    (torch.Size([17, 2]), torch.float32)
    """

    name: str
    why: str
    num_experts: int = 8
    hidden: int = 32
    top_k: int = 2
    tokens: tuple[int, ...] = (12, 9, 10, 11)
    pattern: str = "uniform"
    placed: str = "uniform"
    align: int = 1
    dtype: torch.dtype = torch.bfloat16
    scale_columns: int = 0
    has_weights: bool = True
    index_dtype: torch.dtype = torch.int64
    extreme: bool = False

    def __post_init__(self) -> None:
        for name, value, table in (("pattern", self.pattern, PATTERNS), ("placed", self.placed, PLACEMENTS)):
            if value not in table:
                raise ValueError(f"Case {self.name}: unknown {name}: got {value!r}; expected one of {sorted(table)}")
        if not self.tokens:
            raise ValueError(f"Case {self.name}: tokens is empty: give T of at least one rank, 0 allowed")

    def num_tokens(self, rank: int, round: int) -> int:
        """T of this rank in this round."""
        return self.tokens[(rank + round) % len(self.tokens)]

    @property
    def max_tokens_per_rank(self) -> int:
        """M: the most tokens any rank has in any round, at least 1."""
        return max(1, *self.tokens)

    @property
    def combine_dtype(self) -> torch.dtype:
        """Dtype of the rows that experts return."""
        return self.dtype if self.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16

    def placement(self, world_size: int) -> ExpertPlacement:
        """Which rank holds which expert."""
        return PLACEMENTS[self.placed](self.num_experts, world_size)

    def routing(self, rank: int, round: int, world_size: int) -> tuple[Tensor, Tensor | None]:
        """Make topk_idx (T, K) index_dtype, global expert ids or -1, and topk_weights (T, K) float32 or None."""
        generator = self._generator("routing", rank, round)
        request = RoutingRequest(
            generator, self.num_tokens(rank, round), self.top_k, self.placement(world_size), rank, round
        )
        topk_idx_TK = PATTERNS[self.pattern](request).to(self.index_dtype)
        if not self.has_weights:
            return topk_idx_TK, None
        # Not normalised, some negative and some zero: nothing in dispatch or combine may rely on a softmax.
        weights_TK = torch.rand(topk_idx_TK.shape, generator=generator) * 1.25 - 0.25
        weights_TK[torch.rand(topk_idx_TK.shape, generator=generator) < 0.05] = 0.0
        return topk_idx_TK, weights_TK

    def payload(self, rank: int, round: int) -> Tensor:
        """Make x (T, H) dtype whose every element says where it comes from, see `provenance_rows`."""
        return provenance_rows(rank, self.num_tokens(rank, round), self.hidden, self.dtype, round)

    def scales(self, rank: int, round: int) -> Tensor | None:
        """Make (T, scale_columns) float32 scales, or None."""
        if not self.scale_columns:
            return None
        return provenance_rows(rank, self.num_tokens(rank, round), self.scale_columns, torch.float32, round + 100)

    def values(self, purpose: str, rank: int, round: int, num_rows: int, *, octaves: int = 6) -> Tensor:
        """Make (num_rows, H) combine_dtype numbers whose sums need rounding: expert rows, biases, gradients.

        They are normal, times 2**i with i from -octaves to octaves. A wide range shows where each rounding takes place;
        with 0 no element dominates, as a comparison of largest errors needs it.
        """
        generator = self._generator(purpose, rank, round)
        rows = torch.randn(num_rows, self.hidden, generator=generator)
        rows = rows * torch.exp2(torch.randint(-octaves, octaves + 1, rows.shape, generator=generator))
        if self.extreme and rows.numel():
            limits = torch.finfo(self.combine_dtype)
            special = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, limits.max, limits.min, limits.tiny / 4]
            where = torch.rand(rows.shape, generator=generator) < 0.3
            which = torch.randint(0, len(special), rows.shape, generator=generator)
            rows = torch.where(where, torch.tensor(special, dtype=torch.float32)[which], rows)
        return rows.to(self.combine_dtype)

    def _generator(self, purpose: str, rank: int, round: int) -> torch.Generator:
        text = f"{self.name}/{purpose}/{rank}/{round}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "little"))


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a pattern may look at: random numbers, T, K, the placement, and whose routing of which round it is."""

    generator: torch.Generator
    num_tokens: int
    top_k: int
    placement: ExpertPlacement
    rank: int
    round: int


def _distinct(request: RoutingRequest, experts: tuple[int, ...] | None = None) -> Tensor:
    """K different experts per token, out of the given ones; -1 where there are fewer than K."""
    candidates = torch.tensor(range(request.placement.num_experts) if experts is None else experts)
    order = torch.rand(request.num_tokens, len(candidates), generator=request.generator).argsort(dim=1)
    chosen = candidates[order[:, : request.top_k]]
    missing = request.top_k - chosen.shape[1]
    return torch.nn.functional.pad(chosen, (0, max(missing, 0)), value=-1)


def _with_repeats(request: RoutingRequest) -> Tensor:
    shape = (request.num_tokens, request.top_k)
    return torch.randint(0, request.placement.num_experts, shape, generator=request.generator)


def _duplicated(request: RoutingRequest) -> Tensor:
    """Every other token names its first expert again in its last choice."""
    chosen = _distinct(request)
    chosen[::2, -1] = chosen[::2, 0]
    return chosen


def _all_to_one_rank(request: RoutingRequest) -> Tensor:
    """Everybody goes to the experts of one rank, another one each round."""
    owners = [experts for experts in request.placement.experts_of_rank if experts]
    return _distinct(request, owners[request.round % len(owners)])


def _all_to_one_expert(request: RoutingRequest) -> Tensor:
    """Everybody's first choice is one expert, another one each round; there is no second choice."""
    return _distinct(request, (request.round % request.placement.num_experts,))


def _masked(request: RoutingRequest) -> Tensor:
    chosen = _distinct(request)
    chosen[torch.rand(chosen.shape, generator=request.generator) < 0.5] = -1
    return chosen


def _some_without(request: RoutingRequest) -> Tensor:
    chosen = _distinct(request)
    chosen[(request.rank + request.round) % 3 :: 3] = -1
    return chosen


def _none(request: RoutingRequest) -> Tensor:
    return torch.full((request.num_tokens, request.top_k), -1)


def _skewed(request: RoutingRequest) -> Tensor:
    """Popularity falls with the square of the expert's place; most groups are tiny or empty."""
    popularity = 1.0 / torch.arange(1, request.placement.num_experts + 1) ** 2
    if not request.num_tokens:
        return _none(request)
    return torch.multinomial(popularity.expand(request.num_tokens, -1), request.top_k, generator=request.generator)


def _home_or_away(request: RoutingRequest) -> Tensor:
    """Even rounds: only experts of the own rank (or none, where it holds none). Odd rounds: only of the next rank."""
    ranks = request.placement.experts_of_rank
    return _distinct(request, ranks[(request.rank + request.round % 2) % len(ranks)])


def _interleaved(num_experts: int, num_ranks: int) -> ExpertPlacement:
    held = [tuple(e for e in range(num_experts) if e % num_ranks == num_ranks - 1 - r) for r in range(num_ranks)]
    return ExpertPlacement.explicit([experts[::-1] for experts in held])


def _odd_ranks_only(num_experts: int, num_ranks: int) -> ExpertPlacement:
    owners = list(range(1, num_ranks, 2)) or [0]
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in range(num_experts):
        held[owners[expert % len(owners)]].append(expert)
    return ExpertPlacement.explicit(held)


PATTERNS: dict[str, Callable[[RoutingRequest], Tensor]] = {
    "uniform": _distinct,
    "repeats": _with_repeats,
    "duplicated": _duplicated,
    "all_to_one_rank": _all_to_one_rank,
    "all_to_one_expert": _all_to_one_expert,
    "masked": _masked,
    "some_without": _some_without,
    "none": _none,
    "skewed": _skewed,
    "home_or_away": _home_or_away,
}

PLACEMENTS: dict[str, Callable[[int, int], ExpertPlacement]] = {
    "uniform": ExpertPlacement.uniform,
    "interleaved": _interleaved,
    "odd_ranks_only": _odd_ranks_only,
}

_TABLE = (
    Case(name="plain", why="the ordinary: if this fails, read no further"),
    Case(name="empty_rank", why="a rank without tokens still takes part", tokens=(0, 9, 5, 7)),
    Case(name="all_to_one", why="one rank receives everything, the others nothing", pattern="all_to_one_rank"),
    Case(name="one_expert", why="one group holds all rows, all others are empty", pattern="all_to_one_expert"),
    Case(name="one_token", why="T = 1: vectors of length one", tokens=(1,)),
    Case(name="lone_token", why="one token in the whole world", tokens=(1, 0, 0, 0)),
    Case(name="k_equals_e", why="every token goes everywhere", num_experts=6, top_k=6),
    Case(name="top_1", why="K = 1: no sum to hide behind", top_k=1, dtype=torch.float32),
    Case(name="masked", why="-1 at any place among the choices, in some tokens at all", pattern="masked", top_k=4),
    Case(name="no_expert_tokens", why="tokens that go nowhere must come back as zero or bias", pattern="some_without"),
    Case(name="all_masked", why="tokens everywhere, rows nowhere", pattern="none"),
    Case(name="all_empty", why="nobody has a token", tokens=(0,)),
    Case(name="duplicate_expert", why="one expert named twice counts twice", pattern="duplicated", top_k=3),
    Case(name="more_choices_than_experts", why="K > E", num_experts=3, top_k=5, pattern="repeats"),
    Case(name="odd_hidden", why="rows that are no multiple of 16 bytes", hidden=7, dtype=torch.float16),
    Case(name="tiny_hidden", why="H = 1: strides are ambiguous", hidden=1),
    Case(name="uneven_experts", why="W does not divide E", num_experts=10, top_k=3),
    Case(name="fewer_experts_than_ranks", why="L = 0 on the last ranks", num_experts=2),
    Case(name="ragged_tokens", why="T differs between ranks and rounds", tokens=(1, 17, 0, 6, 33, 2)),
    Case(name="explicit_placement", why="global id order is not rank order", placed="interleaved", num_experts=9),
    Case(name="rank_without_experts", why="L = 0 in the middle of the ranks", placed="odd_ranks_only"),
    Case(name="home_or_away", why="all rows local, then all rows remote", pattern="home_or_away"),
    Case(name="skewed", why="group sizes differ by orders of magnitude", pattern="skewed", num_experts=16, top_k=4),
    Case(name="aligned", why="groups padded for a grouped GEMM", align=16, top_k=3),
    Case(name="odd_align", why="padding that is no power of two, with empty groups", align=3, pattern="masked"),
    Case(name="wide", why="the shape of real layers", hidden=1024, num_experts=32, top_k=8, tokens=(7, 6)),
    Case(name="float32_payload", why="no rounding on the wire", dtype=torch.float32, top_k=4),
    Case(name="float16_payload", why="a small exponent range", dtype=torch.float16, top_k=4),
    Case(name="no_weights", why="all weights are 1 without any being given", has_weights=False, top_k=3),
    Case(name="int32_ids", why="routers that emit int32", index_dtype=torch.int32),
    Case(name="extreme_values", why="NaN, infinities, -0.0, subnormal numbers", extreme=True, top_k=4),
    Case(name="opaque_bytes", why="rows of a dtype that nobody can add", dtype=torch.int8, hidden=24),
    Case(name="quantised_pair", why="rows and scales", dtype=torch.float8_e4m3fn, scale_columns=3, hidden=96),
)

CASES: dict[str, Case] = {case.name: case for case in _TABLE}


def random_case(seed: int) -> Case:
    """Draw a small case whose every property is random, for fuzzing; the same seed gives the same case.

    >>> random_case(1) == random_case(1), random_case(1) == random_case(2)
    (True, False)
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_experts = draw(1, 12)
    pattern = sorted(PATTERNS)[draw(0, len(PATTERNS) - 1)]
    needs_distinct = pattern in ("uniform", "duplicated", "masked", "some_without", "skewed")
    return Case(
        name=f"random_{seed}",
        why="what nobody thought of",
        num_experts=num_experts,
        hidden=draw(1, 70),
        top_k=draw(1, num_experts if needs_distinct else 6),
        tokens=tuple(draw(0, 20) for _ in range(draw(1, 5))),
        pattern=pattern,
        placed=sorted(PLACEMENTS)[draw(0, len(PLACEMENTS) - 1)],
        align=(1, 1, 2, 4, 5)[draw(0, 4)],
        dtype=(torch.bfloat16, torch.float16, torch.float32)[draw(0, 2)],
        has_weights=draw(0, 3) > 0,
        index_dtype=(torch.int32, torch.int64)[draw(0, 1)],
    )
