"""Letters in shared memory: what is posted is seen, whole and once; who sleeps is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

from moecomm.memory import mail as mails
from moecomm.memory.mail import PLACES, TAG_BYTES, Kind, Mail, mail_bytes

RANKS, PAYLOAD_BYTES = 3, 24


@pytest.fixture(params=["machine code", "python"])
def post_offices(request: pytest.FixtureRequest) -> Iterator[list[Mail]]:
    """The mail of three ranks, all in this process."""
    loader = mails.compiled if request.param == "machine code" else lambda module: None
    with mock.patch.object(mails, "compiled", loader):
        boxes = {rank: torch.zeros(mail_bytes(RANKS, PAYLOAD_BYTES), dtype=torch.uint8) for rank in range(RANKS)}
        yield [Mail(boxes, rank, RANKS, PAYLOAD_BYTES) for rank in range(RANKS)]


def counts_of(rank: int, number: int) -> np.ndarray:
    return np.array([rank, number, -7], np.int32)


def test_letters_arrive_whole_and_in_any_order(post_offices: list[Mail]) -> None:
    for number in range(3 * PLACES):
        for sender in post_offices[:: 1 if number % 2 else -1]:
            assert not post_offices[1].has_all(Kind.ARRIVE, number, patient=False)
            payload, tag = counts_of(sender.rank, number), f"dispatch {number}"
            sender.post(Kind.ARRIVE, number, seq=10 + number, tag=tag, ticket=sender.rank, payload=payload)
        for office in post_offices:
            office.woke()
            assert office.has_all(Kind.ARRIVE, number) and office.missing(Kind.ARRIVE, number) == []
            expected = [counts_of(rank, number) for rank in range(RANKS)]
            assert np.array_equal(office.gathered(number, 3), expected)
            assert office.agrees(Kind.ARRIVE, number, f"dispatch {number}")
            assert office.tags(10 + number) == dict.fromkeys(office.peers, f"dispatch {number}")


def test_what_was_gathered_stays_when_a_place_is_used_again(post_offices: list[Mail]) -> None:
    for sender in post_offices:
        sender.post(Kind.ARRIVE, 0, seq=0, tag="a", payload=counts_of(sender.rank, 0))
    first = post_offices[0].gathered(0, 3)
    for sender in post_offices:
        sender.post(Kind.ARRIVE, PLACES, seq=4, tag="b", payload=counts_of(sender.rank, PLACES))
    assert first[:, 1].tolist() == [0] * RANKS
    assert post_offices[0].has_all(Kind.ARRIVE, 0), (
        "a later letter in the same place says that the earlier one was sent"
    )
    assert post_offices[0].agrees(Kind.ARRIVE, 0, "a"), "what it said is not known any more"
    assert post_offices[0].tags(0) == {}


def test_kinds_do_not_mix_and_tickets_travel(post_offices: list[Mail]) -> None:
    for sender in post_offices:
        sender.post(Kind.DONE, 5, seq=5, tag="combine", ticket=100 + sender.rank)
    office = post_offices[2]
    assert office.has_all(Kind.DONE, 5) and not office.has_all(Kind.ARRIVE, 5, patient=False)
    assert office.tickets(5) == {0: 100, 1: 101}


def test_other_operations_are_noticed(post_offices: list[Mail]) -> None:
    for sender, tag in zip(post_offices, ("dispatch x", "dispatch x", "combine y"), strict=True):
        sender.post(Kind.DONE, 0, seq=0, tag=tag)
    assert not post_offices[0].agrees(Kind.DONE, 0, "dispatch x")
    assert post_offices[0].tags(0) == {1: "dispatch x", 2: "combine y"}
    assert post_offices[2].tags(0) == {0: "dispatch x", 1: "dispatch x"}


def test_long_tags_are_cut_but_compared(post_offices: list[Mail]) -> None:
    long = "x" * (TAG_BYTES + 50)
    for sender in post_offices:
        sender.post(Kind.DONE, 0, seq=0, tag=long)
    assert post_offices[0].agrees(Kind.DONE, 0, long)
    assert post_offices[0].tags(0)[1] == "x" * TAG_BYTES


def test_missing_are_named(post_offices: list[Mail]) -> None:
    post_offices[1].post(Kind.DONE, 0, seq=0, tag="a")
    assert post_offices[0].missing(Kind.DONE, 0) == [2]
    assert not post_offices[0].has_all(Kind.DONE, 0)


def test_who_sleeps_must_be_woken(post_offices: list[Mail]) -> None:
    sleeper, sender, _ = post_offices
    jit = post_offices[0]._jit
    asked = sender.post(Kind.DONE, 0, seq=0, tag="a")
    assert list(asked) == ([] if jit else [0, 2]), "without machine code everybody sleeps"
    assert not sleeper.has_all(Kind.DONE, 0, patient=False)
    assert 0 in sender.post(Kind.DONE, 1, seq=1, tag="a"), "it looked, found nothing, and sleeps"
    sleeper.woke()
    assert (0 in sender.post(Kind.DONE, 2, seq=2, tag="a")) == (jit is None)


def test_a_letter_that_comes_while_one_looks_is_seen_at_once(post_offices: list[Mail]) -> None:
    if post_offices[0]._jit is None:
        pytest.skip("without machine code nobody looks for a while")
    waiting, *others = post_offices
    with mock.patch.object(mails, "_TRIES", 10_000_000):
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(waiting.has_all(Kind.DONE, 0)))
        thread.start()
        time.sleep(0.05)
        for sender in others:
            assert list(sender.post(Kind.DONE, 0, seq=0, tag="a")) == [], "it does not sleep, it looks"
        thread.join(30.0)
    assert seen == [True]
