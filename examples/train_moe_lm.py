"""Train a small mixture-of-experts language model on the source code of Python's standard library, byte by byte.

    torchrun --nproc-per-node 4 examples/train_moe_lm.py --ep 4    # experts spread over 4 processes
    python examples/train_moe_lm.py --ep 1                         # the same training in one process
    python examples/train_moe_lm.py --ep 1 --compare out/train_moe_lm_ep4.csv

The global batch of each step depends on the seed alone; every rank takes its part of it. Attention, embeddings and
routers are the same on all ranks, and their gradients are summed over them. Experts live on one rank each; tokens
travel to them with `moecomm`, so their gradients are complete as they are.

Every --ep gives the same loss curve: the relative difference at each step is at most CURVE_BOUND, which `--compare`
checks, for any two runs on one machine in which every rank has a power of two of sequences. It was 0, bit for bit,
where docs/training.md was measured. A float32 sum depends on its order; here is where each of them gets its order from:
  - a token's K experts: the order of its choices, wherever they live (reduce="source");
  - an expert's weight gradient: (source rank, token), which is the order of the global batch;
  - all other gradients, and the loss: a tree over the sequences of the global batch, see `moe_lm.py`;
  - choices counted for the load-balancing loss: integers, of all ranks.
What can still differ:
  - a rank with another number of sequences (--batch 16 --ep 3) adds in another tree: about 1e-7 per step;
  - matrix products: BLAS may compute a row, or one of several matrices, in another order when there are more of them
    or more threads (--threads). Those of the experts have the same shapes everywhere, those of attention do not;
  - elementwise functions, of which the last few elements of a tensor may be computed by other instructions.
Such a difference stays around 1e-7 until it moves a token to another expert, one that was as good but for rounding;
from there on the runs go apart by parts in a thousand.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_curve import Comparison, Step, progress, read_losses, write_csv, write_png  # type: ignore[import-not-found]
from moe_lm import LanguageModel, tree_sum  # type: ignore[import-not-found]
from torch import Tensor

import moecomm

CURVE_BOUND = 1e-5
PROMPT = b"def "
TEMPERATURE = 0.8


def main(argv: Sequence[str] | None = None) -> int:
    """Train, sample, write the curve, compare; the exit status."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        with joined_group() as group, make_buffer(args, group) as buffer:
            return run(args, buffer)
    except (moecomm.MoECommError, ValueError) as error:
        print(f"train_moe_lm: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, buffer: moecomm.Buffer) -> int:
    group = buffer.group
    other = read_losses(args.compare, args.steps) if args.compare else None
    # One rank reads: here may be several hosts, with other versions of Python.
    text = group.broadcast_object(read_sources(args.text_bytes) if group.rank == 0 else b"")
    training, held_out = split(text, args.context)
    model = LanguageModel(
        buffer,
        layers=args.layers,
        heads=args.heads,
        intermediate=args.intermediate,
        context=args.context,
        seed=args.seed,
    )
    curve = train(args, model, training, group)
    held_out_loss = evaluate(args, model, held_out, group)
    sample = generate(args, model, group)
    if group.rank:
        return 0
    first, last, seconds = curve[0].loss, curve[-1].loss, sum(step.seconds for step in curve)
    print(f"\n{PROMPT.decode()}{sample.decode(errors='replace')}\n")
    print(
        f"loss {first:.3f} -> {last:.3f}, {last / first:.0%} of its start, in {seconds:.0f} s; "
        f"held-out loss {held_out_loss:.3f}, {held_out_loss / math.log(2):.2f} bits per byte"
    )
    return write_results(args, curve, Comparison.of(curve, args.compare.stem, other) if other else None)


def write_results(args: argparse.Namespace, curve: Sequence[Step], comparison: Comparison | None) -> int:
    """Write the curve as CSV and PNG, and judge how far it is from another; the exit status."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"train_moe_lm_ep{args.ep}.csv"
    write_csv(path, curve, comparison)
    drawn = write_png(path.with_suffix(".png"), curve, path.stem, comparison)
    print(f"wrote {path} and {path.with_suffix('.png').name if drawn else 'no picture: matplotlib is not installed'}")
    if comparison is None:
        return 0
    difference, step = comparison.largest
    print(f"largest relative difference to {args.compare}: {difference:.2g} at step {step}; bound {CURVE_BOUND:g}")
    if difference <= CURVE_BOUND:
        return 0
    print("train_moe_lm: the curves DIFFER by more than the bound", file=sys.stderr)
    return 1


# -- setting up ------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    counts = {
        "steps": (500, "optimizer steps"),
        "batch": (16, "sequences of a step, on all ranks together"),
        "context": (64, "bytes of a sequence"),
        "layers": (2, "transformer layers"),
        "hidden": (128, "elements of a token"),
        "heads": (4, "attention heads"),
        "experts": (8, "experts of a layer, on all ranks together"),
        "intermediate": (256, "inner size of an expert"),
        "top-k": (2, "experts per token"),
        "warmup": (20, "steps until the full learning rate"),
        "threads": (1, "threads of each process"),
        "text-bytes": (2_000_000, "how much source code to read"),
        "sample-bytes": (240, "how much to write at the end, may be 0"),
    }
    processes = int(os.environ.get("WORLD_SIZE", 1))
    parser.add_argument("--ep", type=int, default=processes, help="processes that share the experts (default: all)")
    for name, (default, meaning) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of AdamW (default: 0.004)")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss (default: 0.01)")
    parser.add_argument("--transport", default="auto", help="auto, local, symmetric, collective (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the curve (default: out)")
    parser.add_argument("--compare", type=Path, metavar="CSV", help="curve of another run; fail if it differs")
    args = parser.parse_args(argv)
    for name in counts:
        least = 0 if name == "sample-bytes" else 1
        if getattr(args, name.replace("-", "_")) < least:
            parser.error(f"--{name} must be at least {least}")
    if args.hidden % args.heads:
        parser.error(f"--hidden must be a multiple of --heads, got {args.hidden} and {args.heads}")
    if args.top_k > args.experts:
        parser.error(f"--top-k must be at most --experts, got {args.top_k} and {args.experts}")
    if args.ep != processes:
        parser.error(f"--ep {args.ep} needs that many processes, not {processes}: torchrun --nproc-per-node {args.ep}")
    return args


@contextmanager
def joined_group() -> Iterator[object | None]:
    """Join the processes that torchrun started, or be one process."""
    if "RANK" not in os.environ:
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def make_buffer(args: argparse.Namespace, group: object | None) -> moecomm.Buffer:
    return moecomm.Buffer(
        group,
        num_experts=args.experts,
        hidden=args.hidden,
        top_k=args.top_k,
        max_tokens_per_rank=-(-args.batch // args.ep) * args.context,
        dtype=torch.float32,
        transport=args.transport,
        reduce="source",
        device="cpu",
    )


# -- text ------------------------------------------------------------------------------------------------------------


def read_sources(num_bytes: int) -> bytes:
    """Read the modules of the standard library in the order of their names, up to `num_bytes`."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= num_bytes:
            break
    return bytes(text[:num_bytes])


def split(text: bytes, context: int) -> tuple[Tensor, Tensor]:
    """Keep the last twentieth, at least four sequences, out of training: two (bytes,) uint8."""
    num_held_out = max(len(text) // 20, 4 * (context + 1))
    if len(text) <= num_held_out + context:
        raise ValueError(f"too little text: got {len(text)} bytes; expected more than {num_held_out + context}")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tokens[:-num_held_out], tokens[-num_held_out:]


@dataclass(frozen=True)
class Part:
    """This rank's part of a global batch: (B, T) bytes to read, (B, T) to predict, and how much of the batch it is."""

    inputs: Tensor
    targets: Tensor
    fraction: float


def take_part(args: argparse.Namespace, text: Tensor, starts: Tensor, rank: int) -> Part:
    """Cut the sequences that begin at `starts`, which are the same on all ranks, and keep this rank's."""
    mine = starts[len(starts) * rank // args.ep : len(starts) * (rank + 1) // args.ep]
    windows = text[mine[:, None] + torch.arange(args.context + 1)].long()
    return Part(windows[:, :-1], windows[:, 1:], len(mine) / len(starts))


# -- training --------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, model: LanguageModel, text: Tensor, group: moecomm.group.Group) -> list[Step]:
    """Take the steps; the curve, which is the same on all ranks but for the seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    curve: list[Step] = []
    with progress(args.steps, shown=group.rank == 0) as show:
        for step in range(args.steps):
            start = perf_counter()
            starts = torch.randint(len(text) - args.context, (args.batch,), generator=generator)
            for settings in optimizer.param_groups:
                settings["lr"] = args.learning_rate * schedule(step, args.steps, args.warmup)
            loss, balance = compute_gradients(args, model, take_part(args, text, starts, group.rank), group.size)
            optimizer.step()
            seconds = perf_counter() - start
            curve.append(Step(step, loss, balance, round(seconds, 4)))
            speed = args.batch * args.context / seconds
            show(step + 1, f"loss {loss:.3f}  balance {balance:.2f}  {speed:,.0f} bytes/s")
    return curve


def compute_gradients(
    args: argparse.Namespace, model: LanguageModel, part: Part, num_ranks: int
) -> tuple[float, float]:
    """Give every parameter the gradient of the global batch's mean loss; that loss, and the load-balancing loss.

    Each rank's loss is its share of the global mean. Shares add up, and so do their gradients: those of experts as
    tokens bring them there, all others in one sum over ranks.
    """
    model.zero_grad()
    loss_share = loss_sum(model, part) / (args.batch * args.context)
    balance = torch.stack([layer.aux_loss for layer in model.moe_layers()]).mean()
    balance_share = balance * part.fraction
    (loss_share + args.balance * args.layers * balance_share).backward()

    gradients = [parameter.grad for parameter in model.replicated()]
    shares = [loss_share.detach()[None], balance_share.detach()[None], *(g.flatten() for g in gradients)]
    sums = sum_over_ranks(torch.cat(shares), num_ranks).split([len(share) for share in shares])
    for gradient, total in zip(gradients, sums[2:], strict=True):
        gradient.copy_(total.view_as(gradient))
    return float(sums[0]), float(sums[1])


def loss_sum(model: LanguageModel, part: Part) -> Tensor:
    """Cross entropy of all bytes of this rank, in nats. Collective."""
    scores = model(part.inputs)
    per_byte = F.cross_entropy(scores.flatten(0, 1), part.targets.flatten(), reduction="none")
    return tree_sum(per_byte.view(part.targets.shape).sum(1))


def sum_over_ranks(local: Tensor, num_ranks: int) -> Tensor:
    """Go on with the tree over sequences; an all-reduce would add in an order of its own."""
    if num_ranks == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(num_ranks)]
    dist.all_gather(parts, local)
    return tree_sum(torch.stack(parts))


def schedule(step: int, steps: int, warmup: int) -> float:
    """Rise to 1 in `warmup` steps, fall to 0.1 along a cosine."""
    return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps))


# -- what came of it -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: LanguageModel, text: Tensor, group: moecomm.group.Group) -> float:
    """Mean loss of as many sequences as a batch has, evenly spread over the text. Collective."""
    starts = torch.linspace(0, len(text) - args.context - 1, args.batch).long()
    total = loss_sum(model, take_part(args, text, starts, group.rank))
    return float(sum_over_ranks(total[None], group.size)) / (args.batch * args.context)


@torch.no_grad()
def generate(args: argparse.Namespace, model: LanguageModel, group: moecomm.group.Group) -> bytes:
    """Continue the prompt on rank 0. The other ranks come along without tokens: their experts are needed."""
    generator = torch.Generator().manual_seed(args.seed)
    text = torch.tensor([list(PROMPT)])[: 1 if group.rank == 0 else 0]
    for _ in range(args.sample_bytes):
        probs = F.softmax(model(text[:, -args.context :])[:, -1] / TEMPERATURE, dim=-1)
        sampled = torch.multinomial(probs, 1, generator=generator) if len(text) else text[:, :1]
        text = torch.cat([text, sampled], dim=1)
    return bytes(text[:, len(PROMPT) :].flatten().tolist())


if __name__ == "__main__":
    sys.exit(main())
