"""`Group`: rank, size and object collectives over torch.distributed, MPI, or a single rank.

moecomm talks through a `Group` when it builds something: who is there, do all ranks agree, where does everybody listen.
Rows of tokens never pass here. Objects travel through the key-value store of a process group, not through its backend,
so every backend will do, also one that has no CPU tensors, and a rank that does not come can be named.
"""

from __future__ import annotations

import math
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moecomm import _env
from moecomm.blobs import dumps, loads, named_in
from moecomm.board import Board, StoreBoard, Wait
from moecomm.errors import ConfigError, DesyncError, PeerLostError, UnsupportedError

T = TypeVar("T")

_ACCEPTED = "a torch.distributed.ProcessGroup, an mpi4py.MPI.Comm, or None"
_GLOO_THREADS = 8  # in a group of our own: blocks on their way at once
_GLOO_PATIENCE = 10  # times the deadline: gloo counts from when a collective began, who waits for it from when he does
_GRACE_S = 1.0  # what a store that no longer answers gets on top of the deadline


class _Exchange(Protocol):
    """How the ranks of a group hand bytes to each other."""

    def all_gather(self, blob: bytes, wait: Wait) -> list[bytes]:
        """Return the blobs of all ranks in rank order, or raise StallError or PeerLostError."""


class _Alone:
    """A group of one rank."""

    def all_gather(self, blob: bytes, wait: Wait) -> list[bytes]:
        return [blob]


class _StoreExchange:
    """Exchange through a torch.distributed store: rank 0 collects what all ranks wrote, and publishes it.

    Rank 0 leaves last, when everybody has read: it may be the process that hosts the store. No key stays behind. Once
    rank 0 gives up it publishes who was missing, so that all ranks, late ones too, hear the same verdict at once.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._keys, self._rank, self._size = dist.PrefixStore("moecomm", store), rank, size
        self._seq = 0
        self._root = store
        while isinstance(self._root, dist.PrefixStore):
            self._root = self._root.underlying_store

    def all_gather(self, blob: bytes, wait: Wait) -> list[bytes]:
        seq, self._seq = self._seq, self._seq + 1
        step = self._collect if self._rank == 0 else self._submit
        try:
            return _finish(lambda: step(seq, blob, wait), wait)
        except dist.DistError as error:
            raise PeerLostError(
                "the key-value store of the process group is gone",
                got=repr(str(error).splitlines()[0] if str(error) else error),
                remedy="look for the process that hosts it: rank 0 of the job, or its launcher",
                rank=wait.rank,
                operation=wait.operation,
            ) from error

    def board(self, name: str) -> Board:
        return StoreBoard(dist.PrefixStore(f"moecomm/{name}", self._root), self._rank)

    def regroup(self, rank: int, addresses: Sequence[str], name: str) -> _StoreExchange:
        return _StoreExchange(dist.PrefixStore(f"moecomm/{name}", self._root), rank, len(addresses))

    def _absent(self, kind: str) -> list[int]:
        return [rank for rank in range(self._size) if not self._keys.check([f"{kind}/{rank}"])]

    def _collect(self, seq: int, blob: bytes, wait: Wait) -> list[bytes]:
        keys, others = self._keys, range(1, self._size)
        came, left, verdict = f"{seq}/came", f"{seq}/left", f"{seq}/verdict"
        _put(keys, f"{came}/0", b"1")
        for rank in others:
            while not keys.check([f"{came}/{rank}"]):
                if not wait.pause():
                    absent = self._absent(came)
                    _put(keys, verdict, dumps((absent, [])))
                    raise wait.stall(absent)
        blobs = [blob, *(keys.get(f"{came}/{rank}") for rank in others)]
        _put(keys, verdict, dumps(([], blobs)))
        for rank in others:
            while not keys.check([f"{left}/{rank}"]):
                if not wait.pause():
                    raise wait.stall([r for r in self._absent(left) if r], "leave")
        for key in (f"{came}/0", verdict, *(f"{kind}/{rank}" for kind in (came, left) for rank in others)):
            keys.delete_key(key)
        return blobs

    def _submit(self, seq: int, blob: bytes, wait: Wait) -> list[bytes]:
        keys = self._keys
        _put(keys, f"{seq}/came/{self._rank}", blob)
        while not keys.check([f"{seq}/verdict"]):
            if not wait.pause():
                raise wait.stall(self._absent(f"{seq}/came") or [0])
        absent, blobs = loads(keys.get(f"{seq}/verdict"))
        if absent:
            raise wait.stall(absent)
        _put(keys, f"{seq}/left/{self._rank}", b"1")
        return blobs


def meeting_point() -> tuple[str, int, int, int]:
    """Where processes meet that were started per node: MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK count nodes."""
    return _env.rendezvous()


def _put(store: dist.Store, key: str, value: bytes) -> None:
    store.set(key, value)  # type: ignore[arg-type]  # the stub says str, the store takes bytes


def _finish(step: Callable[[], T], wait: Wait) -> T:
    """Run `step` in a thread of its own: a store whose host has stopped blocks its callers for ever."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(step())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, name=f"moecomm {wait.operation}", daemon=True)
    thread.start()
    try:
        thread.join(wait.timeout_s + _GRACE_S)
    finally:
        wait.end()  # whoever leaves early, by Ctrl-C, must not seem to be there
    if errors:
        raise errors[0]
    if not results:
        raise wait.stall([], "answer")
    return results[0]


