"""Transport `mpi`: ranks that do not come, stop, die, disagree, close early, and what MPI reports."""

from __future__ import annotations

import functools
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moecomm.testing import RankFailure, no_leaks
from moecomm.testing.mpi import mpi_missing
from tests.faults import _table
from tests.faults._mpi_ranks import play_all
from tests.faults._ranks import Outcome
from tests.faults._scenes import patience
from tests.faults.test_table import judge
from tests.under_mpi import run_under_mpi

pytestmark = [pytest.mark.skipif(bool(mpi_missing()), reason=mpi_missing()), pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """No process, and nothing in /dev/shm, however the ranks end."""
    with no_leaks():
        yield


# All ranks live after these: they follow each other in one job.
TOGETHER = ("absent", "absent_from_combine", "stopped", "mismatch", "closes_early")
CELLS = tuple(f"cell:{event}" for event in _table.EVENTS if event != "killed")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, Any]]:
    """What came of a scenario, all of which run in one job when one is first asked for."""
    folder = tmp_path_factory.mktemp("together")

    @functools.cache
    def printed() -> str:
        return trouble((*TOGETHER, *CELLS, "breaks_off"), 3, folder, timeout_s=350)

    return lambda scenario: said(scenario, 3, folder, printed())


def outcomes(scenario: str, size: int, folder: Path, dead: int) -> dict[int, Any]:
    """Run a scenario in which a rank is killed; what came of the others."""
    return said(scenario, size, folder, trouble((scenario,), size, folder, timeout_s=120, dead=dead), dead)


def trouble(scenarios: tuple[str, ...], size: int, folder: Path, timeout_s: float, dead: int | None = None) -> str:
    """Run scenarios on ranks that their launcher cannot end; what went wrong, if anything did."""
    expect_exit = {} if dead is None else {dead: -signal.SIGKILL}
    try:
        run_under_mpi(play_all, size, scenarios, folder, timeout_s=timeout_s, expect_exit=expect_exit)
    except RankFailure as failure:
        return str(failure)
    return ""


def said(scenario: str, size: int, folder: Path, printed: str, dead: int | None = None) -> dict[int, Any]:
    """What the ranks that live said of a scenario."""
    paths = {rank: folder / f"outcome.{scenario}.{rank}" for rank in range(size) if rank != dead}
    missing = [rank for rank, path in paths.items() if not path.exists()]
    assert not missing, f"ranks {missing} said nothing of {scenario}\n{printed[-6000:]}"
    results = {rank: pickle.loads(path.read_bytes()) for rank, path in paths.items()}
    raised = {rank: result for rank, result in results.items() if isinstance(result, BaseException)}
    assert not raised, f"{raised}\n{printed[-6000:]}"
    return results


@pytest.mark.parametrize("event", _table.EVENTS)
def test_cell(together: Callable[[str], dict[int, Any]], tmp_path: Path, event: str) -> None:
    scenario = f"cell:{event}"
    told = outcomes(scenario, 3, tmp_path, dead=1) if event == "killed" else together(scenario)
    judge("mpi", event, [Outcome(result=told.get(rank)) for rank in range(3)])


def test_absent_rank_is_named_and_a_new_buffer_works(together: Callable[[str], dict[int, Any]]) -> None:
    results = together("absent")
    for rank, ((kind, peers, message, took_s), again) in results.items():
        assert (kind, peers) == ("StallError", (2,)), message
        assert message.startswith(f"rank {rank}: dispatch #2: "), message
        assert took_s < patience(1.0 if rank == 2 else 6.0), message
        assert again[0] == "StallError" and "failed earlier" in again[2]
    assert "waiting for rank 2" in results[0][0][2] or "because of rank 2" in results[0][0][2]
    assert "because of this rank" in results[2][0][2]


def test_rank_absent_from_combine_is_named(together: Callable[[str], dict[int, Any]]) -> None:
    for rank, (kind, peers, message, _) in together("absent_from_combine").items():
        assert (kind, peers) == ("StallError", (0,)), message
        assert message.startswith(f"rank {rank}: combine #1: "), message


def test_stopped_rank_is_named(together: Callable[[str], dict[int, Any]]) -> None:
    for rank, (kind, peers, message, _) in together("stopped").items():
        assert (kind, peers) == ("StallError", (1,)), message
        assert message.startswith(f"rank {rank}: dispatch #2: "), message


@pytest.mark.parametrize("scenario", ["killed_before_rows", "killed_among_rows"])
def test_killed_rank_is_named_at_once(tmp_path: Path, scenario: str) -> None:
    results = outcomes(scenario, 3, tmp_path, dead=1)
    for rank, ((kind, peers, message, took_s), closing_s) in results.items():
        assert (kind, peers) == ("PeerLostError", (1,)), message
        assert message.startswith((f"rank {rank}: dispatch #2: ", f"rank {rank}: dispatch #3: ")), message
        assert took_s < 30.0, "long before the deadline of 60 s"
        assert closing_s < patience(1.0)


def test_ranks_that_disagree_are_named_and_a_new_buffer_works(together: Callable[[str], dict[int, Any]]) -> None:
    for rank, errors in together("mismatch").items():
        others = (0, 2) if rank == 1 else (1,)
        assert [(kind, peers) for kind, peers, _, _ in errors] == [("DesyncError", others)] * 3, errors
        assert max(took_s for *_, took_s in errors) < 30.0, "long before the deadline of 60 s"
        assert "align=2" in errors[0][2] and "align=1" in errors[0][2]
        assert "rank 1 called dispatch" in errors[1][2] or "rank 0 called combine" in errors[1][2]
        assert "routing=" in errors[2][2], "handles of different dispatches differ in their routing"


def test_rank_that_closes_early_is_named_at_once(together: Callable[[str], dict[int, Any]]) -> None:
    results = together("closes_early")
    assert results.pop(1) < 1.0, "close waits for nobody"
    for kind, peers, message, took_s in results.values():
        assert (kind, peers) == ("PeerLostError", (1,)), message
        assert "closed its buffer" in message
        assert took_s < 30.0, "long before the deadline of 60 s"


def test_error_of_mpi_is_ours_and_reaches_the_others(together: Callable[[str], dict[int, Any]]) -> None:
    results = together("breaks_off")
    kind, _, message, _ = results.pop(1)
    assert kind == "PeerLostError"
    assert message.startswith("rank 1: dispatch #2: MPI reports an error: got "), message
    for kind, _, message, took_s in results.values():
        assert kind == "PeerLostError"
        assert "rank 1 gave up in dispatch: MPI reports an error" in message
        assert took_s < 30.0, "long before the deadline of 60 s"
