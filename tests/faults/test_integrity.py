"""`check=` where rows cross nodes: what is copied is compared on arrival, sums that are made on the way on each hop."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import moecomm
from moecomm.testing import CASES
from moecomm.testing.conformance import run_conformance
from moecomm.transport._pairs import PairExchange
from moecomm.transport.hierarchical import HierarchicalExchange
from moecomm.transport.symmetric import SymmetricExchange
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


HOPS: dict[str, tuple[Any, str]] = {"inside": (SymmetricExchange, "_out"), "between": (PairExchange, "_received")}


def spoil(world: World, check: str, hop: str) -> str:
    """A byte of a row, or which sum it is for, changes on its way to the rank that sums, or a sum on its way home."""
    buffer = build("hierarchical", topology=NODES, check=check)
    out = right_step(buffer, world)
    kind, where = HOPS[hop.split(" ")[0]]
    wait = kind.wait

    def faulty(self: Any) -> Any:
        arrived, lane = wait(self), 1 if hop.endswith("keys") else 0
        rows = arrived[lane]
        if self._tag.startswith("combine") and rows.numel() and getattr(self, where) is not None:
            rows.view(-1)[0] ^= 1
        return arrived

    with mock.patch.object(kind, "wait", faulty):
        world.meet("ready")
        try:
            buffer.combine(out.x, out.handle)
            return "nothing"
        except moecomm.CorruptionError as error:
            if error.evidence:
                Path(error.evidence).unlink()
            return str(error)
        finally:
            world.meet("told")


@pytest.mark.parametrize(
    ("check", "hop"), [("cheap", "inside"), ("cheap", "between"), ("full", "inside keys"), ("full", "between")]
)
def test_sums_on_their_way_are_compared_on_each_hop(nursery: Nursery, check: str, hop: str) -> None:
    told = results_of(nursery.run(spoil, 3, check, hop))
    assert all("arrival of combine" in text for text in told[:2]), told  # rank 2 has no tokens to wait for
    assert any(f"{'lane 1' if 'keys' in hop else 'rows'} {hop.split(' ')[0]}" in text for text in told), told


def test_rows_that_are_not_those_that_were_sent_are_found(nursery: Nursery) -> None:
    for reduce, home in (("source", "combine"), ("rank", "nothing")):
        assert results_of(nursery.run(swap, 3, reduce))[1] == ["dispatch", home], reduce
