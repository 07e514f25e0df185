"""Any MPI: rows travel in non-blocking `Alltoallv`, counted in rows; no torch.distributed anywhere.

Every operation begins with small messages between all pairs of ranks (see `_mpi_post`): what is being done, and how
many rows. Rows move once all ranks are known to do the same, in the order of operations; they are packed by
destination, and unpacked where they do not arrive in order. Rows to this rank itself never pass through MPI.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor

from moecomm import errors
from moecomm.blocks import empty_rows
from moecomm.errors import DesyncError, MoECommError, PeerLostError, StaleHandleError, StallError, rank_names
from moecomm.group import Group
from moecomm.topology import Topology
from moecomm.transport._mpi_exchange import MpiExchange
from moecomm.transport._mpi_post import PROGRESS, ROLL_CALL_S, Kind, duplicate, mpi_error, pause, post_of
from moecomm.transport._staging import CopyEngine, Slots, copy_engine, device_awareness
from moecomm.transport.base import Exchange, Lane, Support, Transport, TransportOptions

_GRACE_S = 0.5  # once one rank is seen to do something else, the others get this long to say what they do
_abandoned: list[object] = []  # requests that never completed, and their buffers: MPI may write to them until it ends


@final
class MpiTransport(Transport):
    """Rows travel as bytes, so that every MPI carries every dtype."""

    name = "mpi"

    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        from mpi4py import MPI

        self.group, self.mpi, self.timeout_s, self.device = group, MPI, options.timeout_s, options.device
        self.num_launched = 0
        self._pid = os.getpid()
        self._seq = 0
        self._queue: deque[MpiExchange] = deque()  # committed, and not yet known to be wanted by all ranks
        self._flying: list[MpiExchange] = []
        self._types: dict[int, Any] = {}
        self._scratch: list[Tensor] = []
        self._error: Exception | None = None
        self._broken = self._closed = False
        self._given_up: MoECommError | None = None
        self._give_up_s = float("inf")  # when rows that nobody waits for are given up
        aware = device_awareness(group.mpi_comm, options.device)[0]
        told = group.all_gather_object(aware, timeout_s=options.timeout_s, operation="Buffer()")
        self.engine: CopyEngine | None = copy_engine(options.device)
        self.slots = None if self.engine is None or all(told) else Slots(self.engine)
        try:
            self.post = post_of(group, options.timeout_s)
            self.buffer_id = options.buffer_id
            self.box = self.post.open(options.buffer_id, self._advance, self.close)
            self.comm = self._duplicate()
        except MPI.Exception as error:
            raise mpi_error(error, rank=group.rank, operation="Buffer()") from error

    def _duplicate(self) -> Any:
        try:
            return duplicate(self.group, self.timeout_s)
        except BaseException:
            self.post.shut(self.box)
            raise

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        if group.mpi_comm is None:
            return Support(False, "the group is not an mpi4py communicator")
        from mpi4py import MPI

        vendor, version = MPI.get_vendor()
        reason = f"Ialltoallv of {vendor} {'.'.join(map(str, version))}"
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            reason += ", which was started for one thread: rows move only inside calls of moecomm"
        if device.type != "cpu":
            reason += f"; {device_awareness(group.mpi_comm, device)[1]}"
        return Support(True, reason)

    # -- operations --------------------------------------------------------------------------------------------------

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        """Every operation begins with such messages: they are where disagreement and absence show."""
        seq = self._begin(tag, {peer: counts.astype("<i4").tobytes() for peer in self.post.peers})
        self._wait(lambda: self._heard(seq) and self._conflict(seq, tag) is None, seq, tag, lambda: self._unheard(seq))
        gathered = np.empty((self.group.size, len(counts)), np.int32)
        gathered[self.group.rank] = counts
        for peer, (_, payload) in self.box.headers.pop(seq, {}).items():
            gathered[peer] = np.frombuffer(payload, "<i4")
        return gathered

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        if agreed:
            return MpiExchange(self, self._seq - 1, tag, lanes, agreed=True)
        rows = np.array([lane.send_counts for lane in lanes], "<i8")
        seq = self._begin(tag, {peer: rows[:, peer].tobytes() for peer in self.post.peers})
        return MpiExchange(self, seq, tag, lanes, agreed=False)

    def close(self) -> None:
        if os.getpid() != self._pid:  # a fork must not speak for its parent
            return
        with PROGRESS.lock:
            if self._closed or self.mpi.Is_finalized():
                return
            self._advance()
            if not self._broken:  # else all were told; MPI may crash where it meets a process that died meanwhile
                self._call_mpi(lambda: self.post.send_all(self.box, Kind.BYE, self._seq))
            self._closed = True
            self._give_up_s = time.monotonic() + self.timeout_s
            PROGRESS.last_s = max(PROGRESS.last_s, self.timeout_s)
            self._advance()

    def last_seen(self) -> dict[int, str]:
        waiting = self.box.headers
        seen = dict.fromkeys(self.post.peers, f"all operations before #{self._seq - 1}")
        seen |= {
            peer: f"{waiting[seq][peer][0].split(' ')[0]} #{seq}" for seq in sorted(waiting) for peer in waiting[seq]
        }
        return {peer: told + (", is gone" if peer in self.post.lost else "") for peer, told in seen.items()}

    def abort(self, error: MoECommError) -> None:
        self._broken = True
        self._given_up = error
        if not self._closed:
            self.post.tell(self.box, error)

    def stats(self) -> dict[str, int]:
        in_flight = len(self._queue) + len(self._flying)
        num_chunks = self.slots.num_chunks if self.slots else 0
        return {"in_flight": in_flight, "collectives": self.num_launched, "staged_chunks": num_chunks}

    @property
    def allocated_bytes(self) -> int:
        return sum(scratch.numel() for scratch in self._scratch) + (self.slots.allocated_bytes if self.slots else 0)

    # -- what exchanges use ------------------------------------------------------------------------------------------

    def commit(self, exchange: MpiExchange) -> None:
        """Queue an exchange; it leaves at once if all ranks are here."""
        with PROGRESS.lock:
            self._queue.append(exchange)
            PROGRESS.pump()
        PROGRESS.nudge()

    def finish(self, exchange: MpiExchange) -> None:
        """Wait until all rows of an exchange have come."""
        seq = exchange.seq
        if not exchange.agreed:
            self._wait(lambda: exchange.agreed, seq, exchange.tag, lambda: self._unheard(seq))
        self._wait(lambda: exchange.done, seq, exchange.tag, list)

    def row_type(self, row_bytes: int) -> Any:
        """The MPI datatype of one row."""
        if row_bytes not in self._types:
            self._types[row_bytes] = self.mpi.BYTE.Create_contiguous(row_bytes).Commit()
        return self._types[row_bytes]

    def take_scratch(self, num_rows: int, row_bytes: int) -> Tensor:
        """(num_rows, row_bytes) uint8 to pack or unpack from, used again: fresh pages cost as much as a copy."""
        nbytes = num_rows * row_bytes
        fitting = [scratch for scratch in self._scratch if nbytes <= scratch.numel() <= max(4 * nbytes, 1 << 16)]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self._scratch = [scratch for scratch in self._scratch if scratch is not best]
        else:
            best = empty_rows(1, nbytes + nbytes // 8, torch.uint8, self.device).view(-1)
        return best[:nbytes].view(num_rows, row_bytes)

    def give_scratch(self, rows: Tensor) -> None:
        """Take scratch back; the four largest pieces are kept."""
        base = (rows if rows._base is None else rows._base).view(-1)
        self._scratch = sorted([*self._scratch, base], key=Tensor.numel)[-4:]

    # -- progress ----------------------------------------------------------------------------------------------------

    def _begin(self, tag: str, payloads: dict[int, bytes]) -> int:
        """Tell every peer which operation this rank is in."""
        with PROGRESS.lock:
            self._check_open(tag)
            seq, self._seq = self._seq, self._seq + 1
            self._call_mpi(lambda: self.post.send_all(self.box, Kind.HEADER, seq, tag, payloads))
        return seq

    def _advance(self) -> bool:
        """Launch what all ranks agree on, in order, and see what has arrived; True while something is under way."""
        broken = self._broken or self._error is not None or self.post.error is not None
        if not broken:
            self._call_mpi(self._advance_now)
        if self._closed and (broken or self._is_hopeless()):
            _abandoned.extend(self._flying)  # and the communicator is not freed: late messages must not find another
            self._flying = []
            self._queue.clear()
            self.post.shut(self.box)
        elif self._closed and not (self._flying or self._queue):
            self.post.shut(self.box)
            self._call_mpi(self._free)
        return not broken and bool(self._flying or self._queue)

    def _is_hopeless(self) -> bool:
        """Whether rows that nobody waits for cannot be expected to leave: a peer is gone, gave up, or is too late."""
        last = max((exchange.seq for exchange in (*self._flying, *self._queue)), default=-1)
        gone = any(first <= last for first in self.box.byes.values())
        return last >= 0 and (gone or bool(self.post.lost or self.box.aborts) or time.monotonic() >= self._give_up_s)

    def _free(self) -> None:
        for row_type in self._types.values():
            row_type.Free()
        self._types.clear()
        self.comm.Free()

    def _advance_now(self) -> None:
        while self._queue and self._may_launch(self._queue[0]):
            exchange = self._queue.popleft()
            self._flying.append(exchange)
            self.num_launched += exchange.launch()
        self._flying = [exchange for exchange in self._flying if not exchange.test()]

    def _may_launch(self, exchange: MpiExchange) -> bool:
        one_at_a_time = self.slots is not None and bool(self._flying)
        if not exchange.agreed and self._heard(exchange.seq) and self._conflict(exchange.seq, exchange.tag) is None:
            exchange.agreed = True
            self.box.headers.pop(exchange.seq, None)
        return exchange.agreed and exchange.is_ready() and not one_at_a_time

    def _call_mpi(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # of MPI, or of a device; possibly in the progress thread: raised where one waits
            self._error = error

    # -- waiting -----------------------------------------------------------------------------------------------------

    def _heard(self, seq: int) -> bool:
        return len(self.box.headers.get(seq, ())) == len(self.post.peers)

    def _unheard(self, seq: int) -> list[int]:
        return [peer for peer in self.post.peers if peer not in self.box.headers.get(seq, ())]

    def _wait(self, done: Callable[[], bool], seq: int, tag: str, missing: Callable[[], list[int]]) -> None:
        """Wait until it is done, the deadline passes, or something is known that prevents it."""
        start = time.monotonic()
        conflict_s: float | None = None
        self.box.called_s = None
        with PROGRESS.waiting(self.box, seq):
            while True:
                lost = set(self.post.lost)  # what these sent before they ended is here after one more look
                PROGRESS.pump()
                if done():
                    return
                waited = time.monotonic() - start
                conflict = self._conflict(seq, tag)
                if conflict or any(told["error"] == "DesyncError" for told in self.box.aborts.values()):
                    conflict_s = waited if conflict_s is None else conflict_s
                    in_time = waited < min(conflict_s + _GRACE_S, self.timeout_s)
                    if conflict and (self._heard(conflict.seq or 0) or not in_time):
                        self._fail(conflict)
                    if in_time:  # let this rank see for itself who does what, whatever others have told
                        pause(waited)
                        continue
                self._raise_what_is_known(seq, tag, sorted(lost & set(missing() or lost)))
                if waited >= self.timeout_s:
                    self._give_up(seq, tag, missing(), waited)
                if self.box.called_s is None and waited >= max(self.timeout_s / 2, self.timeout_s - ROLL_CALL_S):
                    self.post.begin_roll(self.box)
                pause(waited)

    def _raise_what_is_known(self, seq: int, tag: str, lost: list[int]) -> None:
        where = self._where(seq, tag)
        self._check_open(tag)
        if self._given_up is not None:  # by another thread of this rank
            raise self._given_up
        if error := self._error or self.post.error:
            self._fail(mpi_error(error, **where), error)
        for peer, told in self.box.aborts.items():
            self._broken = True
            who = "this rank" if self.group.rank in told["peers"] else rank_names(told["peers"])
            because = f" because of {who}" if told["peers"] else ""
            what = f"rank {peer} gave up in {told['operation']}{because}: {told['what']}"
            heard: MoECommError = getattr(errors, told["error"], MoECommError)(what, **where, peers=told["peers"])
            heard.told_by = peer
            raise heard
        if gone := [peer for peer, first in self.box.byes.items() if first <= seq]:
            self._fail(PeerLostError(f"{rank_names(gone)} closed its buffer", **where, peers=gone))
        if lost:
            self._fail(PeerLostError(f"{rank_names(lost)} is gone (its process ended)", **where, peers=lost))

    def _check_open(self, tag: str) -> None:
        if self._closed:
            what = "the buffer was closed, as MPI or the communicator it stands on ended"
            remedy = "keep both until the buffer is done"
            raise StaleHandleError(what, remedy=remedy, rank=self.group.rank, operation=tag.split(" ")[0])

    def _conflict(self, seq: int, tag: str) -> DesyncError | None:
        """The error to raise if a peer is known to do something else in this operation or in an earlier one."""
        for exchange in self._queue:
            if not exchange.agreed and exchange.seq <= seq:
                told = self.box.headers.get(exchange.seq, {})
                if error := self._disagreement(exchange.seq, exchange.tag) or exchange.agrees_with(told):
                    return error
        return self._disagreement(seq, tag)

    def _disagreement(self, seq: int, tag: str) -> DesyncError | None:
        headers = self.box.headers.get(seq, {})
        told = [headers[peer][0] if peer in headers else tag for peer in range(self.group.size)]
        return DesyncError.among(told, self.group.rank, seq)

    def _give_up(self, seq: int, tag: str, missing: list[int], waited_s: float) -> NoReturn:
        """Call the roll. Late are the ranks that say nothing, or that came elsewhere and wait for nobody there."""
        silent = self.post.call_roll(self.box)
        late = [peer for peer in missing if peer in silent or self.box.here.get(peer, -1) < 0] or missing or silent
        who = f"waiting for {rank_names(late)}" if late else "of transfer: all ranks answer, so the network is too slow"
        remedy = "look at what those ranks do, or raise timeout_s" if late else "raise timeout_s"
        what = f"gave up after {waited_s:.1f} s {who}"
        self._fail(StallError(what, remedy=remedy, **self._where(seq, tag), peers=late))

    def _fail(self, error: MoECommError, cause: Exception | None = None) -> NoReturn:
        self.abort(error)
        raise error from cause

    def _where(self, seq: int, tag: str) -> dict[str, Any]:
        number = seq if seq >= 0 else None  # blocks of the hierarchical transport are not counted here
        return {"rank": self.group.rank, "operation": tag.split(" ")[0], "seq": number}
