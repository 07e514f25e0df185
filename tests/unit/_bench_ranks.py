"""What the ranks of test_bench_peers.py do."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from torch import Tensor

from bench import bench_decode, bench_deep_ep, bench_dispatch_combine, peers
from bench.options import settings
from bench.ranks import Ranks
from bench.record import Measurement
from moecomm import deep_ep

SMALL = ["--repeats", "2", "--warmup", "0", "--experts", "4", "--top-k", "2"]


def beside_deep_ep(rank: int, script: str, options: list[str], broken: bool) -> tuple[list[tuple[Any, ...]], str]:
    """Run a case beside moecomm's own `deep_ep`, which has DeepEP's API and needs no GPU; rows and notes."""
    deep_ep.install()
    vars(peers)["_no_gpus"] = lambda ranks: ""
    if broken:
        plain = deep_ep.Buffer.combine

        def wrong(self: Any, *args: Any, **more: Any) -> tuple[Tensor, Any, Any]:
            y, weights, event = plain(self, *args, **more)
            return y + 1 if rank == 1 else y, weights, event

        deep_ep.Buffer.combine = wrong  # type: ignore[method-assign]
    module: Any = {"decode": bench_decode, "dispatch_combine": bench_dispatch_combine}[script]
    args = module.parser().parse_args([*SMALL, *options])
    args.command = ""
    (setting,) = settings(args)
    ranks = Ranks("cpu")
    notes = io.StringIO()
    with contextlib.redirect_stderr(notes):
        rows = module.run_case(setting, ranks)
    ranks.leave()
    return [(row.path, row.operation, row.gate, row.p50_us) for row in rows], notes.getvalue()


def costs_of_deep_ep(rank: int) -> list[Measurement]:
    """The rows of `bench_deep_ep.py`."""
    args = bench_deep_ep.parser().parse_args(["--preset", "tiny", "--tokens", "5", "--repeats", "1", "--warmup", "0"])
    args.command = ""
    (setting,) = settings(args)
    ranks = Ranks("cpu")
    rows = bench_deep_ep.run_case(setting, ranks)
    ranks.leave()
    return rows
