"""The benchmark's arithmetic, and one small run of each script."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moecomm
from bench.baseline import baseline_combine, baseline_dispatch
from bench.record import Measurement, example, percentiles, read, write
from bench.report import insert, table
from bench.traffic import traffic
from tests.scripts import run_forked, run_torchrun

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["baseline", "compare", "memory", "record", "report", "roof", "routing", "traffic"])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"bench.{name}"))
    assert not found.failed


@pytest.mark.parametrize(("layout", "reduce"), [("expert", "rank"), ("expert", "source"), ("rank", "rank")])
def test_bytes_are_those_the_buffer_counts(layout: str, reduce: str) -> None:
    ids = torch.rand(20, 6).topk(3).indices
    ids[3, 1] = ids[7] = -1
    bytes_of = traffic([ids.numpy()], moecomm.ExpertPlacement.uniform(6, 1), layout=layout, reduce=reduce, row_bytes=20)
    with moecomm.Buffer(
        num_experts=6, hidden=5, top_k=3, max_tokens_per_rank=20, dtype=torch.float32, reduce=reduce
    ) as buffer:
        out = buffer.dispatch(torch.randn(20, 5), ids, layout=layout)
        assert isinstance(out.x, torch.Tensor)
        rows = buffer.stats()["rows_local"]
        assert bytes_of["dispatch"][0].local == 20 * rows == 20 * len(out.x)
        buffer.combine(out.x, out.handle)
        assert bytes_of["combine"][0].local == 20 * (buffer.stats()["rows_local"] - rows)
    assert bytes_of["dispatch"][0].remote == bytes_of["combine"][0].remote == 0


def test_bytes_of_two_ranks() -> None:
    """Rank 0 sends tokens to experts 0 1 | 2 3 of two ranks, rank 1 sends nothing."""
    ids = [np.array([[0, 1], [1, 2], [2, 3], [-1, 3]]), np.empty((0, 2), np.int64)]
    placement = moecomm.ExpertPlacement.uniform(4, 2)
    bytes_of = traffic(ids, placement, layout="expert", reduce="rank", row_bytes=10)
    out, home = bytes_of["dispatch"], bytes_of["combine"]
    assert (out[0].local, out[0].remote, out[0].dedup_remote, out[0].moved) == (30, 40, 30, 70)
    assert (out[1].local, out[1].remote, out[1].moved) == (0, 0, 0)
    # Rank 1 reads 4 rows and sends 3 sums; rank 0 reads 3 and writes 2, then reads 5 sums and writes 4 tokens.
    assert (home[1].local, home[1].remote, home[1].moved) == (0, 30, 35)
    assert (home[0].local, home[0].remote, home[0].moved) == (20, 0, 70)
    unsummed = traffic(ids, placement, layout="expert", reduce="source", row_bytes=10)["combine"]
    assert (unsummed[1].remote, unsummed[1].dedup_remote, unsummed[1].moved) == (40, 30, 40)


def test_baseline_gives_what_moecomm_gives() -> None:
    x, ids, weights = torch.randn(30, 7), torch.rand(30, 8).topk(3).indices, torch.rand(30, 3)
    rows, routing = baseline_dispatch(x, ids, 8)
    y = baseline_combine(2 * rows, weights, routing)
    with moecomm.Buffer(num_experts=8, hidden=7, top_k=3, max_tokens_per_rank=30, dtype=torch.float32) as buffer:
        out = buffer.dispatch(x, ids, weights)
        assert isinstance(out.x, torch.Tensor)
        assert torch.equal(out.x, rows), "first difference: " + str((out.x != rows).nonzero()[:1].tolist())
        ours = buffer.combine(2 * out.x, out.handle)
    exact = 2 * x.double() * weights.double().sum(1, keepdim=True)
    for got in (y, ours):
        error = (got.double() - exact).abs().max()
        assert error < 1e-5 and error < 2 * (y.double() - exact).abs().max() + 1e-6


def a_row(**changes: Any) -> Measurement:
    """A measurement with plausible numbers."""
    times = dict(zip(("p20_us", "p50_us", "p80_us", "p99_us"), percentiles([100.0, 200.0, 300.0]), strict=True))
    words = {"transport": "symmetric", "layout": "expert", "reduce": "rank", "dtype": "bfloat16"}
    return example(**({**words, **times, "percent_of_roof": 80.0} | changes))


def test_results_are_replaced_case_by_case(tmp_path: Path) -> None:
    write([a_row(), a_row(case="b")], tmp_path / "r")
    write([a_row(p50_us=7.0)], tmp_path / "r")
    assert [(row.case, row.p50_us) for row in read([tmp_path / "r.json"])] == [("b", 200.0), ("a", 7.0)]
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3


def test_table_holds_ours_beside_the_others() -> None:
    text = table([a_row(ratio=20.0), a_row(path="baseline", p50_us=4000.0), a_row(path="memcpy", p50_us=160.0)])
    assert "| 2 | 16 | dispatch | **0.20** (0.14, 0.26) | 4.00 | 20.0x | 0.16 | 80 % | 5.0 | 1.0 | 1.0 (1.0) |" in text


def test_insert_wants_both_markers() -> None:
    with pytest.raises(SystemExit, match=r"x\.md: no line"):
        insert("<!-- bench:end -->\n<!-- bench:begin -->\n", "new", Path("x.md"))


@pytest.mark.parametrize("options", [["--layout", "rank"], ["--reduce", "source", "--transport", "auto,collective"]])
def test_two_ranks_run_the_benchmark(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "small"
    small = ["--tokens", "0,9", "--hidden", "32", "--experts", "6", "--top-k", "2", "--repeats", "2", "--warmup", "1"]
    run("bench_dispatch_combine.py", *small, *options, "--out", str(out))
    rows = read([out.with_suffix(".json")])
    paths = {("moecomm", "symmetric"), ("memcpy", ""), ("streamed copy", "")}
    paths |= set() if "rank" in options else {("baseline", ""), ("moecomm", "collective")}
    assert {(row.path, row.transport, row.operation) for row in rows} == {
        (*p, o) for p in paths for o in ("dispatch", "combine", "both")
    }
    assert {row.tokens for row in rows} == {0, 9}
    for row in rows:
        assert row.p20_us <= row.p50_us <= row.p80_us <= (row.p99_us or 0.0) and row.world == 2
        assert row.percent_of_roof and (row.ratio or "rank" in options)
        assert row.command.startswith("torchrun --standalone --nproc-per-node 2 bench/bench_dispatch_combine.py --tok")
        assert "--out" not in row.command and len(row.routing_hash) == 12
        assert (
            row.path != "moecomm"
            or (row.gate and row.peak_memory_bytes and "plan_us" in row.extras)
            or (row.operation != "dispatch")
        )


def test_two_ranks_run_the_memory_check() -> None:
    text = run("bench_memory.py", "--tokens", "9", "--hidden", "32", "--iterations", "20")
    assert "100.00 %" in text and "20 iterations" in text


def test_a_rank_that_dies_leaves_the_finished_cases_and_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "partial"
    script = tmp_path / "bench_dispatch_combine.py"
    script.write_text(DIES)
    small = ["--preset", "tiny", "--tokens", "4,8,16", "--repeats", "1", "--warmup", "0", "--out", str(out)]
    done = run_torchrun(script, *small)  # it ends the ranks that are left
    assert done.returncode != 0
    assert re.search(r"bench_dispatch_combine\.py: error: rank 0: .*lost|gone|ended|told to end", done.stderr), (
        done.stderr
    )
    assert "The rows of 1 finished case are in" in done.stderr
    assert {row.tokens for row in read([out.with_suffix(".json")])} == {4}


DIES = f"""
import os, signal, sys
from dataclasses import replace
sys.path.insert(0, {str(ROOT)!r})
from bench.bench_dispatch_combine import BENCHMARK, parser, run_case
from bench.harness import main

def dies(setting, ranks):
    if ranks.rank == 1 and setting.tokens == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_case(setting, ranks)

sys.exit(main(replace(BENCHMARK, run_case=dies), parser()))
"""


def run(script: str, *options: str) -> str:
    """Standard output of a script on two forked ranks."""
    done, other = run_forked(ROOT / "bench" / script, *options)
    assert done.returncode == other.returncode == 0, done.stderr[-4000:]
    return done.stdout
