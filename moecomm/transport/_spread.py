"""Rows on their way out: once to each node, from there to every slot that wants a copy.

Legend: W ranks, V nodes, R ranks of this node, B blocks, U rows that a rank sends to a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from moecomm.rows import copy_rows
from moecomm.transport._fill import AT_LAST
from moecomm.transport._nodes import NodeMap, Shipment, Spread, block_starts, rows_in_block
from moecomm.transport.base import Exchange, Lane, Transport

if TYPE_CHECKING:
    from moecomm.transport._ahead import Ahead


@dataclass(frozen=True)
class Bundle:
    """The rows that repeat, packed for each node: of every lane the same rows.

    shipments: (V,) what goes to every node. packed: for every lane (V,) its rows for every node.
    """

    shipments: list[Shipment]
    packed: list[list[Tensor]]

    def header(self) -> np.ndarray:
        """(2 V,) rows for each node, then copies wanted there."""
        rows = [len(shipment.rows) for shipment in self.shipments]
        return np.array([*rows, *(len(shipment.codes) for shipment in self.shipments)], np.int32)


def everything(row_bytes: int, out_rows: np.ndarray) -> Lane:
    """A lane inside a node in which every rank may write to every row of every output."""
    zeros = np.zeros_like(out_rows)
    return Lane(row_bytes=row_bytes, out_rows=out_rows, send_counts=out_rows, send_starts=zeros, recv_counts=zeros)


def packed_lane(row_bytes: int, send_counts: np.ndarray, recv_counts: np.ndarray) -> Lane:
    """A lane between nodes: rows leave sorted by destination and arrive sorted by source."""
    return Lane(
        row_bytes=row_bytes,
        out_rows=np.full(len(recv_counts), recv_counts.sum()),
        send_counts=send_counts,
        send_starts=np.zeros_like(send_counts),
        recv_counts=recv_counts,
    )


def slots_of(lane: Lane, dst: int) -> np.ndarray:
    """Where this rank's rows for a rank go there."""
    stop = int(lane.send_counts[: dst + 1].sum())
    start = stop - int(lane.send_counts[dst])
    if lane.send_slots is not None:
        return lane.send_slots[start:stop].numpy()
    assert lane.send_starts is not None
    return int(lane.send_starts[dst]) + np.arange(stop - start)


