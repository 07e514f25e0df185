"""What the benchmarks share: the inputs of a case, and the checks before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from bench.options import Setting
from bench.routing import make_routing
from moecomm import ExpertPlacement
from moecomm.quant import dequantize, quantize


class DrawnRows(Sequence[Tensor]):
    """(T, H) rows of any rank, drawn anew each time: every rank can check what it gets without holding them all.

    Indexing gives what arrives: where rows are quantised on their way, what the reference quantiser makes of them.
    """

    def __init__(self, setting: Setting, world: int, device: torch.device) -> None:
        self._setting, self._world, self._device = setting, world, device

    def __len__(self) -> int:
        return self._world

    @overload
    def __getitem__(self, rank: int) -> Tensor: ...
    @overload
    def __getitem__(self, rank: slice) -> list[Tensor]: ...
    def __getitem__(self, rank: int | slice) -> Tensor | list[Tensor]:
        if isinstance(rank, slice):
            return [self[i] for i in range(*rank.indices(self._world))]
        if not 0 <= rank < self._world:
            raise IndexError(rank)
        rows = self.drawn(rank)
        return rows if self._setting.quant is None else decoded(quantize(rows, self._setting.quant), self._setting)

    def drawn(self, rank: int) -> Tensor:
        """The rows that a rank sends."""
        generator = torch.Generator().manual_seed(1000 * self._setting.seed + rank)
        shape = (self._setting.tokens, self._setting.hidden)
        return torch.randn(shape, generator=generator).to(self._setting.dtype).to(self._device)


def decoded(rows: Tensor | tuple[Tensor, Tensor], setting: Setting) -> Tensor:
    """Rows as they are, or what quantised ones stand for."""
    return rows if isinstance(rows, Tensor) else dequantize(*rows, setting.dtype, setting.hidden)


@dataclass(frozen=True)
class Case:
    """The inputs of one rank. expert_scale_E makes the experts differ: expert e multiplies a row by it.

    x: (T, H) rows of this rank. x_of_rank: what arrives of every rank's, `DrawnRows`. topk_idx_of_rank: of every rank
    (T, K) int64 global expert ids. topk_weights_TK: float32, of this rank.
    """

    tokens: int
    rank: int
    x: Tensor
    x_of_rank: Sequence[Tensor]
    topk_idx_of_rank: Sequence[Tensor]
    topk_weights_TK: Tensor
    expert_scale_E: Tensor

    @property
    def topk_idx(self) -> Tensor:
        """(T, K) int64 routing of this rank."""
        return self.topk_idx_of_rank[self.rank]

    @property
    def ids_of_rank(self) -> list[np.ndarray]:
        """The routing of every rank as arrays."""
        return [ids.cpu().numpy() for ids in self.topk_idx_of_rank]


def make_case(setting: Setting, rank: int, world: int, device: torch.device) -> Case:
    """Draw the inputs: the same for the same setting, wherever it runs."""
    ids = make_routing(
        setting.skew,
        tokens=setting.tokens,
        experts=setting.experts,
        top_k=setting.top_k,
        world=world,
        seed=setting.seed,
    )
    rows = DrawnRows(setting, world, device)
    weights = torch.rand(setting.tokens, setting.top_k, generator=torch.Generator().manual_seed(rank))
    scale = 0.5 + torch.arange(setting.experts) / setting.experts
    return Case(
        tokens=setting.tokens,
        rank=rank,
        x=rows.drawn(rank),
        x_of_rank=rows,
        topk_idx_of_rank=[torch.from_numpy(of_rank).to(device) for of_rank in ids],
        topk_weights_TK=weights.to(device),
        expert_scale_E=scale.to(setting.dtype).to(device),
    )


def check_dispatch(case: Case, rows_NH: Tensor, placement: ExpertPlacement, path: str) -> Tensor:
    """Compare arrived rows with what the routing says, bit by bit; (N,) the global expert of every row."""
    here = placement.experts_of_rank[case.rank]
    tokens_of = [[(ids == expert).nonzero()[:, 0] for ids in case.topk_idx_of_rank] for expert in here]
    counts = np.array([[len(tokens) for tokens in of_expert] for of_expert in tokens_of], np.int64).reshape(-1)
    begins = (np.cumsum(counts) - counts).reshape(len(here), len(case.topk_idx_of_rank))
    assert counts.sum() == len(rows_NH), f"{path}: {len(rows_NH)} rows arrived, {counts.sum()} were sent"
    for source, x in enumerate(case.x_of_rank):
        for number, expert in enumerate(here):
            tokens, begin = tokens_of[number][source], begins[number, source]
            got, expected = rows_NH[begin : begin + len(tokens)], x[tokens]
            same = torch.equal(got.view(torch.int8), expected.view(torch.int8))
            assert same, f"{path}: rows of expert {expert} from rank {source}"
    experts = np.repeat(np.array(here, np.int64), counts.reshape(len(here), -1).sum(1))
    return torch.from_numpy(experts).to(rows_NH.device)


def check_combine(case: Case, y_TH: Tensor, path: str) -> None:
    """Compare with float64, within four roundings of the row dtype."""
    unit, x = torch.finfo(y_TH.dtype).eps / 2, case.x_of_rank[case.rank]
    for part in torch.arange(case.tokens, device=y_TH.device).split(128):
        outputs = x[part][:, None] * case.expert_scale_E[case.topk_idx[part]][..., None]
        terms = outputs.double() * case.topk_weights_TK[part].double()[..., None]
        error, bound = (y_TH[part].double() - terms.sum(1)).abs(), 4 * unit * terms.abs().sum(1)
        assert (error <= bound).all(), f"{path}: combine is off by {(error - bound).max():.2e} more than it may be"
