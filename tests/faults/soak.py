"""A bounded soak: random cases, kills and stalls over every CPU transport until the time is up; the counts at the end.

    python -m tests.faults.soak --minutes 10        (make soak)

Two lanes side by side. One is a simulated world with overtaking, doubled and lost messages, and deaths. The other takes
turns between processes: cases on symmetric, collective, hierarchical and mpi, `kill -9` of a process in a loop, and the
other rows of the failure table. Nothing may be wrong, hang, or leave anything: memory, descriptors and threads of the
processes that stay must not grow. With `--tally FILE` the counts of several runs add up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

import moecomm
from moecomm.testing import RankPool, no_leaks, random_case
from moecomm.testing.conformance import ConformanceResult, run_conformance
from moecomm.testing.mpi import mpi_missing, run_mpi
from moecomm.testing.simulated import Faults, results_of, simulate
from tests.faults import _table
from tests.faults._ranks import Nursery
from tests.faults._ranks import results_of as process_results
from tests.faults.test_killed import work_until_the_end
from tests.faults.test_table import PROCESSES, judge, scene

WORLD_SIZE = 3
SHAPES = tuple(itertools.product(("expert", "rank", "padded"), ("rank", "source")))
PER_TURN = 25
GROWTH_BYTES = 64 << 20  # caches of the allocator and of compiled loops fill in the first turns
GOALS = {"cases in the simulator": 10_000, "cases between processes": 1_000, "kills of processes": 200}
SIMULATED, BETWEEN, KILLS = GOALS

Counts = Counter[str]


def run_case(group: Any, transport: str, seed: int, **options: Any) -> list[ConformanceResult]:
    """One random case in one layout and one way to reduce."""
    layout, reduce = SHAPES[seed % len(SHAPES)]
    given: dict[str, Any] = {"rounds": 1, "layouts": [layout], "reduces": [reduce], "timeout_s": 60.0}
    return run_conformance(group, transport, [random_case(seed)], **given, options=options)


def demand(results: list[ConformanceResult], seed: int) -> None:
    for result in results:
        assert result.ok, f"random_case({seed}), {result.transport}, rank {result.rank}: {result.message}"


# -- in the simulator --------------------------------------------------------------------------------------------------


def simulated_turn(rank: int, seed: int) -> Counts:
    """Cases on any schedule; then deaths and losses."""
    counts: Counts = Counter()
    for number in range(seed, seed + PER_TURN):
        random = Random(number)
        faults = Faults(delay_s=random.choice([0.0, 0.001, 1.0]), fragments=random.randint(1, 4), duplicate=0.2)
        outcomes = simulate(run_case, random.randint(1, 5), "simulated", number, seed=number, faults=faults)
        demand([result for results in results_of(outcomes) for result in results], number)
        counts[SIMULATED] += 1
    for number in range(seed, seed + PER_TURN // 5):
        simulated_death(number, counts)
    return counts


def simulated_death(number: int, counts: Counts) -> None:
    """Kills and lost messages: right rows, or an error that names a rank."""
    random = Random(number)
    kills = {random.randrange(4): random.randint(1, 120)}
    faults = Faults(kills=kills, drop=random.choice([0.0, 0.0, 0.02]), notice_s=random.choice([None, 0.01]))
    for outcome in simulate(loop, 4, seed=number, faults=faults):
        fine = outcome.went_well or outcome.killed
        assert fine or isinstance(outcome.error, (moecomm.PeerLostError, moecomm.StallError)), outcome.trace
        counts["kills in the simulator"] += outcome.killed
        counts["stalls in the simulator"] += isinstance(outcome.error, moecomm.StallError)


def loop(group: Any) -> None:
    shape: dict[str, Any] = {"num_experts": 6, "hidden": 4, "top_k": 2, "max_tokens_per_rank": 8}
    with moecomm.Buffer(group, **shape, dtype=torch.float32) as buffer:
        for round in range(4):
            x = torch.full((8, 4), 3.0 + round + group.rank)
            out: Any = buffer.dispatch(x, torch.randint(0, 6, (8, 2)))
            assert torch.equal(buffer.combine(out.x, out.handle), 2 * x), "wrong sums"


# -- between processes -------------------------------------------------------------------------------------------------


def look(rank: int) -> tuple[int, int, int]:
    """Resident bytes, descriptors and threads of a rank."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


def run_cases_of_rank(rank: int, seed: int) -> list[tuple[int, list[ConformanceResult]]]:
    """The transports in turn; of five cases three on symmetric."""
    results = []
    for number in range(seed, seed + PER_TURN):
        transport = ("symmetric", "collective", "symmetric", "hierarchical", "symmetric")[number % 5]
        nodes = {"topology": moecomm.Topology((0, 0, 1))} if transport == "hierarchical" else {}
        results.append((number, run_case(None, transport, number, **nodes)))
    return results


