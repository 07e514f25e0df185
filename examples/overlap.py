"""Hide communication: two half batches take turns, so that one travels while the experts work on the other.

    torchrun --standalone --nproc-per-node 2 examples/overlap.py
    mpiexec -n 2 python examples/overlap.py

Prints the time of a layer call after call and in turns, checks that both give the same bits, and says how much of the
time this rank waited. On a CPU the experts' cores are also what moves rows, so little can be hidden there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

import moecomm
from moecomm.launch import joined
from moecomm.nn import GroupedExperts

Half = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Time both ways; 0 if they give the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="of each rank, an even number")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    with joined() as launch, torch.inference_mode():
        sizes = {"num_experts": 4 * launch.size, "hidden": args.hidden, "top_k": 2}
        with moecomm.Buffer(
            launch.group, max_tokens_per_rank=args.tokens, dtype=torch.float32, device=launch.device, **sizes
        ) as buffer:
            return run(args, buffer)


def run(args: argparse.Namespace, buffer: moecomm.Buffer) -> int:
    """Build the experts of this rank and both halves of its batch, then compare."""
    rank, config = buffer.group.rank, buffer.config
    experts = GroupedExperts(args.hidden, 2 * args.hidden, config.placement.experts_of_rank[rank], device=config.device)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(args.tokens, args.hidden, generator=generator).to(config.device)
    scores = torch.randn(args.tokens, config.placement.num_experts, generator=generator).softmax(-1)
    weights, idx = (tensor.to(config.device) for tensor in scores.topk(config.top_k))
    middle = args.tokens // 2
    halves = [(x[part], idx[part], weights[part]) for part in (slice(0, middle), slice(middle, None))]

    plain, plain_s = timed(lambda: in_order(buffer, experts, halves), args.rounds)
    turns, turns_s = timed(lambda: in_turns(buffer, experts, halves), args.rounds)
    same = all(buffer.group.all_gather_object(bool(torch.equal(plain, turns))))
    if rank == 0:
        waited = buffer.stats()["wait_s"]
        print(f"{buffer.group.size} ranks over {buffer.transport}, {args.tokens} tokens each")
        print(f"call after call {1e3 * plain_s:.2f} ms, in turns {1e3 * turns_s:.2f} ms, waited {waited:.3f} s in all")
        print("both give the same bits" if same else "overlap: WRONG RESULT")
    return int(not same)


def in_order(buffer: moecomm.Buffer, experts: GroupedExperts, halves: Sequence[Half]) -> torch.Tensor:
    """Every call waits for its result."""
    home = []
    for x, idx, weights in halves:
        out = buffer.dispatch(x, idx, weights)
        home.append(buffer.combine(experts(out.x, out.expert_offsets), out.handle))
    return torch.cat(home)


def in_turns(buffer: moecomm.Buffer, experts: GroupedExperts, halves: Sequence[Half]) -> torch.Tensor:
    """Both halves leave at once; while the experts work on one, the other travels."""
    sent = [buffer.dispatch_async(x, idx, weights) for x, idx, weights in halves]
    home = []
    for pending in sent:
        out = pending.wait()
        home.append(buffer.combine_async(experts(out.x, out.expert_offsets), out.handle))
    return torch.cat([pending.wait() for pending in home])


def timed(call: Callable[[], torch.Tensor], rounds: int) -> tuple[torch.Tensor, float]:
    """The result, and the median seconds of a call."""
    result, times = call(), []
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, sorted(times)[rounds // 2]


if __name__ == "__main__":
    sys.exit(main())