class _MpiExchange:
    """Exchange by point-to-point messages: unlike a collective, they tell who is missing."""

    _TAG = 32_749  # below the 32,767 that every MPI allows, and unlikely to be somebody else's

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._seq = 0
        self._unfinished: list[Any] = []  # sends of stalled exchanges; their buffers must live on

    def all_gather(self, blob: bytes, wait: Wait) -> list[bytes]:
        mpi = sys.modules["mpi4py.MPI"]
        try:
            return self._all_gather(blob, wait)
        except mpi.Exception as error:
            raise PeerLostError(
                "MPI reports an error", got=repr(str(error)), rank=wait.rank, operation=wait.operation
            ) from error

    def _all_gather(self, blob: bytes, wait: Wait) -> list[bytes]:
        comm, self._seq = self._comm, self._seq + 1
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        sends = {rank: comm.isend((self._seq, blob), dest=rank, tag=self._TAG) for rank in others}
        blobs = {comm.rank: blob}
        while len(blobs) < comm.size or sends:
            for rank in (rank for rank in others if rank not in blobs):
                message = comm.improbe(source=rank, tag=self._TAG)
                seq, received = message.recv() if message is not None else (None, b"")
                if seq == self._seq:  # an older one belongs to an exchange that stalled here
                    blobs[rank] = received
            sends = {rank: send for rank, send in sends.items() if not send.test()[0]}
            if (len(blobs) < comm.size or sends) and not wait.pause():
                self._unfinished += sends.values()
                raise wait.stall([rank for rank in others if rank not in blobs] or list(sends))
        return [blobs[rank] for rank in range(comm.size)]


# One exchange per process group, however many `Group`s look at it: its sequence numbers must not start again.
_exchange_of_group: WeakKeyDictionary[Any, _StoreExchange] = WeakKeyDictionary()
_mpi_keyval: list[int] = []


def _exchange_of_comm(comm: Any) -> _MpiExchange:
    """Return the exchange that lives on the communicator, as an MPI attribute."""
    if not _mpi_keyval:
        _mpi_keyval.append(type(comm).Create_keyval())
    exchange = comm.Get_attr(_mpi_keyval[0])
    if exchange is None:
        exchange = _MpiExchange(comm)
        comm.Set_attr(_mpi_keyval[0], exchange)
    return exchange


