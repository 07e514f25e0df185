"""Run `bench_dispatch_combine.py` with ours made slower by 20 %, to see that `compare.py` notices.

torchrun --standalone --nproc-per-node 2 bench/plant.py --preset tiny --out out/slow
python bench/compare.py out/run.json out/slow.json      # exit status 1
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

sys.path.insert(0, str(FilePath(__file__).resolve().parents[1]))

from bench import bench_dispatch_combine, paths
from bench.harness import main

SLOWER = 1.2


def slowed(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, busy for a fifth of its time more."""

    def slow(*args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        end = start + SLOWER * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return result

    return slow


def plant() -> None:
    """Slow our path down; the baseline and the roofs stay."""
    make = paths.moecomm_path

    def make_slow(*args: Any) -> paths.Path:
        path = make(*args)
        return replace(path, dispatch=slowed(path.dispatch), combine=slowed(path.combine))

    vars(paths)["moecomm_path"] = make_slow


if __name__ == "__main__":
    plant()
    sys.exit(main(bench_dispatch_combine.BENCHMARK, bench_dispatch_combine.parser()))
