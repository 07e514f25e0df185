"""The checks of all kernels, in a process where Triton interprets: that is decided when a kernel is decorated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("tests/kernels/checks")
CHECKS = sorted(path.stem for path in (ROOT / FOLDER).glob("check_*.py"))
DEADLINE_S = 600
Outcomes = tuple[list[tuple[str, str, str]], str]


def run_checks(report: Path, *paths: Path) -> str:
    """Run files of checks in the interpreter, in one process; what it prints."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", f"--junitxml={report}"]
    options += ["--continue-on-collection-errors"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, paths)],
        cwd=ROOT,
        env=dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    ).stdout


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """File, name and complaint (empty: passed) of every check that was not skipped."""
    for case in ElementTree.parse(report).iter("testcase"):
        complaints = [f"{part.get('message')}\n{part.text}" for part in case if part.tag in ("failure", "error")]
        if complaints or case.find("skipped") is None:
            name = case.get("classname") or case.get("name") or ""  # a file that cannot be read has a name only
            yield name.rpartition(".")[2], case.get("name", ""), "\n".join(complaints)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Outcomes of all checks, and what they printed."""
    report = tmp_path_factory.mktemp("checks") / "report.xml"
    printed = run_checks(report, *(FOLDER / f"{name}.py" for name in CHECKS))
    assert report.exists(), f"the checks did not come to an end:\n{printed[-20000:]}"
    return list(outcomes(report)), printed


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(ran: Outcomes, name: str) -> None:
    found, printed = ran
    own = [(check, complaint) for file, check, complaint in found if file == name]
    assert own, f"no check of {name} ran:\n{printed[-5000:]}"
    failed = [f"{check}: {complaint}" for check, complaint in own if complaint]
    assert not failed, f"{len(failed)} of {len(own)} failed in {FOLDER / name}.py\n" + "\n\n".join(failed)


def test_there_are_checks() -> None:
    assert len(CHECKS) >= 12


FAULTY = """
import pytest, triton
def test_good():
    assert triton.knobs.runtime.interpret
def test_bad():
    assert 1 == 2, "so it is"
@pytest.mark.skip
def test_skipped():
    pass
"""


def test_a_failure_is_reported(tmp_path: Path) -> None:
    """A check that fails, and a file that cannot be read, come out as such."""
    for name, text in (("check_faulty.py", FAULTY), ("check_broken.py", "import nothing_of_that_name")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    report = tmp_path / "report.xml"
    run_checks(report, tmp_path / "check_broken.py", tmp_path / "check_faulty.py")
    found = {(file, name): complaint for file, name, complaint in outcomes(report)}
    (broken,) = (key for key in found if key[0] == "check_broken")
    assert set(found) == {("check_faulty", "test_good"), ("check_faulty", "test_bad"), broken}
    assert found["check_faulty", "test_good"] == "" and "so it is" in found["check_faulty", "test_bad"]
    assert "nothing_of_that_name" in found[broken]
