"""The benchmark of the kernels, and `make gpu-check`, as far as they go without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.record import read

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--tokens", "3", "--hidden", "32", "--top-k", "2", "--world", "2", "--experts", "4", "--repeats", "1"]
KERNELS = {"layout", "receive", "permute", "unpermute", "quantize", "reduce", "push_reduced", "push", "push_quantized"}
PADDED = {f"padded_{name}" for name in ("send", "send_fp8", "receive", "return", "sum")}


# Where kernels are interpreted, that is made quicker first.
SCRIPT = """
import os, runpy
if os.environ["TRITON_INTERPRET"] == "1":
    from tests.kernels.prepared import prepare
    prepare()
runpy.run_path("bench/bench_kernels.py", run_name="__main__")
"""


def bench(interpret: str, *options: str) -> str:
    environment = dict(os.environ, TRITON_INTERPRET=interpret, OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.timeout(330)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check runs it there")
def test_every_kernel_is_timed_against_a_copy(tmp_path: Path) -> None:
    printed = bench("1", *TINY, "--out", str(tmp_path / "kernels"))
    for operation, count in (
        *(("dispatch", 3), ("replay", 2), ("combine", 2)),
        *(("dispatch, padded", 2), ("combine, padded", 2)),
    ):
        assert f"{operation}: {count} launches" in printed
    rows = read([tmp_path / "kernels.json"])
    for path in ("moecomm", "memcpy"):
        assert {row.operation for row in rows if row.path == path} == KERNELS | PADDED
    for row in rows:
        assert row.p50_us > 0 and row.bytes_moved > 0 and row.percent_of_roof is not None
        assert row.percent_of_roof == 100.0 or row.path == "moecomm"
    (push,) = (row for row in rows if row.operation == "push" and row.path == "moecomm")
    (home,) = (row for row in rows if row.operation == "push_quantized" and row.path == "moecomm")
    assert push.bytes_moved > home.bytes_moved and push.extras["launch_us"]
    assert push.gate == "bit for bit" and push.ratio is None and len(push.routing_hash) == 12 and push.world == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why_it_skips() -> None:
    assert bench("0").startswith("no GPU: skipped, because torch")
