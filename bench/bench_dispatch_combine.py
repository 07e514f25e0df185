"""Time dispatch and combine against the frameworks' path and the memcpy roof, round by round in one run.

    torchrun --nproc-per-node 4 bench/bench_dispatch_combine.py --tokens 16,1024
    python bench/bench_dispatch_combine.py --tokens 1024            # one rank

What is timed: the whole call as a user makes it, checks, planning and the exchange of counts included, from a common
start to the return on the slowest rank. Expert outputs exist already when combine is called. Every round runs each path
once, and where there are few tokens in bursts without a pause: of dispatches, of combines, and of both in turn. Results
are checked before. Bytes are counted by `bench.traffic`, from the routing alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.baseline import Routing, baseline_combine, baseline_dispatch
from bench.case import Case, Ranks, add_shape_arguments, check_combine, check_dispatch, make_case
from bench.record import Measurement, environment, percentiles, write
from bench.roof import Roof
from bench.traffic import Traffic, traffic
from moecomm.placement import ExpertPlacement

PHASES = ("plan", "counts", "send", "wait", "arrange")


def run_case(args: argparse.Namespace, ranks: Ranks, tokens: int) -> list[Measurement]:
    """Check every path, then time them in turn."""
    placement = ExpertPlacement.uniform(args.experts, ranks.world)
    case = make_case(args, tokens, ranks.rank, ranks.world, ranks.device)
    row_bytes = args.hidden * args.dtype.itemsize
    ids = [ids.cpu().numpy() for ids in case.topk_idx_of_rank]
    bytes_of = traffic(ids, placement, layout=args.layout, reduce=args.reduce, row_bytes=row_bytes)
    mine = {operation: of_rank[ranks.rank].moved for operation, of_rank in bytes_of.items()}
    times: defaultdict[str, list[float]] = defaultdict(list)
    phases: defaultdict[str, float] = defaultdict(float)
    roof = Roof(max(mine.values()), ranks.device)
    buffer = moecomm.Buffer(
        num_experts=args.experts,
        hidden=args.hidden,
        top_k=args.top_k,
        max_tokens_per_rank=max(tokens, 1),
        dtype=args.dtype,
        transport=args.transport,
        reduce=args.reduce,
    )
    with buffer:
        outputs = prepare(args, case, buffer, placement)
        for number in range(args.warmup + args.repeats):
            if number == args.warmup:
                times.clear()
                phases.clear()
            one_round(args, ranks, case, buffer, outputs, roof, mine, times, phases)
        transport = buffer.transport
    slowest = ranks.slowest(times)
    plan_percent = 1e8 * phases["plan"] / phases["dispatches"] / float(np.mean(times["moecomm dispatch"]))
    rows = summarize(args, transport, tokens, ranks.world, slowest, bytes_of, plan_percent)
    if ranks.rank == 0:
        show(rows, {name: phases[name] / phases["dispatches"] for name in PHASES})
    return rows


def prepare(args: argparse.Namespace, case: Case, buffer: moecomm.Buffer, placement: ExpertPlacement) -> Tensor:
    """Run every path once and check it; the (N, H) expert outputs that combine is timed with."""
    out = buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout=args.layout)
    assert isinstance(out.x, Tensor)
    if args.layout == "rank":
        assert out.topk_idx is not None and out.topk_weights is not None
        first = placement.experts_of_rank[case.rank][0]
        scales = case.expert_scale_E[(out.topk_idx + first).clamp(min=0).long()]
        outputs = torch.empty_like(out.x)
        for part in torch.arange(len(outputs)).split(128):
            terms = (out.x[part][:, None] * scales[part][..., None]).float() * out.topk_weights[part][..., None]
            outputs[part] = terms.sum(1).to(args.dtype)
    else:
        experts = check_dispatch(case, out.x, placement, "moecomm")
        outputs = out.x * case.expert_scale_E[experts][:, None]
    check_combine(case, buffer.combine(outputs, out.handle), "moecomm")
    if args.layout == "expert" and "baseline" in args.paths:
        rows, routing = baseline_dispatch(case.x, case.topk_idx, args.experts)
        check_dispatch(case, rows, placement, "baseline")
        check_combine(case, baseline_combine(outputs, case.topk_weights_TK, routing), "baseline")
    return outputs


def one_round(
    args: argparse.Namespace,
    ranks: Ranks,
    case: Case,
    buffer: moecomm.Buffer,
    outputs: Tensor,
    roof: Roof,
    moved: dict[str, int],
    times: defaultdict[str, list[float]],
    phases: defaultdict[str, float],
) -> None:
    """Run every path once; the order of the paths turns from round to round."""

    burst = args.burst or (16 if case.tokens <= 256 else 1)

    def ours() -> None:
        before = buffer.stats()
        kept: list[moecomm.Dispatched] = []
        dispatch = partial(buffer.dispatch, case.x, case.topk_idx, case.topk_weights_TK, layout=args.layout)
        keep = partial(kept.__setitem__, slice(1))  # one result at a time: its rows go when the next ones come
        measure("moecomm", lambda: keep([dispatch()]), lambda: buffer.combine(outputs, kept[0].handle))
        after = buffer.stats()
        phases["dispatches"] += after["dispatches"] - before["dispatches"]
        for name in PHASES:
            phases[name] += after[f"{name}_s"] - before[f"{name}_s"]

    def theirs() -> None:
        kept: list[tuple[Tensor, Routing]] = []
        dispatch = partial(baseline_dispatch, case.x, case.topk_idx, args.experts)
        combine = partial(baseline_combine, outputs, case.topk_weights_TK)
        keep = partial(kept.__setitem__, slice(1))
        measure("baseline", lambda: keep([dispatch()]), lambda: combine(kept[0][1]))

    def measure(path: str, dispatch: Callable[[], object], combine: Callable[[], object]) -> None:
        """Each by itself, and where they come in bursts also one after the other."""
        alone = [ranks.time_burst_us([call], burst)[0] for call in (dispatch, combine)]
        pairs = alone if burst == 1 else ranks.time_burst_us([dispatch, combine], burst)
        times[f"{path} dispatch"] += alone[0]
        times[f"{path} combine"] += alone[1]
        times[f"{path} both"] += [sum(pair) for pair in zip(*pairs, strict=True)]

    def roofs() -> None:
        for name, copy in (("memcpy", roof.memcpy), ("streamed copy", roof.streamed_copy)):
            calls = {operation: partial(copy, num_bytes) for operation, num_bytes in moved.items()}
            measure(name, calls["dispatch"], calls["combine"])

    rounds = {"moecomm": ours, "baseline": theirs, "roof": roofs}
    wanted = [name for name in rounds if name in args.paths]
    turn = len(times["moecomm dispatch"]) % len(wanted)
    for name in wanted[turn:] + wanted[:turn]:
        rounds[name]()


def summarize(
    args: argparse.Namespace,
    transport: str,
    tokens: int,
    world: int,
    times: dict[str, list[float]],
    bytes_of: dict[str, list[Traffic]],
    plan_percent: float,
) -> list[Measurement]:
    """Turn the times of all rounds into rows; "both" are dispatch and combine in turn."""
    facts = environment()
    dtype = str(args.dtype).removeprefix("torch.")
    case = f"W={world} T={tokens} H={args.hidden} K={args.top_k} E={args.experts} {dtype} {args.layout} {args.reduce}"
    paths = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in times))
    rows = []
    for operation in ("dispatch", "combine", "both"):
        parts = ("dispatch", "combine") if operation == "both" else (operation,)
        of_ranks = [one for part in parts for one in bytes_of[part]]
        p50_of = {path: percentiles(times[f"{path} {operation}"])[1] for path in paths}
        for path in paths:
            p20, p50, p80 = percentiles(times[f"{path} {operation}"])
            moved = sum(one.moved for one in of_ranks)
            rows.append(
                Measurement(
                    case=case,
                    path=path,
                    transport=transport if path == "moecomm" else "",
                    layout=args.layout,
                    reduce=args.reduce,
                    operation=operation,
                    world=world,
                    tokens=tokens,
                    hidden=args.hidden,
                    top_k=args.top_k,
                    experts=args.experts,
                    dtype=dtype,
                    threads=torch.get_num_threads(),
                    iterations=len(times[f"{path} {operation}"]),
                    p20_us=p20,
                    p50_us=p50,
                    p80_us=p80,
                    bytes_local=sum(one.local for one in of_ranks),
                    bytes_remote=sum(one.remote for one in of_ranks),
                    bytes_deduplicated=sum(one.deduplicated for one in of_ranks),
                    bytes_moved=moved,
                    gb_per_s=round(moved / p50 / 1e3, 3),
                    percent_of_roof=round(100 * p50_of["memcpy"] / p50, 1) if "memcpy" in p50_of else None,
                    speedup=round(p50_of["baseline"] / p50, 2) if "baseline" in p50_of else None,
                    plan_percent=round(plan_percent, 2) if path == "moecomm" and operation == "dispatch" else None,
                    **facts,
                )
            )
    return rows


def show(rows: Sequence[Measurement], phase_s: dict[str, float]) -> None:
    """Print one case."""
    print(f"\n{rows[0].case}, {rows[0].threads} threads per rank, {rows[0].device}, commit {rows[0].commit}")
    print(
        f"{'operation':10} {'path':14} {'p20 us':>10} {'p50 us':>10} {'p80 us':>10} {'GB/s':>7} {'roof %':>7} {'x':>6}"
    )
    for row in rows:
        roof = "" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f}"
        ratio = "" if row.speedup is None else f"{row.speedup:.1f}"
        times = f"{row.p20_us:10.0f} {row.p50_us:10.0f} {row.p80_us:10.0f}"
        print(f"{row.operation:10} {row.path:14} {times} {row.gb_per_s:7.1f} {roof:>7} {ratio:>6}")
    for operation in ("dispatch", "combine"):
        one = next(row for row in rows if row.operation == operation)
        megabytes = (n / 1e6 for n in (one.bytes_local, one.bytes_remote, one.bytes_deduplicated, one.bytes_moved))
        local, remote, least, moved = megabytes
        print(
            f"{operation}: {local:.1f} MB local, {remote:.1f} MB remote ({least:.1f} deduplicated), {moved:.1f} moved"
        )
    print(
        "phases of dispatch and combine on rank 0, ms:",
        ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in phase_s.items()),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.add_argument("--paths", type=lambda text: text.split(","), default=["moecomm", "baseline", "roof"])
    parser.add_argument("--burst", type=int, default=0, help="calls in a row; 0: 16 up to 256 tokens, else 1")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them")
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.json (cases that are there are replaced)")
    args = parser.parse_args(argv)
    unknown = set(args.paths) - {"moecomm", "baseline", "roof"}
    if unknown or "moecomm" not in args.paths:
        parser.error(f"--paths: {sorted(unknown)} unknown; moecomm must be among moecomm, baseline, roof")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "baseline" in args.paths and args.experts % world:
        parser.error(
            f"--experts {args.experts}: the baseline needs a multiple of {world} ranks; leave it out of --paths"
        )
    if args.layout == "rank" and args.reduce == "source":
        parser.error("--layout rank sums on the expert rank: it needs --reduce rank")
    if args.layout == "rank" and "baseline" in args.paths:
        args.paths.remove("baseline")  # the frameworks' path has no such layout
    return args


def main() -> None:
    """Run the cases one after the other."""
    args = parse()
    ranks = Ranks()
    rows: list[Measurement] = []
    for tokens in args.tokens:
        rows += run_case(args, ranks, tokens)
    if ranks.rank == 0 and args.out and rows:
        print("wrote", *write(rows, args.out))
    ranks.leave()


if __name__ == "__main__":
    main()
