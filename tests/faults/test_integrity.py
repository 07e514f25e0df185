"""`check=` where rows cross nodes: what is copied is compared on arrival, sums that are made on the way are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import moecomm
from moecomm.testing import CASES
from moecomm.testing.conformance import run_conformance
from moecomm.transport.hierarchical import HierarchicalExchange
from tests.faults._ranks import Nursery, World, results_of
from tests.faults._scenes import build, right_step, tokens_of

NODES = moecomm.Topology((0, 0, 1))


def conform(world: World, check: str) -> list[str]:
    cases = [CASES[name] for name in ("ragged_tokens", "quantised_pair", "odd_align")]
    results = run_conformance(None, "hierarchical", cases, rounds=2, check=check, options={"topology": NODES})
    return [result.message for result in results if not result.ok]


@pytest.mark.parametrize("check", ["cheap", "full"])
def test_right_rows_are_never_accused(nursery: Nursery, check: str) -> None:
    assert results_of(nursery.run(conform, 3, check)) == [[], [], []]


def swap(world: World, reduce: str) -> list[str]:
    """Rank 1 gets two rows in the wrong order, out and home; what it is told of each."""
    wait, told = HierarchicalExchange.wait, list[str]()

    def faulty(self: Any) -> Any:
        is_new, out = self._outputs is None, wait(self)
        if is_new and world.rank == 1 and len(out[0]) > 1:
            out[0][[0, 1]] = out[0][[1, 0]]
        return out

    for way in ("out", "home"):
        buffer = build("hierarchical", topology=NODES, check="cheap", reduce=reduce)
        out = right_step(buffer, world)
        with mock.patch.object(HierarchicalExchange, "wait", faulty):
            try:
                buffer.dispatch(*tokens_of(world.rank)) if way == "out" else buffer.combine(out.x, out.handle)
                told.append("nothing")
            except moecomm.CorruptionError as error:
                told.append(error.operation or "")
                if error.evidence:
                    Path(error.evidence).unlink()
        world.meet(f"told {way}")
        buffer.close()
    return told


def test_rows_that_are_not_those_that_were_sent_are_found(nursery: Nursery) -> None:
    for reduce, home in (("source", "combine"), ("rank", "nothing")):
        assert results_of(nursery.run(swap, 3, reduce))[1] == ["dispatch", home], reduce
