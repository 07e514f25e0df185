"""Every transport x group size x named case against the oracle, forward and backward.

The same file runs three ways:

    pytest tests/conformance
    torchrun --nproc-per-node 4 tests/conformance/test_conformance.py
    mpiexec -n 4 python tests/conformance/test_conformance.py --cases plain,masked
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import moecomm
from moecomm.errors import UnsupportedError
from moecomm.testing import CASES, Case, RankPool, random_case
from moecomm.testing.conformance import ConformanceResult, run_conformance, run_in_turn
from moecomm.topology import Topology
from moecomm.transport import TRANSPORTS

ROUNDS = 6
TIMEOUT_S = 30.0
# The node of every rank, for the transport that knows several.
NODES = {
    "1x4": (0, 0, 0, 0),
    "2x2": (0, 0, 1, 1),
    "4x1": (0, 1, 2, 3),
    "one_and_three": (0, 1, 1, 1),
    "in_turn": (0, 1, 0, 1),
}
FLAT = [(1, "local", None), *((w, t, None) for w in (1, 2, 3, 4) for t in ("symmetric", "collective"))]
# Every case on two nodes of two ranks and on one arrangement more, in turn, in fewer rounds: all of them on all take
# minutes, and are run by hand with `torchrun ... test_conformance.py --transport hierarchical --nodes 0,1,1,1`.
ONE_OF_EACH = 3  # each layout and way to reduce once
ROUNDS_ON_NODES = ONE_OF_EACH + 1  # and one of them after the others
OTHERS = [nodes for nodes in NODES if nodes != "2x2"]
# All runs of a case follow each other: ranks keep what the oracle said of it.
RUNS = [
    (name, *how)
    for i, name in enumerate(CASES)
    for how in (*FLAT, (4, "hierarchical", "2x2"), (4, "hierarchical", OTHERS[i % len(OTHERS)]))
]


def run_on_rank(rank: int, transport: str, case: Case, rounds: int) -> list[ConformanceResult]:
    return run_conformance(None, transport, [case], rounds=rounds, timeout_s=TIMEOUT_S)


def run_in_turn_on_rank(rank: int, transport: str, case: Case, nodes: str | None) -> list[ConformanceResult]:
    topology = None if nodes is None else Topology(NODES[nodes])
    with mock.patch.object(moecomm, "Buffer", functools.partial(moecomm.Buffer, topology=topology)):
        rounds = {None: ROUNDS, "2x2": ROUNDS_ON_NODES}.get(nodes, ONE_OF_EACH)
        return run_in_turn(None, transport, [case], rounds=rounds, timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def pool_of() -> Iterator[Callable[[int], RankPool]]:
    """Pools by size, started when first asked for and kept: whatever the order of the tests, each starts once."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda world_size: stack.enter_context(RankPool(world_size, timeout_s=100.0)))


def demand(results_of_ranks: list[list[ConformanceResult]], world_size: int, num_rows: int = 5) -> None:
    failed = [
        f"rank {result.rank}, {result.case}, layout {result.layout}, reduce {result.reduce}: {result.message}"
        for results in results_of_ranks
        for result in results
        if not result.ok
    ]
    assert not failed, "\n".join(failed)
    assert [len(results) for results in results_of_ranks] == [num_rows] * world_size
    assert all(result.num_checks > 0 for results in results_of_ranks for result in results)


@pytest.mark.parametrize(("name", "world_size", "transport", "nodes"), RUNS)
def test_named_case(
    pool_of: Callable[[int], RankPool], name: str, world_size: int, transport: str, nodes: str | None
) -> None:
    demand(pool_of(world_size).run(run_in_turn_on_rank, transport, CASES[name], nodes), world_size, 1)


@pytest.mark.parametrize(("world_size", "transport"), [(1, "local"), (2, "symmetric"), (3, "collective")])
@pytest.mark.parametrize("name", ["masked", "ragged_tokens", "uneven_experts"])
def test_every_layout_by_itself(pool_of: Callable[[int], RankPool], world_size: int, transport: str, name: str) -> None:
    demand(pool_of(world_size).run(run_on_rank, transport, CASES[name], 3), world_size)


@pytest.mark.parametrize("transport", ["symmetric", "collective"])
@pytest.mark.parametrize("seed", range(6))
def test_random_case(pool_of: Callable[[int], RankPool], transport: str, seed: int) -> None:
    demand(pool_of(3).run(run_on_rank, transport, random_case(seed), 3), 3)


