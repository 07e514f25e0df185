"""`Topology`: construction, questions, and detection over groups that are made up here."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moecomm import topology
from moecomm.checks import BufferConfig, agree, configure
from moecomm.errors import ConfigError
from moecomm.group import Group
from moecomm.topology import Topology, memory_key


class Peers:
    """An exchange whose other ranks answer what the test says."""

    def __init__(self, rank: int, answers: list[Any]) -> None:
        self.rank, self.answers = rank, answers

    def all_gather(self, blob: bytes, wait: Any) -> list[bytes]:
        operation, _ = pickle.loads(blob)
        others = [pickle.dumps((operation, pickle.dumps(answer))) for answer in self.answers]
        return [*others[: self.rank], blob, *others[self.rank :]]


def group_of(rank: int, *others: Any) -> Group:
    return Group(rank=rank, size=len(others) + 1, exchange=Peers(rank, list(others)))


def test_questions() -> None:
    given = Topology((0, 1, 0, 2, 1, 0))
    assert (given.num_ranks, given.num_nodes, given.is_single_node) == (6, 3, False)
    assert [given.ranks_of_node(node) for node in range(3)] == [(0, 2, 5), (1, 4), (3,)]
    assert [given.local_index(rank) for rank in range(6)] == [0, 0, 1, 0, 1, 2]
    assert [given.node_of(rank) for rank in range(6)] == [0, 1, 0, 2, 1, 0]
    assert given.same_node(0, 5)
    assert not given.same_node(0, 1)
    assert Topology((0,)).is_single_node


def test_is_a_value() -> None:
    assert Topology((0, 0, 1)) == Topology.from_ranks_per_node(3, 2) == Topology.explicit(["x", "x", "y"])
    assert hash(Topology((0, 1))) == hash(Topology.from_ranks_per_node(2, 1))
    with pytest.raises(AttributeError):
        Topology((0,)).node_of_rank = (1,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_node", "expected"),
    [(1, 1, (0,)), (4, 2, (0, 0, 1, 1)), (5, 3, (0, 0, 0, 1, 1)), (2, 9, (0, 0))],
)
def test_from_ranks_per_node(num_ranks: int, ranks_per_node: int, expected: tuple[int, ...]) -> None:
    assert Topology.from_ranks_per_node(num_ranks, ranks_per_node).node_of_rank == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Topology(()), r"number its nodes.*got \(\); expected at least one rank.*Topology.explicit"),
        (lambda: Topology((1, 1)), r"number its nodes from 0 without a gap: got \(1, 1\)"),
        (lambda: Topology((0, 2)), r"number its nodes"),
        (lambda: Topology((0, -1)), r"number its nodes"),
        (lambda: Topology([0, 1]), r"no tuple of node ids: got \[0, 1\]; expected one int per rank"),  # type: ignore[arg-type]
        (lambda: Topology((0, True)), r"no tuple of node ids"),
        (lambda: Topology(("a",)), r"no tuple of node ids"),  # type: ignore[arg-type]
        (lambda: Topology.explicit("aab"), r"no list of nodes: got 'aab'; expected one entry per rank"),
        (lambda: Topology.explicit(3), r"no list of nodes: got 3"),  # type: ignore[arg-type]
        (lambda: Topology.explicit([]), r"expected at least one rank"),
        (
            lambda: Topology.from_ranks_per_node(0, 1),
            r"num_ranks is no count: got 0; expected an integer of at least 1",
        ),
        (lambda: Topology.from_ranks_per_node(4, 0), r"ranks_per_node is no count: got 0"),
        (lambda: Topology.from_ranks_per_node(4, 2.0), r"ranks_per_node is no count: got 2.0"),  # type: ignore[arg-type]
        (lambda: Topology((0, 0)).node_of(2), r"rank does not exist: got 2; expected 0 to 1"),
        (lambda: Topology((0, 0)).node_of(-1), r"rank does not exist: got -1"),
        (lambda: Topology((0, 0)).local_index(7), r"rank does not exist: got 7"),
        (lambda: Topology((0, 0)).same_node(0, 2), r"rank does not exist: got 2"),
        (lambda: Topology((0, 0)).ranks_of_node(1), r"node does not exist: got 1; expected 0 to 0"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_detect_on_this_machine() -> None:
    assert Topology.detect(Group.resolve()) == Topology((0,))
    assert Topology.detect(group_of(1, (None, memory_key()), (None, memory_key()))) == Topology((0, 0, 0))


def test_memory_key_is_stable_and_says_where_it_is_from() -> None:
    boot, network, user = memory_key()
    assert memory_key() == (boot, network, user)
    assert user == os.getuid()
    if os.path.exists("/proc/self/ns/net"):
        assert re.fullmatch(r"[0-9a-f-]{36}", boot)
        assert re.fullmatch(r"\d+:\d+", network)


def test_memory_key_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(topology.os, "stat", refuse)
    boot, network, _ = memory_key()
    assert (boot, network) == (topology.platform.node(), "")


@pytest.mark.parametrize("part", [0, 1, 2], ids=["boot", "network", "user"])
def test_every_part_of_the_key_separates(part: int) -> None:
    other: list[Any] = list(memory_key())
    other[part] = "another" if part < 2 else other[part] + 1
    assert Topology.detect(group_of(0, (None, tuple(other)))) == Topology((0, 1))


def test_ranks_per_node_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMM_RANKS_PER_NODE", "2")
    here = (2, memory_key())
    assert Topology.detect(group_of(0, here, here, here)) == Topology((0, 0, 1, 1))


def test_ranks_per_node_never_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMM_RANKS_PER_NODE", "2")
    here, there = (2, memory_key()), (2, ("another", "", 0))
    assert Topology.detect(group_of(0, here, there, there)) == Topology((0, 0, 1, 1))
    with pytest.raises(
        ConfigError, match=r"rank 0: .*cannot share memory: got .*2, but ranks 0 and 1 .*smaller nodes"
    ) as caught:
        Topology.detect(group_of(0, there, here, here))
    assert caught.value.peers == (0, 1)


def test_ranks_per_node_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMM_RANKS_PER_NODE", "2")
    message = r"rank 1: MOECOMM_RANKS_PER_NODE differs between ranks: got 2 here, None on rank 2; expected the same"
    with pytest.raises(ConfigError, match=message) as caught:
        Topology.detect(group_of(1, (2, memory_key()), (None, memory_key())))
    assert caught.value.peers == (2,)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_ranks_per_node_must_be_a_count(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MOECOMM_RANKS_PER_NODE", text)
    with pytest.raises(
        ConfigError, match=rf"MOECOMM_RANKS_PER_NODE is no rank count: got '{text}'; expected a positive"
    ):
        Topology.detect(Group.resolve())


def test_ranks_of_another_byte_order_are_refused() -> None:
    arguments = {"num_experts": 2, "hidden": 4, "top_k": 1, "max_tokens_per_rank": 8, "dtype": torch.float32}
    options = {"transport": "mpi", "placement": None, "reduce": "rank", "timeout_s": 1.0, "num_segments": 2}
    here = configure(0, 2, **arguments, **options, device="cpu")
    assert isinstance(here, BufferConfig) and here.byte_order == sys.byteorder
    agree(here, [here, here], 0)
    there = replace(here, byte_order="big" if sys.byteorder == "little" else "little")
    with pytest.raises(ConfigError, match=r"byte_order: little on ranks \[0\], big on ranks \[1\]"):
        agree(here, [here, there], 0)
