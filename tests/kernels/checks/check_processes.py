"""The kernels on real processes over shared memory, with real signals between them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kernels.checks.worlds import DEVICE

ROOT = Path(__file__).resolve().parents[3]
RUN_BYTES = 4 << 20
DEADLINE_S = 240

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="processes share CPU memory here")


def run_world(world_size: int, names: list[str], rounds: int, silent_from: int = -1) -> list[tuple[int, str]]:
    """Start one process per rank; exit code and output of each. No process and no memory is left behind."""
    fd = os.memfd_create("moecomm-kernels")
    os.truncate(fd, RUN_BYTES * len(names))
    command = [sys.executable, "-m", "tests.kernels.checks.rank_process"]
    arguments = [str(world_size), str(fd), str(RUN_BYTES), str(rounds), str(silent_from), *names]
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *arguments],
            cwd=ROOT,
            env=environment,
            pass_fds=[fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    os.close(fd)
    end = time.monotonic() + DEADLINE_S
    try:
        outputs = [rank.communicate(timeout=max(0.0, end - time.monotonic()))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(
    ("world_size", "rounds", "names"),
    [
        (1, 2, ["masked"]),
        (2, 4, ["ragged_tokens", "empty_rank/source", "quantised_pair"]),
        (4, 3, ["uneven_experts"]),
    ],
)
def test_ranks_as_processes(world_size: int, rounds: int, names: list[str]) -> None:
    for rank, (code, output) in enumerate(run_world(world_size, names, rounds)):
        assert code == 0 and f"rank {rank}: ok" in output, f"rank {rank} of {world_size}:\n{output}"


@pytest.mark.timeout(DEADLINE_S + 30)
def test_a_rank_that_stops_is_named() -> None:
    """The last rank ends after one round: the others give up in operation 3 and name it."""
    *others, silent = run_world(3, ["tiny_hidden"], 2, silent_from=1)
    assert silent[0] == 0, silent[1]
    for rank, (code, output) in enumerate(others):
        assert code != 0 and f"rank {rank}: status [0, 0, 3, 0, 0, 3," in output, output
