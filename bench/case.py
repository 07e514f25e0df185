"""What the benchmarks share: the inputs of a case, the ranks that run it, and the checks before anything is timed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moecomm import ExpertPlacement

_LEAD_S = 0.002  # until the ranks begin: time enough for the slowest to hear of it


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is exchanged, and how."""
    parser.add_argument("--tokens", type=_integers, default=[1024], help="T per rank, a comma list: one case each")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", type=_dtype, default=torch.bfloat16)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--layout", choices=("expert", "rank"), default="expert")
    parser.add_argument("--reduce", choices=("rank", "source"), default="rank")


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{name} is no dtype of torch")
    return dtype


@dataclass(frozen=True)
class Case:
    """The inputs of one rank. expert_scale_E makes the experts differ: expert e multiplies a row by it."""

    tokens: int
    rank: int
    x_of_rank: list[Tensor]
    topk_idx_of_rank: list[Tensor]
    topk_weights_TK: Tensor
    expert_scale_E: Tensor

    @property
    def x(self) -> Tensor:
        """(T, H) rows of this rank."""
        return self.x_of_rank[self.rank]

    @property
    def topk_idx(self) -> Tensor:
        """(T, K) int64 routing of this rank."""
        return self.topk_idx_of_rank[self.rank]


def make_case(args: argparse.Namespace, tokens: int, rank: int, world: int, device: torch.device) -> Case:
    """Draw the inputs of all ranks (each can check what it gets); uniform routing, K different experts per token."""
    xs, ids = [], []
    for source in range(world):
        generator = torch.Generator().manual_seed(1000 * tokens + source)
        scores = torch.rand(tokens, args.experts, generator=generator)
        ids.append(scores.topk(args.top_k).indices.to(device))
        xs.append(torch.randn(tokens, args.hidden, generator=generator).to(args.dtype).to(device))
    weights = torch.rand(tokens, args.top_k, generator=torch.Generator().manual_seed(rank)).to(device)
    scale = 0.5 + torch.arange(args.experts, device=device) / args.experts
    return Case(tokens, rank, xs, ids, weights, scale.to(args.dtype))


class Ranks:
    """This process among its peers; a plain `python` start is a world of one."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def time_us(self, call: Callable[[], object]) -> float:
        """Microseconds of one call, which all ranks begin together."""
        self._begin()
        start = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - start) * 1e6

    def time_burst_us(self, calls: Sequence[Callable[[], object]], burst: int) -> list[list[float]]:
        """Microseconds of each of some calls that follow each other: once, begun together, if burst is 1.

        Else so many times without a pause, as a model calls them layer by layer, after one time that is not counted.
        """
        if burst == 1:
            return [[self.time_us(call)] for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        self._begin()
        for _ in range(burst + 1):
            for number, call in enumerate(calls):
                start = time.perf_counter()
                call()
                self.synchronize()
                times[number].append(1e6 * (time.perf_counter() - start))
        return [of_call[1:] for of_call in times]

    def _begin(self) -> None:
        """Agree on a moment and wait for it: out of a barrier the ranks would come one by one.

        The last of four came 0.5 ms after the first on two cores, of two 0.05 ms (gloo, medians).
        """
        self.synchronize()
        if self.world > 1:
            begin = torch.tensor(time.monotonic() + _LEAD_S, dtype=torch.float64, device=self.device)
            dist.all_reduce(begin, dist.ReduceOp.MAX)
            moment = float(begin)
            while time.monotonic() < moment:
                os.sched_yield()

    def leave(self) -> None:
        """Wait for the others and end."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def slowest(self, times_us: dict[str, list[float]]) -> dict[str, list[float]]:
        """Round by round the maximum over ranks."""
        every: list[dict[str, list[float]]] = [times_us] * self.world
        if self.world > 1:
            dist.all_gather_object(every, times_us)
        return {name: np.max([one[name] for one in every], 0).tolist() for name in times_us}


def check_dispatch(case: Case, rows_NH: Tensor, placement: ExpertPlacement, path: str) -> Tensor:
    """Compare arrived rows with what the routing says, bit by bit; (N,) the global expert of every row."""
    here = placement.experts_of_rank[case.rank]
    at = 0
    experts = []
    for expert in here:
        for x, ids in zip(case.x_of_rank, case.topk_idx_of_rank, strict=True):
            tokens = (ids == expert).nonzero()[:, 0]
            got, expected = rows_NH[at : at + len(tokens)], x[tokens]
            assert torch.equal(got.view(torch.int8), expected.view(torch.int8)), f"{path}: rows of expert {expert}"
            at += len(tokens)
            experts += [expert] * len(tokens)
    assert at == len(rows_NH), f"{path}: {len(rows_NH)} rows arrived, {at} were sent"
    return torch.tensor(experts, dtype=torch.int64, device=rows_NH.device)


def check_combine(case: Case, y_TH: Tensor, path: str) -> None:
    """Compare with float64, within four roundings of the row dtype."""
    unit = torch.finfo(y_TH.dtype).eps / 2
    for part in torch.arange(case.tokens).split(128):
        outputs = case.x[part][:, None] * case.expert_scale_E[case.topk_idx[part]][..., None]
        terms = outputs.double() * case.topk_weights_TK[part].double()[..., None]
        error, bound = (y_TH[part].double() - terms.sum(1)).abs(), 4 * unit * terms.abs().sum(1)
        assert (error <= bound).all(), f"{path}: combine is off by {(error - bound).max():.2e} more than it may be"
