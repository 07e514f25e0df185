"""Rows between pairs of ranks over gloo: one message for each pair and lane, sent from where the rows lie.

`all_to_all_single` of gloo takes a thread for each call and greets every rank, also those that get no rows. Where most
pairs have nothing to tell each other that costs as much as the rows: 8.5 MB in 9 blocks between two nodes of two ranks
took 42 ms of processor time on all ranks together, and 21 ms this way (2 cores, 2026-11-27).
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.blocks import byte_rows
from moecomm.rows import copy_rows
from moecomm.transport.base import Exchange, Lane

if TYPE_CHECKING:
    from moecomm.transport.collective import CollectiveTransport

_LANES = 16  # of an exchange at most, so that every message has a tag of its own
_SEQS = 256  # messages of one tag arrive in order
_TAGS = 1 << 30
_AT_ONCE = timedelta(milliseconds=1)
_LOOK_S = 0.01
BREAK_S = 0.3  # what the thread gets to see what has come, once connections are closed
_LATE_S = 30.0  # after the deadline: then whoever started it has long given up


Message = tuple[int, dist.Work]  # the peer at its other end, and what to wait for


@final
class Arrival:
    """Messages on their way. A thread waits for them, so that others can wait in slices, as for a `dist.Work`.

    Gloo closes all connections when a wait of its own times out.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages, self._at = list(messages), -1
        self._settled, self._seen = threading.Event(), threading.Event()  # waited enough; waited for each of them
        self._error: RuntimeError | None = None
        self._missing: set[int] = set()

    @classmethod
    def lost(cls, error: RuntimeError) -> Arrival:
        """Of what could not even begin, because a connection is lost."""
        arrival = cls([])
        arrival._error = error
        arrival._settled.set()
        arrival._seen.set()
        return arrival

    def settle(self, timeout: timedelta) -> None:
        """Wait for them all; once a connection is lost, only for what has come."""
        for at, message in enumerate(self._messages):
            self._at = at
            self._see(message, timeout)
        self._messages = []
        self._settled.set()
        self._seen.set()

    def _see(self, message: Message, timeout: timedelta) -> None:
        peer, work = message
        try:
            work.wait(timeout)
        except RuntimeError as error:
            self._error = self._error or error
            self._missing.add(peer)
            self._settled.set()

    def is_over(self, timeout_s: float) -> bool:
        """Whether, in that time, it is known of each message whether it has come."""
        return self._seen.wait(timeout_s)

    def missing(self) -> set[int]:
        """The peers whose messages have not come, after `Waiter.break_off`."""
        if not self.is_over(0.0):
            # A message that has come in part is forgotten by gloo as it closes connections: the thread waits for it.
            messages = self._messages
            self._missing |= {peer for peer, _ in messages[max(0, self._at) : self._at + 1]}
            for message in messages[self._at + 1 :]:
                self._see(message, _AT_ONCE)
        return self._missing

    def wait(self, timeout: timedelta) -> bool:
        """Wait so long at most; raises RuntimeError, also for a connection that is lost."""
        if not self._settled.wait(timeout.total_seconds()):
            raise RuntimeError("timed out")
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self._settled.is_set()


