"""How the ranks of one host find each other: Unix-domain sockets that nobody else gets to speak through.

Every rank listens under an abstract name that cannot be guessed, while it must. The group tells the others that
name and a key. Both ends ask the kernel who is at the other one: another user is refused without a word. Who knows the
key of a listener is believed; everybody else is sent away, also after a second of silence, and keeps nobody waiting.
Bytes are compared and numbers are read: nothing that comes through a socket is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from moecomm.errors import CapacityError, MoECommError, PeerLostError, StallError, rank_names
from moecomm.group import Group

_POLL_S = 0.2
_MOST_SILENT = 64  # connections that have not said yet who they are; of more the oldest are closed
_RETRY_S = 0.01
_SILENCE_S = 1.0  # after which they are closed as well


def meet(group: Group, peers: Sequence[int], timeout_s: float) -> dict[int, socket.socket]:
    """A socket to every peer: lower ranks listen, higher ranks connect. All ranks of the group at the same time."""
    name, key = f"\0moecomm-{secrets.token_hex(16)}", secrets.token_hex(16)
    found: dict[int, socket.socket] = {}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(name)
            listener.listen(group.size + _MOST_SILENT)
            known = group.all_gather_object((name, key), timeout_s=timeout_s, operation="connect")
            deadline = time.monotonic() + timeout_s
            for peer in peers:
                if peer < group.rank:
                    try:
                        found[peer] = dial(known[peer], group.rank, deadline)
                    except OSError as error:
                        raise connect_error(group, timeout_s, peer, error) from error
            _Doorkeeper(listener, key, set(peers), found).admit_all(group, deadline, timeout_s)
        return found
    except BaseException as error:
        for sock in found.values():
            sock.close()
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise no_descriptors(group.rank, error) from error
        raise


def connect_error(group: Group, timeout_s: float, peer: int, cause: OSError) -> MoECommError:
    """What to raise when a peer cannot be spoken to."""
    if cause.errno in (errno.EMFILE, errno.ENFILE):
        return no_descriptors(group.rank, cause)
    where: dict[str, Any] = {"rank": group.rank, "operation": "connect", "peers": [peer]}
    if isinstance(cause, (TimeoutError, BlockingIOError)):
        return StallError(f"rank {peer} did not answer within {timeout_s:.1f} s", **where)
    return PeerLostError(f"rank {peer} is gone (its process ended or closed the connection)", **where)


def no_descriptors(rank: int, cause: OSError) -> CapacityError:
    """What to raise when this process may open no more files."""
    what, expected = "no descriptors are left to connect to the other ranks", "2 for each rank of this host"
    return CapacityError(what, got=str(cause), expected=expected, remedy="raise `ulimit -n`", rank=rank)


class _Doorkeeper:
    """Takes in the higher ranks and refuses strangers. found: rank -> its socket."""

    def __init__(self, listener: socket.socket, key: str, ranks: set[int], found: dict[int, socket.socket]) -> None:
        self._listener, self._key, self._ranks, self._found = listener, key, ranks, found
        self._silent: dict[int, tuple[socket.socket, float]] = {}  # did not say yet who they are; oldest first
        self._poll = select.poll()

    def admit_all(self, group: Group, deadline: float, timeout_s: float) -> None:
        """Return when all are there."""
        self._listener.setblocking(False)
        self._poll.register(self._listener, select.POLLIN)
        try:
            while missing := sorted(self._ranks - self._found.keys()):
                now = time.monotonic()
                if now >= deadline:
                    what = f"{rank_names(missing)} did not connect within {timeout_s:.1f} s"
                    raise StallError(what, rank=group.rank, operation="connect", peers=missing)
                self._look(now, min(_POLL_S, deadline - now))
        finally:
            for sock, _ in self._silent.values():
                sock.close()

    def _look(self, now: float, patience_s: float) -> None:
        ready = [fd for fd, _ in self._poll.poll(patience_s * 1000)]
        if self._listener.fileno() in ready and (sock := _take_in(self._listener)) is not None:
            self._silent[sock.fileno()] = sock, now + _SILENCE_S
            self._poll.register(sock, select.POLLIN)
        excess = len(self._silent) - _MOST_SILENT - len(self._ranks)
        for number, (fd, (sock, until)) in enumerate(list(self._silent.items())):
            if fd in ready or now > until or number < excess:
                self._poll.unregister(fd)
                del self._silent[fd]
                self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        """Believe who knows the key of this listener, and nobody else."""
        with contextlib.suppress(OSError, ValueError):
            told_key, told_rank = sock.recv(256).split(b" ")
            peer = int(told_rank)
            is_expected = peer in self._ranks and peer not in self._found
            if secrets.compare_digest(told_key, self._key.encode()) and is_expected:
                self._found[peer] = sock
                return
        sock.close()  # a stranger: refused, and the job goes on


def dial(address: tuple[str, str], rank: int, deadline: float) -> socket.socket:
    """Connect to the listener of a lower rank and say the key."""
    name, key = address
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        _connect_to(sock, name, deadline)
        if _user_of(sock) != os.getuid():  # the name was taken over: not a word to whoever listens there
            raise ConnectionRefusedError
        sock.send(f"{key} {rank}".encode())
    except OSError:
        sock.close()
        raise
    return sock


def _user_of(sock: socket.socket) -> int:
    """Who is at the other end, as the kernel says."""
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


def _connect_to(sock: socket.socket, name: str, deadline: float) -> None:
    """Connect, also where strangers crowd the door: who stands in line is let in, or sent away, in no time."""
    while True:
        try:
            return sock.connect(name)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_S)


def _take_in(listener: socket.socket) -> socket.socket | None:
    """A connection of this user; those of others end here."""
    with contextlib.suppress(OSError):
        sock, _ = listener.accept()
        if _user_of(sock) == os.getuid():
            sock.setblocking(False)
            return sock
        sock.close()
    return None
