"""Who forwards for whom between nodes, and which rows of a lane leave for which node: pure functions, no communication.

Legend: W ranks, V nodes, R ranks of this node (its *mates*, this rank included), U rows that a rank sends to a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moecomm.topology import Topology

BLOCK_BYTES = 1024 * 1024  # what is sent to a node first: soon, so that the link is busy early
LATER_BLOCKS = 2  # so many times as much is sent at once later, as each block costs the same processor time
MAX_BLOCKS = 16


@dataclass(frozen=True)
class NodeMap:
    """The nodes as one rank sees them.

    A rank exchanges rows with one rank of every node, its *forwarder* there: the one with its own local index, modulo
    the number of ranks on that node. So ranks of equal local index serve each other, and a smaller node shares out the
    ranks of a larger one.

    >>> nodes = NodeMap(Topology((0, 1, 1, 1)), rank=1)
    >>> nodes.forwarder_WV.tolist()  # rank 0 serves everybody; ranks 1 and 0 serve each other
    [[0, 1], [0, 1], [0, 2], [0, 3]]
    >>> nodes.node, nodes.mates.tolist(), nodes.sources.tolist()
    (1, [1, 2, 3], [0])
    """

    topology: Topology
    rank: int

    @cached_property
    def node_of_rank(self) -> np.ndarray:
        """(W,) node of every rank."""
        return np.array(self.topology.node_of_rank)

    @cached_property
    def ranks_of_node(self) -> list[np.ndarray]:
        """(V,) lists of the ranks of every node, ascending."""
        return [np.array(self.topology.ranks_of_node(node)) for node in range(self.topology.num_nodes)]

    @cached_property
    def local_index(self) -> np.ndarray:
        """(W,) place of every rank on its node."""
        return np.array([self.topology.local_index(rank) for rank in range(self.topology.num_ranks)])

    @cached_property
    def forwarder_WV(self) -> np.ndarray:
        """(W, V) the rank on each node that exchanges rows with each rank."""
        return np.stack([ranks[self.local_index % len(ranks)] for ranks in self.ranks_of_node], 1)

    @property
    def node(self) -> int:
        """The node of this rank."""
        return int(self.node_of_rank[self.rank])

    @property
    def mates(self) -> np.ndarray:
        """(R,) the ranks of this node, this one included."""
        return self.ranks_of_node[self.node]

    @property
    def away(self) -> np.ndarray:
        """The other nodes, the one behind this one first."""
        return (self.node + np.arange(1, self.topology.num_nodes)) % self.topology.num_nodes

    @cached_property
    def sources(self) -> np.ndarray:
        """The ranks of other nodes that this rank serves."""
        return self.served_by(self.rank)

    def between(self, rows_WV: np.ndarray) -> np.ndarray:
        """(W, V) the same numbers of rows from each rank to each node, without those that stay on theirs."""
        stays_WV = self.node_of_rank[:, None] == np.arange(rows_WV.shape[1])
        return np.where(stays_WV, 0, rows_WV.astype(np.int64))

    def counts_between(self, rows_WV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(W,) rows to and (W,) rows from each rank, when so many rows go from each rank to each other node.

        >>> send, recv = NodeMap(Topology((0, 1, 1)), rank=0).counts_between(np.array([[0, 5], [2, 0], [3, 0]]))
        >>> send.tolist(), recv.tolist()
        ([0, 5, 0], [0, 2, 3])
        """
        send, recv = np.zeros((2, len(rows_WV)), np.int64)
        send[self.forwarder_WV[self.rank, self.away]] = rows_WV[self.rank, self.away]
        recv[self.sources] = rows_WV[self.sources, self.node]
        return send, recv

    def served_by(self, mate: int) -> np.ndarray:
        """The ranks of other nodes that a rank of this node serves, ascending."""
        return np.flatnonzero((self.forwarder_WV[:, self.node] == mate) & (self.node_of_rank != self.node))


