"""What `check=` of a buffer costs: dispatch and combine with and without, in the same processes, turn by turn.

    torchrun --standalone --nproc-per-node 4 bench/bench_check.py --tokens 1024

Paths are named by the level; the ratio is against `check="off"`, so that 0.8 is a quarter more time.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.bench_dispatch_combine import needed_bytes as exchange_bytes
from bench.case import make_case
from bench.harness import Benchmark, Recorder, compared, main
from bench.options import Setting, make_parser
from bench.paths import check_paths, make_buffer, moecomm_path
from bench.ranks import Ranks
from bench.record import Measurement
from bench.show import progress
from bench.traffic import traffic
from moecomm import ExpertPlacement

OPERATIONS = ("dispatch", "combine")


def run_case(setting: Setting, ranks: Ranks) -> list[Measurement]:
    """Check every path, then time them in turn."""
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    times: defaultdict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        paths = []
        for transport in setting.transports:
            for level in setting.options.checks.split(","):
                buffer = stack.enter_context(make_buffer(setting, ranks, transport, check=level))
                paths.append(replace(moecomm_path(setting, case, buffer), name=f"check {level}"))
        check_paths(setting, ranks, case, paths)
        step = stack.enter_context(progress(ranks.rank, "rounds", setting.warmup + setting.repeats))
        for number in range(setting.warmup + setting.repeats):
            if number == setting.warmup:
                times.clear()
            for path in paths if number % 2 else paths[::-1]:
                kept: list[Any] = []
                dispatch = partial(lambda path, kept: kept.append(path.dispatch()[1]), path, kept)
                times[f"{path.label}|dispatch"].append(ranks.time_us(dispatch))
                times[f"{path.label}|combine"].append(
                    ranks.time_us(partial(lambda path, kept: path.combine(path.outputs, kept[0]), path, kept))
                )
            step()
    slowest = ranks.slowest(times)
    placement = ExpertPlacement.uniform(setting.experts, ranks.world)
    bytes_of = traffic(
        case.ids_of_rank, placement, layout=setting.layout, reduce=setting.reduce, row_bytes=setting.row_bytes
    )
    recorder = Recorder("check", setting, ranks, case.ids_of_rank)
    rows = []
    for operation in OPERATIONS:
        for path in paths:
            facts = {"transport": path.transport, "gate": path.gate, "peak_memory_bytes": path.peak_memory_bytes}
            took = slowest[f"{path.label}|{operation}"]
            rows.append(recorder.row(path.name, operation, took, bytes_of[operation], **facts))
    return compared(rows, baseline="check off")


def needed_bytes(setting: Setting, world: int) -> int:
    """Bytes per rank: a buffer for every level, and its rows."""
    levels = len(setting.options.checks.split(","))
    return exchange_bytes(replace(setting, transports=setting.transports * levels), world)


def parser() -> argparse.ArgumentParser:
    """The options of the family, and one more."""
    shape = {"hidden": [7168], "experts": [64], "top_k": [8]}
    made = make_parser(__doc__, shape, tokens=[1024], repeats=15, warmup=2)
    made.add_argument("--checks", default="off,cheap,full", help="levels, a comma list (default: %(default)s)")
    return made


BENCHMARK = Benchmark(
    name="check",
    run_case=run_case,
    needed_bytes=needed_bytes,
    takes={"layout": ("expert", "rank"), "quant": ("none",)},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, parser()))
