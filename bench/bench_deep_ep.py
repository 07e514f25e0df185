"""What `moecomm.deep_ep` costs on top of the calls of `moecomm.Buffer` that do the same.

    torchrun --standalone --nproc-per-node 4 bench/bench_deep_ep.py --tokens 128,1024 --out bench/results/deep_ep

Paths: "moecomm", the native call; "deep_ep", the compatible one, whose ratio is native over compatible time, so that
1.0 is no cost and 0.5 twice the time. The two calls of a pair take turns, round by round. Both give the same rows and
sums, compared bit for bit before anything is timed; the compatible one also what its API gives beside them. `normal`
starts where there is a layout already, `normal layout` makes it first.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.bench_dispatch_combine import needed_bytes as exchange_bytes
from bench.case import Case, make_case
from bench.harness import Benchmark, Recorder, compared, main
from bench.memory import PeakMemory
from bench.options import Setting, make_parser
from bench.paths import make_buffer
from bench.ranks import Ranks
from bench.record import Measurement
from bench.show import progress
from bench.traffic import traffic
from moecomm import ExpertPlacement, deep_ep

PATHS = ("moecomm", "deep_ep")
Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A native call and the compatible one that does the same; layout, reduce: of the native one."""

    native: Call
    compatible: Call
    layout: str = "rank"
    reduce: str = "rank"

    @property
    def calls(self) -> tuple[Call, Call]:
        """In the order of PATHS."""
        return self.native, self.compatible


def normal_pairs(setting: Setting, case: Case, native: moecomm.Buffer) -> dict[str, Pair]:
    """Those of the normal mode of `deep_ep.Buffer`."""
    x, idx, weights = case.x, case.topk_idx, case.topk_weights_TK
    by_rank = native.dispatch(x, idx, weights, layout="rank")
    buffer: Any = deep_ep.Buffer(dist.group.WORLD)

    def layout() -> dict[str, Any]:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, setting.experts)
        return {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
            "topk_idx": idx,
            "topk_weights": weights,
        }

    def dispatch() -> moecomm.Dispatched:
        return native.dispatch(x, idx, weights, layout="rank")

    known = layout()
    recv, _, _, _, handle, _ = buffer.dispatch(x, **known)
    return {
        "normal dispatch": Pair(native=dispatch, compatible=lambda: buffer.dispatch(x, **known)),
        "normal layout and dispatch": Pair(native=dispatch, compatible=lambda: buffer.dispatch(x, **layout())),
        "normal replay": Pair(
            native=lambda: native.dispatch(x, handle=by_rank.handle),
            compatible=lambda: buffer.dispatch(x, handle=handle),
        ),
        "normal combine": Pair(
            native=lambda: native.combine(by_rank.x, by_rank.handle),
            compatible=lambda: buffer.combine(recv, handle),
        ),
    }


def elastic_pairs(setting: Setting, case: Case, native: moecomm.Buffer) -> dict[str, Pair]:
    """Those of `deep_ep.ElasticBuffer`."""
    given = case.x, case.topk_idx, case.topk_weights_TK
    by_rank, by_expert = native.dispatch(*given, layout="rank"), native.dispatch(*given)
    elastic: Any = deep_ep.ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=max(1, setting.tokens), hidden=setting.hidden, num_topk=setting.top_k
    )
    usual = {"num_experts": setting.experts}
    compact, expanded = elastic.dispatch(*given, **usual), elastic.dispatch(*given, do_expand=True, **usual)
    return {
        "elastic dispatch": Pair(
            native=lambda: native.dispatch(*given, layout="rank"), compatible=lambda: elastic.dispatch(*given, **usual)
        ),
        "elastic combine": Pair(
            native=lambda: native.combine(by_rank.x, by_rank.handle),
            compatible=lambda: elastic.combine(compact[0], compact[3]),
        ),
        "expanded dispatch": Pair(
            native=lambda: native.dispatch(*given),
            compatible=lambda: elastic.dispatch(*given, do_expand=True, **usual),
            layout="expert",
        ),
        "expanded combine": Pair(
            native=lambda: native.combine(by_expert.x, by_expert.handle, weighted=False),
            compatible=lambda: elastic.combine(expanded[0], expanded[3]),
            layout="expert",
        ),
    }


