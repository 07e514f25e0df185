"""Every kernel by itself, in GB/s and against the copy rate of the device measured in the same run.

    python bench/bench_kernels.py                       # on a GPU: the whole grid; with two or more: NCCL beside it
    TRITON_INTERPRET=1 python bench/bench_kernels.py --tokens 4 --hidden 64 --top-k 2 --world 2 --iterations 1

W ranks live in one process on one GPU, whose kernels run one after another, so nothing waits: what is timed is what a
kernel reads and writes. Rows go to `bench/results/kernels.json`. The peers' memory is that of the same GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moecomm
from bench.record import Measurement, environment, percentiles, write

ROOT = Path(__file__).resolve().parents[1]
TOKENS, HIDDEN, TOP_K = (1, 16, 128, 1024, 4096, 8192), (2048, 4096, 7168), (1, 2, 4, 8)
# What others publish: the options of bench_dispatch_combine.py for it, ranks, and their words.
PUBLISHED = (
    (("--preset", "deepseek-v3", "--tokens", "4096"), 8, "DeepSeek-V3 shape, EP8"),
    (
        ("--tokens", "4096", "--hidden", "4096", "--experts", "8", "--top-k", "2"),
        2,
        "2 x H100: best published pure-Triton figure 80.1 us (dispatch), 83.4 us (combine)",
    ),
)


@dataclass(frozen=True)
class Work:
    """One kernel: how to launch it, and the bytes that it reads and writes."""

    name: str
    launch: Callable[[], Any]
    num_bytes: int


class Bench:
    """W ranks on one device, a routing, and what every kernel needs to be launched again and again."""

    def __init__(self, tokens: int, hidden: int, top_k: int, world: int, experts: int, device: str) -> None:
        from moecomm.kernels.rows import RowFormat
        from moecomm.kernels.wire import Wire, buffer_bytes, loopback

        self.tokens, self.hidden, self.top_k, self.world = tokens, hidden, top_k, world
        generator = torch.Generator().manual_seed(tokens + hidden + top_k)
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        self.ids = ids.to(device, torch.int32)
        self.weights = torch.rand(tokens, top_k, generator=generator).to(device)
        self.x = torch.randn(tokens, hidden, device=device).bfloat16()
        self.form = RowFormat(hidden, torch.bfloat16)
        local = experts // world
        self.wire = Wire.of(world, top_k, local, self.form.wire_bytes + 64)
        memory = torch.zeros(world, buffer_bytes(self.wire, tokens), dtype=torch.uint8, device=device)
        self.links, self.memory = loopback(self.wire, tokens, memory=memory)
        self.tables = (
            torch.arange(experts, dtype=torch.int32, device=device),
            torch.arange(0, experts + 1, local, dtype=torch.int32, device=device),
        )
        self.local = local

    def works(self) -> Iterator[Work]:
        """Every kernel, in an order in which what it waits for has been sent. All ranks send the same tokens."""
        from moecomm.kernels.combine import push_reduced
        from moecomm.kernels.layout import layout
        from moecomm.kernels.permute import permute, unpermute
        from moecomm.kernels.push import push, push_quantized
        from moecomm.kernels.quant import quantize
        from moecomm.kernels.receive import receive
        from moecomm.kernels.reduce import reduce
        from moecomm.kernels.rows import Arriving

        wire, row, me = self.wire, 2 * self.hidden, self.links[0]
        facts = {"wire": wire, "max_tokens": self.tokens, "status": me.status}
        sent = layout(self.ids, self.weights, *self.tables, **facts)
        counts = sent.counts.cpu()
        pairs, come, entries = (
            int(counts[:, 0].sum()),
            self.world * int(counts[0, 0]),
            self.world * int(counts[0, 1:].sum()),
        )
        order = torch.randperm(self.tokens).to(self.x.device, torch.int32)
        meta, line = 4 * wire.meta_words, 4 * self.top_k
        yield Work(
            "layout",
            lambda: layout(self.ids, self.weights, *self.tables, **facts),
            self.tokens * (2 * line + meta + 4 * self.world),
        )
        for link in self.links:
            push(self.x, sent, link, wire=wire)
        come_rows = Arriving(me, wire, self.form)
        sizes = {"experts": (0, self.local), "num_pairs": come, "num_rows": entries}
        got = receive(come_rows, **sizes)
        yield Work("receive", lambda: receive(come_rows, **sizes), come * (row + meta + line) + entries * (row + 4))
        again = come_rows._replace(wire_row=got.wire_row)
        yield Work("permute", lambda: permute(again, got.table, num_rows=entries), come * (row + line) + entries * row)
        yield Work("unpermute", lambda: unpermute(self.x, order), 2 * self.tokens * row)
        fp8 = self.hidden + 4 * -(-self.hidden // 128)
        yield Work("quantize", lambda: quantize(self.x), self.tokens * (row + fp8))
        for link in self.links:  # what rank 0 would get if all ranks had its rows
            push(self.x, sent, link, wire=wire, replay=True)
        yield Work(
            "reduce", lambda: reduce(come_rows, sent.pair_row), pairs * row + self.tokens * (row + 4 * self.world)
        )
        home = got.table, got.weights, got.wire_row, got.token, me
        yield Work(
            "push_reduced",
            lambda: push_reduced(got.x, *home, wire=wire),
            entries * (row + 4) + come * (row + line + 8),
        )
        yield Work("push", lambda: push(self.x, sent, me, wire=wire), self.tokens * (row + meta) + pairs * (row + meta))
        yield Work(
            "push_quantized",
            lambda: push_quantized(self.x, sent, me, wire=wire),
            self.tokens * (row + meta) + pairs * (fp8 + meta),
        )
        assert not me.status.any(), f"a kernel gave up: {me.status.tolist()}"


def time_us(launch: Callable[[], Any], iterations: int, on_gpu: bool) -> tuple[list[float], float]:
    """Time of each launch on the device, and of the host for one launch, in microseconds."""
    launch()
    if not on_gpu:
        times = []
        for _ in range(iterations):
            start = time.perf_counter()
            launch()
            times.append(1e6 * (time.perf_counter() - start))
        return times, min(times)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
    asleep, cycles = torch.cuda.Event(), 10_000_000
    while True:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)  # until everything is queued: else the host's pace would be timed
        asleep.record()
        start = time.perf_counter()
        for begin, end in marks:
            begin.record()
            launch()
            end.record()
        host = 1e6 * (time.perf_counter() - start) / iterations
        in_time = not asleep.query()
        torch.cuda.synchronize()
        if in_time:
            return [1e3 * begin.elapsed_time(end) for begin, end in marks], host
        cycles *= 2


def copy_us(num_bytes: int, iterations: int, device: str) -> list[float]:
    """Times of a device copy that reads and writes so many bytes together: the roof."""
    source = torch.zeros(max(1, num_bytes // 2), dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    return time_us(lambda: out.copy_(source), iterations, device != "cpu")[0]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels that are launched inside."""
    import importlib

    names: list[str] = []
    modules = [importlib.import_module(f"moecomm.kernels.{name}") for name in ("layout", "push", "receive", "combine")]
    modules += [importlib.import_module(f"moecomm.kernels.{name}") for name in ("reduce", "permute", "sync")]
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
        found["combine"] = list(names)
    return found


