"""The slow oracle: what dispatch and combine mean, in loops over ranks, tokens and choices.

It sees the inputs of all ranks at once, sends nothing, and shares no code with plan, transport or kernels, so that a
test which compares the two compares two independent readings of the same sentences. Nothing here is meant to be fast.

Letters: `T` tokens of one rank, `K` top-k, `H` hidden size, `E` experts in all, `L` experts of one rank, `W` ranks,
`N` rows that one rank receives. `-1` in `topk_idx` means "no expert". Lists have one entry per rank, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecomm.errors import ConfigError, RoutingError, UnsupportedError
from moecomm.placement import ExpertPlacement

__all__ = ["ReferenceDispatched", "combine", "dispatch", "moe", "padded_places"]

# (source rank, source token, k) of one received row; k is -1 in layout "rank", where a row stands for several choices.
Origin = tuple[int, int, int]
_PADDING: Origin = (-1, -1, -1)
_COMBINED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceDispatched:
    """What one rank receives.

    Attributes:
        layout: "expert" or "rank".
        x: (N, H) payload dtype, the received rows; zero in padding.
        scales: (N, ...) scales dtype, what travelled beside the rows, or None; zero in padding.
        expert_offsets: (L,) int32, end of each local expert's padded group; None in layout "rank".
        tokens_per_expert: (L,) int32, (token, k) entries of each local expert, without padding.
        row_weights: (N,) float32, weight of the entry that a row stands for, 0 in padding; None in layout "rank".
        topk_idx: (N, K) int32, local expert ids, -1 for "not here"; None in layout "expert".
        topk_weights: (N, K) float32, 0 where `topk_idx` is -1; None in layout "expert".
        source_rank: (N,) int64, rank that sent the row, -1 in padding.
        source_token: (N,) int64, its token index there, -1 in padding.
        source_k: (N,) int64, which of the token's K choices it is; -1 in padding and in layout "rank".
        tokens_of_rank: T of every rank.
    """

    layout: str
    x: Tensor
    scales: Tensor | None
    expert_offsets: Tensor | None
    tokens_per_expert: Tensor
    row_weights: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    source_rank: Tensor
    source_token: Tensor
    source_k: Tensor
    tokens_of_rank: tuple[int, ...]


def dispatch(
    xs: Sequence[Tensor],
    topk_idxs: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None = None,
    *,
    placement: ExpertPlacement,
    layout: str = "expert",
    align: int = 1,
    scales: Sequence[Tensor] | None = None,
) -> list[ReferenceDispatched]:
    """Send every token to its experts and say what each rank receives.

    In layout "expert" each (token, k) entry is a row and rows are sorted by (local expert, source rank, source token,
    k); every expert's group is padded with zero rows to a multiple of `align`. In layout "rank" each (token,
    destination rank) pair is one row and rows are sorted by (source rank, source token). A token that names one expert
    twice counts twice.

    Args:
        xs: per rank (T, H) any dtype, the tokens.
        topk_idxs: per rank (T, K) integer, global expert ids, -1 for none.
        topk_weights: per rank (T, K) float, router weights; without it every weight is 1.
        placement: which rank holds which expert.
        layout: "expert" or "rank".
        align: rows, multiple to which each expert's group is padded (layout "expert").
        scales: per rank (T, ...) any dtype, travels with the rows.

    Returns:
        One `ReferenceDispatched` per rank.

    Raises:
        RoutingError: an id is outside [-1, E), or shapes do not agree.
        ConfigError: unknown layout or align below 1.
        UnsupportedError: align other than 1 in layout "rank", which has no groups.

    >>> placement = ExpertPlacement.uniform(num_experts=4, num_ranks=2)
    >>> xs = [torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0]])]
    >>> topk_idxs = [torch.tensor([[2, 0], [3, 2]]), torch.tensor([[0, -1]])]
    >>> on_rank0, on_rank1 = dispatch(xs, topk_idxs, placement=placement, align=2)
    >>> on_rank0.x.flatten().tolist(), on_rank0.expert_offsets.tolist(), on_rank0.tokens_per_expert.tolist()
    ([10.0, 20.0], [2, 2], [2, 0])
    >>> on_rank1.x.flatten().tolist(), on_rank1.expert_offsets.tolist(), on_rank1.source_k.tolist()
    ([10.0, 11.0, 11.0, 0.0], [2, 4], [0, 1, 0, -1])
    """
    _check_routing(xs, topk_idxs, topk_weights, placement)
    if layout not in ("expert", "rank"):
        raise ConfigError("unknown layout", got=repr(layout), expected='"expert" or "rank"')
    if align < 1:
        raise ConfigError("align is no row count", got=align, expected="at least 1")
    if layout == "rank" and align != 1:
        raise UnsupportedError('layout "rank" has no groups to align', got=align, expected=1)
    if topk_weights is None:
        topk_weights = [torch.ones(idx.shape, dtype=torch.float32) for idx in topk_idxs]
    world = _World(
        xs=xs,
        scales=scales,
        choices=[idx.tolist() for idx in topk_idxs],
        weights=[w.detach().to(torch.float32).tolist() for w in topk_weights],
        top_k=topk_idxs[0].shape[1],
    )
    if layout == "rank":
        return [_arrange_by_rank(world, experts) for experts in placement.experts_of_rank]
    return [_arrange_by_expert(world, experts, align) for experts in placement.experts_of_rank]


def padded_places(dispatched: ReferenceDispatched, num_ranks: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Say where layout "padded" puts the rows that one rank receives.

    The slot-th row from source rank s to local expert l is row `(l * W + s) * M + slot` of (L * W * M).

    Args:
        dispatched: of layout "expert", without padding.
        num_ranks: W.
        max_tokens: M.

    Returns:
        (N,) int64, the place of each row, and (L, W, 2) int32, the ranges of rows of each local expert that are used.

    >>> placement = ExpertPlacement.uniform(num_experts=2, num_ranks=1)
    >>> out = dispatch([torch.ones(2, 1)], [torch.tensor([[1, 0], [1, -1]])], placement=placement)
    >>> places, ranges = padded_places(out[0], num_ranks=1, max_tokens=4)
    >>> places.tolist(), ranges.tolist()
    ([0, 4, 5], [[[0, 1]], [[0, 2]]])
    """
    places, row = [], 0
    ranges = torch.zeros(len(dispatched.tokens_per_expert), num_ranks, 2, dtype=torch.int32)
    for local, count in enumerate(dispatched.tokens_per_expert.tolist()):
        ends = [source * max_tokens for source in range(num_ranks)]
        for source in dispatched.source_rank[row : row + count].tolist():
            places.append(local * num_ranks * max_tokens + ends[source])
            ends[source] += 1
        ranges[local] = torch.tensor([[source * max_tokens, end] for source, end in enumerate(ends)])
        row += count
    return torch.tensor(places, dtype=torch.int64), ranges


