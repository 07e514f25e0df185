"""Compare what a buffer maps with `plan_memory`, and watch resident memory over many iterations.

    torchrun --nproc-per-node 4 bench/bench_memory.py --iterations 1000 --tokens 256 --hidden 1024

It prints sentences, not rows: nothing is timed. The shape has the options of the family.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.case import Case, make_case
from bench.options import Setting, make_parser, positive, settings
from bench.paths import make_buffer
from bench.ranks import Ranks
from bench.record import environment


def check_memory(setting: Setting, ranks: Ranks, iterations: int) -> list[str]:
    """Compare what is mapped with `plan_memory`, then watch resident memory over many iterations; lines to print."""
    case = make_case(setting, ranks.rank, ranks.world, ranks.device)
    plan = moecomm.Buffer.plan_memory(
        num_ranks=ranks.world,
        num_experts=setting.experts,
        hidden=setting.hidden,
        top_k=setting.top_k,
        max_tokens_per_rank=max(setting.tokens, 1),
        dtype=setting.dtype,
        reduce=setting.reduce,
    )
    lines = [f"{setting.case_name(ranks.world)}, per rank:"]
    with make_buffer(setting, ranks, setting.transports[0]) as buffer:
        if buffer.transport == "symmetric":
            mapped = mapped_bytes() // ranks.world  # those of all ranks, which have the same size
            lines.append(
                f"plan_memory {plan.total_bytes} bytes, mapped {mapped}: {100 * mapped / plan.total_bytes:.2f} %"
            )
        resident = [step(setting, case, buffer) for _ in range(iterations)][iterations // 10 :]
    half = len(resident) // 2
    every = ranks.all_gather((max(resident[:half]), max(resident[half:])))
    growth = ", ".join(f"{(last - first) / 2**20:+.2f}" for first, last in every)
    most = max(last for _, last in every) / 2**20
    lines.append(f"{iterations} iterations of dispatch and combine: at most {most:.1f} MiB resident;")
    lines.append(f"growth of that maximum between the halves of the last 90 % of them, by rank: {growth} MiB")
    return lines


def step(setting: Setting, case: Case, buffer: moecomm.Buffer) -> int:
    """One dispatch and combine; resident bytes with both results still alive."""
    out = buffer.dispatch(case.x, case.topk_idx, case.topk_weights_TK, layout=setting.layout)
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
    parser = make_parser(__doc__, tokens=[256])
    parser.add_argument("--iterations", type=positive, default=1000)
    args = parser.parse_args()
    for name in ("quant", "steady", "repeats", "sittings", "warmup", "json"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} means nothing here")
    if len(args.transport) > 1:
        parser.error(f"--transport {','.join(args.transport)}: give one")
    ranks = Ranks(args.device)
    lines = [line for setting in settings(args) for line in check_memory(setting, ranks, args.iterations)]
    if ranks.rank == 0:
        print("\n".join(lines))
    if ranks.rank == 0 and args.out:
        args.out.write_text("\n".join([*lines, " ".join(environment().values()), ""]))
    ranks.leave()


if __name__ == "__main__":
    main()
