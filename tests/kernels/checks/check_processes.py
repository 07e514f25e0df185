"""The kernels on real processes over shared memory, with real signals between them."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from mmap import mmap
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from tests.kernels.checks.rank_process import Runs
from tests.kernels.checks.worlds import DEVICE

RUN_BYTES = 4 << 20
DEADLINE_S = 240
FORK: Any = multiprocessing.get_context("fork")  # a start of Python with torch and Triton takes seconds

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="processes share CPU memory here")


def play(runs: Runs, rank: int, result: Connection) -> None:
    """In the process of a rank."""
    complaint = ""
    try:
        runs.play(rank)
    except AssertionError:
        complaint = traceback.format_exc()
    result.send(complaint)


@contextlib.contextmanager
def started(runs: Runs) -> Iterator[list[Connection]]:
    """A process per rank, none of which is left behind."""
    pipes = [FORK.Pipe(duplex=False) for _ in range(runs.world_size)]
    processes = [FORK.Process(target=play, args=(runs, rank, end)) for rank, (_, end) in enumerate(pipes)]
    try:
        for process in processes:
            process.start()
        for _, end in pipes:
            end.close()
        yield [ours for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_world(world_size: int, names: list[str], rounds: int, silent_from: int = -1) -> list[str]:
    """What each rank has to complain about; a rank that dies raises EOFError."""
    memory = torch.frombuffer(mmap(-1, RUN_BYTES * len(names)), dtype=torch.uint8)  # shared with children
    end = time.monotonic() + DEADLINE_S
    with started(Runs(world_size, names, rounds, memory, silent_from)) as ranks:
        for rank, connection in enumerate(ranks):
            assert connection.poll(max(0.0, end - time.monotonic())), f"rank {rank} of {world_size} does not end"
        return [connection.recv() for connection in ranks]


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
    assert run_world(world_size, names, rounds) == [""] * world_size


@pytest.mark.timeout(DEADLINE_S + 30)
def test_a_rank_that_stops_is_named() -> None:
    """The last rank ends after one round: the others give up in operation 3 and name it."""
    *others, silent = run_world(3, ["tiny_hidden"], 2, silent_from=1)
    assert silent == ""
    for rank, complaint in enumerate(others):
        assert f"rank {rank}: status [0, 0, 3, 0, 0, 3," in complaint, complaint
