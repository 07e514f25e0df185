"""One rank of `bench_internode.py`: times every path over the link, and counts what crosses it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.baseline import baseline_combine, baseline_dispatch
from bench.case import Case, check_combine, check_dispatch, make_case
from bench.options import Setting
from bench.ranks import Ranks
from bench.routing import Skew
from moecomm.nn import group_limited_topk

PATHS = ("hierarchical", "flat", "baseline")
OPERATIONS = ("dispatch", "combine")
COMPUTE = ("device", "cpu")
STATISTICS = Path("/sys/class/net/eth0/statistics")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What one path did in one operation, per iteration: milliseconds of the slowest rank, bytes in and out by node."""

    path: str
    operation: str
    times_ms: list[float]
    tx_bytes: list[float]
    rx_bytes: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """A dispatch and a compute of equal length, by themselves and together, in milliseconds, round by round."""

    compute: str
    dispatch_ms: list[float]
    compute_ms: list[float]
    both_ms: list[float]


def limited(case: Case, experts: int, num_nodes: int, max_nodes: int) -> Case:
    """The same case with a routing that uses at most so many nodes for a token; experts lie in node order."""
    groups = [expert * num_nodes // experts for expert in range(experts)]
    ids = []
    for rank, chosen in enumerate(case.topk_idx_of_rank):
        scores = torch.rand(len(chosen), experts, generator=torch.Generator().manual_seed(777 + rank))
        ids.append(group_limited_topk(scores, chosen.shape[1], groups=groups, max_groups=max_nodes)[0])
    return replace(case, topk_idx_of_rank=ids)


class Link:
    """This node's interface; its first rank reads the counters."""

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first

    def bytes(self) -> np.ndarray:
        """(2,) bytes sent and received since it exists; zeros on the other ranks."""
        if not self._is_first:
            return np.zeros(2)
        return np.array([float((STATISTICS / name).read_text()) for name in ("tx_bytes", "rx_bytes")])


class Bench:
    """All paths on one case."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks, case: Case) -> None:
        self.args, self.ranks, self.case = args, ranks, case
        self.link = Link(ranks.rank % args.ranks_per_node == 0)
        sizes = {"num_experts": args.experts, "hidden": args.hidden, "top_k": args.top_k, "dtype": args.dtype}
        names = {"hierarchical": "auto", "flat": "collective"}
        self.buffers = {
            path: moecomm.Buffer(transport=name, max_tokens_per_rank=max(1, args.tokens), timeout_s=60.0, **sizes)
            for path, name in names.items()
            if path in args.paths
        }
        if "hierarchical" in self.buffers:
            assert self.buffers["hierarchical"].transport == "hierarchical", self.buffers["hierarchical"].explain()
        self.times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self.moved: defaultdict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        placement = moecomm.ExpertPlacement.uniform(args.experts, ranks.world)
        self.outputs = self._check(placement)

    def _check(self, placement: moecomm.ExpertPlacement) -> torch.Tensor:
        """Every path gives the right rows and sums; the outputs of the experts."""
        case, outputs = self.case, torch.empty(0)
        for path in self.args.paths:
            rows, home = self._dispatch(path)
            experts = check_dispatch(case, rows, placement, path)
            outputs = rows * case.expert_scale_E[experts][:, None]
            check_combine(case, self._combine(path, outputs, home), path)
        return outputs

    def _dispatch(self, path: str) -> tuple[torch.Tensor, Any]:
        case = self.case
        if path == "baseline":
            return baseline_dispatch(case.x, case.topk_idx, self.args.experts)
        out = self.buffers[path].dispatch(case.x, case.topk_idx, case.topk_weights_TK)
        assert isinstance(out.x, torch.Tensor)
        return out.x, out.handle

    def _combine(self, path: str, outputs: torch.Tensor, home: Any) -> torch.Tensor:
        if path == "baseline":
            return baseline_combine(outputs, self.case.topk_weights_TK, home)
        return self.buffers[path].combine(outputs, home)

    def _measure(self, path: str, operation: str, call: Callable[[], object]) -> None:
        dist.barrier()
        before = self.link.bytes()
        time_us = self.ranks.time_us(call)
        dist.barrier()
        self.times[path, operation].append(time_us / 1e3)
        self.moved[path, operation].append(self.link.bytes() - before)

    def round(self, turn: int) -> None:
        """Run every path once; the order turns."""
        paths = self.args.paths
        for path in paths[turn % len(paths) :] + paths[: turn % len(paths)]:
            kept: list[Any] = []
            self._measure(path, "dispatch", lambda path=path, kept=kept: kept.append(self._dispatch(path)[1]))  # type: ignore[misc]
            self._measure(path, "combine", partial(self._combine, path, self.outputs, kept.pop()))

    def timings(self) -> list[Timing]:
        """What was measured, of all ranks and nodes."""
        mine = {key: (times, np.mean(self.moved[key], 0)) for key, times in self.times.items()}
        every: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(every, mine)
        firsts = every[:: self.args.ranks_per_node]
        return [
            Timing(
                path=path,
                operation=operation,
                times_ms=np.max([one[path, operation][0] for one in every], 0).tolist(),
                tx_bytes=[float(one[path, operation][1][0]) for one in firsts],
                rx_bytes=[float(one[path, operation][1][1]) for one in firsts],
            )
            for path, operation in mine
        ]

    def overlap(self, kind: str, rounds: int) -> Overlap:
        """Hide a dispatch behind a compute of equal length: a device that this thread waits for, or this very core."""
        length_s = float(np.median(self.times["hierarchical", "dispatch"])) / 1e3
        lengths: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(lengths, length_s)
        compute = partial(time.sleep, max(lengths)) if kind == "device" else _busy(max(lengths), self.ranks)
        case, buffer = self.case, self.buffers["hierarchical"]
        kept: list[Any] = []

        def dispatch() -> None:
            kept.append(buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK))

        def both() -> None:
            pending = buffer.dispatch_async(case.x, case.topk_idx, case.topk_weights_TK)
            compute()
            kept.append(pending.wait())

        times: dict[str, list[float]] = {"dispatch": [], "compute": [], "both": []}
        for _ in range(rounds):
            for name, call in (("dispatch", dispatch), ("compute", compute), ("both", both)):
                times[name].append(self.ranks.time_us(call) / 1e3)
                kept.clear()
        slowest = self.ranks.slowest(times)
        return Overlap(
            compute=kind, dispatch_ms=slowest["dispatch"], compute_ms=slowest["compute"], both_ms=slowest["both"]
        )


def _busy(length_s: float, ranks: Ranks) -> Callable[[], None]:
    """Matrix products on one thread that take so long when all ranks are at it."""
    a = torch.randn(192, 192)

    def products(count: int) -> None:
        for _ in range(count):
            a @ a

    products(50)
    every = []
    for _ in range(3):
        every.append(ranks.time_us(partial(products, 400)) / 400e6)
    worst: list[Any] = [None] * ranks.world
    dist.all_gather_object(worst, sorted(every)[1])
    return partial(products, max(1, round(length_s / float(np.median(worst)))))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--max-nodes", type=int, default=0, help="nodes that a token may use; 0: any")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--paths", type=lambda text: text.split(","), default=list(PATHS))
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--overlap", type=int, default=0, help="rounds of overlap with a compute of equal length")
    return parser.parse_args(argv)


def main() -> None:
    """Measure one case."""
    args = parse()
    torch.set_num_threads(1)
    ranks = Ranks()
    setting = Setting(
        hidden=args.hidden,
        experts=args.experts,
        top_k=args.top_k,
        tokens=args.tokens,
        skew=Skew.parse("uniform"),
        transports=("auto",),
        layout="expert",
        reduce="rank",
        dtype=args.dtype,
        quant=None,
        repeats=args.repeats,
        warmup=args.warmup,
        seed=0,
        options=args,
    )
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    if args.max_nodes:
        case = limited(case, args.experts, ranks.world // args.ranks_per_node, args.max_nodes)
    bench = Bench(args, ranks, case)
    for turn in range(args.warmup):
        bench.round(turn)
    bench.times.clear()
    bench.moved.clear()
    for turn in range(args.repeats):
        bench.round(turn)
    timings = bench.timings()
    overlaps = [bench.overlap(kind, args.overlap) for kind in COMPUTE if args.overlap]
    if ranks.rank == 0:
        told = {
            "timings": [asdict(timing) for timing in timings],
            "overlaps": [asdict(overlap) for overlap in overlaps],
            "topk_idx": [ids.tolist() for ids in case.topk_idx_of_rank],
            "pid": os.getpid(),
        }
        args.out.write_text(json.dumps(told))
    for buffer in bench.buffers.values():
        buffer.close()
    ranks.leave()


if __name__ == "__main__":
    main()
