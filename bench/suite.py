"""Run every benchmark of dispatch and combine that README and docs show, then write their tables and plots.

    python bench/suite.py             # about ten minutes on two cores; leave the machine alone meanwhile
    python bench/suite.py --dry-run   # print the commands

Results go to `bench/results/`: `dispatch_combine` (the cases of the table), `scaling` (time over tokens), `memory.txt`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
TIMES, MEMORY = "bench_dispatch_combine.py", "bench_memory.py"
SHAPE = ["--hidden", "7168", "--experts", "64", "--top-k", "8"]
# (ranks, script, options)
RUNS: list[tuple[int, str, list[str]]] = [
    (
        4,
        TIMES,
        [*SHAPE, "--tokens", "16", "--repeats", "100", "--warmup", "20", "--out", f"{RESULTS}/dispatch_combine"],
    ),
    (4, TIMES, [*SHAPE, "--tokens", "1024", "--repeats", "20", "--out", f"{RESULTS}/dispatch_combine"]),
    (
        2,
        TIMES,
        [*SHAPE, "--tokens", "16", "--repeats", "100", "--warmup", "20", "--out", f"{RESULTS}/dispatch_combine"],
    ),
    (
        2,
        TIMES,
        [*SHAPE, "--tokens", "4096", "--repeats", "12", "--warmup", "3", "--out", f"{RESULTS}/dispatch_combine"],
    ),
    (
        2,
        TIMES,
        [
            "--tokens",
            "256,512,1024,2048,4096,8192",
            "--hidden",
            "2048",
            "--experts",
            "64",
            "--top-k",
            "8",
            "--repeats",
            "12",
            "--warmup",
            "3",
            "--out",
            f"{RESULTS}/scaling",
        ],
    ),
    (
        4,
        MEMORY,
        [
            "--tokens",
            "256",
            "--hidden",
            "1024",
            "--experts",
            "64",
            "--top-k",
            "8",
            "--iterations",
            "1000",
            "--out",
            f"{RESULTS}/memory.txt",
        ],
    ),
]


def command(ranks: int, script: str, options: list[str]) -> list[str]:
    """The command line of one run."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launch, str(BENCH / script), *options]


def main() -> None:
    """Run all, one after the other; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    commands = [command(*run) for run in RUNS] + [[sys.executable, str(BENCH / "report.py")]]
    for line in commands:
        print("+", *line, flush=True)
        if not args.dry_run:
            subprocess.run(line, env=environment, check=True)


if __name__ == "__main__":
    main()
