"""Run one mixture-of-experts layer forward and backward, spread over processes, and check every number.

    torchrun --nproc-per-node 4 examples/moe_layer.py
    python examples/moe_layer.py                        # one process
    torchrun --nproc-per-node 3 examples/moe_layer.py --transport collective --dtype bfloat16 --top-k 4
    mpiexec -n 4 python examples/moe_layer.py --transport mpi

Every rank holds a few of the experts and has tokens of its own. Afterwards each rank computes the whole batch with all
experts by itself, in plain torch, and compares its part: outputs, and gradients of tokens, router and experts.

The bound: against float64, the largest and the mean error of each result are at most twice those of the plain
computation in the same dtype (and what one rounding costs is always allowed). The two are not equal bit for bit because
they add in another order: matrix products of other shapes (one expert's tokens are the same, those of the router are
not); the sum over a token's K experts, which plain torch rounds after each addition and combine once per rank and once
at the end; and the router's gradient, which is summed on each rank first.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import moecomm
from moecomm.nn import GroupedExperts, MoELayer, TopKRouter, load_balancing_loss
from moecomm.testing import assert_error_bounded

AUX_FACTOR = 0.01
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, check, time, report; the exit status."""
    args = parse_args(argv)
    with joined_group(args) as (group, device):
        try:
            with make_buffer(args, group, device) as buffer:
                return run(args, buffer)
        except moecomm.MoECommError as error:
            print(f"moe_layer: {error}", file=sys.stderr)
            return 2


def run(args: argparse.Namespace, buffer: moecomm.Buffer) -> int:
    layer = MoELayer(buffer, intermediate=args.intermediate, renormalise=args.top_k > 1, seed=args.seed)
    tokens = [make_tokens(args, rank, layer.router.weight.device) for rank in range(buffer.group.size)]
    mine = forward_backward(layer, tokens[buffer.group.rank])
    failures = [text for text in buffer.group.all_gather_object(check(args, layer, tokens, mine)) if text]
    timing = time_layer(layer, tokens[buffer.group.rank], args.iterations)
    if buffer.group.rank == 0:
        report(args, layer, timing)
        for text in failures:
            print(f"moe_layer: WRONG RESULT on {text}", file=sys.stderr)
        if not failures:
            print("check: outputs and gradients agree with one process, on every rank")
    return 1 if failures else 0


