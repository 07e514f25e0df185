"""The first block of rows on their way out, which leaves before the ranks know how many rows the others send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm.rows import copy_rows, empty_rows
from moecomm.transport._nodes import BLOCK_BYTES, NodeMap
from moecomm.transport._spread import packed_lane
from moecomm.transport.base import Exchange, Transport, as_bytes


@final
class Ahead:
    """A block that may be shorter than who receives it has room for. At least one row travels: somebody waits for it.

    Packed when it is made, in the caller's thread; the rest belongs to the thread that moves.

    tag: of the operation. payloads: (T, ...) what repeats. places_TV: see `plan.node_places`.
    """

    def __init__(self, nodes: NodeMap, tag: str, payloads: Sequence[Tensor], places_TV: Tensor) -> None:
        self.tag, self._nodes = tag, nodes
        rows = [as_bytes(payload) for payload in payloads]
        self._row_bytes = [of_lane.shape[1] for of_lane in rows]
        self.most_rows = max(1, BLOCK_BYTES // max(1, sum(self._row_bytes)))
        self._packed: list[list[Tensor]] = []  # for every other node, of every lane
        self._flight: Exchange | None = None
        for node in nodes.away:
            places = places_TV[:, int(node)]
            index = torch.nonzero((places >= 0) & (places < self.most_rows)).view(-1)
            self._packed.append([self._pack(of_lane, index) for of_lane in rows])

    def _pack(self, rows: Tensor, index: Tensor) -> Tensor:
        packed = empty_rows(max(1, len(index)), rows.shape[1], torch.uint8, rows.device)
        if len(index):
            copy_rows(packed, rows, index)
        else:
            packed.zero_()
        return packed

    def send(self, between: Transport) -> None:
        """Let it go."""
        nodes = self._nodes
        forwarders = nodes.forwarder_WV[nodes.rank, nodes.away]
        send, room = np.zeros((2, nodes.topology.num_ranks), np.int64)
        send[forwarders] = [len(of_node[0]) for of_node in self._packed]
        room[nodes.sources] = self.most_rows
        flight = between.open(self.tag, [packed_lane(size, send, room) for size in self._row_bytes], agreed=True)
        for forwarder, of_node in zip(forwarders, self._packed, strict=True):
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
