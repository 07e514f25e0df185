"""The conformance suite over transport `mpi`: one job of mpiexec per group size runs all named cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecomm.testing import CASES
from moecomm.testing.mpi import mpi_missing, run_mpi

SUITE = Path(__file__).with_name("test_conformance.py")
NUM_RANDOM = 4


@pytest.mark.skipif(bool(mpi_missing()), reason=mpi_missing())
@pytest.mark.timeout(900)  # all cases in one process start; a minute on two idle cores
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_cases(world_size: int) -> None:
    arguments = ["-m", "mpi4py", str(SUITE), "--transport", "mpi", "--random", str(NUM_RANDOM)]
    done = run_mpi(arguments, world_size, timeout_s=840)
    assert done.returncode == 0, done.stdout
    said = f"mpi: {len(CASES) + NUM_RANDOM} cases, {world_size} ranks, "
    assert said in done.stdout and " 0 failed" in done.stdout, done.stdout
