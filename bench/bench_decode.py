"""Time dispatch and combine of a few tokens in layout "padded" against the frameworks' path, in one run.

    torchrun --nproc-per-node 4 bench/bench_decode.py --tokens 1,8,32,128

What is timed: the whole call as a user makes it, in bursts of dispatch and combine in turn without a pause, as a model
calls them layer by layer; per call the slowest rank. "moecomm" combines from memory of the caller, so it copies rows
once; "moecomm zero copy" from `combine_input`, where experts would have written them. The frameworks' path is that of
`bench_dispatch_combine.py`. Rows are checked bit for bit and sums against float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(FilePath(__file__).resolve().parents[1]))

import moecomm
from bench.case import Case, check_combine, check_dispatch, decoded, make_case
from bench.harness import Benchmark, Recorder, compared, main
from bench.options import Setting, make_parser
from bench.paths import Path, Rows, baseline_path, make_buffer, passes, why_no_baseline
from bench.peers import DECODE_PEERS, peer_paths
from bench.ranks import Ranks
from bench.record import Measurement
from bench.roof import Roof
from bench.show import note
from bench.traffic import traffic
from moecomm import ExpertPlacement

OPERATIONS = ("dispatch", "combine", "both")


def padded_path(setting: Setting, case: Case, buffer: moecomm.Buffer, *, zero_copy: bool) -> Path:
    """Ours; results lie in memory that is made once."""
    y = torch.empty(setting.tokens, setting.hidden, dtype=setting.dtype, device=case.x.device)

    def dispatch() -> tuple[Rows, moecomm.Dispatched]:
        out = buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout="padded", quant=setting.quant)
        return out.x, out

    def combine(outputs: Tensor, out: moecomm.Dispatched) -> Tensor:
        return buffer.combine(buffer.combine_input(out.handle) if zero_copy else outputs, out.handle, out=y)

    name = "moecomm zero copy" if zero_copy else "moecomm"
    return Path(name=name, transport=buffer.transport, dispatch=dispatch, combine=combine)


def roof_path(roof: Roof, moved: dict[str, int]) -> Path:
    """A plain copy of the bytes that must move."""

    def dispatch() -> tuple[Tensor, None]:
        roof.memcpy(moved["dispatch"])
        return torch.empty(0), None

    def combine(outputs: Tensor, home: None) -> Tensor:
        roof.memcpy(moved["combine"])
        return outputs

    return Path(name="memcpy", dispatch=dispatch, combine=combine)


def check(setting: Setting, case: Case, placement: ExpertPlacement, buffer: moecomm.Buffer | None, path: Path) -> None:
    """The right rows come and the right sums come back; makes the outputs of the experts."""
    arrived, home = path.dispatch()
    rows = decoded(arrived, setting)
    here = list(placement.experts_of_rank[case.rank])
    if rows.ndim == 3:
        path.outputs = rows.nan_to_num() * case.expert_scale_E[here][:, None, None]
        path.gate = "combine within 4 roundings of float64"
    else:
        experts = check_dispatch(case, rows, placement, path.label)
        path.outputs = rows * case.expert_scale_E[experts][:, None]
    if buffer is not None:
        assert home.ranges is not None
        spans = [span for of_expert in home.ranges.tolist() for span in of_expert]
        runs = [rows[i // case_world(case), a:b] for i, (a, b) in enumerate(spans)]
        check_dispatch(case, torch.cat([rows[0, :0], *runs]), placement, path.label)
        buffer.combine_input(home.handle).copy_(path.outputs)
    check_combine(case, path.combine(path.outputs, home).clone(), path.label)
    if not path.is_peer:
        exact = "as the reference quantises" if setting.quant else "bit for bit"
        path.gate = f"dispatch {exact}, combine within 4 roundings of float64"


def case_world(case: Case) -> int:
    """W of a case."""
    return len(case.topk_idx_of_rank)


def make_paths(setting: Setting, ranks: Ranks, case: Case, placement: ExpertPlacement, stack: ExitStack) -> list[Path]:
    """Ours on every transport that was asked for, the baseline and DeepEP, all checked."""
    paths: list[tuple[Path, moecomm.Buffer | None]] = []
    for transport in setting.transports:
        buffer = stack.enter_context(make_buffer(setting, ranks, transport))
        paths += [(padded_path(setting, case, buffer, zero_copy=zero_copy), buffer) for zero_copy in (False, True)]
    if reason := why_no_baseline(replace(setting, layout="expert"), ranks):
        note(ranks.rank, f"no baseline: {reason}")
    else:
        paths.append((baseline_path(setting, case), None))
    paths += [(path, None) for path in peer_paths(setting, ranks, case, DECODE_PEERS)]
    return [path for path, buffer in paths if passes(path, ranks, partial(check, setting, case, placement, buffer))]


def run_case(setting: Setting, ranks: Ranks) -> list[Measurement]:
    """Check every path, then time them in turn."""
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    placement = ExpertPlacement.uniform(setting.experts, ranks.world)
    sizes = {"row_bytes": setting.row_bytes, "wire_row_bytes": setting.wire_row_bytes}
    bytes_of = traffic(case.ids_of_rank, placement, layout="expert", reduce=setting.reduce, **sizes)
    mine = {operation: of_rank[ranks.rank].moved for operation, of_rank in bytes_of.items()}
    burst = setting.options.burst or (16 if setting.tokens <= 32 else 4)
    times: defaultdict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        paths = make_paths(setting, ranks, case, placement, stack)
        paths.append(roof_path(Roof(max(mine.values()), ranks.device), mine))
        for number in range(setting.warmup + setting.repeats):
            if number == setting.warmup:
                times.clear()
            for path in paths[number % len(paths) :] + paths[: number % len(paths)]:
                one_burst(ranks, path, burst, times)
    slowest = ranks.slowest(times)
    recorder = Recorder("decode", setting, ranks, case.ids_of_rank)
    rows = []
    for operation in OPERATIONS:
        of_ranks = [one for part in bytes_of if operation in (part, "both") for one in bytes_of[part]]
        for path in paths:
            took = slowest[f"{path.label}|{operation}"]
            facts = {"transport": path.transport, "gate": path.gate, "peak_memory_bytes": path.peak_memory_bytes}
            rows.append(recorder.row(path.name, operation, took, of_ranks, **facts))
    return compared(rows)


def one_burst(ranks: Ranks, path: Path, burst: int, times: dict[str, list[float]]) -> None:
    """Time one path, call after call."""
    kept: list[Any] = []

    def dispatch() -> None:
        kept[:] = [path.dispatch()[1]]

    of_calls = ranks.time_burst_us([dispatch, lambda: path.combine(path.outputs, kept[0])], max(burst, 2))
    for operation, of_call in zip(OPERATIONS, of_calls, strict=False):
        times[f"{path.label}|{operation}"] += of_call
    times[f"{path.label}|both"] += [sum(pair) for pair in zip(*of_calls, strict=True)]


def needed_bytes(setting: Setting, world: int) -> int:
    """Bytes per rank: rows of both areas in two generations, and copies that the paths and the checks make."""
    choices = setting.tokens * setting.top_k * world
    local = -(-setting.experts // world) * world * setting.tokens  # the outputs of padded rows
    return (16 * choices + 3 * local) * setting.row_bytes


def parser() -> argparse.ArgumentParser:
    """The options of the family, and one more."""
    shape = {"hidden": [7168], "experts": [64], "top_k": [8]}
    made = make_parser(__doc__, shape, tokens=[1, 8, 32, 128], layout="padded", reduce="source")
    made.add_argument("--burst", type=int, default=0, help="pairs in a row; 0: 16 up to 32 tokens, else 4")
    return made


BENCHMARK = Benchmark(
    name="decode", run_case=run_case, needed_bytes=needed_bytes, takes={"layout": ("padded",), "reduce": ("source",)}
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK, parser()))