def combine(
    rows_per_rank: Sequence[Tensor],
    dispatched: Sequence[ReferenceDispatched],
    *,
    reduce: str = "rank",
    weighted: bool | None = None,
    biases: Sequence[Tensor] | None = None,
    node_of_rank: Sequence[int] | None = None,
) -> list[Tensor]:
    """Bring the experts' rows back to their tokens and add them up, with every rounding in its place.

    reduce="rank": on each expert rank a float32 sum over the token's rows in ascending k, starting at +0, rounded once
    to the payload dtype; at the source a float32 sum over those ranks in ascending order, starting at the bias or +0,
    rounded once. reduce="source": one float32 sum over ascending k at the source, starting at the bias or +0, rounded
    once. Each product with a weight is rounded to float32 before it is added. A rank without a row for the token is
    skipped; a token with no expert gives its bias, or zero.

    With node_of_rank, as the hierarchical transport does it, reduce="rank" has one level more: on each node a float32
    sum over what its ranks have rounded, in ascending rank order, starting at +0, rounded once to the payload dtype; at
    the source the sum runs over those nodes in ascending order. reduce="source" is the same as without.

    Args:
        rows_per_rank: per rank (N, H) float32, float16 or bfloat16, what the experts made of the rows; padding is not
            read.
        dispatched: what `dispatch` returned.
        reduce: "rank" or "source".
        weighted: multiply rows by `row_weights`; None means yes in layout "expert" and no in layout "rank", whose rows
            are added as they are.
        biases: per rank (T, H), what each sum starts from.
        node_of_rank: node of every rank, for sums by node; None: no such level.

    Returns:
        Per rank (T, H) in the rows' dtype.

    Raises:
        ConfigError: unknown reduce, or not one node for each rank.
        UnsupportedError: weighted=True or reduce="source" in layout "rank", or a dtype that is not summed.

    >>> placement = ExpertPlacement.uniform(num_experts=2, num_ranks=1)
    >>> out = dispatch([torch.ones(1, 2)], [torch.tensor([[1, 0]])], [torch.tensor([[0.5, 0.25]])], placement=placement)
    >>> combine([10 * out[0].x], out, biases=[torch.ones(1, 2)])
    [tensor([[8.5000, 8.5000]])]
    """
    layout, dtype = dispatched[0].layout, rows_per_rank[0].dtype
    if reduce not in ("rank", "source"):
        raise ConfigError("unknown reduce", got=repr(reduce), expected='"rank" or "source"')
    if layout == "rank" and (weighted or reduce == "source"):
        raise UnsupportedError(
            'layout "rank" adds one finished row per rank', got=f"weighted={weighted}, reduce={reduce!r}"
        )
    if node_of_rank is not None and len(node_of_rank) != len(dispatched):
        raise ConfigError("node_of_rank needs one node per rank", got=len(node_of_rank), expected=len(dispatched))
    if dtype not in _COMBINED_DTYPES:
        raise UnsupportedError("rows of this dtype are not summed", got=dtype, expected=_COMBINED_DTYPES)
    if weighted is None:
        weighted = layout == "expert"

    terms = _terms_of_tokens(rows_per_rank, dispatched, weighted)
    hidden = rows_per_rank[0].shape[1]
    results = []
    for source, num_tokens in enumerate(dispatched[0].tokens_of_rank):
        start_TH = torch.zeros(num_tokens, hidden) if biases is None else biases[source].detach().to(torch.float32)
        totals = []
        for token, total_H in enumerate(start_TH[:num_tokens].unbind(0)):
            of_ranks = terms.get((source, token), {})
            if reduce == "rank":
                partials = {
                    rank: found[0][1] if layout == "rank" else _partial_sum(found, dtype)
                    for rank, found in of_ranks.items()
                }
                if node_of_rank is not None:
                    partials = _sums_of_nodes(partials, node_of_rank, dtype)
                for _, partial_H in sorted(partials.items(), key=_k_of_term):
                    total_H = total_H + partial_H
            else:
                for _, term_H in sorted((term for of_rank in of_ranks.values() for term in of_rank), key=_k_of_term):
                    total_H = total_H + term_H
            totals.append(total_H)
        results.append(torch.stack(totals).to(dtype) if totals else torch.zeros(0, hidden, dtype=dtype))
    return results


