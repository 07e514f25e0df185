"""Time every kernel by itself, against a copy of as many bytes on the same device in the same run.

    python bench/bench_kernels.py --out bench/results/kernels   # the whole grid; with two GPUs: NCCL beside it
    TRITON_INTERPRET=1 python bench/bench_kernels.py --tokens 4 --hidden 64 --top-k 2 --world 2 --repeats 1

W ranks live in one process on one GPU, whose kernels run one after another, so nothing waits: what is timed is what a
kernel reads and writes. All ranks have the same rows and routing, and the peers' memory is that of the same GPU. Each
result is compared with a reference before anything is timed. Without a GPU the script says so, and ends well.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.case import make_case
from bench.harness import Benchmark, Recorder, compared, main
from bench.kernel_works import Bench
from bench.memory import PeakMemory
from bench.options import Setting, make_parser
from bench.padded_works import MOST_TOKENS, PaddedBench, padded_area_bytes
from bench.ranks import Ranks
from bench.record import Measurement
from bench.show import note
from bench.traffic import Traffic

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden": [2048, 4096, 7168], "experts": [64], "top_k": [1, 2, 4, 8]}
LAUNCHING = ("layout", "push", "receive", "combine", "reduce", "permute", "sync", "padded", "padded_home")
# What others publish: the options of bench_dispatch_combine.py for it, ranks, and their words.
PUBLISHED = (
    (("--preset", "deepseek-v3", "--tokens", "4096"), 8, "DeepSeek-V3 shape, EP8"),
    (
        ("--tokens", "4096", "--hidden", "4096", "--experts", "8", "--top-k", "2"),
        2,
        "2 x H100: best published pure-Triton figure 80.1 us (dispatch), 83.4 us (combine)",
    ),
)


def run_case(setting: Setting, ranks: Ranks) -> list[Measurement]:
    """Check each kernel and time it, and a copy of as many bytes beside it."""
    world = setting.options.world
    if ranks.world > 1:
        raise ValueError("all ranks of this benchmark live in one process: start it with python, and give --world")
    if not setting.tokens:
        raise ValueError("--tokens 0: a kernel needs rows")
    if setting.experts % world:
        raise ValueError(f"--experts {setting.experts} cannot be spread evenly over --world {world}")
    case = make_case(setting, 0, 1, ranks.device)
    whose = {"case": setting.case_name(world), "world": world, "transport": "symmetric"}
    recorder = Recorder("kernels", setting, ranks, case.ids_of_rank, **whose)
    rows = []
    works = [Bench(case, world, setting.experts).works()]
    if setting.tokens <= MOST_TOKENS:
        works.append(PaddedBench(case, world, setting.experts).works())
    for work in itertools.chain(*works):
        with PeakMemory(ranks.device) as peak:
            if work.before is not None:
                work.before()
            work.check(work.launch())
        times, launch_us = time_us(work.launch, setting, ranks.device, work.before)
        copies = copy_us(work.num_bytes, setting, ranks.device)
        moved = [Traffic(local=0, remote=0, dedup_local=0, dedup_remote=0, moved=work.num_bytes // 2)]
        extras = {"launch_us": round(launch_us, 2)}
        facts = {"gate": work.proves, "peak_memory_bytes": peak.bytes, "extras": extras}
        rows.append(recorder.row("moecomm", work.name, times, moved, **facts))
        rows.append(recorder.row("memcpy", work.name, copies, moved, transport=""))
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return compared(rows)


def time_us(
    launch: Callable[[], Any], setting: Setting, device: torch.device, before: Callable[[], Any] | None = None
) -> tuple[list[float], float]:
    """Time of each launch on the device, and of the host for one launch with what comes `before`, in microseconds."""
    before = before or (lambda: None)
    for _ in range(max(1, setting.warmup)):
        before()
        launch()
    if device.type == "cpu":
        times = []
        for _ in range(setting.repeats):
            before()
            start = time.perf_counter()
            launch()
            times.append(1e6 * (time.perf_counter() - start))
        return times, min(times)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(setting.repeats)]
    asleep, cycles = torch.cuda.Event(), 10_000_000
    while True:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)  # until everything is queued: else the host's pace would be timed
        asleep.record()
        start = time.perf_counter()
        for begin, end in marks:
            before()
            begin.record()
            launch()
            end.record()
        host = 1e6 * (time.perf_counter() - start) / setting.repeats
        in_time = not asleep.query()
        torch.cuda.synchronize()
        if in_time:
            return [1e3 * begin.elapsed_time(end) for begin, end in marks], host
        cycles *= 2


def copy_us(num_bytes: int, setting: Setting, device: torch.device) -> list[float]:
    """Times of a device copy that reads and writes so many bytes together: the roof."""
    source = torch.zeros(max(1, num_bytes // 2), dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    return time_us(lambda: out.copy_(source), setting, device)[0]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels that are launched inside."""
    import importlib

    names: list[str] = []
    modules = [importlib.import_module(f"moecomm.kernels.{name}") for name in LAUNCHING]
    plain = {module: vars(module)["launch"] for module in modules}

    def counting(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__.strip("_"))
        plain[modules[0]](kernel, *args, **options)

    try:
        for module in modules:
            vars(module)["launch"] = counting
        yield names
    finally:
        for module, launch in plain.items():
            vars(module)["launch"] = launch


