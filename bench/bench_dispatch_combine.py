"""Time dispatch and combine against the frameworks' path and the memcpy roof, round by round in one run.

    torchrun --nproc-per-node 4 bench/bench_dispatch_combine.py --tokens 16,1024
    python bench/bench_dispatch_combine.py --tokens 1024            # one rank
    torchrun --nproc-per-node 4 bench/bench_dispatch_combine.py --memory-iterations 1000 --tokens 256 --hidden 1024

What is timed: the whole call as a user makes it, checks, planning and the exchange of counts included, from a barrier
to the return on the slowest rank. Expert outputs exist already when combine is called. Every round runs each path once;
results are checked before. Bytes are counted by `bench.traffic`, from the routing alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.baseline import baseline_combine, baseline_dispatch
from bench.record import Measurement, environment, percentiles, write
from bench.roof import Roof
from bench.traffic import Traffic, traffic
from moecomm.placement import ExpertPlacement

PHASES = ("plan", "counts", "send", "wait", "arrange")


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
        self.synchronize()
        if self.world > 1:
            dist.barrier()
        start = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - start) * 1e6

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
        max_tokens_per_rank=tokens,
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
    plan_percent = 100 * phases["plan"] * 1e6 / sum(times["moecomm dispatch"])
    rows = summarize(args, transport, tokens, ranks.world, slowest, bytes_of, plan_percent)
    if ranks.rank == 0:
        show(rows, {name: seconds / args.repeats for name, seconds in phases.items()})
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
    kept: dict[str, tuple[object, ...]] = {}

    def ours() -> None:
        kept["out"] = (buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout=args.layout),)

    def theirs() -> None:
        kept["out"] = baseline_dispatch(case.x, case.topk_idx, args.experts)

    def round_of_ours() -> None:
        before = buffer.stats()
        times["moecomm dispatch"].append(ranks.time_us(ours))
        for name in PHASES:
            phases[name] += buffer.stats()[f"{name}_s"] - before[f"{name}_s"]
        handle = kept.pop("out")[0].handle  # type: ignore[attr-defined]
        before = buffer.stats()
        times["moecomm combine"].append(ranks.time_us(lambda: buffer.combine(outputs, handle)))
        for name in PHASES:
            phases[f"combine {name}"] += buffer.stats()[f"{name}_s"] - before[f"{name}_s"]

    def round_of_theirs() -> None:
        times["baseline dispatch"].append(ranks.time_us(theirs))
        routing = kept.pop("out")[1]
        combine = lambda: baseline_combine(outputs, case.topk_weights_TK, routing)  # type: ignore[arg-type]  # noqa: E731
        times["baseline combine"].append(ranks.time_us(combine))

    def round_of_roofs() -> None:
        for operation, num_bytes in moved.items():
            times[f"memcpy {operation}"].append(ranks.time_us(lambda n=num_bytes: roof.memcpy(n)))  # type: ignore[misc]
            copy = lambda n=num_bytes: roof.streamed_copy(n)  # type: ignore[misc]  # noqa: E731
            times[f"streamed copy {operation}"].append(ranks.time_us(copy))

    rounds = {"moecomm": round_of_ours, "baseline": round_of_theirs, "roof": round_of_roofs}
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
    """Turn the times of all rounds into rows; "both" is dispatch plus combine of the same round."""
    facts = environment()
    dtype = str(args.dtype).removeprefix("torch.")
    case = f"W={world} T={tokens} H={args.hidden} K={args.top_k} E={args.experts} {dtype} {args.layout} {args.reduce}"
    paths = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in times))
    for path in paths:
        pairs = zip(times[f"{path} dispatch"], times[f"{path} combine"], strict=True)
        times[f"{path} both"] = [sum(pair) for pair in pairs]
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
    print("phases on rank 0, ms:", ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in phase_s.items()))


def check_memory(args: argparse.Namespace, ranks: Ranks, tokens: int) -> None:
    """Compare what is mapped with `plan_memory`, then watch resident memory over many iterations."""
    case = make_case(args, tokens, ranks.rank, ranks.world, ranks.device)
    sizes = {
        "num_experts": args.experts,
        "hidden": args.hidden,
        "top_k": args.top_k,
        "max_tokens_per_rank": tokens,
        "dtype": args.dtype,
        "reduce": args.reduce,
    }
    plan = moecomm.Buffer.plan_memory(num_ranks=ranks.world, **sizes)
    with moecomm.Buffer(transport=args.transport, **sizes) as buffer:
        mapped = mapped_bytes() // ranks.world  # of all ranks, all of the same size
        if ranks.rank == 0 and buffer.transport == "symmetric":
            print(f"plan_memory {plan.total_bytes} bytes, mapped {mapped}: {100 * mapped / plan.total_bytes:.2f} %")
        resident = []
        for number in range(args.memory_iterations):
            out = buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout=args.layout)
            buffer.combine(out.x, out.handle)
            if number >= args.memory_iterations // 10:
                resident.append(resident_bytes())
        half = len(resident) // 2
        first, last = max(resident[:half]), max(resident[half:])
        growth = [f"{(last - first) / 2**20:+.2f} MiB"]
        if ranks.world > 1:
            growth = [""] * ranks.world
            dist.all_gather_object(growth, f"{(last - first) / 2**20:+.2f} MiB")
        if ranks.rank == 0:
            print(f"{args.memory_iterations} iterations: most resident {last / 2**20:.1f} MiB, growth from the first")
            print(f"half of the last 90 % to the second, by rank: {', '.join(growth)}; {buffer.stats()}")


def mapped_bytes() -> int:
    """Bytes of moecomm's shared memory in the address space of this process."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:moecomm" in line]
    return sum(int(span[0].split("-")[1], 16) - int(span[0].split("-")[0], 16) for span in lines)


def resident_bytes() -> int:
    """Bytes of this process that are in memory, shared ones included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--tokens", type=integers, default=[1024], help="T per rank, a comma list: one case each")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--layout", choices=("expert", "rank"), default="expert")
    parser.add_argument("--reduce", choices=("rank", "source"), default="rank")
    parser.add_argument("--paths", type=lambda text: text.split(","), default=["moecomm", "baseline", "roof"])
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them")
    parser.add_argument("--memory-iterations", type=int, default=0, help="watch memory over so many instead of timing")
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
    if args.layout == "rank" and "baseline" in args.paths:
        args.paths.remove("baseline")  # the frameworks' path has no such layout
    return args


def main() -> None:
    """Run the cases one after the other."""
    args = parse()
    ranks = Ranks()
    rows: list[Measurement] = []
    for tokens in args.tokens:
        if args.memory_iterations:
            check_memory(args, ranks, tokens)
        else:
            rows += run_case(args, ranks, tokens)
    if ranks.rank == 0 and args.out and rows:
        print("wrote", *write(rows, args.out))
    if ranks.world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