def run_without_llvmlite(rank: int, transport: str, case: Case) -> list[ConformanceResult]:
    """As on a machine where there is no compiler: plain torch everywhere, and signals that wake."""
    from moecomm import plan, rows
    from moecomm.memory import mail
    from moecomm.padded import operations as padded

    with contextlib.ExitStack() as patches:
        for module in (plan, mail, rows, padded):
            patches.enter_context(mock.patch.object(module, "compiled", mock.Mock(return_value=None)))
        return run_on_rank(rank, transport, case, 2)


@pytest.mark.parametrize("name", ["plain", "uneven_experts"])
def test_works_without_a_compiler(pool_of: Callable[[int], RankPool], name: str) -> None:
    demand(pool_of(3).run(run_without_llvmlite, "symmetric", CASES[name]), 3)


# -- the same file under the launchers ---------------------------------------------------------------------------

LAUNCHERS = {"torchrun": ["--nproc-per-node", "2"], "mpiexec": ["-n", "2", sys.executable]}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_runs_under(launcher: str) -> None:
    program = shutil.which(launcher, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip(f"{launcher} is not installed")
    command = [program, *LAUNCHERS[launcher], __file__, "--cases", "plain,empty_rank", "--rounds", "2"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    # Without an input of its own mpiexec reads the terminal's, which stops it where the tests run in the background.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, env=env, start_new_session=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout and " 0 failed" in done.stdout, done.stdout + done.stderr


def _join() -> tuple[object, int]:
    """The group that this process was started in, and its rank: MPI, torch.distributed, or alone."""
    if {"PMI_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        from mpi4py import MPI

        return MPI.COMM_WORLD, MPI.COMM_WORLD.Get_rank()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        return None, dist.get_rank()
    return None, 0


def _gather(group: object, results: list[ConformanceResult]) -> list[ConformanceResult]:
    """Everybody's results, on every rank."""
    everybody: list[list[ConformanceResult]] = [results]
    if hasattr(group, "allgather"):
        everybody = group.allgather(results)
    elif dist.is_initialized():
        everybody = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everybody, results)
    return [result for of_rank in everybody for result in of_rank]


def _part(group: Any, cases: list[Case], sizes: list[int]) -> tuple[Any, list[Case], bool]:
    """Split the ranks into groups of those sizes: that of this rank, its cases, and whether it leads it.

    Groups of equal size share the cases.
    """
    if not sizes:
        return group, cases, False
    number = int(np.searchsorted(np.cumsum(sizes), group.rank, "right"))
    alike = [i for i, size in enumerate(sizes) if size == sizes[number]]
    part = group.Split(number, group.rank)
    return part, cases[alike.index(number) :: len(alike)], part.rank == 0


def _meet(group: Any) -> None:
    """Wait for the groups that are not done, without using their cores: what MPI itself calls waiting does."""
    if hasattr(group, "Ibarrier"):
        request = group.Ibarrier()
        while not request.Test():
            time.sleep(0.01)


def _run(group: Any, transport: str, cases: list[Case], rounds: int, speaks: bool) -> int:
    """Run the cases and say what came of them; how many results are failures."""
    try:
        mine = run_in_turn(group, transport, cases, rounds=rounds, timeout_s=TIMEOUT_S)
    except UnsupportedError as error:
        if speaks:
            print(f"{transport}: not here: {error}")
        return 0
    results = _gather(group, mine)
    failed = [result for result in results if not result.ok]
    if speaks:
        checks = sum(result.num_checks for result in results)
        said = (
            f"{transport}: {len(cases)} cases, {results[0].world_size} ranks, {checks} checks, {len(failed)} failed\n"
        )
        for result in failed:
            said += f"  {result.case}, {result.layout}, {result.reduce}, rank {result.rank}: {result.message}\n"
        print(end=said, flush=True)
    return len(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases on the ranks of the launcher that started this; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default=",".join(TRANSPORTS), help="names, separated by commas")
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="random cases on top of the named ones")
    parser.add_argument("--seed", type=int, default=0, help="of the first random case")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sizes", default="", help="as in 4+3,1: first all four together, then three and one (MPI)")
    parser.add_argument("--nodes", metavar="N,N,...", help="pretend that every rank is on that node")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [CASES[name] for name in options.cases.split(",") if name]
    cases += [random_case(options.seed + i) for i in range(options.random)]

    if options.nodes:
        nodes = Topology(tuple(int(node) for node in options.nodes.split(",")))
        mock.patch.object(moecomm, "Buffer", functools.partial(moecomm.Buffer, topology=nodes)).start()

    group, rank = _join()
    num_failed = 0
    for sizes in options.sizes.split("+"):
        part, mine, leads = _part(group, cases, [int(size) for size in sizes.split(",") if size])
        for transport in options.transport.split(","):
            num_failed += _run(part, transport, mine, options.rounds, rank == 0 or leads)
        _meet(group)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