def launches_per_operation(device: str) -> dict[str, list[str]]:
    """Kernels that a dispatch, a replayed one and a combine launch, counted on a buffer of one rank."""
    found = {}
    shape: dict[str, Any] = {"num_experts": 2, "hidden": 8, "top_k": 1, "max_tokens_per_rank": 4}
    with (
        counted() as names,
        moecomm.Buffer(**shape, dtype=torch.float32, device=device, transport="symmetric") as buffer,
    ):
        x, ids = torch.ones(3, 8, device=device), torch.zeros(3, 1, dtype=torch.int64, device=device)
        out = buffer.dispatch(x, ids)
        found["dispatch"], names[:] = list(names), []
        buffer.dispatch(x, handle=out.handle)
        found["replay"], names[:] = list(names), []
        buffer.combine(out.x, out.handle)
        found["combine"], names[:] = list(names), []
        out = buffer.dispatch(x, ids, layout="padded")
        found["dispatch, padded"], names[:] = list(names), []
        buffer.combine(buffer.combine_input(out.handle), out.handle)
        found["combine, padded"] = list(names)
    return found


def between_gpus() -> int:
    """Dispatch and combine against NCCL's all_to_all_single, at the shapes that others publish; worst exit code."""
    here, worst = torch.cuda.device_count(), 0
    for options, world, words in PUBLISHED:
        if here < world:
            note(0, f"{words}: skipped, because {world} GPUs are needed and {here} are here")
            continue
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        note(0, words)
        out = ["--device", "cuda", "--transport", "symmetric", "--out", str(ROOT / "bench" / "results" / "nvlink")]
        command = [*torchrun, str(ROOT / "bench" / "bench_dispatch_combine.py"), *options, *out]
        worst = max(worst, subprocess.run(command, cwd=ROOT, check=False).returncode)
    return worst


def needed_bytes(setting: Setting, world: int) -> int:
    """Bytes of all ranks: two generations of rows from everybody, what arrives, its copy, the copies' roof; slots."""
    here = setting.tokens * setting.options.world
    needed = (2 * setting.options.world * here + 6 * setting.tokens * (1 + setting.top_k)) * setting.row_bytes
    if setting.tokens > MOST_TOKENS:
        return needed
    return needed + 5 * setting.options.world * padded_area_bytes(setting.tokens, setting.experts, setting.row_bytes)


def parser() -> argparse.ArgumentParser:
    """The options of the family, and the number of ranks."""
    made = make_parser(__doc__, SHAPE, tokens=[1, 16, 128, 1024, 4096, 8192], repeats=30, warmup=1)
    made.add_argument("--world", type=int, choices=range(1, 65), metavar="W", default=8, help="ranks in this process")
    return made


BENCHMARK = Benchmark(
    name="kernels",
    run_case=run_case,
    needed_bytes=needed_bytes,
    takes={  # kernels are those of one transport; rows are quantised by a kernel of its own, whatever --quant
        "transport": ("auto", "symmetric"),
        "layout": ("expert",),
        "reduce": ("rank",),
        "quant": ("none",),
    },
)


def run() -> int:
    """Say what there is to time, time it, and what needs more than one GPU; the exit status."""
    on_gpu = torch.cuda.is_available()
    given = parser().parse_args()  # refuses, and shows help, before anything else
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        print(f"no GPU: skipped, because torch {torch.__version__} sees none (TRITON_INTERPRET=1 tries it on the CPU)")
        return 0
    for operation, names in launches_per_operation("cuda" if on_gpu else "cpu").items():
        note(0, f"{operation}: {len(names)} launches ({', '.join(names)})")
    status = main(BENCHMARK, parser())
    return status or (between_gpus() if on_gpu and given.device != "cpu" and torch.cuda.device_count() > 1 else 0)


if __name__ == "__main__":
    sys.exit(run())
