"""What every benchmark shares: routings, options, records, and what happens when something is wrong."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import (
    bench_check,
    bench_decode,
    bench_deep_ep,
    bench_internode,
    bench_kernels,
    bench_memory,
    bench_moe_layer,
)
from bench.bench_dispatch_combine import BENCHMARK, needed_bytes, parser, run_case
from bench.harness import main
from bench.options import Setting, make_parser, settings
from bench.ranks import Ranks, bind_to_cores
from bench.record import Measurement, ResultsError, example, read
from bench.routing import Skew, make_routing, max_over_mean, routing_hash
from moecomm.presets import PRESETS
from moecomm.quant import QuantSpec

ROOT = Path(__file__).resolve().parents[2]


OURS_OUT = ("moecomm", "dispatch")
RunHere = Callable[[Callable[[Setting, Ranks], list[Measurement]], list[str]], tuple[int, str, str]]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunHere:
    """Run the benchmark in this process: exit status, standard output, standard error."""
    monkeypatch.setattr("bench.harness.os._exit", sys.exit)
    monkeypatch.setattr("bench.harness.signal.signal", lambda number, handler: None)
    monkeypatch.setattr("bench.ranks.torch.set_num_threads", lambda number: None)

    def run(case: Callable[[Setting, Ranks], list[Measurement]], options: list[str]) -> tuple[int, str, str]:
        benchmark = replace(BENCHMARK, run_case=case)
        try:
            code = main(benchmark, parser(), options)
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("skew", "expected"),
    [
        ("uniform", "fd81ebaf7533"),
        ("zipf:1.2", "aae5d433aa1e"),
        ("hot:0.5", "589bb53b7ce5"),
        ("ratio:4", "c65ca7e1d450"),
    ],
)
def test_routings_are_the_same_everywhere(skew: str, expected: str) -> None:
    ids = make_routing(Skew.parse(skew), tokens=100, experts=16, top_k=3, world=2, seed=5)
    assert routing_hash(ids) == expected
    for chosen in np.concatenate(ids):
        assert len(set(chosen.tolist())) == 3


@pytest.mark.parametrize("ratio", [1.0, 2.0, 5.0, 16.0 / 3.0])
def test_an_exact_ratio_is_exact(ratio: float) -> None:
    ids = make_routing(Skew("ratio", ratio), tokens=48, experts=16, top_k=3, world=2)
    assert max_over_mean(ids, 16) == pytest.approx(ratio, rel=1e-12)
    loads = np.sort(np.bincount(np.concatenate(ids).ravel(), minlength=16))
    assert loads[-2] - loads[0] <= 1, loads


def test_skews_skew() -> None:
    loads = [
        max_over_mean(make_routing(Skew.parse(text), tokens=500, experts=16, top_k=2, world=2), 16)
        for text in ("ratio:1", "uniform", "zipf:0.5", "zipf:1.5", "hot:0.9", "hot")
    ]
    assert loads == sorted(loads) and loads[-1] == 8.0


@pytest.mark.parametrize("text", ["", "zip", "uniform:1", "zipf:-1", "hot:1.5", "ratio:0.5", "ratio:x", "ratio:inf"])
def test_a_wrong_skew_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no skew: give uniform, zipf"):
        Skew.parse(text)


def test_an_impossible_ratio_says_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"with 8 experts and top-2 the ratio is at most 4"):
        make_routing(Skew("ratio", 5.0), tokens=16, experts=8, top_k=2, world=1)


def test_presets_are_those_of_the_models() -> None:
    shapes = {name: (p.hidden, p.experts, p.top_k) for name, p in PRESETS.items() if name != "tiny"}
    assert shapes == {
        "deepseek-v3": (7168, 256, 8),
        "qwen3-235b": (4096, 128, 8),
        "mixtral-8x7b": (4096, 8, 2),
        "gpt-oss-120b": (2880, 128, 4),
        "kimi-k2": (7168, 384, 8),
    }


def test_a_shape_of_its_own_gives_way_to_a_preset() -> None:
    own = make_parser("", {"hidden": [64, 32], "experts": [4], "top_k": [1, 2]}, tokens=[1, 2])
    shapes = [(s.hidden, s.top_k, s.tokens) for s in settings(own.parse_args([]))]
    assert shapes == [(h, k, t) for h in (64, 32) for k in (1, 2) for t in (1, 2)]
    (given,) = settings(own.parse_args(["--preset", "mixtral-8x7b", "--tokens", "3", "--top-k", "1"]))
    assert (given.hidden, given.experts, given.top_k) == (4096, 8, 1)


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (bench_decode, ["--layout", "rank"], "--layout rank means nothing here; give padded"),
        (bench_decode, ["--reduce", "rank"], "--reduce rank means nothing here; give source"),
        (bench_moe_layer, ["--quant", "int8"], "--quant int8 means nothing here; give none"),
        (bench_check, ["--quant", "fp8"], "--quant fp8 means nothing here; give none"),
        (bench_deep_ep, ["--transport", "mpi"], "--transport mpi means nothing here; give auto"),
        (bench_deep_ep, [], "moecomm.deep_ep stands on a process group: start this with torchrun"),
        (bench_kernels, ["--transport", "collective"], "--transport collective means nothing here; give auto or symm"),
        (bench_kernels, ["--experts", "9"], "--experts 9 cannot be spread evenly over --world 8"),
        (bench_kernels, ["--tokens", "0"], "--tokens 0: a kernel needs rows"),
        (bench_internode, ["--steady", "on"], "--steady on means nothing here; give auto or off"),
        (bench_decode, ["--out", "/proc/no/rows"], "--out: rows cannot be written there"),
        (bench_decode, ["--device", "cuda"], "--device cuda: torch finds no GPU here; give --device cpu"),
    ],
)
def test_what_a_benchmark_cannot_measure_is_refused(
    module: Any,
    options: list[str],
    says: str,
    run_here: RunHere,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.ranks.torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(module.BENCHMARK, module.parser(), ["--hidden", "16", "--top-k", "2", "--experts", "8", *options])
    err = capsys.readouterr().err
    assert f"bench_{module.BENCHMARK.name}.py: error: {says}" in err and "Traceback" not in err


def test_settings_are_every_skew_and_number_of_tokens() -> None:
    args = make_parser("").parse_args(["--preset", "mixtral-8x7b", "--tokens", "1,16", "--skew", "uniform,hot:0.5"])
    made = list(settings(args))
    assert [(s.tokens, str(s.skew)) for s in made] == [(t, k) for k in ("uniform", "hot:0.5") for t in (1, 16)]
    assert made[0].preset == "mixtral-8x7b" and made[0].row_bytes == 8192 and made[0].dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["dispatch_combine", "scaling"])
def test_committed_results_load(name: str) -> None:
    rows = read([ROOT / f"bench/results/{name}.json"])
    assert rows and {row.benchmark for row in rows} == {"dispatch_combine"} and any(row.ratio for row in rows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "cannot be read"),
        ('{"schema": 9, "rows": []}', "has schema 9, this version reads 2; run the benchmark again"),
        ('{"other": 1}', "holds no rows of a benchmark"),
        ('[{"a": 1}]', "holds no rows of a benchmark"),
    ],
)
def test_a_wrong_file_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=says):
        read([path])


def test_the_memory_needed_is_computed() -> None:
    args = make_parser("").parse_args(["--preset", "deepseek-v3", "--tokens", "4096"])
    (setting,) = settings(args)
    rows = 4096 * 8 * 7168 * 2  # what arrives, on average
    assert 8 * rows < needed_bytes(setting, 4) < 16 * rows


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--preset", "gpt-5"], 2, "invalid choice: 'gpt-5'"),
        (["--tokens", "1,x"], 2, "'x' is no whole number"),
        (["--hidden", "64,0"], 2, "'0' is not at least 1"),
        (["--quant", "fp9"], 2, "invalid choice: 'fp9'"),
        (["--layout", "padded"], 1, "--layout padded means nothing here; give expert or rank$"),
        (["--skew", "ratio:9"], 1, "the ratio is at most 4$"),
        (["--transport", "pigeon"], 1, "pigeon"),
        (["--tokens", "100000000", "--hidden", "7168"], 1, "needs about .* GB on one machine, .* fewer --tokens"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options: list[str], code: int, says: str, run_here: RunHere) -> None:
    got, _, err = run_here(run_case, options)
    assert got == code, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("bench_dispatch_combine.py: error: ") and re.search(says, line), err
    assert "Traceback" not in err


def test_the_rows_of_finished_cases_are_kept(tmp_path: Path, run_here: RunHere) -> None:
    out = tmp_path / "kept"

    def fails_later(setting: Setting, ranks: Ranks) -> list[Measurement]:
        if setting.tokens == 8:
            raise AssertionError("a wrong row")
        return run_case(setting, ranks)

    options = ["--tokens", "4,8", "--repeats", "1", "--warmup", "0", "--out", str(out)]
    code, _, err = run_here(fails_later, options)
    assert code == 1
    assert "rank 0: AssertionError: a wrong row. The rows of 1 finished case are in" in err
    assert {row["tokens"] for row in json.loads(out.with_suffix(".json").read_text())["rows"]} == {4}


@pytest.mark.parametrize("option", ["--repeats 3", "--sittings 2", "--steady on", "--quant fp8", "--json"])
def test_what_bench_memory_has_no_use_for_is_refused(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", *option.split()])
    with pytest.raises(SystemExit):
        bench_memory.main()
    assert f"{option.split()[0]} means nothing here" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_a_run_reads_a_sentence_and_keeps_rows(
    number: int, tmp_path: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr("bench.harness.signal.signal", handlers.__setitem__)

    def stopped_later(setting: Setting, ranks: Ranks) -> list[Measurement]:
        if setting.tokens == 8:
            handlers[number](number, None)
        return [example()]

    code, _, err = run_here(stopped_later, ["--tokens", "4,8", "--repeats", "1", "--out", str(tmp_path / "kept")])
    assert code == 1 and "Traceback" not in err
    assert (
        "told to end, because another rank has failed or somebody stopped the run. The rows of 1 finished case" in err
    )
    assert handlers[number] is signal.SIG_IGN


def test_sittings_take_turns_and_become_one_row(tmp_path: Path, run_here: RunHere) -> None:
    out, came = tmp_path / "rows", []

    def counted(setting: Setting, ranks: Ranks) -> list[Measurement]:
        came.append((setting.tokens, setting.repeats))
        return [example(case=str(setting.tokens), p50_us=90.0 + 10 * len(came), iterations=setting.repeats)]

    options = ["--tokens", "4,8", "--repeats", "5", "--sittings", "3", "--out", str(out)]
    code, _, err = run_here(counted, options)
    assert code == 0 and "[2/2] dispatch_combine: W=1 T=8" in err and "(sitting 3 of 3)" in err
    assert came == [(4, 2), (8, 2), (4, 2), (8, 2), (4, 1), (8, 1)]
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["p50_us"], row["iterations"], row["sittings"]) for row in rows] == [(120.0, 5, 3), (130.0, 5, 3)]
    assert rows[0]["p50_noise"] > 0 and rows[0]["ratio_noise"] is None
    code, _, err = run_here(counted, ["--repeats", "2", "--sittings", "3"])
    assert code == 1 and "--sittings 3 of 2 rounds: give as many --repeats at least" in err


def test_a_rank_is_bound_to_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[list[int]] = []
    cores_of = {0: {0, 1, 2, 3}, os.getppid(): {0, 1, 2, 3}}
    monkeypatch.setattr("bench.ranks.os.sched_getaffinity", cores_of.__getitem__)
    monkeypatch.setattr("bench.ranks.os.sched_setaffinity", lambda pid, cores: bound.append(list(cores)))
    for local_rank, local_world in ((0, 2), (1, 2), (2, 3), (0, 1)):
        bind_to_cores(local_rank, local_world)
    assert bound == [[0, 1], [2, 3], [2, 3]]
    cores_of[0] = {2}  # the launcher has bound it
    bind_to_cores(1, 2)
    assert len(bound) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(ValueError, match="--steady on: 5 ranks need a core each, and --device cpu; give --steady off"):
        Ranks("cpu", steady="on")


@pytest.mark.parametrize("quant", ["fp8", "int8", "logfmt10"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_quantised_rows_are_measured(quant: str, layout: str, run_here: RunHere) -> None:
    options = ["--tokens", "4", "--repeats", "1", "--warmup", "0", "--json", "--quant", quant, "--layout", layout]
    code, out, err = run_here(run_case, options)
    assert code == 0 and "no baseline: the frameworks' path" in err
    (row,) = (r for r in json.loads(out) if (r["path"], r["operation"]) == OURS_OUT)
    assert row["quant"] == quant and ("as the reference quantises" in row["gate"]) == (layout == "expert")
    sent = row["bytes_local"]
    assert sent and sent % QuantSpec.of(quant).row_bytes(512) == 0


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_decode_measures_every_transport(quant: str, run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--tokens", "0,4", "--repeats", "1", "--warmup", "0", "--json", "--quant", quant]
    assert main(bench_decode.BENCHMARK, bench_decode.parser(), options) == 0
    rows = [Measurement(**row) for row in json.loads(capsys.readouterr().out)]
    paths = {"moecomm", "moecomm zero copy", "memcpy"} | ({"baseline"} if quant == "none" else set())
    assert {row.path for row in rows} == paths
    assert all(row.gate and row.peak_memory_bytes for row in rows if row.path != "memcpy")


def test_the_levels_of_checks_are_measured(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--tokens", "4", "--repeats", "1", "--warmup", "0", "--json"]
    assert main(bench_check.BENCHMARK, bench_check.parser(), options) == 0
    rows = [Measurement(**row) for row in json.loads(capsys.readouterr().out)]
    assert {(row.path, row.operation) for row in rows} == {
        (f"check {level}", operation) for level in ("off", "cheap", "full") for operation in ("dispatch", "combine")
    }
    assert all(row.ratio for row in rows)


def test_rows_come_as_json(run_here: RunHere) -> None:
    code, out, _ = run_here(run_case, ["--tokens", "4", "--repeats", "1", "--warmup", "0", "--json"])
    assert code == 0
    rows = [Measurement(**row) for row in json.loads(out)]
    assert {row.path for row in rows} == {"moecomm", "baseline", "memcpy", "streamed copy"}