def measure(given: argparse.Namespace, tokens: int, hidden: int, top_k: int, device: str) -> list[Measurement]:
    """Rows of one shape: each kernel, and a copy of as many bytes beside it."""
    experts = given.experts
    bench = Bench(tokens, hidden, top_k, given.world, experts, device)
    common: dict[str, Any] = {
        "benchmark": "kernels",
        "case": f"T {tokens}, H {hidden}, K {top_k}, W {given.world}",
        "transport": "symmetric",
        "dtype": "bfloat16",
        "hidden": hidden,
        "experts": experts,
        "top_k": top_k,
        "world": given.world,
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "iterations": given.iterations,
        "bytes_local": 0,
        "bytes_remote": 0,
        "dedup_local_bytes": None,
        "dedup_remote_bytes": 0,
        "command": shlex.join(["python", *sys.argv]),
        **environment(),
    }
    rows = []
    for work in bench.works():
        times, host = time_us(work.launch, given.iterations, device != "cpu")
        roof = percentiles(copy_us(work.num_bytes, given.iterations, device))
        ours = percentiles(times)
        for path, (p20, p50, p80, p99) in (("moecomm", ours), ("memcpy", roof)):
            measured: dict[str, Any] = {
                "p20_us": p20,
                "p50_us": p50,
                "p80_us": p80,
                "p99_us": p99,
                "bytes_moved": work.num_bytes // 2,
                "gb_per_s": round(work.num_bytes / p50 / 1e3, 3),
                "percent_of_roof": round(100 * roof[1] / p50, 1),
                "extras": {"launch_us": round(host, 2)} if path == "moecomm" else {},
            }
            rows.append(Measurement(**common, operation=work.name, path=path, **measured))
    return rows


def show(rows: list[Measurement]) -> None:
    """A table on standard output."""
    print(f"{'case':34} {'kernel':15} {'p50 us':>9} {'GB/s':>8} {'of copy':>8} {'launch us':>9}")
    for row in rows:
        if row.path == "moecomm":
            launch = row.extras["launch_us"]
            print(
                f"{row.case:34} {row.operation:15} {row.p50_us:9.1f} {row.gb_per_s:8.1f} {row.percent_of_roof:6.1f} %"
                f" {launch:>9}"
            )


def between_gpus() -> int:
    """Dispatch and combine against NCCL's all_to_all_single, at the shapes that others publish; worst exit code."""
    here, worst = torch.cuda.device_count(), 0
    for options, world, words in PUBLISHED:
        if here < world:
            print(f"{words}: skipped, because {world} GPUs are needed and {here} are here")
            continue
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        print(words, flush=True)
        out = ["--device", "cuda", "--transport", "symmetric", "--out", str(ROOT / "bench" / "results" / "nvlink")]
        command = [*torchrun, str(ROOT / "bench" / "bench_dispatch_combine.py"), *options, *out]
        worst = max(worst, subprocess.run(command, cwd=ROOT, check=False).returncode)
    return worst


def main() -> int:
    """Measure the grid, write the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--hidden", type=int, nargs="*", default=HIDDEN)
    parser.add_argument("--top-k", type=int, nargs="*", default=TOP_K)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kernels")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        print(f"no GPU: skipped, because torch {torch.__version__} sees none (TRITON_INTERPRET=1 tries it on the CPU)")
        return 0
    device = "cuda" if on_gpu else "cpu"
    for operation, names in launches_per_operation(device).items():
        print(f"{operation}: {len(names)} launches ({', '.join(names)})")
    rows = []
    for tokens, hidden, top_k in itertools.product(given.tokens, given.hidden, given.top_k):
        rows += measure(given, tokens, hidden, top_k, device)
        if on_gpu:
            torch.cuda.empty_cache()
    write(rows, given.out)
    show(rows)
    return between_gpus() if on_gpu and torch.cuda.device_count() > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
