"""`Topology`: which ranks share memory, and so a node."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from moecomm import _env
from moecomm.errors import CapacityError, ConfigError, PeerLostError
from moecomm.group import Group


@dataclass(frozen=True, slots=True)
class Topology:
    """Say which node every rank is on. A node is a scale-up domain: its ranks can reach each other's memory.

    Args:
        node_of_rank: (W,) node id of each rank; ids run from 0 to the number of nodes - 1, and none is empty.

    Raises:
        ConfigError: no rank at all, or ids that leave a gap.

    >>> topology = Topology((0, 0, 1, 1))
    >>> topology.num_ranks, topology.num_nodes, topology.ranks_of_node(1)
    (4, 2, (2, 3))
    >>> topology.node_of(2), topology.local_index(3), topology.same_node(1, 2), topology.is_single_node
    (1, 1, False, False)
    """

    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        nodes = self.node_of_rank
        if not isinstance(nodes, tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in nodes):
            raise ConfigError(
                "node_of_rank is no tuple of node ids",
                got=repr(nodes),
                expected="one int per rank, as in (0, 0, 1, 1)",
                remedy="use Topology.explicit for names of nodes",
            )
        if not nodes or set(nodes) != set(range(len(set(nodes)))):
            raise ConfigError(
                "node_of_rank does not number its nodes from 0 without a gap",
                got=nodes,
                expected="at least one rank, and each id from 0 to the number of nodes - 1",
                remedy="use Topology.explicit, which numbers them",
            )

    @classmethod
    def explicit(cls, node_of_rank: Sequence[Hashable]) -> Topology:
        """Number the given nodes, such as host names, in the order of their first rank.

        >>> Topology.explicit(["b", "a", "b"]).node_of_rank
        (0, 1, 0)
        """
        if isinstance(node_of_rank, str) or not isinstance(node_of_rank, Sequence):
            raise ConfigError(
                "node_of_rank is no list of nodes",
                got=repr(node_of_rank),
                expected='one entry per rank, as in ["a", "b"]',
            )
        ids: dict[Hashable, int] = {}
        return cls(tuple(ids.setdefault(node, len(ids)) for node in node_of_rank))

    @classmethod
    def from_ranks_per_node(cls, num_ranks: int, ranks_per_node: int) -> Topology:
        """Put that many consecutive ranks on each node; the last node takes what is left.

        >>> Topology.from_ranks_per_node(5, 2).node_of_rank
        (0, 0, 1, 1, 2)
        """
        for name, value in (("num_ranks", num_ranks), ("ranks_per_node", ranks_per_node)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is no count", got=repr(value), expected="an integer of at least 1")
        return cls(tuple(rank // ranks_per_node for rank in range(num_ranks)))

    @classmethod
    def detect(cls, group: Group, *, given: Topology | None = None, timeout_s: float | None = None) -> Topology:
        """Find out which ranks of the group share memory; collective, and equal on all ranks.

        `MOECOMM_RANKS_PER_NODE` splits what was found into nodes of so many consecutive ranks, so that one machine can
        play several nodes. It never joins ranks that cannot share memory.

        Args:
            group: the ranks.
            given: use these nodes, the same on all ranks, once it is clear that the ranks of each share memory; the
                environment variable is then not looked at.
            timeout_s: deadline in seconds, or None for the default.

        Raises:
            ConfigError: `MOECOMM_RANKS_PER_NODE` differs between ranks, or it or `given` joins ranks that share no
                memory.
            StallError, PeerLostError: as `Group.all_gather_object`.
        """
        replies = group.all_gather_object(
            (_env.ranks_per_node(), _key_or_error(group.rank)), timeout_s=timeout_s, operation="Topology.detect"
        )
        keys = [_unless_error(key, rank, group.rank) for rank, (_, key) in enumerate(replies)]
        found = cls.explicit(keys)
        if given is not None:
            return given._within(found, f"topology={given.node_of_rank}", group.rank)
        wanted = [ranks_per_node for ranks_per_node, _ in replies]
        others = [rank for rank, value in enumerate(wanted) if value != wanted[group.rank]]
        if others:
            raise ConfigError(
                "MOECOMM_RANKS_PER_NODE differs between ranks",
                got=f"{wanted[group.rank]} here, {wanted[others[0]]} on rank {others[0]}",
                expected="the same value, or none, on all ranks",
                remedy="set it for all ranks in the launcher",
                rank=group.rank,
                peers=others,
            )
        if wanted[0] is None:
            return found
        pretended = cls.from_ranks_per_node(group.size, wanted[0])
        return pretended._within(found, f"MOECOMM_RANKS_PER_NODE={wanted[0]}", group.rank)

    def _within(self, found: Topology, source: str, rank: int) -> Topology:
        """Return this topology, unless it joins ranks that were not found on one node."""
        for node in range(self.num_nodes):
            first, *rest = self.ranks_of_node(node)
            for other in rest:
                if not found.same_node(first, other):
                    raise ConfigError(
                        f"{source.split('=')[0]} puts ranks on one node that cannot share memory",
                        got=f"{source}, but ranks {first} and {other} differ in machine, network or user",
                        expected="ranks of one node only",
                        remedy="give smaller nodes, or none to use those that were found",
                        rank=rank,
                        peers=[first, other],
                    )
        return self

    @property
    def num_ranks(self) -> int:
        """W, number of ranks."""
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(set(self.node_of_rank))

    @property
    def is_single_node(self) -> bool:
        """True if all ranks share memory."""
        return self.num_nodes == 1

    def ranks_of_node(self, node: int) -> tuple[int, ...]:
        """Ranks on that node, ascending."""
        if not isinstance(node, int) or not 0 <= node < self.num_nodes:
            raise ConfigError("node does not exist", got=repr(node), expected=f"0 to {self.num_nodes - 1}")
        return tuple(rank for rank, on in enumerate(self.node_of_rank) if on == node)

    def node_of(self, rank: int) -> int:
        """Node id of that rank."""
        if not isinstance(rank, int) or not 0 <= rank < self.num_ranks:
            raise ConfigError("rank does not exist", got=repr(rank), expected=f"0 to {self.num_ranks - 1}")
        return self.node_of_rank[rank]

    def local_index(self, rank: int) -> int:
        """Position of that rank among the ranks of its node."""
        return self.ranks_of_node(self.node_of(rank)).index(rank)

    def same_node(self, a: int, b: int) -> bool:
        """True if the two ranks share memory."""
        return self.node_of(a) == self.node_of(b)


def memory_key() -> tuple[str, str, int]:
    """Return what two processes must have in common to hand memory to each other through a Unix socket.

    The boot id is one running kernel: host names repeat, and containers on one machine have different ones. The network
    namespace is where a Unix socket is found. The user is who may connect to it, and whom the owner lets in.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        namespace = os.stat("/proc/self/ns/net")
        network = f"{namespace.st_dev}:{namespace.st_ino}"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            what, remedy = "no descriptors are left to find out which ranks share memory", "raise `ulimit -n`"
            raise CapacityError(what, got=str(error), remedy=remedy) from error
        # Not Linux: one machine is one node as far as anybody can tell.
        boot, network = platform.node(), ""
    return boot, network, os.getuid() if hasattr(os, "getuid") else -1


def _key_or_error(rank: int) -> tuple[str, str, int] | CapacityError:
    """This rank's key; or why it has none, so that the others hear of it and need not wait."""
    try:
        return memory_key()
    except CapacityError as error:
        return CapacityError(error.what, got=error.got, remedy=error.remedy, rank=rank, operation="Buffer()")


def _unless_error(key: Any, of: int, rank: int) -> tuple[str, str, int]:
    """The key of a rank; raise what went wrong there."""
    if isinstance(key, CapacityError):
        if of == rank:
            raise key
        what = f"rank {of} cannot take part: {key.what}"
        raise PeerLostError(what, remedy=key.remedy, rank=rank, operation="Buffer()", peers=[of])
    found: tuple[str, str, int] = key
    return found
