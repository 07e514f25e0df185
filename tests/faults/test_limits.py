"""Little address space, few descriptors: a clear error on every rank, and nothing is left of the attempt."""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Callable

import pytest

import moecomm
from tests.faults._ranks import Nursery, SideBySide, World, results_of
from tests.faults._scenes import build, catch


def little_space() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + (1 << 30)  # enough for threads to start, which the interpreter would else wait for in vain
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def few_descriptors(more: int) -> Callable[[], None]:
    def limit() -> None:
        taken = {number for number in range(1024) if os.path.exists(f"/proc/self/fd/{number}")}
        free = (number for number in range(1024) if number not in taken)
        border = next(itertools.islice(free, more, None))  # `more` of them lie below it, in gaps too
        resource.setrlimit(resource.RLIMIT_NOFILE, (border, border))

    return limit


LIMITS: dict[str, Callable[[], None]] = {
    "address space": little_space,
    **{f"{more} descriptors": few_descriptors(more) for more in range(4)},
}


def be_limited(world: World, limit: str) -> tuple[str, str]:
    """Rank 1 may have little; the others hear of it."""
    moecomm.Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1, transport="symmetric").close()
    if world.rank == 1:
        LIMITS[limit]()
    caught = catch(lambda: build("symmetric", hidden=4096, max_tokens_per_rank=4096, timeout_s=4.0))
    return type(caught.error).__name__, caught.text


@pytest.fixture(scope="module")
def limited(nursery: Nursery, request: pytest.FixtureRequest) -> SideBySide:
    """The others wait for the rank that could not come: all of them at the same time."""
    return SideBySide(nursery, {(limit, "slow"): (be_limited, 2, limit) for limit in LIMITS}, request)


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_are_clear_errors(limited: SideBySide, limit: str) -> None:
    told = results_of(limited[limit, "slow"])
    kind, text = told[1]
    assert kind == "CapacityError" and ("ulimit" in text or "descriptors" in text), text
    assert told[0][0] in ("PeerLostError", "StallError") and "rank" in told[0][1], told[0]
