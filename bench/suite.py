"""Run every benchmark that README and docs show, then write their tables, plots and the interactive page.

    python bench/suite.py                # about twelve minutes on two cores; leave the machine alone meanwhile
    python bench/suite.py --minutes 3    # begin no run after three minutes ...
    python bench/suite.py --resume       # ... and go on later: leave out what this commit has measured
    python bench/suite.py --only tiny    # the runs whose results have this name
    python bench/suite.py --dry-run      # print the commands

Results go to `bench/results/`: `dispatch_combine` (the table of the README), `scaling` (a large model over tokens),
`tiny` and `tiny_mpi` (over tokens, ranks, transports and skews), `decode` (layout "padded"), `moe_layer`, `deep_ep`,
`check`, `memory.txt`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.options import make_parser, settings
from bench.record import environment, read

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
TIMES, LAYER, MEMORY = "bench_dispatch_combine.py", "bench_moe_layer.py", "bench_memory.py"
DECODE, DEEP_EP, CHECK = "bench_decode.py", "bench_deep_ep.py", "bench_check.py"
SHAPE = "--hidden 7168 --experts 64 --top-k 8"
SHAPE_OF_NODES = "--hidden 4096 --experts 64 --top-k 8"
SHAPE_OF_SCALING = "--hidden 2048 --experts 64 --top-k 8"
# (launcher, ranks, script, name of the results, options)
RUNS: list[tuple[str, int, str, str, str]] = [
    ("torchrun", 4, TIMES, "dispatch_combine", f"{SHAPE} --tokens 16 --repeats 24 --warmup 6"),
    ("torchrun", 4, TIMES, "dispatch_combine", f"{SHAPE} --tokens 1024 --repeats 15"),
    ("torchrun", 2, TIMES, "dispatch_combine", f"{SHAPE} --tokens 16 --repeats 24 --warmup 6"),
    ("torchrun", 2, TIMES, "dispatch_combine", f"{SHAPE} --tokens 4096 --repeats 6 --warmup 1"),
    (
        "torchrun",
        2,
        TIMES,
        "scaling",
        f"{SHAPE_OF_SCALING} --tokens 256,512,1024,2048,4096,8192 --repeats 6 --warmup 1",
    ),
    ("torchrun", 2, TIMES, "tiny", "--preset tiny --tokens 1,16,128,1024 --transport auto,collective"),
    ("torchrun", 4, TIMES, "tiny", "--preset tiny --tokens 128 --transport auto,collective"),
    ("python", 1, TIMES, "tiny", "--preset tiny --tokens 128"),
    ("torchrun", 2, TIMES, "tiny", "--preset tiny --tokens 128 --skew zipf:1,ratio:2,hot:1"),
    ("mpiexec", 2, TIMES, "tiny_mpi", "--preset tiny --tokens 16,128,1024 --transport auto,mpi"),
    *(("mpiexec", n, TIMES, "mpi", f"{SHAPE_OF_NODES} --tokens 512 --repeats 12 --transport mpi") for n in (4, 2)),
    ("torchrun", 2, DECODE, "decode", "--repeats 10 --warmup 2"),
    ("torchrun", 4, DECODE, "decode", "--repeats 8 --warmup 2"),
    ("torchrun", 2, LAYER, "moe_layer", "--preset tiny --tokens 128,1024"),
    ("torchrun", 4, LAYER, "moe_layer", "--preset tiny --tokens 128"),
    ("torchrun", 4, DEEP_EP, "deep_ep", "--tokens 128 --repeats 80 --warmup 4"),
    ("torchrun", 4, CHECK, "check", "--tokens 1024 --repeats 10 --warmup 2"),
    ("torchrun", 4, MEMORY, "memory.txt", "--tokens 256 --hidden 1024 --experts 64 --top-k 8 --iterations 1000"),
]
ROOT = BENCH.parent
PAGES = [ROOT / "README.md", ROOT / "docs/benchmarks.md"]
PAGE_OF_MPI = ROOT / "docs/design/mpi.md"


def command(launcher: str, ranks: int, script: str, name: str, options: str) -> list[str]:
    """The command line of one run."""
    start = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)],
        "mpiexec": [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks), sys.executable],
    }[launcher]
    return [*start, str(BENCH / script), *shlex.split(options), "--out", str(RESULTS / name)]


def is_measured(run: tuple[str, int, str, str, str], commit: str) -> bool:
    """Whether the results of all cases of a run are there, from this commit."""
    launcher, ranks, script, name, options = run
    if script == MEMORY:
        path = RESULTS / name
        return path.exists() and f" {commit} " in path.read_text(encoding="utf-8")
    path = RESULTS / f"{name}.json"
    start = {"python": "python", "torchrun": f"torchrun --standalone --nproc-per-node {ranks}"}
    asked = f"{start.get(launcher, f'mpiexec -n {ranks} python')} bench/{script} {options}"
    cases = (
        {row.case for row in read([path]) if (row.command, row.commit) == (asked, commit)} if path.exists() else set()
    )
    return len(cases) == len(list(settings(make_parser(None).parse_known_args(shlex.split(options))[0])))


def reports() -> list[list[str]]:
    """The command lines that write tables, plots and the page from what is there."""
    report = [sys.executable, str(BENCH / "report.py")]
    table = str(RESULTS / "dispatch_combine.json")
    everything = [str(path) for path in sorted(RESULTS.glob("*.json"))]
    curves = [str(RESULTS / f"{name}.json") for name in ("tiny", "scaling") if (RESULTS / f"{name}.json").exists()]
    plots = [*curves[:1], table, "--formats", "svg", "--plots", str(ROOT / "docs/assets/bench")]
    page = ["--html", str(ROOT / "docs/assets/bench/report.html")]
    scaling = [*report, str(RESULTS / "scaling.json"), "--kind", "scaling", "--into", str(PAGES[1])]
    mpi = [*report, str(RESULTS / "mpi.json"), "--into", str(PAGE_OF_MPI)]
    decode = [*report, str(RESULTS / "decode.json"), "--views", "latency_over_tokens", "--formats", "svg"]
    latency = [[*decode, "--ranks", str(n), "--plots", str(ROOT / f"docs/assets/bench/decode_w{n}")] for n in (2, 4)]
    readme = [*report, table, "--into", *map(str, PAGES)]
    return [readme, mpi, scaling, [*report, *plots], *latency, [*report, *everything, *page]]


def main() -> None:
    """Run all, one after the other; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="name of results; 'report' for none")
    parser.add_argument("--resume", action="store_true", help="leave out what has been measured of this commit")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run later than that")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.only not in (None, "report", *(run[3] for run in RUNS)):
        parser.error(f"--only {args.only}: there are {', '.join(dict.fromkeys(run[3] for run in RUNS))}, report")
    start, commit = time.monotonic(), environment()["commit"]
    runs = [run for run in RUNS if args.only in (None, run[3]) and not (args.resume and is_measured(run, commit))]
    for number, run in enumerate(runs):
        if time.monotonic() - start > 60 * args.minutes:
            sys.exit(f"{len(runs) - number} runs are left: go on with --resume")
        execute(command(*run), args.dry_run)
    for line in reports():
        execute(line, args.dry_run)


def execute(line: list[str], dry_run: bool) -> None:
    """Print a command, and run it."""
    print("+", *line, flush=True)
    if not dry_run:
        subprocess.run(line, env={"OMP_NUM_THREADS": "1"} | os.environ, check=True)


if __name__ == "__main__":
    main()