def _gloo_options(timeout_s: float) -> Any:
    """Options as torch would choose them, but for more threads: each of them has one collective on its way."""
    gloo: Any = dist.ProcessGroupGloo
    options, names = gloo._Options(), _env.gloo_interfaces()
    options._devices = [gloo.create_device(interface=name) for name in names] or [gloo.create_default_device()]
    options._timeout, options._threads = timedelta(seconds=timeout_s), _GLOO_THREADS
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Name the ranks that share the experts, and let them agree on things.

    Make one with `Group.resolve`. Every operation is collective: all ranks of the group call the same operations in the
    same order. Each has a deadline, `timeout_s`, by default `MOECOMM_TIMEOUT_S` (60 seconds).

    Args:
        rank: rank of this process inside the group, not in the whole job.
        size: W, number of ranks in the group.
        process_group: the torch.distributed process group behind it, or None.
        mpi_comm: the mpi4py communicator behind it, or None.
        exchange: how bytes travel between the ranks.
        is_duplicate: made by `duplicate`; then `free` ends it.
        transport: the only transport class that moves rows between these ranks, or None for those of moecomm.

    >>> group = Group.resolve()  # torch.distributed is not initialised here: a single rank
    >>> group.rank, group.size, group.all_gather_object({"hidden": 64})
    (0, 1, [{'hidden': 64}])
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None = None
    mpi_comm: Any = None
    exchange: _Exchange = field(repr=False)
    is_duplicate: bool = False
    transport: Any = None

    @classmethod
    def resolve(cls, group: Any = None) -> Group:
        """Make a `Group` of whatever the caller has.

        Args:
            group: a torch.distributed.ProcessGroup, an mpi4py.MPI.Comm, or None for the default process group, or for a
                single rank where torch.distributed is not initialised; a `Group` is given back as it is.

        Raises:
            ConfigError: another type, or a group that this process is not in.
            UnsupportedError: a process group without a store.
        """
        if isinstance(group, Group):
            return group
        if group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return cls(rank=0, size=1, exchange=_Alone())
            group = dist.group.WORLD
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and isinstance(group, mpi.Comm):
            return cls._of_comm(group, mpi)
        if dist.is_available() and isinstance(group, dist.ProcessGroup):
            return cls._of_process_group(group)
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ConfigError(
                "this process is not in the process group",
                got="GroupMember.NON_GROUP_MEMBER",
                expected=_ACCEPTED,
                remedy="use the group only on the ranks that were given to new_group",
            )
        raise ConfigError(
            "group has a type that moecomm does not know",
            got=f"{type(group).__module__}.{type(group).__qualname__}",
            expected=_ACCEPTED,
            remedy="for a DeviceMesh pass mesh.get_group()",
        )

    @classmethod
    def _of_process_group(cls, group: dist.ProcessGroup) -> Group:
        rank, size = group.rank(), group.size()
        exchange = _exchange_of_group.get(group)
        if exchange is None:
            try:
                store = group.get_group_store()
            except RuntimeError as error:
                raise UnsupportedError(
                    "the process group has no key-value store",
                    got=repr(str(error).splitlines()[0]),
                    expected="a group made by init_process_group or new_group with a store",
                    remedy="for MPI pass the mpi4py communicator instead",
                    rank=rank,
                ) from error
            exchange = _exchange_of_group[group] = _StoreExchange(store, rank, size)
        return cls(rank=rank, size=size, process_group=group, exchange=exchange)

    @classmethod
    def _of_comm(cls, comm: Any, mpi: Any) -> Group:
        if comm == mpi.COMM_NULL or comm.Is_inter():
            raise ConfigError(
                "this communicator does not hold this process and its peers alone",
                got="MPI.COMM_NULL" if comm == mpi.COMM_NULL else "an intercommunicator",
                expected=_ACCEPTED,
                remedy="pass an intracommunicator on the ranks that are in it",
            )
        return cls(rank=comm.Get_rank(), size=comm.Get_size(), mpi_comm=comm, exchange=_exchange_of_comm(comm))

    def duplicate(self, *, timeout_s: float | None = None) -> Group:
        """Make a group of the same ranks whose messages never meet those of this one: for use in another thread.

        A process group gets connections of its own, over gloo and for CPU tensors whatever its backend is; `free` ends
        them. Any other group is returned as it is: what moves rows over MPI makes its own communicators. Collective.

        Args:
            timeout_s: deadline in seconds, here and of everything that gloo does; None for the default.

        Raises:
            UnsupportedError: torch was built without gloo.
            StallError, PeerLostError: as `all_gather_object`, or the ranks cannot connect to each other.
        """
        if self.process_group is None:
            return self
        if not dist.is_gloo_available():
            raise UnsupportedError("torch.distributed has no gloo backend here", expected="one built with gloo")
        timeout_s = _env.timeout_s() if timeout_s is None else timeout_s
        operation = "Group.duplicate"
        name = self.all_gather_object(secrets.token_hex(8), timeout_s=timeout_s, operation=operation)[0]
        store = dist.PrefixStore(f"moecomm/{name}", self.process_group.get_group_store())
        try:
            backend = dist.ProcessGroupGloo(store, self.rank, self.size, _gloo_options(timeout_s))
        except RuntimeError as error:
            what = "the ranks cannot connect to each other over gloo"
            remedy = "name the network interface that all of them reach in GLOO_SOCKET_IFNAME"
            raise PeerLostError(what, got=str(error), remedy=remedy, rank=self.rank, operation=operation) from error
        backend._set_default_timeout(timedelta(seconds=_GLOO_PATIENCE * timeout_s))
        group = dist.ProcessGroup(store, self.rank, self.size)
        gloo = dist.ProcessGroup.BackendType.GLOO
        group._register_backend(torch.device("cpu"), gloo, backend)
        group._set_default_backend(gloo)
        return replace(Group._of_process_group(group), is_duplicate=True)

    def board(self, name: str) -> Board:
        """The board of that name at the store that the ranks share; the same for all who reach that store.

        Raises:
            UnsupportedError: they share none, as under MPI.
        """
        if not hasattr(self.exchange, "board"):
            what, expected = "the ranks of this group share no store", "a process group of torch.distributed"
            raise UnsupportedError(what, expected=expected, rank=self.rank)
        return self.exchange.board(name)

    def regroup(self, rank: int, addresses: Sequence[str], name: str) -> Group:
        """A group of whoever has these addresses, this process as `rank`; `name` is new and the same on all of them."""
        exchange: Any = self.exchange.regroup(rank, addresses, name)  # type: ignore[attr-defined]
        return Group(rank=rank, size=len(addresses), exchange=exchange, transport=self.transport)

    @classmethod
    def at_store(cls, store: Any) -> Group:
        """A group of this process alone that can `regroup` with others at a torch.distributed store."""
        if not isinstance(store, dist.Store):
            raise ConfigError("this is no store", got=type(store).__name__, expected="a torch.distributed.Store")
        return cls(rank=0, size=1, exchange=_StoreExchange(store, 0, 1))

    def free(self) -> None:
        """End the connections that `duplicate` made, and whatever is under way in them; never waits."""
        if self.is_duplicate and self.process_group is not None:
            self.process_group._get_backend(torch.device("cpu")).abort()

    def all_gather_object(self, obj: T, *, timeout_s: float | None = None, operation: str | None = None) -> list[T]:
        """Give every rank the objects of all ranks, in rank order.

        Args:
            obj: anything that pickle takes; every rank, this one too, gets a copy of its own. Classes other than those
                of moecomm, torch and Python's containers are taken from others only if this rank sends them as well.
            timeout_s: deadline in seconds, or None for the default.
            operation: name for error messages; the ranks must give the same one.

        Raises:
            StallError: ranks that did not arrive before the deadline; `peers` names them.
            PeerLostError: the connection to the other ranks is closed.
            DesyncError: another rank is in another operation.
            UnsupportedError: another rank sent what may not be unpickled here (see `moecomm.blobs`).
        """
        operation = operation or "all_gather_object"
        timeout_s = _env.timeout_s() if timeout_s is None else timeout_s
        if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
            raise ConfigError(
                "timeout_s is no deadline",
                got=repr(timeout_s),
                expected="a positive number of seconds",
                rank=self.rank,
                operation=operation,
            )
        mine = dumps(obj)
        wait = Wait(operation, self.rank, timeout_s)
        replies = [loads(reply) for reply in self.exchange.all_gather(dumps((operation, mine)), wait)]
        strays = {rank: name for rank, (name, _) in enumerate(replies) if name != operation}
        if strays:
            raise DesyncError(
                "ranks are in different operations",
                got=", ".join(f"{name} on rank {rank}" for rank, name in strays.items()),
                expected=f"{operation} on all {self.size} ranks",
                remedy="call the same operations in the same order on every rank",
                rank=self.rank,
                operation=operation,
                peers=list(strays),
            )
        return [loads(payload, named_in(mine)) for _, payload in replies]

    def broadcast_object(self, obj: T, root: int = 0, *, timeout_s: float | None = None) -> T:
        """Give every rank the object of rank `root`; what the others pass is ignored. Raises as `all_gather_object`."""
        if not 0 <= root < self.size:
            raise ConfigError(
                "root is no rank of the group", got=root, expected=f"0 to {self.size - 1}", rank=self.rank
            )
        mine: Any = obj if root == self.rank else None
        return self.all_gather_object(mine, timeout_s=timeout_s, operation=f"broadcast_object(root={root})")[root]

    def barrier(self, *, timeout_s: float | None = None, operation: str = "barrier") -> None:
        """Return when every rank of the group has called it. Raises as `all_gather_object`."""
        self.all_gather_object(None, timeout_s=timeout_s, operation=operation)
