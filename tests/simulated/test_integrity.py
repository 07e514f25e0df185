"""`check=`: a row that is not what was sent is named, with evidence, on all ranks; a right one is never accused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import moecomm
from moecomm.errors import ConfigError, CorruptionError
from moecomm.integrity import row_sums, row_sums_ref
from moecomm.testing import CASES, Case
from moecomm.testing.conformance import run_conformance
from moecomm.testing.simulated import Faults, SimulatedRows, results_of, simulate

NAMES = ("ragged_tokens", "odd_align", "quantised_pair", "tiny_hidden", "opaque_bytes", "all_empty", "duplicate_expert")


def conform(group: Any, case: Case, check: str) -> list[Any]:
    return run_conformance(group, "simulated", [case], rounds=2, timeout_s=60.0, check=check)


@pytest.mark.parametrize("check", ["cheap", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_the_right_rows_are_never_accused(name: str, check: str) -> None:
    for results in results_of(simulate(conform, 3, CASES[name], check, seed=1, faults=Faults(fragments=3))):
        assert len(results) >= 4 and [result.message for result in results if not result.ok] == []


def steps(group: Any, check: str, layout: str = "expert") -> None:
    shape: dict[str, Any] = {"num_experts": 6, "hidden": 9, "top_k": 2, "max_tokens_per_rank": 8, "timeout_s": 30.0}
    with moecomm.Buffer(group, **shape, dtype=torch.float32, check=check) as buffer:
        for round in range(3):
            generator = torch.Generator().manual_seed(10 * round + group.rank)
            x, idx = torch.randn(8, 9, generator=generator), torch.randint(0, 6, (8, 2), generator=generator)
            out: Any = buffer.dispatch(x, idx, torch.rand(8, 2, generator=generator), layout=layout)
            buffer.combine(out.x, out.handle)


def accused(call: Callable[[], list[Any]]) -> CorruptionError:
    """The error of the rank that saw it; the others must have heard of it."""
    outcomes = call()
    errors = [outcome.error for outcome in outcomes]
    assert all(isinstance(error, CorruptionError) for error in errors), [outcome.trace for outcome in outcomes]
    seen = [error for error in errors if isinstance(error, CorruptionError) and error.evidence]
    assert seen
    for error in seen:
        assert Path(error.evidence).exists() and error.evidence in str(error)
    return seen[0]


@pytest.fixture(autouse=True)
def evidence_folder(tmp_path: Path) -> Any:
    with mock.patch("tempfile.tempdir", str(tmp_path)):
        yield


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_is_found_by_a_full_check(seed: int) -> None:
    error = accused(lambda: simulate(steps, 2, "full", seed=seed, faults=Faults(corrupt=1.0)))
    assert error.operation in ("dispatch", "combine") and error.seq is not None and len(error.peers) == 1


def lane_fault(change: Callable[[SimulatedRows, list[torch.Tensor]], None], at: int) -> Any:
    """Change what rank 1 received in exchange `at`, payload and tags being lanes of their own."""
    wait = SimulatedRows.wait

    def faulty(self: SimulatedRows) -> list[torch.Tensor]:
        first = self._out is None
        out = wait(self)
        if first and self._seq == at and self._transport.group.rank == 1:
            change(self, out)
        return out

    return mock.patch.object(SimulatedRows, "wait", faulty)


def swap_rows(_: SimulatedRows, out: list[torch.Tensor]) -> None:
    out[0][[0, 1]] = out[0][[1, 0]]


def swap_rows_with_tags(_: SimulatedRows, out: list[torch.Tensor]) -> None:
    swap_rows(_, out)
    out[-1][[0, 1]] = out[-1][[1, 0]]


def lose_the_tail(_: SimulatedRows, out: list[torch.Tensor]) -> None:
    out[0][0, -1] ^= 255


def lose_a_row(_: SimulatedRows, out: list[torch.Tensor]) -> None:
    for lane in out:
        lane[1] = 255


def give_an_older_generation(rows: SimulatedRows, out: list[torch.Tensor]) -> None:
    for lane in out:
        tags = lane.view(torch.int64) if lane.shape[1] == 24 else None
        if tags is not None:
            tags[:, 0] -= 2 << 32


FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "two rows changed places": (swap_rows, "its check sum is"),
    "two rows changed places with their tags": (swap_rows_with_tags, "its tag says that"),
    "the last byte is another": (lose_the_tail, "its check sum is"),
    "a row never came": (lose_a_row, "nothing that belongs here was ever written"),
    "the rows are those of an older operation": (give_an_older_generation, "its tag is of operation"),
}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_a_cheap_check_finds(name: str, at: int) -> None:
    change, reason = FAULTS[name]
    with lane_fault(change, at):
        error = accused(lambda: simulate(steps, 2, "cheap", seed=3))
    assert reason in error.what and error.rank == 1 and error.seq == at, str(error)
    assert error.operation == ("dispatch", "combine")[at] and error.phase == f"arrival of {error.operation}, rows"
    if at or not any(word in reason for word in ("tag", "nothing")):
        assert error.token is not None and f"(token {error.token} of rank" in str(error)
    with np.load(error.evidence) as evidence:
        assert json.loads(str(evidence["told"]))["rank"] == 1 and evidence["rows"].shape[1] == 36


def test_without_a_check_nothing_is_said() -> None:
    with lane_fault(swap_rows, 0):
        assert results_of(simulate(steps, 2, "off", seed=3)) == [None, None]


def test_the_environment_sets_it_and_wrong_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"num_experts": 2, "hidden": 4, "top_k": 1, "max_tokens_per_rank": 2}
    monkeypatch.setenv("MOECOMM_CHECK", "full")
    with moecomm.Buffer(**shape) as buffer:
        assert buffer.config.check == "full"
    with moecomm.Buffer(**shape, check="off") as buffer:
        assert buffer.config.check == "off"
    monkeypatch.setenv("MOECOMM_CHECK", "some")
    with pytest.raises(ConfigError, match=r"check is unknown: got 'some'; expected one of \('off', 'cheap', 'full'\)"):
        moecomm.Buffer(**shape)


def test_room_for_tags_is_planned() -> None:
    shape: dict[str, Any] = {"num_ranks": 4, "num_experts": 8, "hidden": 64, "top_k": 2, "max_tokens_per_rank": 64}
    sizes = [moecomm.Buffer.plan_memory(**shape, check=check).total_bytes for check in ("off", "cheap", "full")]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("row_bytes", [1, 3, 8, 15, 16, 36])
def test_sums_see_every_byte_that_counts(row_bytes: int) -> None:
    rows = torch.randint(0, 256, (1, row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(row_bytes))
    for every_byte in (False, True):
        assert torch.equal(row_sums(rows, every_byte=every_byte), row_sums_ref(rows, every_byte=every_byte))
        before = int(row_sums(rows, every_byte=every_byte))
        for at in range(row_bytes):
            changed = rows.clone()
            changed[0, at] ^= 1
            seen = int(row_sums(changed, every_byte=every_byte)) != before
            assert seen or (not every_byte and 8 <= at < row_bytes - 8)