def first_block_rows(row_bytes: int) -> int:
    """How many rows the first block has, if there are so many.

    >>> first_block_rows(BLOCK_BYTES // 4), first_block_rows(2 * BLOCK_BYTES)
    (4, 1)
    """
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def block_starts(row_bytes: int, most_rows: int) -> np.ndarray:
    """(B + 1,) the first row of every block, then `most_rows`. Blocks grow twofold until they are large, or few enough.

    >>> block_starts(row_bytes=BLOCK_BYTES // 4, most_rows=50).tolist()
    [0, 4, 12, 20, 28, 36, 44, 50]
    """
    size = first_block_rows(row_bytes)
    largest = max(size * LATER_BLOCKS, -(-most_rows // MAX_BLOCKS))
    starts = [0]
    while starts[-1] < most_rows:
        starts.append(min(starts[-1] + size, most_rows))
        size = min(2 * size, largest)
    return np.array(starts)


def rows_in_block(rows: np.ndarray, starts: np.ndarray, block: int) -> np.ndarray:
    """How many of each number of rows fall into a block.

    >>> rows_in_block(np.array([5, 2, 0]), np.array([0, 2, 4, 5]), block=1).tolist()
    [2, 0, 0]
    """
    return np.clip(rows, starts[block], starts[block + 1]) - starts[block]


@dataclass(frozen=True, slots=True)
class Shipment:
    """What one rank sends to one node: each source row once, and where copies of it are wanted there.

    rows: (U,) source rows, ascending. copies: (U,) how many slots want each. codes: (sum of copies,) by row:
    `slot * R + local index` of the destination.
    """

    rows: np.ndarray
    copies: np.ndarray
    codes: np.ndarray

    @classmethod
    def pack(cls, wanted: Sequence[np.ndarray], slots: Sequence[np.ndarray]) -> Shipment:
        """Find the rows that repeat. wanted, slots: for each rank of the node, which source rows go to which slots.

        >>> shipment = Shipment.pack([np.array([4, 7]), np.array([7])], [np.array([0, 1]), np.array([5])])
        >>> shipment.rows.tolist(), shipment.copies.tolist(), shipment.codes.tolist()
        ([4, 7], [1, 2], [0, 2, 11])
        """
        every = np.concatenate(wanted)
        codes = np.concatenate([s.astype(np.int64) * len(slots) + local for local, s in enumerate(slots)])
        counts = np.bincount(every)
        rows = np.flatnonzero(counts)
        return cls(rows, counts[rows], codes[np.argsort(every, kind="stable")])

    def meta(self, dtype: np.dtype) -> np.ndarray:
        """(U + sum of copies,) what travels beside the rows."""
        return np.concatenate([self.copies, self.codes]).astype(dtype)

    @classmethod
    def unpack(cls, meta: np.ndarray, num_rows: int) -> Shipment:
        """The inverse of `meta`; `rows` are numbered from 0."""
        return cls(np.arange(num_rows), meta[:num_rows].astype(np.int64), meta[num_rows:].astype(np.int64))


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the rows of every block go inside the node: entries sorted by (block, mate, row).

    rows: row in the block as it arrived. slots: its place at the mate. bounds: (number of blocks * R + 1,).
    """

    rows: np.ndarray
    slots: np.ndarray
    bounds: np.ndarray
    num_mates: int

    @classmethod
    def plan(cls, shipments: Sequence[Shipment], num_mates: int, starts: np.ndarray) -> Spread:
        """Merge what came from several ranks; the rows of a block arrive sorted by shipment. starts: of the blocks.

        >>> one = Shipment(np.arange(2), np.array([1, 2]), np.array([0, 2, 11]))
        >>> spread = Spread.plan([one, one], num_mates=2, starts=np.array([0, 1, 2]))
        >>> [(rows.tolist(), slots.tolist()) for rows, slots in (spread.part(1, 0), spread.part(1, 1))]
        [([0, 1], [1, 1]), ([0, 1], [5, 5])]
        """
        keys, rows, slots = [], [], []
        before = np.zeros(len(starts), np.int64)  # rows of earlier shipments in every block
        for shipment in shipments:
            number = np.repeat(shipment.rows, shipment.copies)
            block = np.searchsorted(starts, number, "right") - 1
            keys.append(block * num_mates + shipment.codes % num_mates)
            rows.append(before[block] - starts[block] + number)
            slots.append(shipment.codes // num_mates)
            before[:-1] += np.diff(np.clip(starts, 0, len(shipment.rows)))
        key = np.concatenate([*keys, np.empty(0, np.int64)])
        order = np.argsort(key, kind="stable")
        bounds = np.searchsorted(key[order], np.arange((len(starts) - 1) * num_mates + 1))
        row, slot = (np.concatenate([*parts, np.empty(0, np.int64)])[order] for parts in (rows, slots))
        return cls(row, slot, bounds, num_mates)

    def part(self, block: int, mate: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and slots of one block for the mate with that local index."""
        start, stop = self.bounds[block * self.num_mates + mate : block * self.num_mates + mate + 2]
        return self.rows[start:stop], self.slots[start:stop]
