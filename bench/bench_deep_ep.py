"""What `moecomm.deep_ep` costs on top of the calls of `moecomm.Buffer` that do the same.

    torchrun --standalone --nproc-per-node 4 bench/bench_deep_ep.py --tokens 128,1024 --out bench/results/deep_ep

Rows are times of a call: the maximum over ranks of each round, then the median over rounds. The two calls of a pair
take turns, so that whatever else the machine does meets both. Both give the same rows; the compatible one also what its
API gives beside them. `normal` starts where there is a layout already, `normal, layout` makes it first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.record import environment
from moecomm import deep_ep

Call = Callable[[], Any]


def inputs(rank: int, tokens: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, uniform choices without repetition, weights."""
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, args.hidden, generator=random).bfloat16()
    idx = torch.rand(tokens, args.experts, generator=random).topk(args.top_k, dim=1).indices
    return x, idx, torch.rand(tokens, args.top_k, generator=random)


def pairs(args: argparse.Namespace, tokens: int) -> dict[str, tuple[Call, Call]]:
    """Name -> (native call, compatible call)."""
    rank = dist.get_rank()
    x, idx, weights = inputs(rank, tokens, args)
    shape: dict[str, Any] = {
        "num_experts": args.experts,
        "hidden": args.hidden,
        "top_k": args.top_k,
        "max_tokens_per_rank": tokens,
    }
    native, source = moecomm.Buffer(**shape), moecomm.Buffer(**shape, reduce="source")
    by_rank = native.dispatch(x, idx, weights, layout="rank")
    alone = source.dispatch(x, idx, weights)

    buffer: Any = deep_ep.Buffer(dist.group.WORLD)

    def layout() -> dict[str, Any]:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, args.experts)
        return {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
            "topk_idx": idx,
            "topk_weights": weights,
        }

    known = layout()
    recv, _, _, _, handle, _ = buffer.dispatch(x, **known)
    assert torch.equal(recv, by_rank.x)
    made: dict[str, tuple[Call, Call]] = {
        "normal dispatch": (
            lambda: native.dispatch(x, idx, weights, layout="rank"),
            lambda: buffer.dispatch(x, **known),
        ),
        "normal dispatch, layout": (
            lambda: native.dispatch(x, idx, weights, layout="rank"),
            lambda: buffer.dispatch(x, **layout()),
        ),
        "normal combine": (lambda: native.combine(by_rank.x, by_rank.handle), lambda: buffer.combine(recv, handle)),
        "normal replay": (
            lambda: native.dispatch(x, handle=by_rank.handle),
            lambda: buffer.dispatch(x, handle=handle),
        ),
    }
    made |= elastic_pairs(args, native, (x, idx, weights))
    if tokens <= args.most_low_latency:
        few = x, idx, tokens, args.experts
        slots, _, ll_handle, _, _ = buffer.low_latency_dispatch(*few, use_fp8=False)
        made["low-latency dispatch"] = (
            lambda: source.dispatch(x, idx, weights),
            lambda: buffer.low_latency_dispatch(*few, use_fp8=False),
        )
        made["low-latency combine"] = (
            lambda: source.combine(alone.x, alone.handle),
            lambda: buffer.low_latency_combine(slots, idx, weights, ll_handle),
        )
    return made


def elastic_pairs(
    args: argparse.Namespace, native: moecomm.Buffer, given: tuple[Tensor, Tensor, Tensor]
) -> dict[str, tuple[Call, Call]]:
    """Those of `ElasticBuffer`."""
    by_rank, by_expert = native.dispatch(*given, layout="rank"), native.dispatch(*given)
    elastic: Any = deep_ep.ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=len(given[0]), hidden=args.hidden, num_topk=args.top_k
    )
    usual = {"num_experts": args.experts}
    compact = elastic.dispatch(*given, **usual)
    expanded = elastic.dispatch(*given, do_expand=True, **usual)
    assert torch.equal(compact[0], by_rank.x) and torch.equal(expanded[0], by_expert.x)
    return {
        "elastic dispatch": (
            lambda: native.dispatch(*given, layout="rank"),
            lambda: elastic.dispatch(*given, **usual),
        ),
        "elastic combine": (
            lambda: native.combine(by_rank.x, by_rank.handle),
            lambda: elastic.combine(compact[0], compact[3]),
        ),
        "expanded dispatch": (
            lambda: native.dispatch(*given),
            lambda: elastic.dispatch(*given, do_expand=True, **usual),
        ),
        "expanded combine": (
            lambda: native.combine(by_expert.x, by_expert.handle, weighted=False),
            lambda: elastic.combine(expanded[0], expanded[3]),
        ),
    }


def measure(calls: tuple[Call, Call], repeats: int, warmup: int) -> list[Tensor]:
    """(repeats,) microseconds of each call, the maximum over ranks."""
    times: list[list[float]] = [[], []]
    for round_number in range(repeats + warmup):
        for which in (0, 1) if round_number % 2 else (1, 0):
            dist.barrier()
            begin = time.perf_counter()
            calls[which]()
            if round_number >= warmup:
                times[which].append((time.perf_counter() - begin) * 1e6)
    made = [torch.tensor(part) for part in times]
    for part in made:
        dist.all_reduce(part, dist.ReduceOp.MAX)
    return made


def main() -> None:
    """Measure, print a table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 7168, "experts": 64, "top-k": 8, "repeats": 40, "warmup": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", default="128", help="T per rank, a comma list (default: %(default)s)")
    parser.add_argument("--most-low-latency", type=int, default=256, help="T up to which that mode is measured")
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for tokens in map(int, args.tokens.split(",")):
            for name, calls in pairs(args, tokens).items():
                if args.only not in name:
                    continue
                native, ours = measure(calls, args.repeats, args.warmup)
                row = {
                    "call": name,
                    "tokens": tokens,
                    "native_p50_us": round(float(native.median()), 1),
                    "deep_ep_p50_us": round(float(ours.median()), 1),
                    "ratio": round(float(ours.median() / native.median()), 3),
                    "ratio_of_p20": round(float(ours.quantile(0.2) / native.quantile(0.2)), 3),
                }
                rows.append(row)
                if dist.get_rank() == 0:
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.out is not None and dist.get_rank() == 0:
        shape = {"world": dist.get_world_size(), "hidden": args.hidden, "experts": args.experts, "top_k": args.top_k}
        args.out.with_suffix(".json").write_text(json.dumps({**shape, **environment(), "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
