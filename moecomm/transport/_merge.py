"""Sums on their way home: a forwarder sums what the ranks of its node have for a token, and sends one row.

It reads the rows of its mates where they lie (`_yard.py`). Where every hop is checked they hand them over instead, so
that what arrives can be compared with what left.

Legend: W ranks, V nodes, R ranks of this node, B blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import empty_rows
from moecomm.rows import reduce_columns
from moecomm.transport._fill import AT_LAST, EVERYTHING
from moecomm.transport._nodes import NodeMap, block_starts, first_block_rows, rows_in_block
from moecomm.transport._spread import packed_lane
from moecomm.transport._yard import Yard
from moecomm.transport.base import Exchange, Lane, Merge, Transport

_NOTHING = np.empty(0, np.int32)


def sections(nodes: NodeMap, lane: Lane, filled: Callable[[int], None]) -> Iterator[tuple[int, slice]]:
    """The order in which to fill a lane that merges: block by block for other nodes, then for this one.

    filled: told after each block how many rows for each rank of another node are there.
    """
    assert lane.merge is not None
    starts = np.cumsum(lane.send_counts) - lane.send_counts
    step = first_block_rows(lane.row_bytes)
    away = [int(rank) for node in nodes.away for rank in nodes.ranks_of_node[node]]
    keys = {dst: keys_for(lane, dst) for dst in away}
    for begin in range(0, max([int(of_dst[-1]) + 1 for of_dst in keys.values() if len(of_dst)], default=0), step):
        for dst in away:
            low, high = starts[dst] + np.searchsorted(keys[dst], [begin, begin + step])
            if low < high:
                yield dst, slice(int(low), int(high))
        filled(begin + step)
    filled(EVERYTHING - 1)
    for mate in nodes.mates:
        if lane.send_counts[mate]:
            yield int(mate), slice(int(starts[mate]), int(starts[mate] + lane.send_counts[mate]))


def keys_for(lane: Lane, dst: int) -> np.ndarray:
    assert lane.merge is not None
    stop = int(lane.send_counts[: dst + 1].sum())
    return lane.merge.keys.numpy()[stop - int(lane.send_counts[dst]) : stop]


@dataclass(frozen=True, kw_only=True)
class Block:
    """What the ranks of a node sum together.

    served: (R,) for whom each of them forwards. counts_RW: rows that each of them has for each rank. lows_RW: where
    these begin. first_key: key of the first sum. sums_W: sums for each rank.
    """

    served: list[np.ndarray]
    counts_RW: np.ndarray
    lows_RW: np.ndarray
    first_key: int
    sums_W: np.ndarray


@dataclass(frozen=True)
class Inbox:
    """What a forwarder has of its mates.

    rows: (R,) of (n, row_bytes). tables: for each rank served (sums, R) int64 which of each mate's rows to sum, -1 for
    none. exchange: what to release when the rows are no longer needed.
    """

    rows: list[Tensor]
    tables: dict[int, Tensor]
    exchange: Exchange | None

    def release(self) -> None:
        if self.exchange is not None:
            self.exchange.release()


@final
class Merger:
    """Moves the lane of an exchange that merges.

    staged: this rank's rows, sorted by destination, then key.
    """

    def __init__(
        self,
        nodes: NodeMap,
        inside: Transport,
        between: Transport,
        tag: str,
        lane: Lane,
        staged: Tensor,
        counters: Counter[str],
    ) -> None:
        assert lane.merge is not None
        self._counters = counters
        self._nodes, self._inside, self._between, self._tag = nodes, inside, between, tag
        self._lane, self._staged = lane, staged
        self._merge: Merge = lane.merge
        self._local = int(nodes.local_index[nodes.rank])
        self._yard: Yard | None = None
        self._of_mates: list[tuple[Tensor, Tensor]] = []  # rows and keys in the yard

    def run(self, home: Future[np.ndarray], yard: Yard | None) -> Generator[int, None, Tensor]:
        """Move everything (see `_fill.py`); the output, sorted by (node, key).

        home: (W, V) headers of all ranks, when they come. yard: where mates read each other's rows, or None.
        """
        nodes, mates, self._yard = self._nodes, self._nodes.mates, yard
        most = self._lane.out_rows  # at least as many come home, and every rank knows it already
        starts = block_starts(self._lane.row_bytes, int(most.max(initial=0)))
        bounds_WB = self._bounds(starts)
        yield int(starts[:2][-1])
        self._show(bounds_WB, 0)
        counts_BRW, lows_BRW, home_W = self._meet_first(bounds_WB)
        # How many sums each rank sends and gets is known here: the first block need not wait for what others tell.
        home_WV = np.zeros((len(home_W), nodes.topology.num_nodes), np.int64)
        home_WV[:, nodes.node], home_WV[nodes.rank] = home_W, self._merge.recv_rows
        away_WV = nodes.between(home_WV)
        flights: list[Exchange] = []
        for block in range(len(starts) - 1):
            if block and block >= np.searchsorted(starts, nodes.between(home.result()).max(initial=0)):
                break
            flights.append(self._open_between(rows_in_block(away_WV, starts, block), block))
            if block:
                yield int(starts[block + 1])
                self._show(bounds_WB, block)
                self._meet()
            inbox = self._collect(
                Block(
                    served=[nodes.served_by(int(mate)) for mate in mates],
                    counts_RW=counts_BRW[block],
                    lows_RW=lows_BRW[block],
                    first_key=int(starts[block]),
                    sums_W=rows_in_block(home_W, starts, block),
                ),
                f"inside a node, block {block}",
            )
            self._send(inbox, flights[-1])
        home.result()  # all ranks agree
        num_sent = int(home_W[nodes.sources].sum())
        self._counters.update(rows_between=num_sent, bytes_between=num_sent * self._lane.row_bytes, blocks=len(flights))
        yield EVERYTHING
        self._show(bounds_WB, len(starts) - 1)
        self._meet()
        inbox = self._collect(
            Block(
                served=list(mates[:, None]),
                counts_RW=counts_BRW[-1],
                lows_RW=lows_BRW[-1],
                first_key=0,
                sums_W=home_W,
            ),
            "inside a node, at last",
        )
        home_V = home_WV[nodes.rank]
        out = empty_rows(int(home_V.sum()), self._lane.row_bytes, torch.uint8, self._staged.device)
        of_node = list(out.split(home_V.tolist()))
        self._sum(of_node[nodes.node], inbox, inbox.tables[nodes.rank])
        inbox.release()
        if yard is not None:
            yard.leave()
        yield AT_LAST
        self._arrange(of_node, flights, starts)
        if yard is not None:
            yard.close()
        return out

    def _bounds(self, starts: np.ndarray) -> np.ndarray:
        """(W, B + 2) where in `staged` my rows of each block for each rank begin; the last block is for this node."""
        first = np.cumsum(self._lane.send_counts) - self._lane.send_counts
        bounds_WB = np.zeros((len(first), len(starts) + 1), np.int64)
        for dst, start in enumerate(first):
            keys = keys_for(self._lane, dst)
            if self._nodes.node_of_rank[dst] == self._nodes.node:
                bounds_WB[dst, :-1] = start
            else:
                bounds_WB[dst, :-1] = start + np.searchsorted(keys, starts)
            bounds_WB[dst, -1] = start + len(keys)
        return bounds_WB

    def _key_ends(self) -> np.ndarray:
        """(W,) one more than the last key of my rows for each rank."""
        last = [keys_for(self._lane, dst)[-1:] for dst in range(len(self._lane.send_counts))]
        return np.array([int(keys[0]) + 1 if len(keys) else 0 for keys in last])

    def _meet_first(self, bounds_WB: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Wait until all mates have shown their first block, and learn what they have.

        (B + 1, R, W) rows of every block that each mate has for each rank, where in its rows they begin, and (W,) how
        many sums this node makes for each rank.
        """
        yard, mates = self._yard, self._nodes.mates
        if yard is not None:
            yard.keys.copy_(self._merge.keys)
        mine = np.ascontiguousarray(np.vstack([np.diff(bounds_WB, axis=1).T, self._key_ends()]), np.int32)
        gather = partial(self._inside.gather_counts, self._tag) if yard is None else yard.gather_counts
        told = gather(mine.ravel())[mates].reshape(len(mates), *mine.shape)
        counts_BRW, ends_RW = told[:, :-1].swapaxes(0, 1), told[:, -1]
        num_RW = counts_BRW.sum(0)
        if yard is not None:
            self._of_mates = [yard.of(int(mate), int(num)) for mate, num in zip(mates, num_RW.sum(1), strict=True)]
        lows_BRW = num_RW.cumsum(1) - num_RW + counts_BRW.cumsum(0) - counts_BRW
        return counts_BRW, lows_BRW, ends_RW.max(0).astype(np.int64)  # keys have no gaps

    def _open(self, transport: Transport, lanes: Sequence[Lane], which: str) -> Exchange:
        if self._merge.open is not None:
            return self._merge.open(transport, self._tag, lanes, which)
        return transport.open(self._tag, lanes, agreed=True)

    def _lanes_inside(self, block: Block) -> list[Lane]:
        """Rows, and which sum each is for, sorted by (mate, rank served, key)."""
        incoming, sent, starts, received = np.zeros((4, len(block.sums_W)), np.int64)
        for local, (mate, served) in enumerate(zip(self._nodes.mates, block.served, strict=True)):
            counts_R = block.counts_RW[:, served].sum(1)
            incoming[mate], sent[mate] = counts_R.sum(), counts_R[self._local]
            starts[mate] = counts_R[: self._local].sum()
            received[mate] = block.counts_RW[local, block.served[self._local]].sum()
        rows = Lane(
            row_bytes=self._lane.row_bytes,
            out_rows=incoming,
            send_counts=sent,
            send_starts=starts,
            recv_counts=received,
        )
        return [rows, replace(rows, row_bytes=4)]

    def _show(self, bounds_WB: np.ndarray, block: int) -> None:
        """Put my rows of a block where mates read them, if they are not there already."""
        yard = self._yard
        if yard is not None and yard.rows.data_ptr() != self._staged.data_ptr():
            for low, high in bounds_WB[:, block : block + 2].tolist():
                yard.rows[low:high] = self._staged[low:high]

    def _meet(self) -> None:
        """Wait until all mates have shown as much."""
        if self._yard is not None:
            self._yard.gather_counts(_NOTHING)

    def _collect(self, block: Block, which: str) -> Inbox:
        """What this rank forwards of a block."""
        if not self._of_mates:
            return self._hand_over(block, which)
        rows, keys = zip(*self._of_mates, strict=True)
        return Inbox([*rows], self._tables(block, [of_mate.numpy() for of_mate in keys], block.lows_RW), None)

    def _hand_over(self, block: Block, which: str) -> Inbox:
        """Hand rows to the mates that forward them, and take those that this rank forwards."""
        exchange = self._open(self._inside, self._lanes_inside(block), which)
        for mate, served in zip(self._nodes.mates, block.served, strict=True):
            rows, keys, at = exchange.target(0, int(mate)), exchange.target(1, int(mate)), 0
            for rank in served:
                low, count = int(block.lows_RW[self._local, rank]), int(block.counts_RW[self._local, rank])
                rows[at : at + count] = self._staged[low : low + count]
                keys[at : at + count] = self._merge.keys[low : low + count].view(torch.uint8).view(count, 4)
                at += count
        exchange.commit()
        arrived, keys, *_ = exchange.wait()
        served, num_mates = block.served[self._local], len(block.served)
        counts = block.counts_RW[:, served]  # rows came sorted by (mate, rank served, key)
        lows_RW = np.zeros_like(block.lows_RW)
        lows_RW[:, served] = (counts.cumsum() - counts.ravel()).reshape(counts.shape)
        every_key = keys.view(torch.int32).view(-1).numpy()
        return Inbox([arrived] * num_mates, self._tables(block, [every_key] * num_mates, lows_RW), exchange)

    def _tables(self, block: Block, keys: Sequence[np.ndarray], lows_RW: np.ndarray) -> dict[int, Tensor]:
        """Which rows of each mate make up every sum. keys: (R,) of their rows. lows_RW: where those of a rank begin."""
        tables = {}
        for rank in block.served[self._local].tolist():
            table = np.full((block.sums_W[rank], len(keys)), -1, np.int64)
            for local, of_mate in enumerate(keys):
                low = int(lows_RW[local, rank])
                rows = np.arange(low, low + int(block.counts_RW[local, rank]))
                table[of_mate[rows] - block.first_key, local] = rows
            tables[rank] = torch.from_numpy(table)
        return tables

    def _open_between(self, sums_WV: np.ndarray, block: int) -> Exchange:
        recv, send = self._nodes.counts_between(sums_WV)
        lanes = [packed_lane(self._lane.row_bytes, send, recv)]
        return self._open(self._between, lanes, f"between nodes, block {block}")

    def _send(self, inbox: Inbox, flight: Exchange) -> None:
        """Sum what came for each rank served, and send it home."""
        for rank, table in inbox.tables.items():
            self._sum(flight.target(0, rank), inbox, table)
        flight.commit()
        inbox.release()

    def _sum(self, out: Tensor, inbox: Inbox, table: Tensor) -> None:
        if len(table):
            dtype = self._merge.dtype
            reduce_columns(out.view(dtype), [rows.view(dtype) for rows in inbox.rows], table)

    def _arrange(self, of_node: Sequence[Tensor], flights: Sequence[Exchange], starts: np.ndarray) -> None:
        """Put the rows of other nodes where they belong, as they come."""
        nodes = self._nodes
        order = sorted(nodes.away, key=lambda node: nodes.forwarder_WV[nodes.rank, node])  # as they arrive
        for block, flight in enumerate(flights):
            arrived, at = flight.wait()[0], 0
            for node in order:
                rows = of_node[node][starts[block] : starts[block + 1]]
                rows.copy_(arrived[at : at + len(rows)])
                at += len(rows)
        for flight in flights:
            flight.release()