def low_latency_pairs(setting: Setting, case: Case, source: moecomm.Buffer) -> dict[str, Pair]:
    """Those of the low-latency mode; its dispatch lays rows out otherwise, so only the sums can be compared."""
    alone = source.dispatch(case.x, case.topk_idx, case.topk_weights_TK)
    buffer: Any = deep_ep.Buffer(dist.group.WORLD)
    few = case.x, case.topk_idx, max(1, setting.tokens), setting.experts
    slots, _, handle, _, _ = buffer.low_latency_dispatch(*few, use_fp8=False)
    return {
        "low-latency dispatch": Pair(
            native=lambda: source.dispatch(case.x, case.topk_idx, case.topk_weights_TK),
            compatible=lambda: buffer.low_latency_dispatch(*few, use_fp8=False),
            layout="expert",
            reduce="source",
        ),
        "low-latency combine": Pair(
            native=lambda: source.combine(alone.x, alone.handle),
            compatible=lambda: buffer.low_latency_combine(slots, case.topk_idx, case.topk_weights_TK, handle),
            layout="expert",
            reduce="source",
        ),
    }


def check(name: str, pair: Pair, ranks: Ranks) -> list[dict[str, Any]]:
    """Compare what both calls give; for the row of each what has been shown, and its peak memory."""
    given, facts = [], []
    for call in pair.calls:
        with PeakMemory(ranks.device) as peak:
            given.append(_rows(call()))
        facts.append({"gate": "by its combine", "peak_memory_bytes": max(ranks.all_gather(peak.bytes))})
    if name != "low-latency dispatch":
        assert torch.equal(*given), f"{name}: not what moecomm.Buffer gives"
        facts = [fact | {"gate": "bit for bit what moecomm.Buffer gives"} for fact in facts]
    return facts


def _rows(given: Any) -> Tensor:
    rows = given.x if isinstance(given, moecomm.Dispatched) else given[0] if isinstance(given, tuple) else given
    assert isinstance(rows, Tensor)
    return rows


def run_case(setting: Setting, ranks: Ranks) -> list[Measurement]:
    """Check each pair of calls, then time the two in turn."""
    if ranks.world == 1:
        raise ValueError("moecomm.deep_ep stands on a process group: start this with torchrun --nproc-per-node RANKS")
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    times: defaultdict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack, torch.no_grad():
        native = stack.enter_context(make_buffer(setting, ranks, "auto"))
        pairs = normal_pairs(setting, case, native) | elastic_pairs(setting, case, native)
        if setting.tokens <= setting.options.most_low_latency:
            source = stack.enter_context(make_buffer(replace(setting, reduce="source"), ranks, "auto"))
            pairs |= low_latency_pairs(setting, case, source)
        pairs = {name: pair for name, pair in pairs.items() if setting.options.only in name}
        if not pairs:
            raise ValueError(f"--only {setting.options.only}: no call has this in its name")
        facts = {name: check(name, pair, ranks) for name, pair in pairs.items()}
        step = stack.enter_context(progress(ranks.rank, "rounds", setting.warmup + setting.repeats))
        for number in range(setting.warmup + setting.repeats):
            if number == setting.warmup:
                times.clear()
            for name, pair in pairs.items():
                for path in PATHS if number % 2 else PATHS[::-1]:
                    times[f"{path}|{name}"].append(ranks.time_us(pair.calls[PATHS.index(path)]))
            step()
        transport = native.transport
    slowest = ranks.slowest(times)
    recorder = Recorder("deep_ep", setting, ranks, case.ids_of_rank, transport=transport, layout="")
    rows = []
    for name, pair in pairs.items():
        placement, shape = ExpertPlacement.uniform(setting.experts, ranks.world), {"row_bytes": setting.row_bytes}
        bytes_of = traffic(case.ids_of_rank, placement, layout=pair.layout, reduce=pair.reduce, **shape)
        of_ranks = bytes_of["combine" if "combine" in name else "dispatch"]
        for path, of_path in zip(PATHS, facts[name], strict=True):
            facts_here = {"layout": pair.layout, "reduce": pair.reduce, **of_path}
            rows.append(recorder.row(path, name, slowest[f"{path}|{name}"], of_ranks, **facts_here))
    return compared(rows, baseline="moecomm")


def needed_bytes(setting: Setting, world: int) -> int:
    """Bytes per rank: four buffers, and rows that each has given."""
    return 3 * exchange_bytes(setting, world)


def parser() -> argparse.ArgumentParser:
    """The options of the family, and two more."""
    shape = {"hidden": [7168], "experts": [64], "top_k": [8]}
    made = make_parser(__doc__, shape, tokens=[128], repeats=40, warmup=8)
    made.add_argument("--most-low-latency", type=int, default=256, help="T up to which that mode is measured")
    made.add_argument("--only", default="", help="measure what has this in its name")
    return made


BENCHMARK = Benchmark(
    name="deep_ep",
    run_case=run_case,
    needed_bytes=needed_bytes,
    takes={  # each call has its layout and reduction; deep_ep chooses the transport and has rows of bfloat16
        "layout": ("expert",),
        "reduce": ("rank",),
        "transport": ("auto",),
        "dtype": ("bfloat16",),
        "quant": ("none",),
    },
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, parser()))
