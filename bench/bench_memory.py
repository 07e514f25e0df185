"""Compare what a buffer maps with `plan_memory`, and watch resident memory over many iterations.

torchrun --nproc-per-node 4 bench/bench_memory.py --iterations 1000 --tokens 256 --hidden 1024
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.case import Ranks, add_shape_arguments, make_case


def check_memory(args: argparse.Namespace, ranks: Ranks, tokens: int) -> None:
    """Compare what is mapped with `plan_memory`, then watch resident memory over many iterations."""
    case = make_case(args, tokens, ranks.rank, ranks.world, ranks.device)
    sizes = {
        "num_experts": args.experts,
        "hidden": args.hidden,
        "top_k": args.top_k,
        "max_tokens_per_rank": max(tokens, 1),
        "dtype": args.dtype,
        "reduce": args.reduce,
    }
    plan = moecomm.Buffer.plan_memory(num_ranks=ranks.world, **sizes)
    with moecomm.Buffer(transport=args.transport, **sizes) as buffer:
        mapped = mapped_bytes() // ranks.world  # of all ranks, all of the same size
        if ranks.rank == 0 and buffer.transport == "symmetric":
            print(f"plan_memory {plan.total_bytes} bytes, mapped {mapped}: {100 * mapped / plan.total_bytes:.2f} %")
        resident = []
        for number in range(args.iterations):
            out = buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout=args.layout)
            assert isinstance(out.x, Tensor)
            buffer.combine(out.x, out.handle)
            if number >= args.iterations // 10:
                resident.append(resident_bytes())
        half = len(resident) // 2
        first, last = max(resident[:half]), max(resident[half:])
        growth = [f"{(last - first) / 2**20:+.2f} MiB"]
        if ranks.world > 1:
            growth = [""] * ranks.world
            dist.all_gather_object(growth, f"{(last - first) / 2**20:+.2f} MiB")
        if ranks.rank == 0:
            print(f"{args.iterations} iterations: most resident {last / 2**20:.1f} MiB, growth from the first")
            print(f"half of the last 90 % to the second, by rank: {', '.join(growth)}; {buffer.stats()}")


def mapped_bytes() -> int:
    """Bytes of moecomm's shared memory in the address space of this process."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:moecomm" in line]
    return sum(int(span[0].split("-")[1], 16) - int(span[0].split("-")[0], 16) for span in lines)


def resident_bytes() -> int:
    """Bytes of this process that are in memory, shared ones included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    parser.add_argument("--iterations", type=int, default=1000)
    args = parser.parse_args()
    ranks = Ranks()
    for tokens in args.tokens:
        check_memory(args, ranks, tokens)
    ranks.leave()


if __name__ == "__main__":
    main()
