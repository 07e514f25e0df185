"""The public suite: it says what ran, names the first wrong place, and finds every planted fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moecomm.errors import ConfigError
from moecomm.testing import CASES, RankPool
from moecomm.testing.conformance import ConformanceResult, run_conformance
from moecomm.testing.planted import PLANTED, find_planted
from moecomm.testing.simulated import results_of, simulate
from moecomm.testing.suite import SuiteReport, run_suite

MUTANT_CASES = ("masked", "float32_payload")


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=150.0) as pool:
        yield pool


def suite_of_rank(rank: int, names: tuple[str, ...]) -> SuiteReport:
    return run_suite(minutes=0.01, cases=[CASES[name] for name in names], rounds=1)


def test_a_page_about_every_transport_that_works(pair: RankPool) -> None:
    first, second = pair.run(suite_of_rank, ("plain",))
    assert first.ok and first.page() == second.page()
    assert {result.transport for result in first.results} == {"symmetric", "hierarchical", "collective"}
    assert set(first.not_here) == {"local", "mpi"}
    assert "conformance on 2 ranks" in first.page() and "not here: the group has 2 ranks" in first.page()
    assert json.loads(json.dumps(first.as_dict()))["ok"] is True
    assert first.page().endswith("right")


def test_no_result_is_not_a_right_one() -> None:
    report = SuiteReport()
    assert not report.ok and report.page().endswith("NOTHING RAN")


def test_time_is_kept_and_what_was_left_out_is_said() -> None:
    report = run_suite(minutes=1e-9, transports=["local"], rounds=1)
    assert len({result.case for result in report.results}) == 1
    assert f"no time for {len(CASES) - 1} named cases" in report.page()


def simulated_suite() -> list[ConformanceResult]:
    def run(group: Any) -> list[ConformanceResult]:
        return run_conformance(
            group, "simulated", [CASES[name] for name in MUTANT_CASES], rounds=2, layouts=["expert"], reduces=["rank"]
        )

    return [result for results in results_of(simulate(run, 3, seed=8)) for result in results]


def test_every_planted_fault_is_found() -> None:
    torch.set_num_threads(1)
    found = find_planted(simulated_suite)
    assert len(found) == len(PLANTED) >= 12
    assert [name for name, message in found.items() if not message] == []
    assert "this row should be rank" in found["swapped rows"] and "got RowOrigin(rank=" in found["swapped rows"]


def plant_in_rank(rank: int) -> dict[str, str]:
    cases = [CASES[name] for name in MUTANT_CASES]
    return find_planted(
        lambda: run_conformance(None, "symmetric", cases, rounds=2, layouts=["expert"], reduces=["rank"], timeout_s=3.0)
    )


def test_every_planted_fault_is_found_between_processes(pair: RankPool) -> None:
    both = pair.run(plant_in_rank)
    missed = [name for name in both[0] if not both[0][name] and not both[1][name]]
    assert missed == [] and len(both[0]) == len(PLANTED)


def test_the_first_wrong_place_is_on_the_page() -> None:
    swapped = next(planted for planted in PLANTED if planted.name == "swapped rows")
    with swapped.patch():
        report = run_suite(minutes=1e-9, transports=["local"], cases=[CASES["plain"]], rounds=1)
    assert not report.ok and report.page().endswith("WRONG")
    assert "dispatch: x: row 0, column 0: expected" in report.page() and "this row should be rank 0" in report.page()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"minutes": float("nan")}, "minutes does not fit: got nan; expected a positive number"),
        ({"minutes": float("inf")}, "minutes does not fit"),
        ({"rounds": 0}, "rounds does not fit: got 0; expected at least 1"),
        ({"seed": 10**30}, "seed does not fit"),
        ({"seed": True}, "seed does not fit"),
        ({"transports": ["foo"]}, "transport is unknown: got 'foo'"),
    ],
)
def test_what_would_run_nothing_or_for_ever_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_suite(**{"minutes": 0.001, **given})
