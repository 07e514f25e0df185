"""What `check=` costs: dispatch and combine with and without, in the same processes, turn by turn.

torchrun --nproc-per-node 4 bench/bench_check.py --tokens 1024
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

import moecomm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("hidden", 7168), ("experts", 64), ("top-k", 8), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--checks", default="off,cheap,full")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shape: dict[str, Any] = {"num_experts": options.experts, "hidden": options.hidden, "top_k": options.top_k}
    shape |= {"max_tokens_per_rank": options.tokens, "transport": options.transport}
    checks = options.checks.split(",")
    buffers = {check: moecomm.Buffer(**shape, check=check) for check in checks}
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(options.tokens, options.hidden, generator=generator).bfloat16()
    topk_idx = torch.rand(options.tokens, options.experts, generator=generator).topk(options.top_k).indices
    weights = torch.rand(options.tokens, options.top_k, generator=generator)
    times: dict[tuple[str, str], list[float]] = {}
    for round in range(options.rounds + 2):
        for check in checks if round % 2 else checks[::-1]:
            dist.barrier()
            start = time.perf_counter()
            out = buffers[check].dispatch(x, topk_idx, weights)
            middle = time.perf_counter()
            buffers[check].combine(out.x, out.handle)
            del out
            if round >= 2:
                spent = torch.tensor([middle - start, time.perf_counter() - middle])
                dist.all_reduce(spent, dist.ReduceOp.MAX)
                for operation, seconds in zip(("dispatch", "combine"), spent.tolist(), strict=True):
                    times.setdefault((operation, check), []).append(1e3 * seconds)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {options}: {buffers['off'].transport}; milliseconds, max over ranks")
        for operation in ("dispatch", "combine"):
            base = times[operation, "off"]
            for check in checks:
                mine = times[operation, check]
                ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
                print(f"{operation:9} {check:6} p50 {statistics.median(mine):8.2f}  {100 * (ratio - 1):+6.1f} %")
    for buffer in buffers.values():
        buffer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
