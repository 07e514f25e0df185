"""The measurement row of moecomm, and how it is written and read: one type for every benchmark."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moecomm

SCHEMA = 2
_ROOT = Path(__file__).resolve().parents[1]
_CORES = len(os.sched_getaffinity(0))  # before ranks are bound


class ResultsError(ValueError):
    """A result file that is not one; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One path, one operation, one case.

    benchmark: the script without "bench_". case: name of the case, the same for all its paths. path: whose time it is:
        "moecomm", "baseline" (torch `all_to_all_single`), "baseline mpi", "memcpy", "streamed copy", ...
    operation: "dispatch", "combine", "both", or what else the benchmark times.
    transport, layout, reduce, dtype, quant: options of the buffer and the operation ("" where they mean nothing).
    preset, hidden, experts, top_k: H, E, K and the model that has them. skew, routing_hash, max_over_mean: the routing.
    world, nodes, threads: W ranks, on how many nodes, CPU threads of each. tokens: T per rank.
    steady: ranks were bound to cores and malloc had settled, see `bench.ranks`.
    iterations: times that the percentiles stand on, of all sittings. sittings: how many there were, each with buffers
        of its own; times and ratios are means of theirs,
        without the highest and the lowest quarter. See `bench.sittings`.
    p20_us, p50_us, p80_us, p99_us: per round the maximum over ranks, then percentiles over rounds.
    bytes_local, bytes_remote: rows that this layout sends, all ranks, to the rank itself and to others.
    dedup_local_bytes, dedup_remote_bytes: the same with one row per (token, rank), the least any wire can carry.
    bytes_moved: what memory must read and write, halved. See `bench.traffic`.
    gb_per_s: bytes_moved / p50. percent_of_roof: p50 of "memcpy" of bytes_moved in the same run / p50.
    ratio: p50 of the baseline in the same sitting / p50, so that more is better.
    p50_noise, ratio_noise: standard errors, from what differs between sittings, over the number; None: one sitting.
    peak_memory_bytes: the most that one rank had resident (CPU) or allocated (GPU) while this path ran; None: unknown.
    gate: what was checked before anything was timed; "" for a roof.
    device, versions, commit, date, command: where, what, and how to do it again.
    extras: numbers and words that only this benchmark has.
    """

    benchmark: str
    case: str
    path: str
    operation: str
    transport: str = ""
    layout: str = ""
    reduce: str = ""
    dtype: str = ""
    quant: str = ""
    preset: str = "custom"
    hidden: int
    experts: int
    top_k: int
    skew: str = "uniform"
    routing_hash: str = ""
    max_over_mean: float | None = None
    world: int
    nodes: int = 1
    threads: int
    tokens: int
    iterations: int
    p20_us: float
    p50_us: float
    p80_us: float
    p99_us: float | None
    bytes_local: int
    bytes_remote: int
    dedup_local_bytes: int | None
    dedup_remote_bytes: int
    bytes_moved: int
    gb_per_s: float
    percent_of_roof: float | None = None
    ratio: float | None = None
    steady: bool = False
    sittings: int = 1
    p50_noise: float | None = None
    ratio_noise: float | None = None
    peak_memory_bytes: int | None = None
    gate: str = ""
    device: str
    versions: str
    commit: str
    date: str
    command: str = ""
    extras: Mapping[str, float | str | None] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What the same measurement has in another run, too."""
        return self.benchmark, self.case, self.path, self.operation, self.transport


def example(**changes: Any) -> Measurement:
    """A row with plausible numbers, for examples and tests; keyword arguments replace them.

    >>> example(tokens=3).tokens
    3
    """
    words = {"benchmark": "dispatch_combine", "case": "a", "path": "moecomm", "operation": "dispatch"}
    shape = {"hidden": 8, "experts": 4, "top_k": 2, "world": 2, "threads": 1, "tokens": 16, "iterations": 25}
    times = {"p20_us": 95.0, "p50_us": 100.0, "p80_us": 105.0, "p99_us": 120.0}
    sizes = dict.fromkeys(("bytes_local", "bytes_remote", "dedup_local_bytes", "dedup_remote_bytes"), 1_000_000)
    where = {"device": "a machine", "versions": "torch 2", "commit": "abc", "date": "2026-11-23"}
    values: dict[str, Any] = words | shape | times | sizes | where | {"bytes_moved": 1_000_000, "gb_per_s": 5.0}
    return Measurement(**(values | changes))


def percentiles(times_us: Sequence[float]) -> tuple[float, float, float, float]:
    """p20, p50, p80 and p99.

    >>> percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (2.0, 3.5, 5.0, 5.95)
    """
    p20, p50, p80, p99 = (round(float(np.percentile(times_us, p)), 2) for p in (20, 50, 80, 99))
    return p20, p50, p80, p99


def environment() -> dict[str, str]:
    """Device, versions, commit and date of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_model()}, {_CORES} cores"
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
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "moecomm", "kernels", "bench/*.py"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write(rows: Iterable[Measurement], stem: Path) -> list[Path]:
    """Write `stem`.csv and `stem`.json; rows of the same benchmark and case that are there already are replaced."""
    rows = list(rows)
    path = stem.with_suffix(".json")
    if path.exists():
        cases = {(row.benchmark, row.case) for row in rows}
        rows = [row for row in read([path]) if (row.benchmark, row.case) not in cases] + rows
    stem.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, "rows": [asdict(row) for row in rows]}
    _replace(path, json.dumps(document, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Measurement)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | {"extras": json.dumps(dict(row.extras))} for row in rows)
    return [path, stem.with_suffix(".csv")]


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all: who is killed meanwhile leaves what was there."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


def read(paths: Iterable[Path]) -> list[Measurement]:
    """Read JSON files that `write` wrote, also before there was a schema number.

    Raises:
        ResultsError: a file is missing or holds something else.
    """
    return [row for path in paths for row in _read_one(path)]


def _read_one(path: Path) -> list[Measurement]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read ({error}); give the .json file that a benchmark wrote") from None
    try:
        if isinstance(document, list):
            return [Measurement(**_from_first_schema(row)) for row in document]
        if document["schema"] != SCHEMA:
            raise ResultsError(
                f"{path}: has schema {document['schema']}, this version reads {SCHEMA}; run the benchmark again"
            )
        return [Measurement(**row) for row in document["rows"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{path}: holds no rows of a benchmark of moecomm ({error}); give the .json file that --out wrote"
        ) from None


def _from_first_schema(row: dict[str, Any]) -> dict[str, Any]:
    """A row of before 2026-11-27: other names, no routing hash, no p99, no command."""
    row = dict(row)
    plan_percent = row.pop("plan_percent")
    renamed = {"ratio": row.pop("speedup"), "dedup_remote_bytes": row.pop("bytes_deduplicated")}
    unknown = {"benchmark": "dispatch_combine", "p99_us": None, "dedup_local_bytes": None}
    return row | renamed | unknown | {"extras": {"plan_percent": plan_percent} if plan_percent is not None else {}}
