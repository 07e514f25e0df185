"""Time dispatch and combine against the frameworks' path and the memcpy roof, round by round in one run.

    torchrun --nproc-per-node 4 bench/bench_dispatch_combine.py --preset deepseek-v3 --tokens 16,1024
    mpiexec -n 4 python bench/bench_dispatch_combine.py --transport auto,mpi
    python bench/bench_dispatch_combine.py                          # one rank

What is timed: the whole call as a user makes it, checks, planning and the exchange of counts included, from a common
start to the return on the slowest rank. Expert outputs exist already when combine is called. Every round runs each path
once, and where there are few tokens in bursts without a pause: of dispatches, of combines, and of both in turn. Results
are checked before. Bytes are counted by `bench.traffic`, from the routing alone.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path as FilePath

import numpy as np
import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parents[1]))

from bench.case import Case, make_case
from bench.harness import Benchmark, Recorder, compared, main
from bench.options import Setting, make_parser
from bench.paths import Path, check_paths, make_paths, why_no_baseline
from bench.peers import PEERS, peer_paths
from bench.ranks import Ranks
from bench.record import Measurement
from bench.roof import Roof
from bench.routing import expected_rows
from bench.show import note, progress
from bench.traffic import Traffic, traffic
from moecomm import ExpertPlacement

PHASES = ("plan", "counts", "send", "wait", "arrange")
ROOFS = ("memcpy", "streamed copy")


def run_case(setting: Setting, ranks: Ranks) -> list[Measurement]:
    """Check every path, then time them in turn."""
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    placement = ExpertPlacement.uniform(setting.experts, ranks.world)
    sizes = {"row_bytes": setting.row_bytes, "wire_row_bytes": setting.wire_row_bytes}
    bytes_of = traffic(case.ids_of_rank, placement, layout=setting.layout, reduce=setting.reduce, **sizes)
    mine = {operation: of_rank[ranks.rank].moved for operation, of_rank in bytes_of.items()}
    roof = Roof(max(mine.values()), ranks.device)
    if reason := why_no_baseline(setting, ranks):
        note(ranks.rank, f"no baseline: {reason}")
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    phases: defaultdict[tuple[str, str], float] = defaultdict(float)
    with ExitStack() as stack:
        paths = make_paths(setting, ranks, case, stack) + peer_paths(setting, ranks, case, PEERS)
        paths = check_paths(setting, ranks, case, paths)
        step = stack.enter_context(progress(ranks.rank, "rounds", setting.warmup + setting.repeats))
        for number in range(setting.warmup + setting.repeats):
            if number == setting.warmup:
                times.clear()
                phases.clear()
            one_round(setting, ranks, case, paths, partial(time_roofs, roof, mine), times, phases)
            step()
    slowest = ranks.slowest({f"{label}|{operation}": of_path for (label, operation), of_path in times.items()})
    return summarize(setting, ranks, case, paths, slowest, bytes_of, phases)


def one_round(
    setting: Setting,
    ranks: Ranks,
    case: Case,
    paths: Sequence[Path],
    roofs: Callable[[Callable[..., None]], None],
    times: defaultdict[tuple[str, str], list[float]],
    phases: defaultdict[tuple[str, str], float],
) -> None:
    """Run every path once; the order of the paths turns from round to round."""
    burst = setting.options.burst or (16 if setting.tokens <= 256 else 1)

    def measure(label: str, dispatch: Callable[[], object], combine: Callable[[], object]) -> None:
        """Each by itself, and where they come in bursts also one after the other."""
        alone = [ranks.time_burst_us([call], burst)[0] for call in (dispatch, combine)]
        pairs = alone if burst == 1 else ranks.time_burst_us([dispatch, combine], burst)
        times[label, "dispatch"] += alone[0]
        times[label, "combine"] += alone[1]
        times[label, "both"] += [sum(pair) for pair in zip(*pairs, strict=True)]

    def time_path(path: Path) -> None:
        before = path.stats() if path.stats else {}
        kept: list[object] = []  # one result at a time: its rows go when the next ones come

        def dispatch() -> None:
            kept[:] = [path.dispatch()[1]]

        measure(path.label, dispatch, lambda: path.combine(path.outputs, kept[0]))
        after = path.stats() if path.stats else {}
        for name in ("dispatches", *(f"{phase}_s" for phase in PHASES)) if after else ():
            phases[path.label, name] += float(after[name] - before[name])

    turns = [partial(time_path, path) for path in paths] + [partial(roofs, measure)]
    turn = len(times[paths[0].label, "dispatch"]) // burst % len(turns)
    for call in turns[turn:] + turns[:turn]:
        call()


def time_roofs(roof: Roof, moved: dict[str, int], measure: Callable[..., None]) -> None:
    """Copy what dispatch and combine move."""
    for name, copy in zip(ROOFS, (roof.memcpy, roof.streamed_copy), strict=True):
        calls = {operation: partial(copy, num_bytes) for operation, num_bytes in moved.items()}
        measure(name, calls["dispatch"], calls["combine"])


def summarize(
    setting: Setting,
    ranks: Ranks,
    case: Case,
    paths: Sequence[Path],
    times: dict[str, list[float]],
    bytes_of: dict[str, list[Traffic]],
    phases: dict[tuple[str, str], float],
) -> list[Measurement]:
    """Turn the times of all rounds into rows; "both" are dispatch and combine in turn."""
    recorder = Recorder("dispatch_combine", setting, ranks, case.ids_of_rank)
    rows = []
    for operation in ("dispatch", "combine", "both"):
        of_ranks = [one for part in bytes_of if operation in (part, "both") for one in bytes_of[part]]
        for path in paths:
            extras = _phases(path, phases, times[f"{path.label}|dispatch"]) if operation == "dispatch" else {}
            rows.append(
                recorder.row(
                    path.name,
                    operation,
                    times[f"{path.label}|{operation}"],
                    of_ranks,
                    transport=path.transport,
                    gate=path.gate,
                    peak_memory_bytes=path.peak_memory_bytes,
                    extras=extras,
                )
            )
        rows += [recorder.row(name, operation, times[f"{name}|{operation}"], of_ranks) for name in ROOFS]
    return compared(rows)


def _phases(path: Path, phases: dict[tuple[str, str], float], times_us: Sequence[float]) -> dict[str, float]:
    """Microseconds per dispatch that rank 0 spent in each phase, its combine included; the share of planning."""
    if path.stats is None:
        return {}
    dispatches = phases[path.label, "dispatches"]
    spent_us = {f"{name}_us": round(1e6 * phases[path.label, f"{name}_s"] / dispatches, 2) for name in PHASES}
    return spent_us | {"plan_percent": round(100 * spent_us["plan_us"] / float(np.mean(times_us)), 2)}


def needed_bytes(setting: Setting, world: int) -> int:
    """Bytes per rank: rows here and there, copies that the paths make, the roof, and the check in float64.

    Or what drawing the routing takes, if that is more. Nothing is drawn for it, so arrivals are as expected.
    """
    tokens, choices = setting.tokens, setting.tokens * setting.top_k
    arrive = expected_rows(setting.skew, tokens=tokens, experts=setting.experts, top_k=setting.top_k, world=world)
    ours, theirs, roof = 3 * len(setting.transports) * arrive, 3 * arrive + 3 * choices, 2 * arrive + 2 * tokens
    checked = 4 * 128 * setting.top_k * setting.hidden * torch.float64.itemsize
    running = (2 * tokens + arrive + ours + theirs + roof) * setting.row_bytes + tokens * setting.hidden * 4 + checked
    drawing = 4 * world * tokens * setting.experts * np.float64().itemsize
    return max(running, drawing)


def parser() -> argparse.ArgumentParser:
    """The options of the family, and one more."""
    made = make_parser(__doc__, repeats=24, repeats_of_tiny=56)
    made.add_argument("--burst", type=int, default=0, help="calls in a row; 0: 16 up to 256 tokens, else 1")
    return made


BENCHMARK = Benchmark(
    name="dispatch_combine",
    run_case=run_case,
    needed_bytes=needed_bytes,
    takes={"layout": ("expert", "rank")},  # bench_decode.py has "padded"
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, parser()))
