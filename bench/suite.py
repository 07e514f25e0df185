"""Run every benchmark that README and docs show, then write their tables, plots and the interactive page.

    python bench/suite.py                # about twelve minutes on two cores; leave the machine alone meanwhile
    python bench/suite.py --only tiny    # the runs whose results have this name
    python bench/suite.py --dry-run      # print the commands

Results go to `bench/results/`: `dispatch_combine` (the table of the README), `scaling` (a large model over tokens),
`tiny` (over tokens, ranks, transports and skews), `decode` (layout "padded"), `moe_layer`, `memory.txt`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
TIMES, LAYER, MEMORY = "bench_dispatch_combine.py", "bench_moe_layer.py", "bench_memory.py"
DECODE = "bench_decode.py"
SHAPE = "--hidden 7168 --experts 64 --top-k 8"
# (launcher, ranks, script, name of the results, options)
RUNS: list[tuple[str, int, str, str, str]] = [
    ("torchrun", 4, TIMES, "dispatch_combine", f"{SHAPE} --tokens 16 --repeats 60 --warmup 20"),
    ("torchrun", 4, TIMES, "dispatch_combine", f"{SHAPE} --tokens 1024 --repeats 15"),
    ("torchrun", 2, TIMES, "dispatch_combine", f"{SHAPE} --tokens 16 --repeats 60 --warmup 20"),
    ("torchrun", 2, TIMES, "dispatch_combine", f"{SHAPE} --tokens 4096 --repeats 8 --warmup 2"),
    (
        "torchrun",
        2,
        TIMES,
        "scaling",
        "--hidden 2048 --experts 64 --top-k 8 --tokens 256,512,1024,2048,4096,8192 --repeats 12 --warmup 3",
    ),
    ("torchrun", 2, TIMES, "tiny", "--preset tiny --tokens 1,16,128,1024 --transport auto,collective"),
    ("torchrun", 4, TIMES, "tiny", "--preset tiny --tokens 128 --transport auto,collective"),
    ("python", 1, TIMES, "tiny", "--preset tiny --tokens 128"),
    ("torchrun", 2, TIMES, "tiny", "--preset tiny --tokens 128 --skew zipf:1,ratio:2,hot:1"),
    ("mpiexec", 2, TIMES, "tiny_mpi", "--preset tiny --tokens 16,128,1024 --transport auto,mpi"),
    ("torchrun", 2, DECODE, "decode", "--repeats 20"),
    ("torchrun", 4, DECODE, "decode", "--repeats 12"),
    ("torchrun", 2, LAYER, "moe_layer", "--preset tiny --tokens 128,1024"),
    ("torchrun", 4, LAYER, "moe_layer", "--preset tiny --tokens 128"),
    ("torchrun", 4, MEMORY, "memory.txt", "--tokens 256 --hidden 1024 --experts 64 --top-k 8 --iterations 1000"),
]
ROOT = BENCH.parent
PAGES = [ROOT / "README.md", ROOT / "docs/benchmarks.md"]


def command(launcher: str, ranks: int, script: str, name: str, options: str) -> list[str]:
    """The command line of one run."""
    start = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)],
        "mpiexec": [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks), sys.executable],
    }[launcher]
    return [*start, str(BENCH / script), *shlex.split(options), "--out", str(RESULTS / name)]


def reports() -> list[list[str]]:
    """The command lines that write tables, plots and the page from what is there."""
    report = [sys.executable, str(BENCH / "report.py")]
    table = str(RESULTS / "dispatch_combine.json")
    everything = [str(path) for path in sorted(RESULTS.glob("*.json")) if path.stem != "internode"]
    curves = [str(RESULTS / f"{name}.json") for name in ("tiny", "scaling") if (RESULTS / f"{name}.json").exists()]
    plots = [*curves[:1], table, "--formats", "svg", "--plots", str(ROOT / "docs/assets/bench")]
    page = ["--html", str(ROOT / "docs/assets/bench/report.html")]
    return [[*report, table, "--into", *map(str, PAGES)], [*report, *plots], [*report, *everything, *page]]


def main() -> None:
    """Run all, one after the other; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="name of results; 'report' for none")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    runs = [command(*run) for run in RUNS if args.only in (None, run[3])]
    if args.only not in (None, "report", *(run[3] for run in RUNS)):
        parser.error(f"--only {args.only}: there are {', '.join(dict.fromkeys(run[3] for run in RUNS))}, report")
    for line in [*runs, *(reports() if not args.dry_run or args.only == "report" else [])]:
        print("+", *line, flush=True)
        if not args.dry_run:
            subprocess.run(line, env=environment, check=True)


if __name__ == "__main__":
    main()
