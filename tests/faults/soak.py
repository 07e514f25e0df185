"""A bounded soak: random cases, kills and stalls over every CPU transport until the time is up; the counts at the end.

    python -m tests.faults.soak --minutes 10        (make soak)

In turns: cases in a simulated world with overtaking, doubled and lost messages; deaths there; cases between processes;
`kill -9` of a process in a loop. Nothing may be wrong, hang, or leave anything: memory, descriptors and threads of the
processes that stay must not grow.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

import moecomm
from moecomm.testing import RankPool, no_leaks, random_case
from moecomm.testing.conformance import ConformanceResult, run_conformance
from moecomm.testing.simulated import Faults, results_of, simulate
from tests.faults._ranks import Nursery
from tests.faults._ranks import results_of as process_results
from tests.faults.test_killed import work_until_the_end

WORLD_SIZE = 3
SHAPES = tuple(itertools.product(("expert", "rank"), ("rank", "source")))
PER_TURN = 25
GROWTH_BYTES = 64 << 20  # caches of the allocator and of compiled loops fill in the first turns


def run_case(group: Any, transport: str, seed: int, timeout_s: float = 60.0) -> list[ConformanceResult]:
    """One random case in one layout and one way to reduce."""
    layout, reduce = SHAPES[seed % len(SHAPES)]
    case = random_case(seed)
    return run_conformance(group, transport, [case], rounds=1, layouts=[layout], reduces=[reduce], timeout_s=timeout_s)


def demand(results: list[ConformanceResult], seed: int) -> None:
    for result in results:
        assert result.ok, f"random_case({seed}), {result.transport}, rank {result.rank}: {result.message}"


def simulated_cases(seed: int, counts: Counter[str]) -> None:
    for number in range(seed, seed + PER_TURN):
        random = Random(number)
        faults = Faults(delay_s=random.choice([0.0, 0.001, 1.0]), fragments=random.randint(1, 4), duplicate=0.2)
        outcomes = simulate(run_case, random.randint(1, 5), "simulated", number, seed=number, faults=faults)
        demand([result for results in results_of(outcomes) for result in results], number)
        counts["cases in the simulator"] += 1


def simulated_deaths(seed: int, counts: Counter[str]) -> None:
    """Kills and lost messages: right rows, or an error that names a rank."""
    for number in range(seed, seed + PER_TURN):
        random = Random(number)
        kills = {random.randrange(4): random.randint(1, 120)}
        faults = Faults(kills=kills, drop=random.choice([0.0, 0.0, 0.02]), notice_s=random.choice([None, 0.01]))
        for outcome in simulate(loop, 4, seed=number, faults=faults):
            fine = outcome.went_well or outcome.killed
            assert fine or isinstance(outcome.error, (moecomm.PeerLostError, moecomm.StallError)), outcome.trace
            counts["kills in the simulator"] += outcome.killed


def loop(group: Any) -> None:
    shape: dict[str, Any] = {"num_experts": 6, "hidden": 4, "top_k": 2, "max_tokens_per_rank": 8}
    with moecomm.Buffer(group, **shape, dtype=torch.float32) as buffer:
        for round in range(4):
            x = torch.full((8, 4), 3.0 + round + group.rank)
            out: Any = buffer.dispatch(x, torch.randint(0, 6, (8, 2)))
            assert torch.equal(buffer.combine(out.x, out.handle), 2 * x), "wrong sums"


def look(rank: int) -> tuple[int, int, int]:
    """Resident bytes, descriptors and threads of a rank."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


def run_cases_of_rank(rank: int, seed: int) -> list[tuple[int, list[ConformanceResult]]]:
    transports = ("symmetric", "collective")
    return [(n, run_case(None, transports[n % 5 == 0], n)) for n in range(seed, seed + PER_TURN)]


def process_cases(pool: RankPool) -> Callable[[int, Counter[str]], None]:
    def run(seed: int, counts: Counter[str]) -> None:
        for of_rank in pool.run(run_cases_of_rank, seed, timeout_s=300.0):
            for number, results in of_rank:
                demand(results, number)
        counts["cases between processes"] += PER_TURN

    return run


def process_deaths(nursery: Nursery) -> Callable[[int, Counter[str]], None]:
    def run(seed: int, counts: Counter[str]) -> None:
        for number in range(seed, seed + 5):
            seconds = 0.02 + 0.2 * Random(number).random()
            caught = process_results(nursery.run(work_until_the_end, WORLD_SIZE, seconds), killed=1)
            assert all(isinstance(caught[rank].error, moecomm.PeerLostError) for rank in (0, 2))
            slowest = max(caught[rank].since_death_s for rank in (0, 2))
            counts["kills of processes"] += 1
            counts["of them noticed within 1 s"] += slowest < 1.0

    return run


def soak(minutes: float, seed: int, only: str) -> Counter[str]:
    """Take turns until the time is up."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    with no_leaks(settle_s=5.0), Nursery() as nursery, RankPool(WORLD_SIZE) as pool:
        kinds: dict[str, Callable[[int, Counter[str]], None]] = {
            "simulated_cases": simulated_cases,
            "simulated_deaths": simulated_deaths,
            "process_cases": process_cases(pool),
            "process_deaths": process_deaths(nursery),
        }
        chosen = [kinds[name] for name in (only.split(",") if only else kinds)]
        before = None
        for turn, run in zip(_numbers(seed), itertools.cycle(chosen), strict=False):
            if time.monotonic() >= end:
                break
            run(turn, counts)
            if run is kinds.get("process_cases"):
                now = pool.run(look)
                before = before or now
                for rank, (first, last) in enumerate(zip(before, now, strict=True)):
                    grown = last[0] - first[0] < GROWTH_BYTES and last[1] <= first[1] + 4 and last[2] <= first[2] + 2
                    assert grown, f"rank {rank} grew from {first} to {last}: bytes, descriptors, threads"
                counts["looks at memory, descriptors and threads"] += 1
    return counts


def _numbers(seed: int) -> Iterator[int]:
    return itertools.count(seed, PER_TURN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="kinds of turns, with commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    print(f"soak: {options.minutes:g} minutes, seed {options.seed}", flush=True)
    for name, count in soak(options.minutes, options.seed, options.only).items():
        print(f"  {count:6} {name}")
    print(f"nothing wrong, nothing hung, nothing left behind; {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
