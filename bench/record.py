"""The measurement row of moecomm, and how it is written and read."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import moecomm


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One path, one operation, one case.

    case: name of the case, the same for all paths of it. path: "moecomm", "baseline", "memcpy" or "streamed copy".
    transport, layout, reduce: options of the buffer and the dispatch. operation: "dispatch", "combine", "both".
    world: W ranks; tokens: T per rank; hidden: H; top_k: K; experts: E; dtype: of the rows; threads: per rank.
    iterations: rounds that the percentiles stand on.
    p20_us, p50_us, p80_us: per round the maximum over ranks, then percentiles over rounds.
    bytes_local, bytes_remote, bytes_deduplicated, bytes_moved: all ranks, see `bench.traffic`.
    gb_per_s: bytes_moved / p50. percent_of_roof: p50 of "memcpy" of bytes_moved in the same run / p50.
    speedup: p50 of the baseline in the same run / p50. plan_percent: share of planning in a dispatch.
    device, versions, commit, date: where and what.
    """

    case: str
    path: str
    transport: str
    layout: str
    reduce: str
    operation: str
    world: int
    tokens: int
    hidden: int
    top_k: int
    experts: int
    dtype: str
    threads: int
    iterations: int
    p20_us: float
    p50_us: float
    p80_us: float
    bytes_local: int
    bytes_remote: int
    bytes_deduplicated: int
    bytes_moved: int
    gb_per_s: float
    percent_of_roof: float | None
    speedup: float | None
    plan_percent: float | None
    device: str
    versions: str
    commit: str
    date: str


def percentiles(times_us: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80.

    >>> percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (2.0, 3.5, 5.0)
    """
    p20, p50, p80 = (float(np.percentile(times_us, p)) for p in (20, 50, 80))
    return round(p20, 2), round(p50, 2), round(p80, 2)


def environment() -> dict[str, str]:
    """Device, versions, commit and date of this run."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores"
    versions = f"moecomm {moecomm.__version__}, torch {torch.__version__}, python {platform.python_version()}"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"device": device, "versions": versions, "commit": _commit(), "date": date}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash; "+" behind it if files of the library or the benchmark differ from it."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "moecomm", "kernels", "bench/*.py"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write(rows: Iterable[Measurement], stem: Path) -> list[Path]:
    """Write `stem`.csv and `stem`.json; rows of the same case that are there already are replaced."""
    rows = list(rows)
    path = stem.with_suffix(".json")
    if path.exists():
        cases = {row.case for row in rows}
        rows = [row for row in read([path]) if row.case not in cases] + rows
    stem.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return [path, stem.with_suffix(".csv")]


def read(paths: Iterable[Path]) -> list[Measurement]:
    """Read JSON files that `write` wrote."""
    return [Measurement(**row) for path in paths for row in json.loads(path.read_text())]
