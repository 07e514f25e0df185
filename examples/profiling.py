"""Profile a layer's dispatch and combine: which phase takes how long, and how many bytes it moves.

    python examples/profiling.py
    torchrun --standalone --nproc-per-node 4 examples/profiling.py --out out/trace

Writes one Chrome trace per rank, which opens in Perfetto, prints a table of the phases of rank 0, the counters of the
buffer as Prometheus would scrape them, and, where matplotlib is installed, heat maps of expert load and traffic.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import moecomm
from moecomm.launch import joined

PHASES = ("plan", "counts", "send", "wait", "arrange")


def main(argv: Sequence[str] | None = None) -> int:
    """Profile some rounds; 0 if every phase was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/trace"), help="folder of the traces")
    args = parser.parse_args(argv)
    with joined() as launch:
        sizes = {"num_experts": 4 * launch.size, "hidden": 256, "top_k": 2, "max_tokens_per_rank": args.tokens}
        with moecomm.Buffer(launch.group, device=launch.device, **sizes) as buffer:
            return run(args, buffer)


def run(args: argparse.Namespace, buffer: moecomm.Buffer) -> int:
    """One warm-up, then the profiled rounds."""
    rank, config = buffer.group.rank, buffer.config
    generator = torch.Generator().manual_seed(rank)
    scores = torch.randn(args.tokens, config.placement.num_experts, generator=generator).softmax(-1)
    weights, idx = (tensor.to(config.device) for tensor in scores.topk(config.top_k))
    x = torch.randn(args.tokens, config.hidden, generator=generator).to(config.device, config.dtype)

    def one_round() -> None:
        out = buffer.dispatch(x, idx, weights)
        buffer.combine(out.x, out.handle)

    one_round()
    devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if x.is_cuda else [])]
    with profile(activities=devices) as trace:
        for _ in range(args.rounds):
            one_round()
    args.out.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(args.out / f"rank{rank}.json"))
    drawn = draw(buffer, idx, args.out)
    seen = {event.key: event for event in trace.key_averages() if event.key.startswith("moecomm::")}
    if rank == 0:
        print(f"{'phase':10} {'calls':>6} {'ms':>9}")
        for phase in PHASES:
            if event := seen.get(f"moecomm::{phase}"):
                print(f"{phase:10} {event.count:6} {event.cpu_time_total / 1e3:9.3f}")
        for name, event in seen.items():
            if sent := re.fullmatch(r"moecomm::bytes local=(\d+) remote=(\d+)", name):
                print(f"{event.count} times {sent[1]} bytes to itself and {sent[2]} to others")
        print(buffer.stats().prometheus(rank=rank), end="")
        print("wrote", args.out / f"rank{rank}.json", *drawn)
    return 0 if {"moecomm::plan", "moecomm::send", "moecomm::wait"} <= set(seen) else 1


def draw(buffer: moecomm.Buffer, idx: torch.Tensor, folder: Path) -> list[Path]:
    """Heat maps of what this routing does; collective. Nothing where matplotlib is missing."""
    from moecomm import viz

    load, traffic = viz.gather_load(buffer, idx), viz.gather_traffic(buffer, idx)
    if buffer.group.rank:
        return []
    try:
        figures = {"load": viz.expert_load(load), "traffic": viz.peer_traffic(traffic)}
    except moecomm.UnsupportedError as error:
        print(error)
        return []
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


if __name__ == "__main__":
    sys.exit(main())
