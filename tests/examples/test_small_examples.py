"""The small examples run, in this process where one rank is enough, and check themselves."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from moecomm.testing import run_ranks
from tests.scripts import run_forked

ROOT = Path(__file__).resolve().parents[2]
LISTED = (ROOT / "examples/README.md").read_text(encoding="utf-8")


def call(name: str, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run an example as the main program; its exit status."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return int(end.value.code or 0)


def test_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("one_process.py", monkeypatch=monkeypatch) == 0
    assert "1 dispatch, 1 replay, 1 combine" in capsys.readouterr().out


def test_overlap_on_two_ranks() -> None:
    options = ["--tokens", "16", "--hidden", "32", "--rounds", "2"]
    done, other = run_forked(ROOT / "examples/overlap.py", *options)
    assert done.returncode == other.returncode == 0, done.stderr
    assert "2 ranks over symmetric" in done.stdout and "both give the same bits" in done.stdout


def test_decoding_in_turns(tmp_path: Path) -> None:
    shape = ["--hidden", "64", "--experts", "4", "--top-k", "2", "--tokens", "4", "--layers", "2"]
    done, other = run_forked(ROOT / "examples/decode_overlap.py", *shape, "--out", str(tmp_path / "turns"))
    assert done.returncode == other.returncode == 0, done.stderr
    assert "of communication hidden (rank 0)" in done.stdout and (tmp_path / "turns.png").stat().st_size > 1000
    events = json.loads((tmp_path / "turns.json").read_text())["traceEvents"]
    assert {event["cat"] for event in events} == {"compute", "wait", "travel"}


def from_deepep(rank: int) -> tuple[int, str]:
    """As torchrun would start it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = runpy.run_path(str(ROOT / "examples/from_deepep.py"))["main"]()
    return int(status), printed.getvalue()


def test_from_deepep() -> None:
    for rank, (status, printed) in enumerate(run_ranks(from_deepep, 4, backend=None, timeout_s=100.0)):
        assert status == 0, printed
        assert re.findall(rf"rank {rank}: (\w+) of \d+ tokens differs by 0\.0\d+", printed) == ["prefill", "decode"]


def test_profiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "16", "--rounds", "2", "--out", str(tmp_path)]
    assert call("profiling.py", *options, monkeypatch=monkeypatch) == 0
    names = {event.get("name") for event in json.loads((tmp_path / "rank0.json").read_text())["traceEvents"]}
    assert {"moecomm::plan", "moecomm::send", "moecomm::wait"} <= names
    assert (tmp_path / "traffic.png").exists()
    assert 'moecomm_dispatches_total{rank="0"} 3' in capsys.readouterr().out


def test_every_example_is_listed() -> None:
    """Files that are started; the others are parts of them."""
    started = {path.name for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert started
    assert not started - set(re.findall(r"`(\w+\.py)`", LISTED))
