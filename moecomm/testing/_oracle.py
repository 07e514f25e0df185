"""What the oracle says of the named cases, once per process: it is slow, and the same on every transport.

All is a pure function of its arguments, none of which is a transport. What is given is shared: not to be written to.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moecomm import reference
from moecomm.quant import QuantSpec, dequantize, quantize
from moecomm.reference import ReferenceDispatched
from moecomm.testing.cases import Case
from moecomm.testing.provenance import provenance_rows

_REPLAY_ROUND = 50  # payloads of replays come from rounds far from those of dispatches


@dataclass(frozen=True, slots=True)
class Sheet:
    """What all ranks put in, and what each should get."""

    xs: list[Tensor]
    scales: list[Tensor] | None
    topk_idxs: list[Tensor]
    topk_weights: list[Tensor] | None
    expected: list[ReferenceDispatched]


@functools.lru_cache(maxsize=32)  # the same for each layout
def _inputs(case: Case, world_size: int, round: int) -> dict[str, Any]:
    ranks = range(world_size)
    routings = [case.routing(r, round, world_size) for r in ranks]
    return {
        "xs": [case.payload(r, round) for r in ranks],
        "scales": [s for s in (case.scales(r, round) for r in ranks) if s is not None] or None,
        "topk_idxs": [idx for idx, _ in routings],
        "topk_weights": [w for _, w in routings if w is not None] or None,
    }


@functools.lru_cache(maxsize=128)  # the same for each way to reduce, and for "expert" and "padded" without align
def sheet_of(case: Case, world_size: int, layout: str, align: int, round: int, replayed: bool = False) -> Sheet:
    """A round of a case; replayed: with the payload of another round, so other rows at the same places."""
    if not replayed:
        inputs = _inputs(case, world_size, round)
        expected = reference.dispatch(**inputs, placement=case.placement(world_size), layout=layout, align=align)
        return Sheet(**inputs, expected=expected)
    sheet = sheet_of(case, world_size, layout, align, round)
    numbers = enumerate(sheet.xs)
    xs = [provenance_rows(r, len(x), case.hidden, case.dtype, round + _REPLAY_ROUND) for r, x in numbers]
    expected = [replace(table, x=rows_at(table, xs)) for table in sheet.expected]
    return replace(sheet, xs=xs, expected=expected)


def rows_at(table: ReferenceDispatched, xs: list[Tensor]) -> Tensor:
    """What a rank receives where these rows are sent by the same routing; zero in padding."""
    origins = zip(table.source_rank.tolist(), table.source_token.tolist(), strict=True)
    rows = [torch.zeros_like(table.x[0]) if rank == -1 else xs[rank][token] for rank, token in origins]
    return torch.stack(rows) if rows else table.x


@functools.lru_cache(maxsize=64)
def _returning(
    case: Case, world_size: int, layout: str, align: int, round: int, rank: int
) -> tuple[list[Tensor], list[ReferenceDispatched]]:
    """Which rows of each rank are of this rank's tokens, and the tables of these rows.

    Nothing else has a part in what comes back to it, so the oracle can skip it.
    """
    sheet = sheet_of(case, world_size, layout, align, round)
    which = [table.source_rank == rank for table in sheet.expected]
    tables = [
        replace(
            table,
            x=table.x[mine],
            row_weights=None if table.row_weights is None else table.row_weights[mine],
            source_rank=table.source_rank[mine],
            source_token=table.source_token[mine],
            source_k=table.source_k[mine],
            tokens_of_rank=tuple(t if r == rank else 0 for r, t in enumerate(table.tokens_of_rank)),
        )
        for mine, table in zip(which, sheet.expected, strict=True)
    ]
    return which, tables


@functools.lru_cache(maxsize=512)  # the same for each layout, each way to reduce, and each transport
def values(case: Case, purpose: str, rank: int, round: int, num_rows: int, octaves: int = 6) -> Tensor:
    """Shared: to be cloned before anything under test may write to it."""
    return case.values(purpose, rank, round, num_rows, octaves=octaves)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """What one combine adds up for the tokens of one rank: all that the result may depend on, and no transport."""

    case: Case
    world_size: int
    rank: int
    layout: str
    align: int
    round: int  # of the routing
    purpose: str  # and seed: of the rows, see `values`
    seed: int
    reduce: str
    weighted: bool | None
    has_bias: bool = False
    node_of_rank: tuple[int, ...] | None = None
    quant: QuantSpec | str | None = None


@functools.lru_cache(maxsize=256)  # the same on each transport
def expected_sum(of: Sum) -> Tensor:
    """What the oracle says of it: (T, H). Shared: only to be compared with."""
    which, tables = _returning(of.case, of.world_size, of.layout, of.align, of.round, of.rank)
    rows = [values(of.case, of.purpose, r, of.seed, len(mine))[mine] for r, mine in enumerate(which)]
    if of.quant is not None:  # each row by itself
        together = dequantize(*quantize(torch.cat(rows), of.quant), torch.float32, of.case.hidden)
        rows = list(together.split([len(part) for part in rows]))
    biases = None
    if of.has_bias:
        num_tokens = tables[0].tokens_of_rank[of.rank]
        biases = [values(of.case, "bias", of.rank, of.seed, num_tokens)] * of.world_size
    given: dict[str, Any] = {"reduce": of.reduce, "weighted": of.weighted, "node_of_rank": of.node_of_rank}
    return reference.combine(rows, tables, **given, biases=biases)[of.rank].to(of.case.combine_dtype)


@functools.lru_cache(maxsize=64)  # the same on each transport
def quantised(case: Case, world_size: int, rank: int, round: int, replayed: bool, spec: QuantSpec) -> list[Tensor]:
    """Codes and scales of the rows that a rank receives without padding."""
    return list(quantize(sheet_of(case, world_size, "expert", 1, round, replayed).expected[rank].x, spec))


def expert_fn(rows: Tensor, expert: int) -> Tensor:
    """A different function for each expert, row by row, with a gradient that depends on the row."""
    return rows * (1 + expert / 8) + rows.abs() / 2


@functools.lru_cache(maxsize=32)  # the same for each layout and each way to reduce
def gradients_in_one_process(
    case: Case, world_size: int, rank: int, round: int, dtype: torch.dtype, magnitudes: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of x and, where there are weights, of these; other ranks' tokens have no part in them.

    With `magnitudes` nothing cancels: every input is positive, and so are the experts' derivatives.
    """
    num_tokens = case.num_tokens(rank, round)
    x, bias, dy = (values(case, name, rank, round, num_tokens, 0).to(dtype) for name in ("x", "bias", "dy"))
    inputs = _inputs(case, world_size, round)
    idx, weights = inputs["topk_idxs"][rank], None if inputs["topk_weights"] is None else inputs["topk_weights"][rank]
    if magnitudes:
        x, bias, dy, weights = x.abs(), bias.abs(), dy.abs(), None if weights is None else weights.abs()
    leaves = [leaf(x)] + ([] if weights is None else [leaf(weights.to(torch.promote_types(dtype, weights.dtype)))])
    # The bias connects y to the graph also where no token has an expert.
    y = reference.moe(leaves[:1], [idx], leaves[1:] or None, expert_fn, biases=[leaf(bias)])[0]
    if not y.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)


def leaf(tensor: Any) -> Any:
    """A copy that asks for a gradient."""
    return None if tensor is None else tensor.detach().clone().requires_grad_()