class Processes:
    """What takes turns between processes."""

    def __init__(self, nursery: Nursery, pool: RankPool) -> None:
        self.nursery, self.pool = nursery, pool
        self.at_first: list[tuple[int, int, int]] | None = None

    def cases(self, seed: int, counts: Counts) -> None:
        for of_rank in self.pool.run(run_cases_of_rank, seed, timeout_s=300.0):
            for number, results in of_rank:
                demand(results, number)
        counts[BETWEEN] += PER_TURN
        self.look_at_growth(counts)

    def mpi_cases(self, seed: int, counts: Counts) -> None:
        arguments = ["-m", "mpi4py", "-m", "tests.faults.soak", "--mpi-cases", str(seed)]
        done = run_mpi(arguments, WORLD_SIZE, timeout_s=300.0)
        assert done.returncode == 0 and done.stdout.count("all right") == WORLD_SIZE, done.stdout[-6000:]
        counts[BETWEEN] += PER_TURN
        counts["of them over MPI"] += PER_TURN

    def deaths(self, seed: int, counts: Counts) -> None:
        for number in range(seed, seed + 5):
            seconds = 0.02 + 0.2 * Random(number).random()
            caught = process_results(self.nursery.run(work_until_the_end, WORLD_SIZE, seconds), killed=1)
            assert all(isinstance(caught[rank].error, moecomm.PeerLostError) for rank in (0, 2))
            slowest = max(caught[rank].since_death_s for rank in (0, 2))
            counts[KILLS] += 1
            counts["of them noticed within 1 s"] += slowest < 1.0

    def events(self, seed: int, counts: Counts) -> None:
        """One cell of the failure table after the other."""
        cells = list(itertools.product(PROCESSES, _table.EVENTS))
        transport, event = cells[seed // PER_TURN % len(cells)]
        judge(transport, event, self.nursery.run(scene, WORLD_SIZE, transport, event))
        counts["other failures between processes" if event != "killed" else KILLS] += 1

    def look_at_growth(self, counts: Counts) -> None:
        now = self.pool.run(look)
        self.at_first = self.at_first or now
        for rank, (first, last) in enumerate(zip(self.at_first, now, strict=True)):
            grown = last[0] - first[0] < GROWTH_BYTES and last[1] <= first[1] + 4 and last[2] <= first[2] + 2
            assert grown, f"rank {rank} grew from {first} to {last}: bytes, descriptors, threads"
        counts["looks at memory, descriptors and threads"] += 1


def mpi_cases(seed: int) -> None:
    """What each rank of `mpiexec` runs."""
    from mpi4py import MPI

    for number in range(seed, seed + PER_TURN):
        demand(run_case(MPI.COMM_WORLD, "mpi", number), number)
    print(end=f"rank {MPI.COMM_WORLD.rank}: all right\n", flush=True)


# -- both --------------------------------------------------------------------------------------------------------------


class Lane(threading.Thread):
    """Calls its turns, the one that is furthest behind its goal first, until it is late or all goals are reached."""

    def __init__(self, turns: Sequence[tuple[str, Callable[[int, Counts], None]]], seed: int, counts: Counts) -> None:
        super().__init__(name="soak")
        self.turns, self.seed, self.counts = turns, seed, counts
        self.end = 0.0
        self.failure: BaseException | None = None

    def run(self) -> None:
        seeds = itertools.count(self.seed, PER_TURN)
        try:
            for rest in itertools.count():
                goals = {goal for goal, _ in self.turns}
                if time.monotonic() >= self.end or all(self.counts[goal] >= GOALS[goal] for goal in goals):
                    return
                behind = min(goals, key=lambda goal: self.counts[goal] / GOALS[goal])
                able = [turn for goal, turn in self.turns if goal == behind]
                able[rest % len(able)](next(seeds), self.counts)
        except BaseException as error:
            self.failure = error


def soak(minutes: float, seed: int, counts: Counts) -> None:
    """Run both lanes until the time is up, or all goals are reached."""
    with (
        no_leaks(settle_s=5.0),
        RankPool(1, backend=None) as simulator,
        Nursery() as nursery,
        RankPool(WORLD_SIZE) as pool,
    ):
        between = Processes(nursery, pool)
        turns = [(BETWEEN, between.cases), (BETWEEN, between.cases), (KILLS, between.deaths), (KILLS, between.events)]
        turns += [(BETWEEN, between.mpi_cases)] * (not mpi_missing())

        def simulated(seed: int, counts: Counts) -> None:
            counts.update(simulator.run(simulated_turn, seed, timeout_s=600.0)[0])

        lanes = [Lane([(SIMULATED, simulated)], seed, counts), Lane(turns, seed, counts)]
        for lane in lanes:
            lane.end = time.monotonic() + 60 * minutes
            lane.start()
        for lane in lanes:
            lane.join()
        for lane in lanes:
            if lane.failure is not None:
                raise lane.failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--tally", type=Path, help="file in which the counts of several runs add up")
    parser.add_argument("--mpi-cases", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.mpi_cases is not None:
        mpi_cases(options.mpi_cases)
        return 0
    start = time.monotonic()
    counts: Counts = Counter()
    if options.tally and options.tally.exists():
        counts.update(json.loads(options.tally.read_text()))
    print(f"soak: at most {options.minutes:g} minutes, seed {options.seed}", flush=True)
    soak(options.minutes, options.seed, counts)
    counts["seconds"] += round(time.monotonic() - start)
    for name, count in counts.items():
        print(f"  {count:6} {name}" + (f" of {GOALS[name]}" if name in GOALS else ""))
    if options.tally:
        options.tally.write_text(json.dumps(counts))
    print(f"nothing wrong, nothing hung, nothing left behind; {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