def moe(
    xs: Sequence[Tensor],
    topk_idxs: Sequence[Tensor],
    topk_weights: Sequence[Tensor] | None,
    expert_fn: Callable[[Tensor, int], Tensor],
    *,
    biases: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Compute a whole MoE layer in one process, in any dtype, with autograd: the reference for gradients.

    Products and sums are taken in the wider dtype of rows and weights, and each token's sum is rounded to `xs`'s dtype
    once. In float64 this is the exact answer; in the payload dtype it is the baseline whose error a transport may
    double.

    Args:
        xs: per rank (T, H) floating.
        topk_idxs: per rank (T, K) integer, global expert ids, -1 for none.
        topk_weights: per rank (T, K) floating, or None to add the rows as they are.
        expert_fn: called once per expert that has tokens, with ((n, H) rows in order of (rank, token, k), global expert
            id); returns (n, H).
        biases: per rank (T, H), what each sum starts from.

    Returns:
        Per rank (T, H), connected to the inputs' graph wherever a token has an expert or a bias.

    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> y = moe([x], [torch.tensor([[1, 0]])], [torch.tensor([[0.5, 0.25]])], lambda rows, expert: rows * (expert + 1))
    >>> y[0].tolist(), torch.autograd.grad(y[0].sum(), x)[0].tolist()
    ([[1.25, 1.25]], [[1.25, 1.25]])
    """
    tokens = [x_TH.unbind(0) for x_TH in xs]
    weights = [[w_K1.unbind(0) for w_K1 in w_TK.unsqueeze(2).unbind(0)] for w_TK in topk_weights or ()]
    entries_of_expert: dict[int, list[Origin]] = {}
    for source, idx in enumerate(topk_idxs):
        for token, experts in enumerate(idx.tolist()):
            for k, expert in enumerate(experts):
                if expert != -1:
                    entries_of_expert.setdefault(expert, []).append((source, token, k))

    terms: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for expert in sorted(entries_of_expert):
        entries = entries_of_expert[expert]
        made = expert_fn(torch.stack([tokens[source][token] for source, token, _ in entries]), expert)
        for row_H, (source, token, k) in zip(made.unbind(0), entries, strict=True):
            if topk_weights is not None:
                row_H = row_H * weights[source][token][k]
            terms.setdefault((source, token), []).append((k, row_H))

    results = []
    for source, x_TH in enumerate(xs):
        rows = []
        for token in range(x_TH.shape[0]):
            total_H = torch.zeros_like(x_TH[token]) if biases is None else biases[source][token]
            for _, term_H in sorted(terms.get((source, token), []), key=_k_of_term):
                total_H = total_H + term_H
            rows.append(total_H.to(x_TH.dtype))
        results.append(torch.stack(rows) if rows else torch.zeros_like(x_TH))
    return results


def _check_routing(
    xs: Sequence[Tensor], topk_idxs: Sequence[Tensor], weights: Sequence[Tensor] | None, placement: ExpertPlacement
) -> None:
    for name, values in (("xs", xs), ("topk_idxs", topk_idxs), ("topk_weights", weights)):
        if values is not None and len(values) != placement.num_ranks:
            raise RoutingError(f"{name} needs one entry per rank", got=len(values), expected=placement.num_ranks)
    for rank, (x_TH, idx_TK) in enumerate(zip(xs, topk_idxs, strict=True)):
        if x_TH.dim() != 2 or idx_TK.dim() != 2 or x_TH.shape[0] != idx_TK.shape[0]:
            raise RoutingError("x is no (T, H) beside (T, K)", got=(x_TH.shape, idx_TK.shape), rank=rank)
        if weights is not None and weights[rank].shape != idx_TK.shape:
            raise RoutingError("weights are not (T, K)", got=weights[rank].shape, expected=idx_TK.shape, rank=rank)
        if idx_TK.numel() and not -1 <= int(idx_TK.min()) <= int(idx_TK.max()) < placement.num_experts:
            raise RoutingError(
                "expert id out of range", got=idx_TK.tolist(), expected=f"-1 to {placement.num_experts - 1}", rank=rank
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _World:
    """The inputs of all ranks, routings as nested lists: choices[rank][token][k]."""

    xs: Sequence[Tensor]
    scales: Sequence[Tensor] | None
    choices: list[list[list[int]]]
    weights: list[list[list[float]]]
    top_k: int


def _arrange_by_expert(world: _World, experts: Sequence[int], align: int) -> ReferenceDispatched:
    origins: list[Origin] = []
    ends, counts = [], []
    for expert in experts:
        before = len(origins)
        for source in range(len(world.xs)):
            for token, chosen in enumerate(world.choices[source]):
                for k, choice in enumerate(chosen):
                    if choice == expert:
                        origins.append((source, token, k))
        counts.append(len(origins) - before)
        while len(origins) % align:
            origins.append(_PADDING)
        ends.append(len(origins))
    row_weights = [0.0 if o == _PADDING else world.weights[o[0]][o[1]][o[2]] for o in origins]
    return ReferenceDispatched(
        layout="expert",
        x=_copy_rows(world.xs, origins),
        scales=None if world.scales is None else _copy_rows(world.scales, origins),
        expert_offsets=torch.tensor(ends, dtype=torch.int32),
        tokens_per_expert=torch.tensor(counts, dtype=torch.int32),
        row_weights=torch.tensor(row_weights, dtype=torch.float32),
        topk_idx=None,
        topk_weights=None,
        **_provenance(origins),
        tokens_of_rank=tuple(x.shape[0] for x in world.xs),
    )


def _arrange_by_rank(world: _World, experts: Sequence[int]) -> ReferenceDispatched:
    origins: list[Origin] = []
    local_ids, local_weights = [], []
    counts = [0] * len(experts)
    for source in range(len(world.xs)):
        for token, chosen in enumerate(world.choices[source]):
            ids = [experts.index(choice) if choice in experts else -1 for choice in chosen]
            if all(local == -1 for local in ids):
                continue
            origins.append((source, token, -1))
            local_ids.append(ids)
            local_weights.append([0.0 if i == -1 else world.weights[source][token][k] for k, i in enumerate(ids)])
            for local in ids:
                if local != -1:
                    counts[local] += 1
    return ReferenceDispatched(
        layout="rank",
        x=_copy_rows(world.xs, origins),
        scales=None if world.scales is None else _copy_rows(world.scales, origins),
        expert_offsets=None,
        tokens_per_expert=torch.tensor(counts, dtype=torch.int32),
        row_weights=None,
        topk_idx=torch.tensor(local_ids, dtype=torch.int32).reshape(len(origins), world.top_k),
        topk_weights=torch.tensor(local_weights, dtype=torch.float32).reshape(len(origins), world.top_k),
        **_provenance(origins),
        tokens_of_rank=tuple(x.shape[0] for x in world.xs),
    )


def _copy_rows(tensors: Sequence[Tensor], origins: Sequence[Origin]) -> Tensor:
    rows_of = [tensor.detach().unbind(0) for tensor in tensors]
    zero = torch.zeros(tensors[0].shape[1:], dtype=tensors[0].dtype)
    rows = [zero if source == -1 else rows_of[source][token] for source, token, _ in origins]
    return torch.stack(rows) if rows else torch.zeros((0, *zero.shape), dtype=zero.dtype)


def _provenance(origins: Sequence[Origin]) -> dict[str, Tensor]:
    names = ("source_rank", "source_token", "source_k")
    return {name: torch.tensor([o[i] for o in origins], dtype=torch.int64) for i, name in enumerate(names)}


def _terms_of_tokens(
    rows_per_rank: Sequence[Tensor], dispatched: Sequence[ReferenceDispatched], weighted: bool
) -> dict[tuple[int, int], dict[int, list[tuple[int, Tensor]]]]:
    # (source, token) -> expert rank -> [(k, float32 term)]
    terms: dict[tuple[int, int], dict[int, list[tuple[int, Tensor]]]] = {}
    for rank, (rows, received) in enumerate(zip(rows_per_rank, dispatched, strict=True)):
        if rows.shape[0] != received.x.shape[0]:
            raise RoutingError("rows do not match", got=rows.shape[0], expected=received.x.shape[0], rank=rank)
        origins = torch.stack([received.source_rank, received.source_token, received.source_k], 1).tolist()
        terms_NH = rows.detach().to(torch.float32)
        if weighted and received.row_weights is not None:
            terms_NH = received.row_weights[:, None] * terms_NH
        for term_H, (source, token, k) in zip(terms_NH.unbind(0), origins, strict=True):
            if source != -1:
                terms.setdefault((source, token), {}).setdefault(rank, []).append((k, term_H))
    return terms


def _partial_sum(terms: Sequence[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    total_H = torch.zeros_like(terms[0][1])
    for _, term_H in sorted(terms, key=_k_of_term):
        total_H = total_H + term_H
    return total_H.to(dtype).to(torch.float32)


def _sums_of_nodes(partials: dict[int, Tensor], node_of_rank: Sequence[int], dtype: torch.dtype) -> dict[int, Tensor]:
    # node -> sum over its ranks
    on_node: dict[int, list[tuple[int, Tensor]]] = {}
    for rank, partial_H in partials.items():
        on_node.setdefault(node_of_rank[rank], []).append((rank, partial_H))
    return {node: _partial_sum(found, dtype) for node, found in on_node.items()}


def _k_of_term(term: tuple[int, Tensor]) -> int:
    return term[0]
