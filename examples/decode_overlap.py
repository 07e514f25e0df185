"""Decode two micro-batches in turns: while the rows of one travel, the other computes. Draws what happened.

    torchrun --nproc-per-node 2 examples/decode_overlap.py --out overlap

Runs a few MoE layers on two halves of a batch, one after the other, then in turns (`moecomm.overlap`), checks
that both give the same bits, and writes overlap.png (the timeline of rank 0) and overlap.json (open it in
https://ui.perfetto.dev). It says how much of the communication was hidden: the part of the time between the start of an
exchange and its result in which the rank did something else.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import moecomm
from moecomm.overlap import Batch, Timeline, interleave

COLORS = {"compute": "#1b7f5c", "wait": "#c44e52", "travel": "#b7c9e2"}


class Layers:
    """MoE layers with something like attention before each; experts of this rank only."""

    def __init__(self, args: argparse.Namespace, world: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-2] ** 0.5).bfloat16()

        hidden, experts = args.hidden, args.experts
        self.attention = [weights(hidden, hidden) for _ in range(args.layers)]
        self.routers = [weights(hidden, experts) for _ in range(args.layers)]
        here = moecomm.ExpertPlacement.uniform(experts, world).experts_of_rank[rank]
        self.experts = [weights(experts, hidden, hidden)[list(here)] for _ in range(args.layers)]
        self.top_k = args.top_k

    def run(self, x: Tensor, buffer: moecomm.Buffer) -> Batch[Tensor]:
        """All layers on (T, H) tokens; yields what is under way."""
        for attention, router, experts in zip(self.attention, self.routers, self.experts, strict=True):
            x = x + torch.tanh(x @ attention)
            scores, idx = torch.softmax((x @ router).float(), 1).topk(self.top_k)
            out = yield "dispatch", buffer.dispatch_async(x, idx, scores, layout="padded")
            rows = self._experts(out, experts, buffer.combine_input(out.handle))
            x = yield "combine", buffer.combine_async(rows, out.handle, bias=x)
        return x

    def _experts(self, out: moecomm.Dispatched, experts: Tensor, rows: Tensor) -> Tensor:
        """Multiply the rows that arrived, and write what comes of it where they go home from."""
        assert out.ranges is not None
        for local, of_rank in enumerate(out.ranges.tolist()):
            for begin, end in of_rank:
                if begin < end:
                    torch.matmul(out.x[local, begin:end], experts[local], out=rows[local, begin:end])
        return rows


def draw(timeline: Timeline, path: Path, title: str) -> None:
    """The spans of one rank as bars: a track for each batch, and below it what of it travels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first = min(span.begin_s for span in timeline.spans)
    figure, axis = plt.subplots(figsize=(12, 3), layout="constrained")
    for span in timeline.spans:
        y = 2 * span.batch + (span.kind == "travel")
        width = 1e3 * (span.end_s - span.begin_s)
        axis.barh(y, width, 0.8, 1e3 * (span.begin_s - first), color=COLORS[span.kind], linewidth=0)
    axis.set_yticks(range(4), ["batch 0", "batch 0 travels", "batch 1", "batch 1 travels"])
    axis.invert_yaxis()
    axis.set(xlabel="ms", title=title)
    axis.legend([plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()], COLORS, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run it both ways, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of each of the two batches")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("overlap"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    layers = Layers(args, world, rank)
    generator = torch.Generator().manual_seed(1 + rank)
    halves = [torch.randn(args.tokens, args.hidden, generator=generator).bfloat16() for _ in range(2)]
    shape = {"num_experts": args.experts, "hidden": args.hidden, "top_k": args.top_k}
    timelines = {"one after the other": Timeline(), "in turns": Timeline()}
    with moecomm.Buffer(max_tokens_per_rank=args.tokens, **shape) as buffer, torch.no_grad():
        run = partial(layers.run, buffer=buffer)
        results = {}
        for name, timeline in timelines.items():
            for warm in (True, False):
                given = None if warm else timeline
                results[name] = interleave(map(run, halves), given, in_turns=name == "in turns")
    same = [torch.equal(a, b) for a, b in zip(*results.values(), strict=True)]
    assert all(same), "the order of the batches changed a result"
    if rank == 0:
        for name, timeline in timelines.items():
            took = 1e3 * (timeline.spans[-1].end_s - timeline.spans[0].begin_s)
            waited = 1e3 * timeline.total_s("wait")
            print(f"{name}: {took:.1f} ms, of which {waited:.1f} ms waiting")
        alone, timeline = timelines.values()
        saved = 1 - timeline.total_s("wait") / alone.total_s("wait")
        title = f"two batches in turns, {world} ranks: {timeline.hidden_share:.0%} of communication hidden (rank 0)"
        print(f"{title}; {saved:.0%} less waiting than one after the other")
        draw(timeline, args.out.with_suffix(".png"), title)
        timeline.write_trace(args.out.with_suffix(".json"))
        print(f"wrote {args.out.with_suffix('.png')} and {args.out.with_suffix('.json')}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
