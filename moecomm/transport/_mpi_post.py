"""Small messages between the ranks of an MPI communicator, and what keeps MPI going while nobody waits.

A collective of MPI cannot say who is missing, and cannot be given up. So everything that may have to be said about an
operation (who is in which one, who gave up and why, who is still there) travels in point-to-point messages of its own,
on a duplicate of the caller's communicator, and rows travel only when all ranks are known to want the same.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, final

from moecomm.errors import MoECommError, PeerLostError, StallError, rank_names
from moecomm.group import Group

_HEADER = struct.Struct("<BqiqH")  # kind, buffer, which of its transports, sequence number, length of tag
ROLL_CALL_S = 1.0  # what a rank gets to answer; its progress thread does, whatever else it is doing
_LOOK_S = 0.005  # how often the processes of peers are looked at
_BUSY_S = 0.0003  # pause of the progress thread while rows travel
_IDLE_S = 0.02  # and while nothing does: late questions are answered within this time
_MAX_PAUSE_S = 0.0005

Key = tuple[int, int]


class Kind(IntEnum):
    """What a message says."""

    HEADER = 0  # the sender is in operation `seq`; payload: its counts
    ROLL = 1  # whoever reads this says HERE
    HERE = 2  # the sender is alive; seq: the operation in which it waits, -1 if in none
    ABORT = 3  # the sender gave up; payload: why, as JSON
    BYE = 4  # the sender closed its buffer: nothing comes from operation `seq` on


@final
@dataclass(eq=False)
class Mailbox:
    """What the peers told one transport.

    headers: sequence number -> peer -> (tag, payload). here: peer -> the operation in which it waits. aborts: peer ->
    why it gave up. byes: peer -> the first operation that it takes no part in. advance: lets the transport go on, True
    while something is under way. close: of the transport. waits_in: the operation in which this rank waits, or -1.
    called_s: when this rank asked who is there, in a wait that is not over; or None.
    """

    key: Key
    advance: Callable[[], bool]
    close: Callable[[], None]
    headers: defaultdict[int, dict[int, tuple[str, bytes]]] = field(default_factory=lambda: defaultdict(dict))
    here: dict[int, int] = field(default_factory=dict)
    aborts: dict[int, dict[str, Any]] = field(default_factory=dict)
    byes: dict[int, int] = field(default_factory=dict)
    waits_in: int = -1
    called_s: float | None = None


@final
class Post:
    """The messages of all transports on one communicator, found again through an attribute of it."""

    def __init__(self, comm: Any, processes: Sequence[tuple[object, int]], rank: int) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self.rank, self.size = MPI, comm, rank, len(processes)
        self.peers = [peer for peer in range(self.size) if peer != rank]
        self.error: Exception | None = None  # of MPI; nothing works here any more
        self.lost: set[int] = set()  # peers whose process has ended, of those on this machine
        self._dead: set[int] = set()  # peers that others have lost: to send to one may end this process (MPICH, UCX)
        self._processes = processes
        self._boxes: dict[Key, Mailbox] = {}
        self._num_opened: dict[int, int] = defaultdict(int)
        self._sending: list[tuple[int, Any, bytes]] = []  # to whom
        self._arriving: list[tuple[int, bytearray, Any]] = []
        self._watched: dict[int, int] = {}  # descriptor -> peer
        self._poll = select.poll()
        self._looked_s = 0.0

    # -- transports --------------------------------------------------------------------------------------------------

    def open(self, buffer_id: int, advance: Callable[[], bool], close: Callable[[], None]) -> Mailbox:
        """A mailbox for a transport; all ranks open theirs in the same order."""
        with PROGRESS.lock:
            key = buffer_id, self._num_opened[buffer_id]
            self._num_opened[buffer_id] += 1
            if not self._watched:
                self._watch()
            box = self._boxes[key] = Mailbox(key, advance, close)
        PROGRESS.add(self)
        return box

    def shut(self, box: Mailbox) -> None:
        """Forget a mailbox; what still comes for it is thrown away."""
        with PROGRESS.lock:
            self._boxes.pop(box.key, None)
            self._rest()

    def _rest(self) -> bool:
        """Without transports, and when everything has been said, there is nothing to do; True if so."""
        if self._boxes or (
            self.error is None and any(peer not in self.lost | self._dead for peer, *_ in self._sending)
        ):
            return False
        PROGRESS.remove(self)
        for fd in self._watched:
            os.close(fd)
        self._watched, self._poll = {}, select.poll()
        return True

    def close_all(self) -> None:
        """Close the transports that are open."""
        for box in list(self._boxes.values()):
            box.close()

    def free(self) -> None:
        """The communicator goes."""
        with PROGRESS.lock:
            self.close_all()
            for box in list(self._boxes.values()):
                self.shut(box)
            self.error = RuntimeError("the communicator of this buffer was freed")
            self._comm.Free()

    # -- messages ----------------------------------------------------------------------------------------------------

    def send(self, peer: int, box: Mailbox, kind: Kind, seq: int, tag: str = "", payload: bytes = b"") -> None:
        """Send one message; never waits. What is for a peer that is gone is thrown away."""
        if peer in self._dead or peer in self.lost:
            return
        name = tag.encode()
        data = _HEADER.pack(kind, *box.key, seq, len(name)) + name + payload
        self._sending.append((peer, self._comm.Isend([data, self._mpi.BYTE], peer), data))

    def send_all(
        self, box: Mailbox, kind: Kind, seq: int, tag: str = "", payloads: Mapping[int, bytes] | None = None
    ) -> None:
        """Send every peer a message, with a payload of its own; never waits."""
        for peer in self.peers:
            self.send(peer, box, kind, seq, tag, payloads[peer] if payloads else b"")

    def tell(self, box: Mailbox, error: MoECommError) -> None:
        """Tell every peer why this rank gives up, as far as messages still get through."""
        told = {"error": type(error).__name__, "what": error.what, "peers": error.peers, "operation": error.operation}
        with PROGRESS.lock, contextlib.suppress(self._mpi.Exception):
            if isinstance(error, PeerLostError):  # who has only closed his buffer, or broke off, is not dead
                self._dead |= set(error.peers) - set(box.byes) - set(box.aborts)
            payload = json.dumps(told).encode()
            self.send_all(box, Kind.ABORT, 0, payloads=dict.fromkeys(self.peers, payload))

    def begin_roll(self, box: Mailbox) -> None:
        """Ask who is there, and go on. `box.here` then has what the others say."""
        box.here.clear()
        box.called_s = time.monotonic()
        with PROGRESS.lock:
            self.send_all(box, Kind.ROLL, 0)

    def call_roll(self, box: Mailbox) -> list[int]:
        """The peers that do not answer; waits for them unless they were asked long enough ago."""
        if box.called_s is None:
            self.begin_roll(box)
        assert box.called_s is not None
        deadline = box.called_s + ROLL_CALL_S
        while True:
            PROGRESS.pump()
            silent = [peer for peer in self.peers if peer not in box.here]
            if not silent or self.error is not None or time.monotonic() >= deadline:
                return silent
            time.sleep(_MAX_PAUSE_S)

    def pump(self) -> bool:
        """Take what has come and let every transport advance; True while something is under way."""
        if self.error is None:
            try:
                self._sending = [message for message in self._sending if not message[1].Test()]
                self._receive()
            except self._mpi.Exception as error:
                self.error = error
        if time.monotonic() - self._looked_s > _LOOK_S:
            self.lost |= {self._watched[fd] for fd, _ in self._poll.poll(0)}
            self._looked_s = time.monotonic()
        if self._boxes:
            return max(box.advance() for box in list(self._boxes.values()))
        return not self._rest()

    def _receive(self) -> None:
        status = self._mpi.Status()
        while (message := self._comm.Improbe(status=status)) is not None:
            data = bytearray(status.Get_count(self._mpi.BYTE))
            self._arriving.append((status.Get_source(), data, message.Irecv([data, self._mpi.BYTE])))
        arriving, self._arriving = self._arriving, []
        for source, data, request in arriving:
            if request.Test():
                self._deliver(source, bytes(data))
            else:
                self._arriving.append((source, data, request))

    def _deliver(self, source: int, data: bytes) -> None:
        kind, buffer_id, number, seq, tag_bytes = _HEADER.unpack_from(data)
        box = self._boxes.get((buffer_id, number))
        if box is None:  # of a transport that is closed here
            return
        body = _HEADER.size + tag_bytes
        if kind == Kind.HEADER:
            box.headers[seq][source] = data[_HEADER.size : body].decode(), data[body:]
        elif kind == Kind.ROLL:
            self.send(source, box, Kind.HERE, box.waits_in)
        elif kind == Kind.HERE:
            box.here[source] = seq
        elif kind == Kind.ABORT:
            box.aborts.setdefault(source, json.loads(data[body:]))
        elif kind == Kind.BYE:
            box.byes[source] = seq

    def _watch(self) -> None:
        """Hold on to the processes of peers on this machine: the system says at once when one ends."""
        for peer in self.peers:
            machine, pid = self._processes[peer]
            if machine is not None and machine == self._processes[self.rank][0] and hasattr(os, "pidfd_open"):
                try:
                    fd = os.pidfd_open(pid)
                except ProcessLookupError:
                    self.lost.add(peer)
                    continue
                except OSError:  # not allowed here: then its silence will tell
                    continue
                self._watched[fd] = peer
                self._poll.register(fd, select.POLLIN)


@final
class Progress:
    """Keeps all posts of this process going: whoever waits does it, and a thread while nobody does.

    MPI moves most rows only while somebody calls it. The lock guards every call of MPI and all that it changes.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._posts: list[Post] = []
        self._num_waiting = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._hooked = False
        self._pid = 0  # of the process that the hooks belong to
        self.last_s = 0.0  # what is on its way gets this long before MPI ends: the longest timeout_s of a buffer

    def add(self, post: Post) -> None:
        """A post has transports; start the thread if MPI allows several, and see that it ends before MPI does."""
        from mpi4py import MPI

        with self.lock:
            if post not in self._posts:
                self._posts.append(post)
            if self._thread is None and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
                self._thread = threading.Thread(target=self._run, name="moecomm mpi progress", daemon=True)
                self._thread.start()
            if not self._hooked:
                self._hooked, self._pid = True, os.getpid()
                atexit.register(self.end)
                MPI.COMM_SELF.Set_attr(type(MPI.COMM_SELF).Create_keyval(delete_fn=self.end), None)

    def remove(self, post: Post) -> None:
        """A post has no transports; without any the thread ends."""
        if post in self._posts:
            self._posts.remove(post)
        self._wake.set()

    def end(self, *_: object) -> None:
        """MPI is about to end: say goodbye for the transports that are open, and stay until all is on its way.

        Rows that MPI has taken are not gone: they travel while somebody calls it, and `MPI_Finalize` need not.
        """
        if os.getpid() != self._pid:
            return
        with self.lock:
            for post in list(self._posts):
                post.close_all()
        start = time.monotonic()
        while self.pump() and time.monotonic() - start < self.last_s:
            pause(time.monotonic() - start)
        with self.lock:
            self._posts.clear()
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def nudge(self) -> None:
        """Rows travel from now on."""
        self._wake.set()

    def pump(self) -> bool:
        """Let everything advance; True while something is under way."""
        with self.lock:
            return max([post.pump() for post in list(self._posts)], default=False)

    @contextlib.contextmanager
    def waiting(self, box: Mailbox, seq: int) -> Iterator[None]:
        """This thread pumps; the other one can rest."""
        with self.lock:
            self._num_waiting += 1
            box.waits_in = seq
        try:
            yield
        finally:
            with self.lock:
                self._num_waiting -= 1
                box.waits_in = -1

    def _run(self) -> None:
        while True:
            with self.lock:
                if not self._posts:
                    self._thread = None
                    return
                busy = not self._num_waiting and self.pump()
            if not busy:
                self._wake.wait(_IDLE_S)
                self._wake.clear()
            time.sleep(_BUSY_S)


