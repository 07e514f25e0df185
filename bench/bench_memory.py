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
from bench.case import Case, Ranks, add_shape_arguments, make_case
from bench.record import environment


def check_memory(args: argparse.Namespace, ranks: Ranks, tokens: int) -> list[str]:
    """Compare what is mapped with `plan_memory`, then watch resident memory over many iterations; lines to print."""
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
    lines = [f"W={ranks.world} T={tokens} H={args.hidden} K={args.top_k} E={args.experts} {args.dtype} per rank:"]
    with moecomm.Buffer(transport=args.transport, **sizes) as buffer:
        if buffer.transport == "symmetric":
            mapped = mapped_bytes() // ranks.world  # those of all ranks, which have the same size
            lines.append(
                f"plan_memory {plan.total_bytes} bytes, mapped {mapped}: {100 * mapped / plan.total_bytes:.2f} %"
            )
        resident = [step(args, case, buffer) for _ in range(args.iterations)][args.iterations // 10 :]
    half = len(resident) // 2
    mine = (max(resident[:half]), max(resident[half:]))
    every: list[tuple[int, int]] = [mine] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(every, mine)
    growth = ", ".join(f"{(last - first) / 2**20:+.2f}" for first, last in every)
    most = max(last for _, last in every) / 2**20
    lines.append(f"{args.iterations} iterations of dispatch and combine: at most {most:.1f} MiB resident;")
    lines.append(f"growth of that maximum between the halves of the last 90 % of them, by rank: {growth} MiB")
    return lines


def step(args: argparse.Namespace, case: Case, buffer: moecomm.Buffer) -> int:
    """One dispatch and combine; resident bytes with both results still alive."""
    out = buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout=args.layout)
    assert isinstance(out.x, Tensor)
    _ = buffer.combine(out.x, out.handle)
    return resident_bytes()


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
    parser.add_argument("--out", type=Path, help="also write what is printed to this file")
    args = parser.parse_args()
    ranks = Ranks()
    lines = [line for tokens in args.tokens for line in check_memory(args, ranks, tokens)]
    if ranks.rank == 0:
        print("\n".join(lines))
    if ranks.rank == 0 and args.out:
        args.out.write_text("\n".join([*lines, " ".join(environment().values()), ""]))
    ranks.leave()


if __name__ == "__main__":
    main()
