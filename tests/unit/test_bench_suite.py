"""The suite goes on where it was stopped; tables and rows that are made without measuring anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import bench_internode, suite
from bench.internode_report import table as internode_table
from bench.options import settings
from bench.ranks import Ranks
from bench.record import example, read, write
from bench.report import main, scaling_table

RUN = ("torchrun", 2, "bench_decode.py", "decode", "--tokens 1,8")
COMMAND = "torchrun --standalone --nproc-per-node 2 bench/bench_decode.py --tokens 1,8"


def test_what_this_commit_has_measured_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    assert not suite.is_measured(RUN, "abc")
    write([example(case="T=1", command=COMMAND)], tmp_path / "decode")
    assert not suite.is_measured(RUN, "abc"), "one of two cases"
    write([example(case="T=8", command=COMMAND)], tmp_path / "decode")
    assert suite.is_measured(RUN, "abc") and not suite.is_measured(RUN, "abd")
    assert not suite.is_measured((*RUN[:4], "--tokens 1,9"), "abc")
    memory = ("torchrun", 4, suite.MEMORY, "memory.txt", "")
    (tmp_path / "memory.txt").write_text("growth\na machine torch 2 abc 2026-11-27\n")
    assert suite.is_measured(memory, "abc") and not suite.is_measured(memory, "ab")


def test_every_run_of_the_suite_has_options_that_its_script_knows() -> None:
    for run in suite.RUNS:
        words = suite.command(*run)
        assert Path(words[words.index("--out") - len(run[4].split()) - 1]).name == run[2]
        assert (suite.BENCH / run[2]).exists() and run[0] in ("python", "torchrun", "mpiexec")


def test_cost_per_token_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        example(
            tokens=tokens, operation=operation, p50_us=2.0 * tokens, case=f"{tokens}", extras={"plan_percent": 4.25}
        )
        for tokens in (1024, 256)
        for operation in ("dispatch", "combine", "both")
    ]
    lines = scaling_table(rows).splitlines()
    assert lines[2:4] == ["| 256 | 0.51 | 2.00 | 0.51 | 2.00 | 4.2 % |", "| 1024 | 2.05 | 2.00 | 2.05 | 2.00 | 4.2 % |"]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- scaling:begin -->\n<!-- scaling:end -->\n")
    results = str(write(rows, tmp_path / "run")[0])
    assert main([results, "--kind", "scaling", "--into", str(page), "--check"]) == 1
    assert main([results, "--kind", "scaling", "--into", str(page)]) == 0
    assert main([results, "--kind", "scaling", "--into", str(page), "--check"]) == 0
    assert "| 256 |" in page.read_text()
    capsys.readouterr()


def told(path: str, transport: str, operation: str, ms: float, num_bytes: float) -> dict[str, Any]:
    """What the ranks of two nodes tell of one path."""
    traffic = {"tx_bytes": [num_bytes, num_bytes], "rx_bytes": [num_bytes, num_bytes]}
    facts = {"gate": "checked", "peak_memory_bytes": 7}
    return {"path": path, "transport": transport, "operation": operation, "times_ms": [ms] * 3} | traffic | facts


def test_rows_between_nodes() -> None:
    """Two nodes of two ranks, two experts each; every rank has one token, for experts 0 and 7."""
    options = ["--tokens", "1", "--hidden", "8", "--experts", "8", "--top-k", "2", "--link-mbit", "8"]
    args = bench_internode.parser().parse_args(options)
    args.command = "python bench/bench_internode.py"
    (setting,) = settings(args)
    timings = [
        told(path, transport, operation, ms, num_bytes)
        for path, transport, ms, num_bytes in (("moecomm", "hierarchical", 1.0, 40.0), ("baseline", "", 4.0, 80.0))
        for operation in ("dispatch", "combine")
    ]
    overlap = {"compute": "cpu", "dispatch_ms": [2.0], "compute_ms": [2.0], "both_ms": [3.0]}
    answer = {"timings": timings, "overlaps": [overlap], "topk_idx": [[[0, 7]]] * 4}
    rows = bench_internode.rows_of(answer, setting, Ranks("cpu"), 2, 0)
    ours = {row.operation: row for row in rows if row.path == "moecomm"}["dispatch"]
    # Each node has to send two rows of 16 bytes; 40 bytes went, which take 40 us at 8 Mbit/s.
    assert (ours.extras["wire_minimum"], ours.extras["wire_bytes"], ours.extras["time_over_wire"]) == (32, 40, 25.0)
    assert (ours.ratio, ours.extras["bytes_saved"], ours.extras["hidden_cpu"]) == (4.0, 2.0, 50.0)
    assert (ours.percent_of_roof, ours.world, ours.nodes, ours.gate, ours.peak_memory_bytes) == (
        3.2,
        4,
        2,
        "checked",
        7,
    )
    assert "| 2 nodes, K = 2, 8 Mbit/s | dispatch | 0.00 (1.250x) |" in internode_table(rows)


def test_the_committed_rows_between_nodes_load() -> None:
    rows = read([suite.RESULTS / "internode.json"])
    assert {row.benchmark for row in rows} == {"internode"} and "| 4 nodes, K = 8 |" in internode_table(rows)
