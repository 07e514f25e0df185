"""Rows of every rank of a node in memory that its mates read: sums are made of them where they lie."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import LINE_BYTES
from moecomm.transport.base import Exchange, Lane, Transport


@final
class Yard:
    """Opened by all ranks of a node at the same place in the order of their exchanges.

    Mates may read what a rank has written once it has told them so. rows, keys: (n, row_bytes) and (n,) int32 of this
    rank, with n = `num_sent` of the lane.
    """

    def __init__(self, inside: Transport, tag: str, lane: Lane) -> None:
        self._row_bytes = lane.row_bytes
        size = np.full(len(lane.send_counts), self._begin(lane.num_sent) + lane.num_sent * lane.row_bytes)
        nothing = np.zeros_like(size)
        everything = Lane(row_bytes=1, out_rows=size, send_counts=nothing, send_starts=nothing, recv_counts=nothing)
        self._exchange: Exchange = inside.open(tag, [everything], agreed=True)
        self.rows, self.keys = self.of(inside.group.rank, lane.num_sent)

    def of(self, rank: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """Rows and keys of a rank of this node, which has so many."""
        memory, begin = self._exchange.memory_at(rank), self._begin(num_rows)
        rows = memory[begin : begin + num_rows * self._row_bytes].view(num_rows, self._row_bytes)
        return rows, memory[: 4 * num_rows].view(torch.int32)

    def gather_counts(self, counts: np.ndarray) -> np.ndarray:
        """All-gather (C,) int32 counts into (W, C); what mates wrote before is there then."""
        return self._exchange.gather_counts(counts)

    def leave(self) -> None:
        """This rank has read all that it needs."""
        self._exchange.commit()

    def close(self) -> None:
        """Wait until all mates have left; then their memory may serve for something else."""
        self._exchange.wait()
        self._exchange.release()

    @staticmethod
    def _begin(num_rows: int) -> int:
        return -(-4 * num_rows // LINE_BYTES) * LINE_BYTES
