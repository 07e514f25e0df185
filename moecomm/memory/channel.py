"""Signals between the ranks of one host: a mesh of Unix-domain sockets that also hands the memory around.

Messages are small and keep their boundaries (SOCK_SEQPACKET). A peer that dies is an end of file, at once. Socket
names are abstract: they live in no file system and vanish with the process. A stranger is refused by user id and key.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn, final

from moecomm import errors
from moecomm.errors import DesyncError, MoECommError, PeerLostError, StallError
from moecomm.group import Group

_CHUNK_BYTES = 64 * 1024
_HEADER = struct.Struct("<BBQiH")  # kind, more follows, sequence number, ticket, length of tag


class Kind(IntEnum):
    """What a message says."""

    HELLO = 0  # the sender's memory (its descriptor travels along) and its first ticket
    ARRIVE = 1  # the sender is in operation `seq`; payload: its counts
    DONE = 2  # the sender's rows of `seq` are written; ticket: where it wants those of `seq + 1`
    BYE = 3  # the sender closed its buffer
    ABORT = 4  # the sender gave up; payload: why, as JSON


@dataclass(slots=True)
class Message:
    """One message of a peer."""

    kind: Kind
    seq: int
    ticket: int
    tag: str
    payload: bytes


@final
class Channel:
    """Sockets to the peers among `ranks`, those of this host. `descriptors`: each peer's memory as a file descriptor.

    Made by all ranks of the group at the same time, also where `ranks` are only some of them.
    """

    def __init__(self, group: Group, ranks: Sequence[int], timeout_s: float, memory_fd: int, ticket: int) -> None:
        self.group, self.timeout_s = group, timeout_s
        self.peers = [rank for rank in ranks if rank != group.rank]
        self.descriptors: dict[int, int] = {}
        self.wait_s = dict.fromkeys(self.peers, 0.0)
        self._sockets: dict[int, socket.socket] = {}
        self._inbox: dict[int, dict[tuple[Kind, int], Message]] = {peer: {} for peer in self.peers}
        self._partial: dict[int, bytes] = dict.fromkeys(self.peers, b"")
        self._lost: set[int] = set()
        self._tickets: dict[int, dict[int, int]] = {peer: {} for peer in self.peers}  # seq -> the peer's segment for it
        self._poll = select.poll()
        self._rank_of_fd: dict[int, int] = {}
        try:
            self._connect(memory_fd, ticket)
        except BaseException:
            self.close()
            raise
        _channels.add(self)

    # -- operations ----------------------------------------------------------------------------------------------

    def post(self, kind: Kind, seq: int, *, ticket: int = -1, tag: str = "", payload: bytes = b"") -> None:
        """Send one message to every peer."""
        for peer in self.peers:
            self._send(peer, kind, seq, ticket, tag, payload)

    def collect(self, kind: Kind, seq: int, tag: str) -> dict[int, Message]:
        """Wait for that message of every peer and take it."""
        self._wait(lambda peer: (kind, seq) in self._inbox[peer], seq, tag)
        return {peer: self._inbox[peer].pop((kind, seq)) for peer in self.peers}

    def tickets(self, seq: int, tag: str) -> dict[int, int]:
        """Wait until every peer has said where it wants the rows of operation `seq`."""
        self._wait(lambda peer: seq in self._tickets[peer], seq, tag)
        return {peer: self._tickets[peer].pop(seq) for peer in self.peers}

    def abort(self, error: MoECommError, tag: str = "") -> None:
        """Tell every peer that can be told why this rank gives up, and (tag) what it was doing."""
        told = {"error": type(error).__name__, "what": error.what, "peers": error.peers, "operation": error.operation}
        told["remedy"] = error.remedy
        for peer in self._sockets:
            try:
                self._send_now(peer, Kind.ABORT, error.seq or 0, -1, tag, json.dumps(told).encode())
            except OSError:
                self._lost.add(peer)

    def close(self) -> None:
        """Say goodbye and close; idempotent."""
        for peer, sock in self._sockets.items():
            try:
                self._send_now(peer, Kind.BYE, 0, -1, "", b"")
            except OSError:
                self._lost.add(peer)
            sock.close()
        self._sockets.clear()
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
        self._poll = select.poll()
        self._lost.update(self.peers)

    # -- waiting -------------------------------------------------------------------------------------------------

    def _wait(self, arrived: Callable[[int], bool], seq: int, tag: str) -> None:
        start = time.monotonic()
        while True:
            self._check_agreement(seq, tag)
            missing = [peer for peer in self.peers if not arrived(peer)]
            waited = time.monotonic() - start
            if not missing:
                return
            self._raise_aborts(seq, tag)
            lost = [peer for peer in missing if peer in self._lost]
            if lost:
                self._raise_lost(lost, seq, tag)
            if waited >= self.timeout_s:
                self._fail(
                    StallError(
                        f"gave up after {waited:.1f} s waiting for {_ranks(missing)}",
                        remedy="look at what those ranks do, or raise timeout_s",
                        **self._where(seq, tag),
                        peers=missing,
                    ),
                    tag,
                )
            self._pump(self.timeout_s - waited)
            for peer in missing:
                self.wait_s[peer] += time.monotonic() - start - waited

    def _check_agreement(self, seq: int, tag: str) -> None:
        tags = [tag] * self.group.size
        for peer in self.peers:
            for message in self._inbox[peer].values():
                if message.seq == seq and message.tag:
                    tags[peer] = message.tag
        if error := DesyncError.among(tags, self.group.rank, seq):
            self._fail(error, tag)

    def _raise_aborts(self, seq: int, tag: str) -> None:
        for peer in self.peers:
            message = self._inbox[peer].get((Kind.ABORT, 0))
            if message is None:
                continue
            told = json.loads(message.payload)
            kind = getattr(errors, told["error"], MoECommError)
            who = "this rank" if self.group.rank in told["peers"] else _ranks(told["peers"])
            raise kind(
                f"rank {peer} gave up in {told['operation']} because of {who}: {told['what']}",
                remedy=told["remedy"],
                **self._where(seq, tag),
                peers=told["peers"],
            )

    def _raise_lost(self, lost: Sequence[int], seq: int, tag: str) -> NoReturn:
        left = [peer for peer in lost if (Kind.BYE, 0) in self._inbox[peer]]
        how = "closed its buffer" if len(left) == len(lost) else "is gone (its process ended or closed the connection)"
        if not self._sockets:
            how = "cannot be reached from a forked process"
        remedy = "look for the first error of all ranks; build a new Buffer once all of them live"
        self._fail(PeerLostError(f"{_ranks(lost)} {how}", remedy=remedy, **self._where(seq, tag), peers=lost), tag)

    def _fail(self, error: MoECommError, tag: str) -> NoReturn:
        self.abort(error, tag)
        raise error

    def _where(self, seq: int, tag: str) -> dict[str, Any]:
        return {"rank": self.group.rank, "operation": tag.split(" ")[0], "seq": seq}

    # -- wire ----------------------------------------------------------------------------------------------------

    def _send(self, peer: int, kind: Kind, seq: int, ticket: int, tag: str, payload: bytes) -> None:
        start = time.monotonic()
        for at in range(0, max(len(payload), 1), _CHUNK_BYTES):
            chunk, more = payload[at : at + _CHUNK_BYTES], at + _CHUNK_BYTES < len(payload)
            while peer not in self._lost:
                try:
                    self._send_now(peer, kind, seq, ticket, tag, chunk, more)
                    break
                except BlockingIOError:
                    if time.monotonic() - start >= self.timeout_s:
                        what = f"rank {peer} does not take messages for {self.timeout_s:.1f} s"
                        self._fail(StallError(what, **self._where(seq, tag), peers=[peer]), tag)
                    self._pump(0.01)
                except OSError:
                    # What it still had to say (why it gave up, say) is read before its end of file.
                    self._pump(0.0)
                    self._lost.add(peer)

    def _send_now(
        self, peer: int, kind: Kind, seq: int, ticket: int, tag: str, chunk: bytes, more: bool = False
    ) -> None:
        name = tag.encode()
        self._sockets[peer].send(_HEADER.pack(kind, more, seq, ticket, len(name)) + name + chunk, socket.MSG_NOSIGNAL)

    def _pump(self, timeout_s: float) -> None:
        """Read everything that is there; wait up to timeout_s for the first message."""
        for fd, _ in self._poll.poll(timeout_s * 1000):
            while self._receive(self._rank_of_fd[fd]):
                pass

    def _receive(self, peer: int) -> bool:
        """Take one message; False when there is none for now, or ever."""
        try:
            data = self._sockets[peer].recv(_CHUNK_BYTES + 1024)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # reported once, ahead of what the peer said before it went
        if not data:
            self._lose(peer)
            return False
        kind, more, seq, ticket, tag_bytes = _HEADER.unpack_from(data)
        body = _HEADER.size + tag_bytes
        self._partial[peer] += data[body:]
        if more:
            return True
        message = Message(Kind(kind), seq, ticket, data[_HEADER.size : body].decode(), self._partial[peer])
        self._partial[peer] = b""
        # Of several reasons to give up the first one counts.
        self._inbox[peer].setdefault((message.kind, 0 if message.kind is Kind.ABORT else seq), message)
        if message.kind is Kind.DONE:
            self._tickets[peer][seq + 1] = ticket
        return True

    def _lose(self, peer: int) -> None:
        self._lost.add(peer)
        self._poll.unregister(self._sockets[peer])

    # -- construction --------------------------------------------------------------------------------------------

    def _connect(self, memory_fd: int, ticket: int) -> None:
        """Lower ranks listen, higher ranks connect; then everybody says hello with its memory."""
        name, key = f"\0moecomm-{secrets.token_hex(16)}", secrets.token_hex(16)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(name)
            listener.listen(self.group.size)
            known = self.group.all_gather_object((name, key), timeout_s=self.timeout_s, operation="connect")
            deadline = time.monotonic() + self.timeout_s
            for peer in self.peers:
                if peer < self.group.rank:
                    self._sockets[peer] = self._dial(peer, known[peer], deadline)
            while len(self._sockets) < len(self.peers):
                self._accept(listener, key, deadline)
        for sock in self._sockets.values():
            socket.send_fds(sock, [_HEADER.pack(Kind.HELLO, False, 0, ticket, 0)], [memory_fd])
        for peer, sock in self._sockets.items():
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                hello, fds, _, _ = socket.recv_fds(sock, _HEADER.size, 1)
            except OSError as error:
                raise self._connect_error(peer, error) from error
            self.descriptors.update((peer, fd) for fd in fds)
            if not fds:
                raise self._connect_error(peer, ConnectionResetError())
            self._tickets[peer][0] = _HEADER.unpack(hello)[3]
            sock.setblocking(False)
            self._rank_of_fd[sock.fileno()] = peer
            self._poll.register(sock, select.POLLIN)

    def _accept(self, listener: socket.socket, key: str, deadline: float) -> None:
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError as error:
            missing = [peer for peer in self.peers if peer > self.group.rank and peer not in self._sockets]
            where = f"{_ranks(missing)} did not connect within {self.timeout_s:.1f} s"
            raise StallError(where, rank=self.group.rank, operation="connect", peers=missing) from error
        uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid == os.getuid():
            sock.settimeout(1.0)
            with contextlib.suppress(OSError, ValueError):
                told_key, told_rank = sock.recv(256).split(b" ")
                peer = int(told_rank)
                if secrets.compare_digest(told_key, key.encode()) and peer in self.peers and peer not in self._sockets:
                    self._sockets[peer] = sock
                    return
        sock.close()  # a stranger: refused, and the job goes on

    def _dial(self, peer: int, address: tuple[str, str], deadline: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            sock.connect(address[0])
            sock.send(f"{address[1]} {self.group.rank}".encode())
        except OSError as error:
            sock.close()
            raise self._connect_error(peer, error) from error
        return sock

    def _connect_error(self, peer: int, cause: OSError) -> MoECommError:
        where: dict[str, Any] = {"rank": self.group.rank, "operation": "connect", "peers": [peer]}
        if isinstance(cause, (TimeoutError, BlockingIOError)):
            return StallError(f"rank {peer} did not answer within {self.timeout_s:.1f} s", **where)
        return PeerLostError(f"rank {peer} is gone (its process ended or closed the connection)", **where)


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # A forked child (a data loader's worker, say) that kept the sockets would hide the death of its parent from the
    # peers, and would say goodbye in its name when it ends.
    for channel in list(_channels):
        channel.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
