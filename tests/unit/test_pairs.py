"""Messages between pairs of ranks over gloo: what comes, what is lost, and from whom something is missing."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch

import moecomm
from moecomm.errors import PeerLostError
from moecomm.group import Group
from moecomm.testing import RankPool
from moecomm.topology import Topology
from moecomm.transport._bulletin import Bulletin
from moecomm.transport._pairs import Waiter
from moecomm.transport.collective import CollectiveTransport

SOON = timedelta(seconds=30)


class EndsWithTheSlice:
    """What is over just after the first wait for it was: with an error, or well."""

    def __init__(self, error: str) -> None:
        self._error, self._is_over = error, False

    def is_completed(self) -> bool:
        return self._is_over

    def wait(self, timeout: timedelta) -> bool:
        if not self._is_over:
            self._is_over = True
            raise RuntimeError("timed out")
        if self._error:
            raise RuntimeError(self._error)
        return True


@pytest.mark.parametrize(("error", "kind"), [("", None), ("Connection closed by peer", PeerLostError)])
def test_what_ends_just_as_a_slice_of_waiting_does_is_no_stall(error: str, kind: Any) -> None:
    transport = object.__new__(CollectiveTransport)
    transport.group, transport.timeout_s, transport._waiter = Group.resolve(), 60.0, None
    transport._away, transport._bulletin = [], mock.Mock(spec=Bulletin)
    bulletin: Any = transport._bulletin
    bulletin.verdict.return_value = None
    bulletin.look.return_value = False
    bulletin.left_before.return_value = bulletin.call_roll.return_value = []
    bulletin.publish.side_effect = lambda verdict: verdict
    work: Any = EndsWithTheSlice(error)
    with contextlib.nullcontext() if kind is None else pytest.raises(kind):
        transport.finish(work, "combine", 3)


def told(rank: int) -> tuple[str, set[int]]:
    """Rank 0 waits for all others, of whom only rank 1 sends; then it closes its connections, and rank 3 is told."""
    group = Group.resolve().duplicate(timeout_s=30.0)
    assert group.process_group is not None
    waiter, row = Waiter(group.process_group, 30.0), torch.full((1, 4), float(rank))
    text, silent = "", set()
    try:
        if rank == 0:
            rows = torch.zeros(4, 4)
            works = [(peer, group.process_group.recv([rows[peer]], peer, 5)) for peer in (2, 1, 3)]
            arrival = waiter.watch(works)
            while not rows[1].any():
                time.sleep(0.01)
            try:
                arrival.wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                text = str(error)
            assert not arrival.is_completed() and rows[1].tolist() == [1.0] * 4
            silent = waiter.silent()
        elif rank == 1:
            waiter.watch([(0, group.process_group.send([row], 0, 5))]).wait(SOON)
        elif rank == 3:
            try:
                waiter.watch([(0, group.process_group.recv([row], 0, 6))]).wait(SOON)
            except RuntimeError as error:
                text = str(error)
        Group.resolve().barrier(timeout_s=60.0)
    finally:
        waiter.close()
        group.free()
    return text, silent


def test_who_is_silent_and_who_hears_of_it() -> None:
    with RankPool(4, timeout_s=100.0) as pool:
        (waited, silent), _, _, (lost, _) = pool.run(told)
        assert (waited, silent) == ("timed out", {2, 3})
        assert "onnection closed by peer" in lost
        for rank, error in enumerate(pool.run(without_store)):
            assert error is None if rank == 3 else error == ("StallError", (3,)), (rank, error)


def sent_ahead(rank: int) -> list[int]:
    """Rank 0 serves three, who send as many rows as the first block has, fewer, none and more; those who got what."""
    sizes: dict[str, Any] = {"num_experts": 4, "hidden": 1 << 16, "top_k": 1, "max_tokens_per_rank": 9}
    topology, seen = Topology((0, 1, 1, 1)), []
    with moecomm.Buffer(topology=topology, transport="hierarchical", dtype=torch.float32, **sizes) as buffer:
        for turn, tokens in enumerate(([4, 3, 0, 9], [9, 4, 4, 5], [0, 0, 0, 0])):
            x = (100 * rank + torch.arange(tokens[rank])).float()[:, None].expand(-1, 1 << 16) + 1000 * turn
            out = buffer.dispatch(x, torch.full((tokens[rank], 1), int(rank == 0)))
            assert (out.x == out.x[:, :1]).all()
            seen += out.x[:, 0].int().tolist()
            assert torch.equal(buffer.combine(out.x, out.handle), x)
    return seen


def test_the_first_block_may_be_shorter_than_the_room_for_it() -> None:
    with RankPool(4, timeout_s=100.0) as pool:
        zero, one, *others = pool.run(sent_ahead)
    assert zero == [100, 101, 102, *range(300, 309), *range(1100, 1104), *range(1200, 1204), *range(1300, 1305)]
    assert one == [*range(4), *range(1000, 1009)] and others == [[], []]


def without_store(rank: int) -> tuple[str, tuple[int, ...]] | None:
    """Rank 3, alone on its node, does not come, and the store does not answer: the others name no other node."""
    sizes: dict[str, Any] = {
        "num_experts": 4,
        "hidden": 8,
        "top_k": 2,
        "max_tokens_per_rank": 8,
        "dtype": torch.float32,
    }
    buffer = moecomm.Buffer(topology=Topology((0, 0, 1, 2)), transport="hierarchical", timeout_s=2.0, **sizes)
    x, topk_idx = torch.ones(8, 8), torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    buffer.dispatch(x, topk_idx)
    sent = {name: buffer.stats()[name] for name in ("rows_between", "bytes_between", "blocks")}
    assert sent == {"rows_between": 8, "bytes_between": 8 * 32, "blocks": 1}, "each token once to each other node"
    group, error = Group.resolve(), None
    with mock.patch.object(Bulletin, "_ask", lambda self, ask, otherwise, timeout_s=0.0: otherwise):
        if rank != 3:
            start = time.monotonic()
            try:
                buffer.dispatch(x, topk_idx)
            except moecomm.MoECommError as raised:
                error = type(raised).__name__, raised.peers
                assert time.monotonic() - start > 1.5, "only at the deadline"
        group.barrier(timeout_s=60.0)
        buffer.close()
    return error