# -- setting up ------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--transport", default="auto", help="auto, local, symmetric, mpi, ... (default: auto)")
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="tokens of each rank (default: 512)")
    parser.add_argument("--hidden", type=int, default=256, metavar="H", help="elements of a token (default: 256)")
    parser.add_argument("--intermediate", type=int, metavar="D", help="inner size of an expert (default: 2 H)")
    parser.add_argument("--experts", type=int, default=10, metavar="E", help="experts in all (default: 10)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of tokens and experts (default: float32)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    parser.add_argument("--iterations", type=int, default=10, help="timed runs, the median counts (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    args = parser.parse_args(argv)
    if args.tokens < 0 or args.iterations < 1:
        parser.error("--tokens must be at least 0 and --iterations at least 1")
    args.intermediate = 2 * args.hidden if args.intermediate is None else args.intermediate
    return args


@contextmanager
def joined_group(args: argparse.Namespace) -> Iterator[tuple[object | None, torch.device]]:
    """Join the processes that torchrun or mpiexec started, or be one: a group for `moecomm.Buffer`, and the device."""
    launched = "RANK" in os.environ
    by_mpi = bool({"PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys())
    world = None
    local_rank, ranks_here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if (by_mpi or not launched) if args.transport == "mpi" else (by_mpi and not launched):
        world, local_rank, ranks_here = mpi_world()
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.device_count() >= ranks_here):
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world is not None or not launched:
        yield world, device
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield dist.group.WORLD, device
    finally:
        dist.destroy_process_group()


def mpi_world() -> tuple[object, int, int]:
    """All processes of the MPI job, the number of this one on its host, and how many there are on it."""
    from mpi4py import MPI

    host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, ranks_here = host.rank, host.size
    host.Free()
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, mpiexec does not
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    return MPI.COMM_WORLD, local_rank, ranks_here


def make_buffer(args: argparse.Namespace, group: object | None, device: torch.device) -> moecomm.Buffer:
    return moecomm.Buffer(
        group,
        num_experts=args.experts,
        hidden=args.hidden,
        top_k=args.top_k,
        max_tokens_per_rank=max(1, args.tokens),
        dtype=DTYPES[args.dtype],
        transport=args.transport,
        device=device,
    )


@dataclass(frozen=True)
class Tokens:
    """Tokens of one rank, (T, H), and the gradient that their outputs will get, (T, H)."""

    x: Tensor
    grad_y: Tensor


def make_tokens(args: argparse.Namespace, rank: int, device: torch.device) -> Tokens:
    """Draw the tokens of any rank: every rank knows all of them, for the check."""
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank)
    x, grad_y = torch.randn(2, args.tokens, args.hidden, generator=generator).to(device, DTYPES[args.dtype])
    return Tokens(x, grad_y)


# -- the layer, and the same in one process --------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a forward and a backward give: y, aux_loss, and the gradients of x, router, w_in and w_out."""

    y: Tensor
    aux_loss: Tensor
    grad_x: Tensor
    grad_router: Tensor
    grad_w_in: Tensor
    grad_w_out: Tensor


def forward_backward(layer: MoELayer, tokens: Tokens) -> Result:
    """Run the layer on this rank's tokens; expert and token gradients come out complete, the router's is a share."""
    layer.zero_grad()
    x = tokens.x.clone().requires_grad_()
    y = layer(x)
    assert layer.aux_loss is not None
    share = layer.aux_loss / layer.buffer.group.size  # every rank has as many tokens
    torch.autograd.backward([y, AUX_FACTOR * share], [tokens.grad_y, None])
    gradients = [parameter.grad for parameter in (x, layer.router.weight, layer.experts.w_in, layer.experts.w_out)]
    return Result(y.detach(), share.detach(), *(gradient for gradient in gradients if gradient is not None))


def one_process(
    all_tokens: Sequence[Tokens], router: TopKRouter, experts: GroupedExperts, topk_idx: Tensor, *, exact: bool
) -> Result:
    """Compute the layer in plain torch, all tokens and all experts here: in the dtype of the tokens, or in float64."""
    dtype = torch.float64 if exact else all_tokens[0].x.dtype
    router_dtype = torch.float64 if exact else torch.float32
    x = torch.cat([tokens.x for tokens in all_tokens]).to(dtype).requires_grad_()
    router_weight = router.weight.detach().to(router_dtype).requires_grad_()
    w_in, w_out = (weight.detach().to(dtype).requires_grad_() for weight in (experts.w_in, experts.w_out))

    probs = F.softmax(x.to(router_dtype) @ router_weight.T, dim=-1)
    weights = probs.gather(1, topk_idx)
    if router.renormalise:
        weights = weights / weights.sum(1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(router.num_experts):
        token, k = (topk_idx == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_in[expert]).chunk(2, dim=-1)
        rows = (F.silu(gate) * up) @ w_out[expert]
        y = y.index_add(0, token, (rows * weights[token, k, None]).to(dtype))
    counts = torch.bincount(topk_idx.flatten(), minlength=router.num_experts)
    aux_loss = load_balancing_loss(probs, counts)

    grad_y = torch.cat([tokens.grad_y for tokens in all_tokens]).to(dtype)
    inputs = (x, router_weight, w_in, w_out)
    gradients = torch.autograd.grad([y, AUX_FACTOR * aux_loss], inputs, [grad_y, None])
    return Result(y.detach(), aux_loss.detach(), *gradients)


def check(args: argparse.Namespace, layer: MoELayer, all_tokens: Sequence[Tokens], mine: Result) -> str:
    """Compare this rank's part with one process; what is wrong, or nothing. Collective."""
    group, router = layer.buffer.group, layer.router
    everyone = group.all_gather_object((mine.grad_router.cpu(), mine.aux_loss.cpu()))
    device = mine.y.device
    grad_router, aux_loss = (torch.stack(parts).sum(0).to(device) for parts in zip(*everyone, strict=True))

    # An expert is drawn from the seed and its global id: here are all of them, equal to those of the ranks.
    config = layer.buffer.config
    experts = GroupedExperts(args.hidden, args.intermediate, range(args.experts), seed=args.seed, dtype=config.dtype)
    experts = experts.to(device)
    with torch.no_grad():  # chosen once: between two experts that are as good, float64 may prefer the other
        topk_idx = torch.cat([router(tokens.x).topk_idx for tokens in all_tokens])
    baseline, exact = (one_process(all_tokens, router, experts, topk_idx, exact=e) for e in (False, True))

    held = list(config.placement.experts_of_rank[group.rank])
    here = slice(group.rank * args.tokens, (group.rank + 1) * args.tokens)
    comparisons = {
        "output": (mine.y, baseline.y[here], exact.y[here]),
        "gradient of the tokens": (mine.grad_x, baseline.grad_x[here], exact.grad_x[here]),
        "gradient of the router": (grad_router, baseline.grad_router, exact.grad_router),
        "gradient of w_in": (mine.grad_w_in, baseline.grad_w_in[held], exact.grad_w_in[held]),
        "gradient of w_out": (mine.grad_w_out, baseline.grad_w_out[held], exact.grad_w_out[held]),
    }
    try:
        for what, (actual, plain, true) in comparisons.items():
            assert_error_bounded(actual, plain, true, what)
        if not math.isclose(aux_loss, exact.aux_loss, rel_tol=1e-5):
            raise AssertionError(f"load-balancing loss: got {float(aux_loss)}, exact {float(exact.aux_loss)}")
    except AssertionError as error:
        return f"rank {group.rank}: {error}"
    return ""


# -- timing and report -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Median over iterations of the slowest rank's time, and what all ranks together moved per iteration."""

    iteration_s: float
    bytes_remote: float
    bytes_local: float


def time_layer(layer: MoELayer, tokens: Tokens, iterations: int) -> Timing:
    """Time forward and backward. Collective."""
    group, before, times_s = layer.buffer.group, layer.buffer.stats(), []
    for _ in range(iterations):
        group.barrier()
        start = perf_counter()
        forward_backward(layer, tokens)
        if tokens.x.is_cuda:
            torch.cuda.synchronize()
        times_s.append(perf_counter() - start)
    after = layer.buffer.stats()
    moved = [(after[name] - before[name]) / iterations for name in ("bytes_remote", "bytes_local")]
    everyone = group.all_gather_object((times_s, moved))
    slowest_s = sorted(max(times) for times in zip(*(times for times, _ in everyone), strict=True))
    remote, local = (sum(parts) for parts in zip(*(moved for _, moved in everyone), strict=True))
    return Timing(slowest_s[len(slowest_s) // 2], remote, local)


def report(args: argparse.Namespace, layer: MoELayer, timing: Timing) -> None:
    """Print the load of every expert, then the summary."""
    buffer, counts = layer.buffer, layer.expert_counts
    assert counts is not None
    total, most = max(1, int(counts.sum())), max(1, int(counts.max()))
    rank_of_expert = buffer.config.placement.rank_of_expert
    table = [
        (str(expert), str(rank_of_expert[expert]), str(count), f"{count / total:.1%}", "#" * round(20 * count / most))
        for expert, count in enumerate(counts.tolist())
    ]
    print_table(("expert", "rank", "rows", "share", "load"), table)
    num_ranks = buffer.group.size
    num_tokens = args.tokens * num_ranks
    print(
        f"{num_ranks} rank{'s' * (num_ranks > 1)}, transport {buffer.transport}, {args.dtype} on "
        f"{buffer.config.device.type}, {args.tokens} tokens per rank, hidden {args.hidden}, "
        f"top-{args.top_k} of {args.experts} experts"
    )
    print(
        f"forward and backward: {timing.iteration_s * 1e3:.1f} ms, {num_tokens / timing.iteration_s:,.0f} tokens/s, "
        f"moved {timing.bytes_remote / 1e6:.2f} MB between ranks and {timing.bytes_local / 1e6:.2f} MB inside them"
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with rich where it is installed, else plainly."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        for row in (header, *rows):
            print("  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), "", row[-1])
        return
    table = Table()
    for name in header:
        table.add_column(name, justify="left" if name == header[-1] else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
