"""The conformance suite over transport `mpi`: one job of mpiexec runs all named cases in groups of every size."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from pathlib import Path
from typing import Any

import pytest

from moecomm.testing import CASES
from moecomm.testing.mpi import mpi_missing, run_mpi
from tests.conformance.test_conformance import main
from tests.under_mpi import run_under_mpi

LARGE = Path(__file__).with_name("_large_payload.py")
NUM_RANDOM = 4
ROUNDS = 4  # each layout and way to reduce once, and one of them after the others
SIZES = "4+3,1+2,2"  # one start for all: two groups of two share the cases


def run_suite(world: Any, options: list[str]) -> tuple[int, str]:
    """On a rank: what `main` returns, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return main(options), said.getvalue()


@functools.cache
def output() -> str:
    """What the job prints: a line of each group."""
    options = ["--transport", "mpi", "--random", str(NUM_RANDOM), "--rounds", str(ROUNDS), "--sizes", SIZES]
    results = run_under_mpi(run_suite, 4, options, timeout_s=840)
    said = "".join(said for _, said in results)
    assert [failed for failed, _ in results] == [0] * 4, said
    return said


@pytest.mark.skipif(bool(mpi_missing()), reason=mpi_missing())
@pytest.mark.timeout(900)  # all cases in one process start; a minute on two idle cores
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_cases(world_size: int) -> None:
    said = re.findall(rf"^mpi: (\d+) cases, {world_size} ranks, [1-9]\d* checks, 0 failed$", output(), re.MULTILINE)
    assert sum(map(int, said)) == len(CASES) + NUM_RANDOM, output()


@pytest.mark.skipif(bool(mpi_missing()), reason=mpi_missing())
def test_mpi_counts_rows_not_bytes() -> None:
    """So what an operation sends is limited to 2^31 rows. With 2100 of these rows (2.2 GB) it was run by hand."""
    done = run_mpi(["-m", "mpi4py", str(LARGE), "5"], 2, timeout_s=100)
    assert done.returncode == 0 and f"{5 << 20} bytes arrived" in done.stdout, done.stdout
    assert f"5 items of {1 << 20} bytes were sent" in done.stdout, done.stdout
