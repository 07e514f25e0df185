"""One rank of `bench_internode.py`: times every path over the link, and counts what crosses it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(FilePath(__file__).resolve().parents[1]))

from bench.case import Case, make_case
from bench.options import Setting, make_parser, settings
from bench.paths import Path, baseline_path, check_paths, make_buffer, moecomm_path
from bench.ranks import Ranks
from moecomm.nn import group_limited_topk

TRANSPORTS = ("hierarchical", "collective")
OPERATIONS = ("dispatch", "combine")
COMPUTE = ("device", "cpu")
STATISTICS = FilePath("/sys/class/net/eth0/statistics")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What one path did in one operation, per iteration: milliseconds of the slowest rank, bytes in and out by node.

    path, transport, gate, peak_memory_bytes: as in `Measurement`.
    """

    path: str
    transport: str
    operation: str
    times_ms: list[float]
    tx_bytes: list[float]
    rx_bytes: list[float]
    gate: str
    peak_memory_bytes: int | None


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
    """All paths on one case; buffers close with the stack."""

    def __init__(self, setting: Setting, ranks: Ranks, case: Case, stack: ExitStack) -> None:
        self.setting, self.ranks, self.case = setting, ranks, case
        self.link = Link(ranks.rank % setting.options.ranks_per_node == 0)
        self.buffers = {name: stack.enter_context(make_buffer(setting, ranks, name)) for name in setting.transports}
        paths = [moecomm_path(setting, case, buffer) for buffer in self.buffers.values()]
        if setting.experts % ranks.world == 0:
            paths.append(baseline_path(setting, case))
        self.paths = check_paths(setting, ranks, case, paths)
        self.times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self.moved: defaultdict[tuple[str, str], list[np.ndarray]] = defaultdict(list)

    def _measure(self, path: Path, operation: str, call: Callable[[], object]) -> None:
        dist.barrier()
        before = self.link.bytes()
        time_us = self.ranks.time_us(call)
        dist.barrier()
        self.times[path.label, operation].append(time_us / 1e3)
        self.moved[path.label, operation].append(self.link.bytes() - before)

    def round(self, turn: int) -> None:
        """Run every path once; the order turns."""
        paths = self.paths
        for path in paths[turn % len(paths) :] + paths[: turn % len(paths)]:
            kept: list[Any] = []
            self._measure(path, "dispatch", partial(lambda path, kept: kept.append(path.dispatch()[1]), path, kept))
            self._measure(path, "combine", partial(path.combine, path.outputs, kept.pop()))

    def timings(self) -> list[Timing]:
        """What was measured, of all ranks and nodes."""
        mine = {key: (times, np.mean(self.moved[key], 0)) for key, times in self.times.items()}
        every = self.ranks.all_gather(mine)
        firsts = every[:: self.setting.options.ranks_per_node]
        return [
            Timing(
                path=path.name,
                transport=path.transport,
                operation=operation,
                times_ms=np.max([one[path.label, operation][0] for one in every], 0).tolist(),
                tx_bytes=[float(one[path.label, operation][1][0]) for one in firsts],
                rx_bytes=[float(one[path.label, operation][1][1]) for one in firsts],
                gate=path.gate,
                peak_memory_bytes=path.peak_memory_bytes,
            )
            for path in self.paths
            for operation in OPERATIONS
        ]

    def overlap(self, kind: str, rounds: int) -> Overlap:
        """Hide a dispatch behind a compute of equal length: a device that this thread waits for, or this very core."""
        length_s = float(np.median(self.times["moecomm hierarchical", "dispatch"])) / 1e3
        longest = max(self.ranks.all_gather(length_s))
        compute = partial(time.sleep, longest) if kind == "device" else _busy(longest, self.ranks)
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
    worst = ranks.all_gather(sorted(every)[1])
    return partial(products, max(1, round(length_s / float(np.median(worst)))))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line: the options of the family, and what `bench_internode.py` knows besides."""
    parser = make_parser(__doc__, transport=list(TRANSPORTS))
    parser.add_argument("--told", type=FilePath, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--max-nodes", type=int, default=0, help="nodes that a token may use; 0: any")
    parser.add_argument("--overlap", type=int, default=0, help="rounds of overlap with a compute of equal length")
    return parser.parse_args(argv)


def main() -> None:
    """Measure one case."""
    args = parse()
    torch.set_num_threads(1)
    ranks = Ranks(args.device)
    (setting,) = settings(args)
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    if args.max_nodes:
        case = limited(case, setting.experts, ranks.world // args.ranks_per_node, args.max_nodes)
    with ExitStack() as stack:
        bench = Bench(setting, ranks, case, stack)
        for turn in range(setting.warmup + setting.repeats):
            if turn == setting.warmup:
                bench.times.clear()
                bench.moved.clear()
            bench.round(turn)
        timings = bench.timings()
        hides = "hierarchical" in bench.buffers and args.overlap
        overlaps = [bench.overlap(kind, args.overlap) for kind in COMPUTE] if hides else []
        if ranks.rank == 0:
            told = {
                "timings": [asdict(timing) for timing in timings],
                "overlaps": [asdict(overlap) for overlap in overlaps],
                "topk_idx": [ids.tolist() for ids in case.topk_idx_of_rank],
            }
            args.told.write_text(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main()