@final
class Waiter:
    """The thread that waits, in the order of `watch`."""

    def __init__(self, process_group: dist.ProcessGroup, timeout_s: float) -> None:
        self._process_group, self._timeout = process_group, timedelta(seconds=timeout_s + _LATE_S)
        self._arrivals: SimpleQueue[Arrival | None] = SimpleQueue()
        self._under_way: list[Arrival] = []  # and those that will never come
        self._thread: threading.Thread | None = None

    def watch(self, messages: Sequence[Message]) -> Arrival:
        """Wait for those messages, after all earlier ones."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moecomm-arrivals", daemon=True)
            self._thread.start()
        arrival = Arrival(messages)
        self._under_way.append(arrival)
        self._arrivals.put(arrival)
        return arrival

    def _run(self) -> None:
        while (arrival := self._arrivals.get()) is not None:
            arrival.settle(self._timeout)
            if not arrival.missing():
                self._under_way.remove(arrival)

    def gather(self, blobs: Tensor) -> Arrival:
        """Send every peer this rank's row of (W, n) blobs, and receive theirs."""
        group = self._process_group
        peers = [(group.rank() + step) % group.size() for step in range(1, group.size())]
        try:
            messages = [(peer, group.recv([blobs[peer]], peer, _TAGS + 1)) for peer in peers]
            messages += [(peer, group.send([blobs[group.rank()]], peer, _TAGS + 1)) for peer in peers]
        except RuntimeError as error:
            return Arrival.lost(error)
        return self.watch(messages)

    def close(self) -> None:
        """End the thread, once nothing is under way."""
        self._arrivals.put(None)

    def break_off(self) -> None:
        """Close all connections: peers that wait for this rank stop at once, and so does the thread.

        A wait that times out is the only way to make gloo do it.
        """
        peer = (self._process_group.rank() + 1) % self._process_group.size()
        with contextlib.suppress(RuntimeError):
            work: Any = self._process_group.recv([torch.empty(1, dtype=torch.uint8)], peer, _TAGS)
            work.wait(_AT_ONCE)

    def silent(self) -> set[int]:
        """The peers from whom something is missing; closes all connections."""
        self.break_off()
        under_way, deadline = list(self._under_way), time.monotonic() + BREAK_S
        while time.monotonic() < deadline and not all(arrival.is_over(0.0) for arrival in under_way):
            time.sleep(_LOOK_S)
        return {peer for arrival in under_way for peer in arrival.missing()}


@final
class PairExchange(Exchange):
    """Receives from the start, sends at `commit`. No rows to this rank itself, and all lanes are contiguous."""

    def __init__(self, transport: CollectiveTransport, waiter: Waiter, tag: str, seq: int, lanes: Sequence[Lane]):
        assert len(lanes) <= _LANES and all(lane.recv_slots is None for lane in lanes), "lanes between nodes"
        self._transport, self._waiter, self._tag, self._seq, self._lanes = transport, waiter, tag, seq, lanes
        self._rows: list[dict[int, Tensor]] = [{} for _ in lanes]
        self._received = [byte_rows(int(lane.recv_counts.sum()), lane.row_bytes) for lane in lanes]
        self._sends: list[Message] = []
        self._departure: Arrival | None = None  # of all sends
        self._broken: Arrival | None = None
        messages = []
        try:
            for number, (lane, received) in enumerate(zip(lanes, self._received, strict=True)):
                ends = np.cumsum(lane.recv_counts)
                for src in np.flatnonzero(lane.recv_counts) if lane.row_bytes else ():
                    part = received[int(ends[src] - lane.recv_counts[src]) : int(ends[src])]
                    work = transport.process_group.recv([part], int(src), self._tag_of(number))
                    messages.append((int(src), work))
        except RuntimeError as error:
            self._broken = Arrival.lost(error)
        self._arrival = waiter.watch(messages)

    def _tag_of(self, lane: int) -> int:
        # Ranks that do not do the same must not meet: a message that is too long for who waits ends a process.
        return (zlib.crc32(self._tag.encode()) * _SEQS + self._seq % _SEQS) * _LANES % _TAGS + lane

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        copy_rows(self.target(lane, dst), src, index)

    def target(self, lane: int, dst: int) -> Tensor:
        if dst not in self._rows[lane]:
            self._rows[lane][dst] = byte_rows(int(self._lanes[lane].send_counts[dst]), self._lanes[lane].row_bytes)
        return self._rows[lane][dst]

    def lend(self, lane: int, dst: int, rows: Tensor) -> None:
        self._rows[lane][dst] = rows

    def commit(self) -> None:
        try:
            for number, of_lane in enumerate(self._rows):
                for dst, rows in of_lane.items():
                    if rows.numel():
                        work = self._transport.process_group.send([rows], dst, self._tag_of(number))
                        self._sends.append((dst, work))
        except RuntimeError as error:
            self._broken = Arrival.lost(error)

    def wait(self) -> list[Tensor]:
        if self._departure is None:  # behind all that is opened by now
            self._departure = self._waiter.watch(self._sends)
        self._transport.finish(self._broken or self._arrival, self._tag, self._seq)
        return self._received

    def own(self, lane: int) -> Tensor:
        return self.wait()[lane]

    def release(self) -> None:
        """Wait until all that was sent has left: it must not be gone before."""
        if self._sends:
            self._transport.finish(self._departure or self._waiter.watch(self._sends), self._tag, self._seq)
            self._sends, self._rows = [], []