@final
class Spreader:
    """Moves all lanes of an exchange but those to merge.

    lanes: they, in order. repeating: which of them repeat, alike; the others lie in `staged`, sorted by destination.
    """

    def __init__(
        self,
        nodes: NodeMap,
        inside: Transport,
        between: Transport,
        tag: str,
        lanes: Sequence[Lane],
        counters: Counter[str],
    ) -> None:
        self._nodes, self._inside, self._between, self._tag, self._lanes = nodes, inside, between, tag, lanes
        self._counters = counters
        self._repeating = [number for number, lane in enumerate(lanes) if lane.repeats]
        self._direct = [number for number, lane in enumerate(lanes) if not lane.repeats]
        self._is_away = nodes.node_of_rank != nodes.node

    def run(
        self,
        bundle: Bundle | None,
        staged: Sequence[Tensor | None],
        told: np.ndarray,
        ahead: Ahead | None = None,
    ) -> Generator[int, None, tuple[Exchange, list[Tensor]]]:
        """Move everything (see `_fill.py`); the exchange inside the node, complete, and its outputs.

        told: (W, 2 V) headers of all bundles. ahead: the first block, if it has left.
        """
        rows_WV, copies_WV = np.split(told.astype(np.int64), 2, 1)
        away_WV = self._nodes.between(rows_WV)
        row_bytes = sum(self._lanes[number].row_bytes for number in self._repeating)
        starts = block_starts(row_bytes, int(away_WV.max(initial=0)))
        first: Exchange | None = None
        flights: list[Exchange | Ahead] = []
        for block, (start, stop) in enumerate(pairwise(starts.tolist())):
            if block or ahead is None:
                flights.append(flight := self._open_block(rows_in_block(away_WV, starts, block)))
                yield stop
                assert bundle is not None
                self._send_block(flight, bundle, slice(start, stop))
            else:
                flights.append(ahead)
            if first is None:  # the link is busy, and without this nobody can spread the block
                first = self._send_first(rows_WV + copies_WV, bundle, staged)
        first = first or self._send_first(rows_WV + copies_WV, bundle, staged)
        num_sent = int(away_WV[self._nodes.rank].sum())
        self._counters.update(rows_between=num_sent, bytes_between=num_sent * row_bytes, blocks=len(flights))
        inner = self._open_inside()
        yield AT_LAST
        own = self._own_rows(inner, bundle, staged, max(1, len(flights) - 1))
        arrived = first.wait()
        spread = self._spread_plan(arrived, rows_WV, copies_WV, starts)
        for direct, number in enumerate(self._direct, start=bool(self._repeating)):
            self._place(inner, number, arrived[direct])
        for block, sent in enumerate(flights):
            rows = sent.wait() if isinstance(sent, Exchange) else sent.wait(rows_WV[:, self._nodes.node])
            self._put_block(inner, rows, spread, block)
            next(own, None)  # a part of what never leaves the node, after each block but the last
        for _ in own:
            pass
        inner.commit()
        if ahead is not None and not flights:  # nobody sends anything to another node
            ahead.wait(rows_WV[:, self._nodes.node])
            ahead.release()
        for sent in (first, *flights):
            sent.release()
        return inner, inner.wait()

    # -- between nodes ---------------------------------------------------------------------------------------------

    def _send_first(self, meta_WV: np.ndarray, bundle: Bundle | None, staged: Sequence[Tensor | None]) -> Exchange:
        """What each forwarder must know of the rows that come, and the lanes that go straight to their destination.

        meta_WV: numbers that each rank tells its forwarder on each node.
        """
        nodes, lanes = self._nodes, []
        if self._repeating:
            lanes.append(packed_lane(self._meta_dtype().itemsize, *nodes.counts_between(meta_WV)))
        for number in self._direct:
            lane = self._lanes[number]
            counts = (np.where(self._is_away, counts, 0) for counts in (lane.send_counts, lane.recv_counts))
            lanes.append(packed_lane(lane.row_bytes, *counts))
        first = self._between.open(self._tag, lanes, agreed=True)
        if bundle is not None:
            for node in nodes.away:
                meta = bundle.shipments[node].meta(self._meta_dtype())
                rows = torch.from_numpy(meta.view(np.uint8).reshape(len(meta), meta.itemsize))
                first.lend(0, int(nodes.forwarder_WV[nodes.rank, node]), rows)
        for direct, number in enumerate(self._direct, start=bool(self._repeating)):
            for dst in np.flatnonzero(self._is_away & (self._lanes[number].send_counts > 0)):
                first.lend(direct, int(dst), self._section(staged, number, int(dst)))
        first.commit()
        return first

    def _open_block(self, rows_WV: np.ndarray) -> Exchange:
        counts = self._nodes.counts_between(rows_WV)
        lanes = [packed_lane(self._lanes[number].row_bytes, *counts) for number in self._repeating]
        return self._between.open(self._tag, lanes, agreed=True)

    def _send_block(self, flight: Exchange, bundle: Bundle, part: slice) -> None:
        for number, packed in enumerate(bundle.packed):
            for node in self._nodes.away:
                flight.lend(number, int(self._nodes.forwarder_WV[self._nodes.rank, node]), packed[node][part])
        flight.commit()

    def _meta_dtype(self) -> np.dtype:
        largest = max(int(self._lanes[number].out_rows.max()) for number in self._repeating)
        most = max(len(ranks) for ranks in self._nodes.ranks_of_node)
        return np.dtype(np.int32 if largest * most < 2**31 else np.int64)

    # -- inside the node -------------------------------------------------------------------------------------------

    def _open_inside(self) -> Exchange:
        lanes = [everything(lane.row_bytes, np.where(self._is_away, 0, lane.out_rows)) for lane in self._lanes]
        return self._inside.open(self._tag, lanes, agreed=True)

    def _put_block(self, inner: Exchange, rows_of_lanes: Sequence[Tensor], spread: Spread, block: int) -> None:
        for number, rows in zip(self._repeating, rows_of_lanes, strict=True):
            for local, mate in enumerate(self._nodes.mates):
                _copy(inner.target(number, int(mate)), rows, *spread.part(block, local))

    def _own_rows(
        self,
        inner: Exchange,
        bundle: Bundle | None,
        staged: Sequence[Tensor | None],
        num_parts: int,
    ) -> Iterator[None]:
        """Move rows that never leave the node, in so many parts: they can wait, what others wait for cannot."""
        for number in self._direct:
            for mate in self._nodes.mates:
                rows = self._section(staged, number, int(mate))
                slots = slots_of(self._lanes[number], int(mate))
                _copy(inner.target(number, int(mate)), rows, np.arange(len(rows)), slots)
        if bundle is None:
            return
        own = bundle.shipments[self._nodes.node]
        starts = len(own.rows) * np.arange(num_parts + 1) // num_parts
        spread = Spread.plan([replace(own, rows=np.arange(len(own.rows)))], len(self._nodes.mates), starts)
        for part, (start, stop) in enumerate(pairwise(starts.tolist())):
            self._put_block(inner, [packed[self._nodes.node][start:stop] for packed in bundle.packed], spread, part)
            yield

    def _spread_plan(
        self, arrived: list[Tensor], rows_WV: np.ndarray, copies_WV: np.ndarray, starts: np.ndarray
    ) -> Spread:
        """Where the rows that come from other nodes go, as their senders said."""
        shipments, at = [], 0
        if self._repeating:
            meta = arrived[0].reshape(-1).numpy().view(self._meta_dtype())
            for source in self._nodes.sources:
                num_rows, copies = (int(counts[source, self._nodes.node]) for counts in (rows_WV, copies_WV))
                shipments.append(Shipment.unpack(meta[at : at + num_rows + copies], num_rows))
                at += num_rows + copies
        return Spread.plan(shipments, len(self._nodes.mates), starts)

    def _place(self, inner: Exchange, number: int, rows: Tensor) -> None:
        """Put what came straight from other nodes where it belongs here."""
        lane = self._lanes[number]
        places = np.arange(lane.recv_counts.sum()) if lane.recv_slots is None else lane.recv_slots()
        slots = places[np.repeat(self._is_away, lane.recv_counts)]
        _copy(inner.target(number, self._nodes.rank), rows, np.arange(len(rows)), slots)

    def _section(self, staged: Sequence[Tensor | None], number: int, dst: int) -> Tensor:
        """The rows of a direct lane for a rank."""
        rows, counts = staged[number], self._lanes[number].send_counts
        assert rows is not None
        stop = int(counts[: dst + 1].sum())
        return rows[stop - int(counts[dst]) : stop]


def _copy(out: Tensor, src: Tensor, index: np.ndarray, slots: np.ndarray) -> None:
    if len(index):
        copy_rows(out, src, torch.from_numpy(index), torch.from_numpy(slots))
