"""Comparing two runs: a slow-down is seen, noise is not; files that do not belong together are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench.compare import compare, main
from bench.harness import compared
from bench.record import Measurement, ResultsError, example, percentiles, write
from bench.sittings import merged


def a_run(seed: int, slower: float = 1.0, machine: float = 1.0, sigma: float = 0.05) -> list[Measurement]:
    """Two cases, each with ours and the baseline, from drawn times; ours may be slower, or the whole machine."""
    rng = np.random.default_rng(seed)
    rows = []
    for case in ("a", "b"):
        for path, us in (("moecomm", 100.0 * slower), ("baseline", 900.0), ("memcpy", 50.0)):
            p20, p50, p80, p99 = percentiles((machine * us * (1 + sigma * rng.standard_normal(40))).tolist())
            times = {"p20_us": p20, "p50_us": p50, "p80_us": p80, "p99_us": p99, "iterations": 40}
            rows.append(example(case=case, path=path, routing_hash="0", **times))
    return compared(rows)


def verdicts(before: Sequence[Measurement], after: Sequence[Measurement]) -> set[str]:
    return {change.verdict for change in compare(before, after)}


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_slow_down_is_seen_and_equal_runs_are_silent(seed: int) -> None:
    assert verdicts(a_run(seed), a_run(seed + 100)) == {"same"}
    assert verdicts(a_run(seed), a_run(seed + 100, slower=1.2)) == {"slower"}
    assert verdicts(a_run(seed), a_run(seed + 100, slower=0.8)) == {"faster"}


def test_a_slower_machine_is_no_regression() -> None:
    assert verdicts(a_run(1), a_run(2, machine=3.0)) == {"same"}
    assert {c.verdict for c in compare(a_run(1), a_run(2, machine=3.0), absolute=True)} == {"slower"}


def test_what_differs_between_sittings_is_what_explains_a_change() -> None:
    """Rounds of a sitting agree to 1 %; 15 % are a change where sittings do, not where they are 10 % apart."""

    def one(apart: float, slower: float = 1.0) -> Measurement:
        levels = [slower * (1 + apart * step) for step in (-1.5, -0.5, 0.0, 0.0, 0.5, 1.5)]
        return merged([example(p50_us=100 * at, p20_us=99 * at, p80_us=101 * at, ratio=9 / at) for at in levels])

    assert verdicts([one(0.01)], [one(0.01, slower=1.15)]) == {"slower"}
    assert verdicts([one(0.1)], [one(0.1, slower=1.15)]) == {"same"}


def test_one_disturbed_sitting_moves_no_number_and_is_told() -> None:
    rows = [example(p50_us=us, ratio=900 / us) for us in (98.0, 99.0, 100.0, 101.0, 102.0)]
    quiet, disturbed = merged(rows), merged([*rows[:4], example(p50_us=400.0, ratio=2.25)])
    assert disturbed.p50_us == pytest.approx(quiet.p50_us, rel=0.01)
    assert quiet.ratio_noise and disturbed.ratio_noise and disturbed.ratio_noise > 10 * quiet.ratio_noise


def test_what_is_too_noisy_to_tell_says_so() -> None:
    assert verdicts(a_run(1, sigma=0.8), a_run(2, sigma=0.8)) == {"noisy"}


def test_files_that_do_not_belong_together() -> None:
    with pytest.raises(ResultsError, match=r"no case in common: .*combine: a.* compare runs of one command"):
        compare([example()], [example(case="c")])
    with pytest.raises(ResultsError, match="routing 1 in one file, 2 in the other; use the same --seed"):
        compare([example(routing_hash="1")], [example(routing_hash="2")])
    with pytest.raises(ResultsError, match="one file was measured with --steady on, the other with off; use the same"):
        compare([example()], [example(steady=True)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        name: str(write(rows, tmp_path / name)[0])
        for name, rows in (
            ("a", a_run(1)),
            ("b", a_run(2)),
            ("slow", a_run(3, slower=1.2)),
            ("other", [example(case="z")]),
        )
    }
    assert main([files["a"], files["b"]]) == 0
    assert "0 slower, 0 faster, 2 same, 0 noisy; 0 rows" in capsys.readouterr().out
    assert main([files["a"], files["slow"]]) == 1
    assert "2 slower" in capsys.readouterr().out
    assert main([files["a"], files["slow"], "--json"]) == 1
    assert {change["verdict"] for change in json.loads(capsys.readouterr().out)} == {"slower"}
    assert main([files["a"], files["other"]]) == 2
    assert main([files["a"], str(tmp_path / "nothing.json")]) == 2
    err = capsys.readouterr().err
    assert "compare.py: error: the files have no case in common" in err and "cannot be read" in err
