"""The first block of rows on their way out, which leaves before the ranks know how many rows the others send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import byte_rows
from moecomm.rows import copy_rows
from moecomm.transport._nodes import NodeMap, first_block_rows
from moecomm.transport._spread import packed_lane
from moecomm.transport.base import Exchange, Transport, as_bytes


@final
class Ahead:
    """Rows of every node packed before counts are known, and the first block of them on its way.

    The block may be shorter than who receives it has room for; at least one row travels, as somebody waits for it.
    `wait` and `release` belong to the thread that moves, and `send` if that one is busy; the rest to the caller's.

    tag: of the operation. payloads: (T, ...) what repeats. places_TV: see `plan.node_places`. packed: of every lane,
    for every node, the rows that it wants, ascending.
    """

    def __init__(self, nodes: NodeMap, tag: str, payloads: Sequence[Tensor], places_TV: Tensor) -> None:
        self.tag, self._nodes = tag, nodes
        self._rows = [as_bytes(payload) for payload in payloads]
        self._row_bytes = [of_lane.shape[1] for of_lane in self._rows]
        self.most_rows = first_block_rows(sum(self._row_bytes))
        self._index_V = [torch.nonzero(places_T >= 0).view(-1) for places_T in places_TV.unbind(1)]
        self.packed = [[_room(len(index), row_bytes) for index in self._index_V] for row_bytes in self._row_bytes]
        self._flight: Exchange | None = None
        for node in nodes.away:
            self._pack(int(node), slice(0, self.most_rows))

    def pack_rest(self) -> None:
        """Pack what is not in the first block."""
        for node in self._nodes.away:
            self._pack(int(node), slice(self.most_rows, None))
        self._pack(self._nodes.node, slice(None))

    def _pack(self, node: int, part: slice) -> None:
        index = self._index_V[node][part]
        for rows, packed in zip(self._rows, self.packed, strict=True):
            if len(index):
                copy_rows(packed[node][part], rows, index)

    def send(self, between: Transport) -> None:
        """Let it go."""
        nodes = self._nodes
        forwarders = nodes.forwarder_WV[nodes.rank, nodes.away]
        send, room = np.zeros((2, nodes.topology.num_ranks), np.int64)
        first = [[of_lane[int(node)][: self.most_rows] for of_lane in self.packed] for node in nodes.away]
        send[forwarders] = [len(of_node[0]) for of_node in first]
        room[nodes.sources] = self.most_rows
        flight = between.open(self.tag, [packed_lane(size, send, room) for size in self._row_bytes], agreed=True)
        for forwarder, of_node in zip(forwarders, first, strict=True):
            for lane, rows in enumerate(of_node):
                flight.lend(lane, int(forwarder), rows)
        flight.commit()
        self._flight = flight

    def wait(self, rows_W: np.ndarray) -> list[Tensor]:
        """Of every lane the rows that came, sorted by source. rows_W: how many each rank sends to this node in all."""
        assert self._flight is not None, "it was sent"
        room = self.most_rows
        counts = np.minimum(rows_W[self._nodes.sources], room)
        lanes = self._flight.wait()
        if (counts[:-1] == room).all():
            return [rows[: counts.sum()] for rows in lanes]
        return [torch.cat([rows[at * room : at * room + count] for at, count in enumerate(counts)]) for rows in lanes]

    def release(self) -> None:
        """Wait until all of it has left, and nobody needs what came."""
        assert self._flight is not None, "it was sent"
        self._flight.release()


def _room(num_rows: int, row_bytes: int) -> Tensor:
    rows = byte_rows(max(1, num_rows), row_bytes)
    return rows if num_rows else rows.zero_()
