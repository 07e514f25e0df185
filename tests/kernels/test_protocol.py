"""The signal protocol, explored exhaustively; and every part of it taken away once, to see that it is needed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from tests.kernels.protocol import Protocol, Result, downhill, explore

pytestmark = pytest.mark.timeout(600)
SOUND = [
    Protocol(world=1, fine=True, programs=3),
    Protocol(world=2, fine=True, operations=6),
    Protocol(world=2, programs=3),
    Protocol(world=2, one_by_one=True, fine=True, operations=6),
    Protocol(world=2, sends=downhill, operations=6),
    Protocol(world=3, operations=4),
    Protocol(world=3, one_by_one=True, operations=5),
    Protocol(world=3, sends=downhill),
    # A rank that does something else: everybody stops, nobody reads its rows.
    Protocol(world=2, odd_one=(1, 3), fine=True, operations=5),
    Protocol(world=3, odd_one=(1, 2), operations=4),
    Protocol(world=2, ahead=2, generations=4, operations=7),
    Protocol(world=3, ahead=2, generations=4, programs=1, operations=5),
]
FAULTY = [
    # Without the second generation a fast rank writes while a slow one still reads.
    (Protocol(world=2, generations=1), "is overwritten before it is read"),
    # Two operations in flight need four generations: two and three are not enough.
    (Protocol(world=2, ahead=2, generations=2), "is overwritten"),
    (Protocol(world=2, ahead=2, generations=3, operations=6), "is overwritten"),
    # A rank may be signalled the next number before it has polled for this one.
    (Protocol(world=2, equal=True), "deadlock"),
    # The signal of one program says nothing of the others.
    (Protocol(world=2, early=True), "reads operation 1 of rank 1 and finds 0"),
    # A signal without release and acquire orders nothing.
    (Protocol(world=2, relaxed=True), "in stage 1"),
    # A kernel that sends and waits hangs where its programs run one after another.
    (Protocol(world=2, fused=True, one_by_one=True), "deadlock"),
    # Without tags the rows of another operation are taken for those of this one.
    (Protocol(world=2, odd_one=(1, 3), blind=True), "rank 0 takes operation 3 of rank 1 for another one"),
    # Signals are the only thing that holds a sender back: ranks without rows must send and await them too.
    (Protocol(world=2, lazy=True, sends=downhill), "is overwritten"),
]


@pytest.fixture(scope="module")
def result_of() -> Iterator[Callable[[Protocol], Result]]:
    """Explores all protocols in two processes."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found: dict[str, Future[Result]] = {
            str(protocol): pool.submit(explore, protocol) for protocol in [*SOUND, *(faulty for faulty, _ in FAULTY)]
        }
        yield lambda protocol: found[str(protocol)].result()


@pytest.mark.parametrize("protocol", SOUND, ids=str)
def test_nothing_is_lost_overwritten_or_stuck(result_of: Callable[[Protocol], Result], protocol: Protocol) -> None:
    result = result_of(protocol)
    assert result.fault is None, f"{result.fault}\n" + "\n".join(result.trace)
    assert result.states > 50 * protocol.world


@pytest.mark.parametrize(("protocol", "fault"), FAULTY, ids=str)
def test_every_part_is_needed(result_of: Callable[[Protocol], Result], protocol: Protocol, fault: str) -> None:
    result = result_of(protocol)
    assert result.fault is not None and fault in result.fault and result.trace, result
