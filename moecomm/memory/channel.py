"""Who is there, and what they do: letters in shared memory, and a mesh of Unix-domain sockets beside it.

The sockets hand the memory around, wake who sleeps, and tell of the end: a peer that dies is an end of file, at once.
Messages are small and keep their boundaries (SOCK_SEQPACKET). Socket names are abstract: they live in no file system
and vanish with the process. A stranger is refused (`handshake.py`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn, final

import numpy as np

from moecomm import errors
from moecomm.errors import DesyncError, MoECommError, PeerLostError, StallError, rank_names
from moecomm.group import Group
from moecomm.memory.handshake import connect_error, meet
from moecomm.memory.mail import STOP, WAIT, WAKE, Kind, Mail, cut_tag

Steps = Sequence[Callable[[int], int]]

_MESSAGE_BYTES = 64 * 1024
_REASON_CHARS = 4096
_HEADER = struct.Struct("<BqiH")  # signal, sequence number, ticket, bytes of the tag
_POLL_S = 0.2  # no wake-up is known to get lost; if one did, this is what it would cost


class Signal(IntEnum):
    """What a message says."""

    HELLO = 0  # the sender's memory (its descriptor travels along) and its first ticket
    WAKE = 1  # a letter lies in the receiver's box
    BYE = 2  # the sender closed its buffer
    ABORT = 3  # the sender gave up; payload: why, as JSON


@dataclass(slots=True)
class Message:
    """What a peer said of its end. tag: what it was doing, in operation `seq`."""

    seq: int
    tag: str
    payload: bytes


@final
class Channel:
    """Sockets to the peers among `ranks`, those of this host. `descriptors`: each peer's memory as a file descriptor.

    Made by all ranks of the group at the same time, also where `ranks` are only some of them; `attach` the mail then.
    """

    def __init__(self, group: Group, ranks: Sequence[int], timeout_s: float, memory_fd: int, ticket: int) -> None:
        self.group, self.timeout_s = group, timeout_s
        self.peers = [rank for rank in ranks if rank != group.rank]
        self.descriptors: dict[int, int] = {}
        self._mail: Mail | None = None
        self._sockets: dict[int, socket.socket] = {}
        self._said: dict[int, dict[Signal, Message]] = {peer: {} for peer in self.peers}
        self._lost: set[int] = set()
        self._first_tickets: dict[int, int] = {}
        self.num_gathered = 0
        self._given_up: MoECommError | None = None
        self.num_done = 0  # exchanges whose rows are known to be here
        self.last = 0, ""  # sequence number and tag of the last exchange
        self._poll = select.poll()
        self._rank_of_fd: dict[int, int] = {}
        try:
            self._connect(memory_fd, ticket)
        except BaseException:
            self.close()
            raise
        _channels.add(self)

    def attach(self, mail: Mail) -> None:
        """Take the letter boxes, once the memory of the peers is mapped."""
        self._mail = mail

    # -- operations ----------------------------------------------------------------------------------------------

    def gather(self, seq: int, tag: str, counts: np.ndarray) -> np.ndarray:
        """All-gather (C,) int32 counts into (W, C) before operation `seq`; 0 from ranks that are not on this host."""
        size, parts = self._box().payload_bytes // 4, []
        for at in range(0, max(len(counts), 1), size):
            number, part = self.num_gathered, counts[at : at + size]
            self.num_gathered += 1
            self.post(Kind.ARRIVE, number, seq, tag, -1, part)
            self.wait(Kind.ARRIVE, number, seq, tag)
            parts.append(self._box().gathered(number, len(part)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)

    def tickets(self, number: int) -> dict[int, int]:
        """Wait until every peer has said where it wants the rows of exchange `number`."""
        if not number:
            return self._first_tickets
        if self.num_done < number:
            self.wait(Kind.DONE, number - 1, *self.last)
        return self._box().tickets(number - 1)

    def done(self, number: int, seq: int, tag: str, ticket: int) -> None:
        """Say that this rank's rows of exchange `number` are written, and where it wants those of the next one."""
        self.last = seq, tag
        self.post(Kind.DONE, number, seq, tag, ticket)

    def all_done(self, number: int, seq: int, tag: str) -> None:
        """Wait until all peers have written their rows of an exchange."""
        self.wait(Kind.DONE, number, seq, tag)
        self.num_done = max(self.num_done, number + 1)

    def abort(self, error: MoECommError, tag: str = "") -> None:
        """Tell every peer that can be told why this rank gives up, and (tag) what it was doing."""
        self._given_up = error
        told = {
            "error": type(error).__name__,
            "what": error.what[:_REASON_CHARS],
            "remedy": error.remedy and error.remedy[:_REASON_CHARS],
            "peers": error.peers,
            "operation": error.operation,
        }
        for peer in self._sockets:
            try:
                self._send(peer, Signal.ABORT, seq=error.seq or 0, tag=tag, payload=json.dumps(told).encode())
            except OSError:
                self._lost.add(peer)

    def ends(self, timeout_s: float) -> list[int]:
        """Listen for a while; the peers that have ended, closed their buffer or given up so far."""
        self._pump(timeout_s)
        return [peer for peer in self.peers if peer in self._lost or Signal.ABORT in self._said[peer]]

    def raise_ended(self, ended: Sequence[int], seq: int, tag: str) -> NoReturn:
        """Raise what became of peers that have ended."""
        self._raise_aborts(seq, tag)
        self._raise_lost(ended, seq, tag)

    def leave(self) -> None:
        """Say goodbye and hear no more: who listens in another thread is woken up. `close` afterwards."""
        for peer, sock in self._sockets.items():
            with contextlib.suppress(OSError):
                self._send(peer, Signal.BYE)
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say goodbye and close; idempotent."""
        for peer, sock in self._sockets.items():
            try:
                self._send(peer, Signal.BYE)
            except OSError:
                self._lost.add(peer)
            sock.close()
        self._sockets.clear()
        self._mail = None
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close those of the peers' memory: once it is mapped, nobody needs them."""
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()

    def after_fork(self) -> None:
        """Let go of the sockets in a child process, without a word: they are its parent's, and end with it."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        self._mail = None
        self._poll = select.poll()

    def waited_s(self) -> np.ndarray:
        """(W,) seconds for which this rank waited for each of the others."""
        return np.zeros(self.group.size) if self._mail is None else self._mail.waited_s(self.group.size)

    # -- waiting -------------------------------------------------------------------------------------------------

    @property
    def mail(self) -> Mail | None:
        """The letter boxes, while the channel is open."""
        return self._mail

    def _box(self) -> Mail:
        if self._mail is None:
            what = f"{rank_names(self.peers)} cannot be reached from a forked process"
            raise PeerLostError(what, rank=self.group.rank, peers=self.peers)
        return self._mail

    def post(
        self, kind: Kind, number: int, seq: int, tag: str, ticket: int = -1, counts: np.ndarray | None = None
    ) -> None:
        """Send letter `number` of a kind, in operation `seq`, to all peers; wake those that sleep."""
        self.wake(self._box().post(kind, number, seq=seq, tag=tag, ticket=ticket, payload=counts))

    def wake(self, asleep: Sequence[int]) -> None:
        """Wake peers that sleep and have a letter now."""
        for peer in asleep:
            # It has unread messages, which wake it as well; or it is gone, which reading will tell.
            with contextlib.suppress(OSError):
                self._send(peer, Signal.WAKE)

    def wait(self, kind: Kind, number: int, seq: int, tag: str, *, patient: bool = True) -> None:
        """Wait until all peers have sent that letter, and see that they do the same in operation `seq`.

        patient: look for a while; False where machine code has done so.
        """
        mail = self._box()
        start = time.monotonic()
        try:
            while not mail.has_all(kind, number, patient=patient):
                patient = False
                self._pump(0.0)
                self._check_agreement(seq, tag)
                self._raise_aborts(seq, tag)
                missing = mail.missing(kind, number)
                if lost := [peer for peer in missing if peer in self._lost]:
                    self._raise_lost(lost, seq, tag)
                waited = time.monotonic() - start
                if missing and waited >= self.timeout_s:
                    what = f"gave up after {waited:.1f} s waiting for {rank_names(missing)}"
                    remedy = "look at what those ranks do, or raise timeout_s"
                    self._fail(StallError(what, remedy=remedy, **self._where(seq, tag), peers=missing), tag)
                if missing:
                    self._pump(min(_POLL_S, self.timeout_s - waited))
        finally:
            if not patient:
                mail.woke()
        if not mail.agrees(kind, number, tag):
            self._check_agreement(seq, tag)

    def run(self, steps: Steps, table: int, letters: Mapping[int, tuple[Kind, int]], seq: int, tag: str) -> int:
        """Run an operation that is a chain of compiled steps, from step 0 on; 0, or at least `STOP`: what is wrong.

        Each step ends by calling the next one, unless there is something to do first: then it gives the number of that
        step, plus `WAKE` (who sleeps and has a letter now) or `WAIT` (for `letters` of that step, that did not come
        soon or say something else).
        """
        mail = self._box()
        mail.draft(tag)
        code = steps[0](table)
        while 0 < code < STOP:
            if code & WAIT:
                code -= WAIT
                self.wait(*letters[code], seq, tag, patient=False)
            else:
                code -= WAKE
                self.wake(mail.asleep())
            code = steps[code](table)
        return code

    def _check_agreement(self, seq: int, tag: str) -> None:
        tags = [tag] * self.group.size
        for peer, told in self._box().tags(seq).items():
            tags[peer] = tag if told == cut_tag(tag) else told
        for peer in self.peers:
            message = self._said[peer].get(Signal.ABORT)
            if message is not None and message.seq == seq and message.tag:
                tags[peer] = message.tag
        if error := DesyncError.among(tags, self.group.rank, seq):
            self._fail(error, tag)

    def is_first_report(self) -> bool:
        """Whether no rank of this host has said this before."""
        return self._mail is None or self._mail.is_first_report()

    def last_seen(self) -> dict[int, str]:
        """What is known of the peers, for whoever must find out what went wrong."""
        seen = {}
        for peer, (seq, tag) in ({} if self._mail is None else self._mail.last_seen()).items():
            said = self._said[peer]
            end = ", gave up" if Signal.ABORT in said else ", closed its buffer" if Signal.BYE in said else ""
            end = end or (", is gone" if peer in self._lost else "")
            seen[peer] = f"{tag.split(' ')[0]} #{seq}{end}" if tag else f"not seen in any operation{end}"
        return seen

    def _raise_aborts(self, seq: int, tag: str) -> None:
        if self._given_up is not None:  # by another thread of this rank
            raise self._given_up
        for peer in self.peers:
            message = self._said[peer].get(Signal.ABORT)
            if message is None:
                continue
            told = json.loads(message.payload)
            kind = getattr(errors, told["error"], MoECommError)
            who = "this rank" if self.group.rank in told["peers"] else rank_names(told["peers"])
            error = kind(
                f"rank {peer} gave up in {told['operation']} because of {who}: {told['what']}",
                remedy=told["remedy"],
                **self._where(seq, tag),
                peers=told["peers"],
            )
            error.told_by = peer
            raise error

    def _raise_lost(self, lost: Sequence[int], seq: int, tag: str) -> NoReturn:
        left = [peer for peer in lost if Signal.BYE in self._said[peer]]
        how = "closed its buffer" if len(left) == len(lost) else "is gone (its process ended or closed the connection)"
        remedy = "look for the first error of all ranks; build a new Buffer once all of them live"
        self._fail(PeerLostError(f"{rank_names(lost)} {how}", remedy=remedy, **self._where(seq, tag), peers=lost), tag)

    def _fail(self, error: MoECommError, tag: str) -> NoReturn:
        self.abort(error, tag)
        raise error

    def _where(self, seq: int, tag: str) -> dict[str, Any]:
        return {"rank": self.group.rank, "operation": tag.split(" ")[0], "seq": seq}

    # -- wire ----------------------------------------------------------------------------------------------------

    def _send(self, peer: int, signal: Signal, *, seq: int = 0, tag: str = "", payload: bytes = b"") -> None:
        """Send a message, or raise OSError: it never waits."""
        name = tag.encode()
        data = _HEADER.pack(signal, seq, -1, len(name)) + name + payload
        self._sockets[peer].send(data[:_MESSAGE_BYTES], socket.MSG_NOSIGNAL)

    def _pump(self, timeout_s: float) -> None:
        """Read everything that is there; wait up to timeout_s for the first message."""
        for fd, _ in self._poll.poll(timeout_s * 1000):
            while self._receive(self._rank_of_fd[fd]):
                pass

    def _receive(self, peer: int) -> bool:
        """Take one message; False when there is none for now, or ever."""
        try:
            data = self._sockets[peer].recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # reported once, ahead of what the peer said before it went
        if not data:
            self._lose(peer)
            return False
        signal, seq, _, tag_bytes = _HEADER.unpack_from(data)
        body = _HEADER.size + tag_bytes
        message = Message(seq, data[_HEADER.size : body].decode(), data[body:])
        self._said[peer].setdefault(Signal(signal), message)  # of several reasons to give up the first one counts
        return True

    def _lose(self, peer: int) -> None:
        self._lost.add(peer)
        self._poll.unregister(self._sockets[peer])

    # -- construction --------------------------------------------------------------------------------------------

    def _connect(self, memory_fd: int, ticket: int) -> None:
        """Everybody says hello with its memory to everybody else."""
        deadline = time.monotonic() + self.timeout_s
        self._sockets = meet(self.group, self.peers, self.timeout_s)
        for sock in self._sockets.values():
            socket.send_fds(sock, [_HEADER.pack(Signal.HELLO, 0, ticket, 0)], [memory_fd])
        for peer, sock in self._sockets.items():
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                hello, fds, _, _ = socket.recv_fds(sock, _HEADER.size, 1)
            except OSError as error:
                raise connect_error(self.group, self.timeout_s, peer, error) from error
            self.descriptors.update((peer, fd) for fd in fds)
            if not fds:
                full = OSError(errno.EMFILE, "too many open files") if hello else ConnectionResetError()
                raise connect_error(self.group, self.timeout_s, peer, full)
            self._first_tickets[peer] = _HEADER.unpack(hello)[2]
            sock.setblocking(False)
            self._rank_of_fd[sock.fileno()] = peer
            self._poll.register(sock, select.POLLIN)


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # A forked child (a data loader's worker, say) that kept the sockets would hide the death of its parent from the
    # peers, and would say goodbye in its name when it ends.
    for channel in list(_channels):
        channel.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
