"""Run one benchmark of the family: every setting in turn, checked for memory first, its rows kept as they come.

A benchmark is a function that measures one setting, and the bytes that this takes; see `bench/README.md`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

import moecomm
from bench.memory import free_bytes
from bench.options import Setting, refusal, settings
from bench.ranks import Ranks
from bench.record import Measurement, environment, percentiles, write
from bench.routing import max_over_mean, routing_hash
from bench.show import note, print_json, print_rows
from bench.sittings import merged, split
from bench.traffic import Traffic

# What all ranks find out alike: one of them says so.
_COMMON_ERRORS = (ValueError, moecomm.ConfigError, moecomm.UnsupportedError, ImportError)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One script.

    name: the script is `bench/bench_NAME.py`. run_case: measure one setting; its rows, equal on every rank or at least
    right on rank 0. needed_bytes: (setting, W) -> bytes per rank that `run_case` will allocate, computed beforehand.
    takes: by option the values that it can measure, where these are not all; see `bench.options.refusal`.
    """

    name: str
    run_case: Callable[[Setting, Ranks], list[Measurement]]
    needed_bytes: Callable[[Setting, int], int]
    takes: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Recorder:
    """Makes the rows of one setting: what they have in common is said once.

    Args:
        name: of the benchmark.
        ids_of_rank: routing of every rank, (T, K).
        facts: more fields of `Measurement` that are the same for all rows, or that replace those of the setting.
    """

    def __init__(
        self, name: str, setting: Setting, ranks: Ranks, ids_of_rank: Sequence[np.ndarray], **facts: Any
    ) -> None:
        self._common: dict[str, Any] = {
            "benchmark": name,
            "case": setting.case_name(ranks.world),
            "layout": setting.layout,
            "reduce": setting.reduce,
            "dtype": setting.dtype_name,
            "quant": setting.quant or "",
            "preset": setting.preset,
            "hidden": setting.hidden,
            "experts": setting.experts,
            "top_k": setting.top_k,
            "skew": str(setting.skew),
            "routing_hash": routing_hash(ids_of_rank),
            "max_over_mean": round(max_over_mean(ids_of_rank, setting.experts), 4),
            "world": ranks.world,
            "nodes": max(1, ranks.world // max(1, ranks.local_world)),
            "threads": torch.get_num_threads(),
            "steady": ranks.is_steady,
            "tokens": setting.tokens,
            "command": setting.options.command,
            **environment(),
        }
        self._common |= facts

    def row(
        self, path: str, operation: str, times_us: Sequence[float], of_ranks: Sequence[Traffic], **more: Any
    ) -> Measurement:
        """One row. times_us: of every round the slowest rank's. of_ranks: bytes of all ranks, see `bench.traffic`."""
        p20, p50, p80, p99 = percentiles(times_us)
        moved = sum(one.moved for one in of_ranks)
        computed = {
            "path": path,
            "operation": operation,
            "iterations": len(times_us),
            "p20_us": p20,
            "p50_us": p50,
            "p80_us": p80,
            "p99_us": p99,
            "bytes_local": sum(one.local for one in of_ranks),
            "bytes_remote": sum(one.remote for one in of_ranks),
            "dedup_local_bytes": sum(one.dedup_local for one in of_ranks),
            "dedup_remote_bytes": sum(one.dedup_remote for one in of_ranks),
            "bytes_moved": moved,
            "gb_per_s": round(moved / p50 / 1e3, 3),
        }
        return Measurement(**(self._common | computed | more))


def compared(rows: Sequence[Measurement], baseline: str = "baseline", roof: str = "memcpy") -> list[Measurement]:
    """Fill in ratio and percent_of_roof, from the rows of these paths for the same case and operation."""
    p50_us: dict[tuple[str, str, str], float] = {(row.case, row.operation, row.path): row.p50_us for row in rows}
    done = []
    for row in rows:
        base, best = (p50_us.get((row.case, row.operation, path)) for path in (baseline, roof))
        done.append(
            replace(
                row,
                ratio=round(base / row.p50_us, 3) if base else None,
                percent_of_roof=round(100 * best / row.p50_us, 1) if best else None,
            )
        )
    return done


def main(benchmark: Benchmark, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Read the command line, join the ranks, run every setting, show and keep the rows; the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.prog = f"bench_{benchmark.name}.py"
    args = _parse(parser, argv)
    kept: list[Measurement] = []
    rank = 0
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends one when a rank has died, Ctrl-C is the other
        signal.signal(number, _terminated)
    try:
        by_itself = "on" in benchmark.takes.get("steady", ["on"]) and {s.preset for s in settings(args)} == {"tiny"}
        ranks = Ranks(args.device, steady="off" if args.steady == "auto" and not by_itself else args.steady)
        rank = ranks.rank
        args.command = f"{ranks.launch} bench/{parser.prog} {shlex.join(_without_out(argv))}".strip()
        _run(benchmark, args, ranks, kept)
        ranks.leave()
    except _COMMON_ERRORS as error:
        _give_up(parser.prog, args, rank, kept, "" if rank else str(error))
    except (moecomm.MoECommError, AssertionError, Stopped) as error:
        _give_up(parser.prog, args, rank, kept, f"rank {rank}: {type(error).__name__}: {error}")
    except Exception as error:  # anything may come out of a collective whose peer has died
        if isinstance(error, RuntimeError) and re.search(r"[Cc]onnection (reset|closed|refused)", str(error)):
            text = f"rank {rank}: another rank is gone; look for the first one that failed, and why"
            _give_up(parser.prog, args, rank, kept, text)
        traceback.print_exc()
        _give_up(parser.prog, args, rank, kept, f"rank {rank} failed: {error}")
    return 0


def _run(benchmark: Benchmark, args: argparse.Namespace, ranks: Ranks, kept: list[Measurement]) -> None:
    every = list(settings(args))
    for setting in every:
        if reason := refusal(setting, benchmark.takes):
            raise ValueError(reason)
        check_memory(benchmark, setting, ranks)
    if args.out:
        _make_folder(args.out.parent)
    done: dict[tuple[str, ...], list[Measurement]] = {}
    rounds = [split(setting.repeats, args.sittings) for setting in every]
    for sitting in range(max(map(len, rounds))):
        for number, (setting, of_setting) in enumerate(zip(every, rounds, strict=True), 1):
            if sitting >= len(of_setting):
                continue
            which = f" (sitting {sitting + 1} of {len(of_setting)})" * (len(of_setting) > 1)
            note(ranks.rank, f"[{number}/{len(every)}] {benchmark.name}: {setting.case_name(ranks.world)}{which}")
            rows = benchmark.run_case(replace(setting, repeats=of_setting[sitting]), ranks)
            for row in rows:
                done.setdefault(row.key, []).append(row)
            if ranks.rank == 0 and args.out and rows:
                write([merged(done[row.key]) for row in rows], args.out)
            kept[:] = map(merged, done.values())
    if ranks.rank == 0:
        (print_json if args.json else print_rows)(kept)
        if args.out and kept:
            note(0, f"wrote {args.out.with_suffix('.csv')} and {args.out.with_suffix('.json')}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: rows cannot be written there ({error}); nothing was measured") from None


def check_memory(benchmark: Benchmark, setting: Setting, ranks: Ranks) -> None:
    """Compare what all ranks of this machine will need with what is free, before anything is allocated.

    Raises:
        ValueError: it does not fit.
    """
    needed = benchmark.needed_bytes(setting, ranks.world)
    on_device = 1 if ranks.device.type == "cuda" and not ranks.shares_device else ranks.local_world
    free = free_bytes(ranks.device)
    answers = ranks.all_gather((needed * on_device <= free, free))
    if not all(fits for fits, _ in answers):
        where = "GPU" if ranks.device.type == "cuda" else "machine"
        raise ValueError(
            f"{setting.preset} (H {setting.hidden}, E {setting.experts}, K {setting.top_k}) with --tokens "
            f"{setting.tokens} and --skew {setting.skew} on {ranks.world} ranks needs about {_gb(needed * on_device)} "
            f"on one {where}, {_gb(min(free for _, free in answers))} are free: fewer --tokens, a smaller --preset "
            f"or fewer ranks. Nothing was allocated"
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse; one rank prints what is wrong."""
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")):

        def silent(message: str) -> NoReturn:
            raise SystemExit(2)

        parser.error = silent  # type: ignore[method-assign]
        if {"-h", "--help"} & set(argv):
            raise SystemExit(0)
    return parser.parse_args(argv)


def _without_out(argv: Sequence[str]) -> list[str]:
    """The options without the place of the results, which is no part of what was measured."""
    kept = []
    words = iter(argv)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return kept


class Stopped(BaseException):
    pass


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped("told to end, because another rank has failed or somebody stopped the run")


def _give_up(name: str, args: argparse.Namespace, rank: int, kept: list[Measurement], text: str) -> NoReturn:
    """Say what happened and end at once: a peer may be gone, so no clean-up must wait for one."""
    for number in (signal.SIGTERM, signal.SIGINT):  # who is told to end now is ending, and says why
        signal.signal(number, signal.SIG_IGN)
    if text:
        partial = ""
        if rank == 0 and kept:
            cases = len({row.case for row in kept})
            place = f"are in {args.out.with_suffix('.json')}" if args.out else "were not written: give --out"
            partial = f". The rows of {cases} finished case{'s' * (cases > 1)} {place}"
        print(f"{name}: error: {text}{partial}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