PROGRESS = Progress()


def pause(waited_s: float) -> None:
    """Leave the processor to others for a moment, longer the longer one has waited: MPI itself would spin."""
    if waited_s < 0.0002 and hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(min(waited_s / 8, _MAX_PAUSE_S))


# -- construction ----------------------------------------------------------------------------------------------------

_keyval: list[int] = []


def post_of(group: Group, timeout_s: float) -> Post:
    """The post on the communicator of the group; made at the first call, which is collective."""
    comm = group.mpi_comm
    if not _keyval:
        _keyval.append(type(comm).Create_keyval(delete_fn=lambda comm, keyval, post: post.free()))
    post = comm.Get_attr(_keyval[0])
    if post is None:
        processes = group.all_gather_object((_machine(), os.getpid()), timeout_s=timeout_s, operation="Buffer()")
        post = Post(duplicate(group, timeout_s), processes, group.rank)
        comm.Set_attr(_keyval[0], post)
    return post


def duplicate(group: Group, timeout_s: float) -> Any:
    """A communicator like that of the group for messages of our own, whose errors come back; collective."""
    from mpi4py import MPI

    comm, request = group.mpi_comm.Idup()
    start = time.monotonic()
    while not request.Test():
        waited = time.monotonic() - start
        if waited >= timeout_s:
            missing: Sequence[int] = ()
            try:
                group.barrier(timeout_s=ROLL_CALL_S, operation="roll call")
            except MoECommError as absent:
                missing = absent.peers
            what = f"gave up after {waited:.1f} s waiting for {rank_names(missing) if missing else 'MPI_Comm_idup'}"
            remedy = "look at what those ranks do, or raise timeout_s"
            raise StallError(what, remedy=remedy, rank=group.rank, operation="Buffer()", peers=missing)
        PROGRESS.pump()
        pause(waited)
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    return comm


def _machine() -> object:
    """What two processes have in common that can look at each other's process ids."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def mpi_error(error: Exception, **where: Any) -> PeerLostError:
    """What MPI reports (or a device, on the way to it), as an error of ours."""
    from mpi4py import MPI

    what = "MPI reports an error" if isinstance(error, MPI.Exception) else "moving rows broke off"
    remedy = "look at the other ranks and at the network; build a new Buffer"
    return PeerLostError(what, got=repr(str(error)), remedy=remedy, **where)
