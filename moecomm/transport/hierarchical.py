"""Several nodes: each row crosses the slow link once per node, and is spread or summed inside the node.

Handed three transports: `inside` moves rows between the ranks of a node, `between` moves blocks of rows between nodes,
`control` compares what the ranks do and how much they send. The caller's thread plans and packs, and also moves, if it
waits at once and nothing is under way; else one thread of this transport moves, operation after operation, so that a
rank that is busy elsewhere still forwards what others wait for.

A lane that `repeats` goes to one rank of each node, its forwarder there, with the slots of its copies beside it; a lane
to `merge` is summed by the forwarder; any other lane goes straight to its destination. Rows travel in blocks: while one
is between nodes, the one before it is spread, or the one after it is summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast, final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import byte_rows
from moecomm.errors import MoECommError, PeerLostError, StallError
from moecomm.group import Group
from moecomm.rows import copy_rows
from moecomm.topology import Topology
from moecomm.transport._ahead import Ahead
from moecomm.transport._fill import EVERYTHING, Fill, Turns
from moecomm.transport._merge import Merger, sections
from moecomm.transport._nodes import NodeMap, Shipment, first_block_rows
from moecomm.transport._spread import Bundle, Spreader, slots_of
from moecomm.transport._yard import Yard
from moecomm.transport.base import Exchange, Lane, Support, Transport, TransportOptions

T = TypeVar("T")


@final
class HierarchicalTransport(Transport):
    """Two levels; see the module."""

    name = "hierarchical"

    def __init__(
        self,
        group: Group,
        topology: Topology,
        options: TransportOptions,
        *,
        inside: Transport,
        between: Transport,
        control: Transport,
    ) -> None:
        self.group, self.timeout_s, self.buffer_id = group, options.timeout_s, options.buffer_id
        self.inside, self.between, self._control = inside, between, control
        self.nodes = NodeMap(topology, group.rank)
        self.node_of_rank = self.nodes.node_of_rank
        self.counters: Counter[str] = Counter()
        self.failure: MoECommError | None = None
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="moecomm-move")
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="moecomm-counts")
        self._moves: list[Future[Any]] = []
        self._asked: Future[np.ndarray] | None = None  # what `gather_counts` is about to ask
        self._ahead: Ahead | None = None  # of the exchange that is opened next
        self._closed = False

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        if device.type != "cpu":
            return Support(False, f"rows on {device.type} are not there yet, only on cpu")
        nodes = "one node" if topology.is_single_node else f"{topology.num_nodes} nodes"
        return Support(True, nodes)

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        asked, self._asked = self._asked or self.ask(tag, counts), None
        return asked.result()

    def ask(self, tag: str, counts: np.ndarray) -> Future[np.ndarray]:
        """All-gather counts, in the order of the calls and independently of what moves."""
        return self._clerk.submit(self.guarded, lambda: self._control.gather_counts(tag, counts))

    def move(self, job: Callable[[], T]) -> Future[T]:
        """Run a job in the thread that moves."""
        self._moves = [move for move in self._moves if not move.done()]
        self._moves.append(future := self._mover.submit(self.guarded, job))
        return future

    @property
    def is_idle(self) -> bool:
        """Whether a job would begin at once."""
        return all(move.done() for move in self._moves)

    def guarded(self, job: Callable[[], T]) -> T:
        """Run a job, unless one before it failed; if it fails, tell the peers."""
        if self.failure is not None:
            raise self.failure
        try:
            return job()
        except MoECommError as error:
            self.abort(error)
            raise
        except BaseException as error:
            what = f"rank {self.group.rank} broke off with {type(error).__name__}: {error}"
            self.abort(PeerLostError(what, rank=self.group.rank, peers=[self.group.rank]))
            raise

    def send_ahead(self, tag: str, counts: np.ndarray, payloads: Sequence[Tensor], places_TV: Tensor) -> None:
        self._asked = self.ask(tag, counts)
        if self.between.takes_less and len(self.nodes.away):
            self._ahead = ahead = Ahead(self.nodes, tag, payloads, places_TV)
            if self.is_idle:  # nobody else moves now
                self.guarded(lambda: ahead.send(self.between))
            else:
                self.move(lambda: ahead.send(self.between))
            ahead.pack_rest()

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        ahead, self._ahead = self._ahead, None
        assert ahead is None or ahead.tag == tag, "an operation that fails is the last one"
        return HierarchicalExchange(self, tag, lanes, agreed=agreed, ahead=ahead)

    def abort(self, error: MoECommError) -> None:
        self.failure = self.failure or error
        for transport in (self.inside, self.between, self._control):
            transport.abort(error)

    def is_first_report(self) -> bool:
        return self.inside.is_first_report()

    def last_seen(self) -> dict[int, str]:
        return self._control.last_seen() | self.inside.last_seen()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        busy = any(not move.done() for move in self._moves)
        ends = [self._clerk.submit(self._control.close), self._mover.submit(self._close)]
        self._clerk.shutdown(wait=False)
        self._mover.shutdown(wait=False)
        if not busy:
            for end in ends:
                end.result()

    def _close(self) -> None:
        self.inside.close()
        self.between.close()
        for transport in (self.between, self._control):
            transport.group.free()

    def stats(self) -> dict[str, int]:
        counted = {name: self.counters[name] for name in ("rows_between", "bytes_between", "blocks")}
        return self.inside.stats() | counted

    @property
    def allocated_bytes(self) -> int:
        return self.inside.allocated_bytes + self.between.allocated_bytes


@final
class HierarchicalExchange(Exchange):
    """One operation: filled by the caller's thread, moved by the same one in turns or by the transport's."""

    def __init__(
        self, transport: HierarchicalTransport, tag: str, lanes: Sequence[Lane], *, agreed: bool, ahead: Ahead | None
    ) -> None:
        self._transport, self._nodes, self._tag, self._lanes = transport, transport.nodes, tag, lanes
        merging = [number for number, lane in enumerate(lanes) if lane.merge]
        self._wanted: dict[int, dict[int, tuple[Tensor, np.ndarray]]] = {
            number: {} for number, lane in enumerate(lanes) if lane.repeats
        }
        assert not merging or (merging == [0] and not self._wanted), "only the first lane merges, and none repeats then"
        # Not where an operation is under way: its exchanges inside the node come first, in the thread that moves.
        self._yard = transport.guarded(self._open_yard) if merging and transport.is_idle else None
        self._staged = [None if lane.repeats else self._staging(lane) for lane in lanes]
        self._bundle: Bundle | None = None
        self._ahead = ahead
        self._told = self._know_or_ask(agreed=agreed)
        self._outputs: list[Tensor] | None = None
        steps = self._merge_and_spread() if merging else self._spread()
        if transport.is_idle and not transport.goes_on:  # the caller waits at once: no other thread is needed
            self._fill: Fill | Turns[list[Tensor]] = (turns := Turns(steps, transport.guarded))
            self._result: Callable[[], list[Tensor]] = turns.result
        else:
            self._fill = fill = Fill(lambda: transport.failure is not None, transport.timeout_s)
            self._result = transport.move(lambda: self._moved(steps, fill)).result

    def _open_yard(self) -> Yard | None:
        """Where mates read this rank's sums, unless every hop is checked."""
        lane = self._lanes[0]
        assert lane.merge is not None
        return None if lane.merge.open is not None else Yard(self._transport.inside, self._tag, lane)

    def _staging(self, lane: Lane) -> Tensor:
        if lane.merge is not None and self._yard is not None:
            return self._yard.rows
        return byte_rows(lane.num_sent, lane.row_bytes)

    def _know_or_ask(self, *, agreed: bool) -> Future[np.ndarray] | None:
        """What all ranks tell of their rows for each node; None: to be asked for once this rank knows its own."""
        lane, transport = self._lanes[0], self._transport
        if lane.merge is not None:
            return transport.ask(self._tag, lane.merge.recv_rows.astype(np.int32))
        nothing = np.zeros((transport.group.size, 2 * len(self._nodes.ranks_of_node)), np.int32)
        known = self._lanes[min(self._wanted)].node_counts if self._wanted else nothing
        if agreed and known is not None:
            told: Future[np.ndarray] = Future()
            told.set_result(known)
            return told
        return None if self._wanted else transport.ask(self._tag, nothing[0])

    # -- what fills ------------------------------------------------------------------------------------------------

    def sections(self, lane: Lane, rank: int) -> Iterator[tuple[int, slice]]:
        return sections(self._nodes, lane, self._fill.reach) if lane.merge else super().sections(lane, rank)

    def area(self, lane: int, dst: int, section: slice) -> Tensor:
        return self._rows_staged(lane)[section]

    def target(self, lane: int, dst: int) -> Tensor:
        counts = self._lanes[lane].send_counts
        stop = int(counts[: dst + 1].sum())
        return self._rows_staged(lane)[stop - int(counts[dst]) : stop]

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        if lane in self._wanted:
            self._wanted[lane][dst] = src, index.numpy()
        else:
            copy_rows(self.target(lane, dst), src, index)

    def commit(self) -> None:
        if self._wanted:
            self._pack()
        self._fill.reach(EVERYTHING)

    def wait(self) -> list[Tensor]:
        if self._outputs is None:
            self._outputs = self._result()
        return self._outputs

    def own(self, lane: int) -> Tensor:
        return self.wait()[lane]

    def release(self) -> None: ...

    def _rows_staged(self, lane: int) -> Tensor:
        rows = self._staged[lane]
        assert rows is not None, "a lane that repeats is put"
        return rows

    def _pack(self) -> None:
        """Find out which rows go to which node, and lay them out in blocks; those of this node last."""
        nodes, first, ahead = self._nodes, min(self._wanted), self._ahead
        nothing = np.empty(0, np.int64)
        wanted = {dst: index for dst, (_, index) in self._wanted[first].items()}
        shipments = []
        for ranks in nodes.ranks_of_node:
            slots = [slots_of(self._lanes[first], int(dst)) for dst in ranks]
            shipments.append(Shipment.pack([wanted.get(int(dst), nothing) for dst in ranks], slots))
        if ahead is not None:
            self._bundle = Bundle(shipments, ahead.packed)
            return
        lanes = [self._lanes[number] for number in self._wanted]
        packed = [[byte_rows(len(shipment.rows), lane.row_bytes) for shipment in shipments] for lane in lanes]
        self._bundle = Bundle(shipments, packed)
        self._told = self._told or self._transport.ask(self._tag, self._bundle.header())
        self._fill.reach(0)
        step = first_block_rows(sum(lane.row_bytes for lane in lanes))
        for begin in range(0, max((len(shipments[node].rows) for node in nodes.away), default=0), step):
            for node in nodes.away:
                self._pack_rows(packed, int(node), slice(begin, begin + step))
            self._fill.reach(begin + step)
        self._fill.reach(EVERYTHING - 1)
        self._pack_rows(packed, nodes.node, slice(None))

    def _pack_rows(self, packed: list[list[Tensor]], node: int, part: slice) -> None:
        assert self._bundle is not None
        index = torch.from_numpy(self._bundle.shipments[node].rows[part])
        for of_node, put in zip(packed, self._wanted.values(), strict=True):
            if len(index):
                copy_rows(of_node[node][part], next(iter(put.values()))[0], index)

    # -- what moves ------------------------------------------------------------------------------------------------

    def _moved(self, steps: Generator[int, None, T], fill: Fill) -> T:
        """Go through steps, waiting until the caller's thread has filled what each of them needs."""
        try:
            while fill.wait(min(next(steps), EVERYTHING)):
                pass
        except StopIteration as end:
            return cast(T, end.value)
        what = "this rank did not get to fill its own rows in time"
        raise self._transport.failure or StallError(what, rank=self._nodes.rank, operation=self._tag.split(" ")[0])

    def _spread(self) -> Generator[int, None, list[Tensor]]:
        """Move lanes none of which merges."""
        transport = self._transport
        yield 0 if self._wanted else EVERYTHING
        assert self._told is not None, "asked for before anything is filled"
        told = self._told.result()
        spreader = Spreader(
            self._nodes, transport.inside, transport.between, self._tag, self._lanes, transport.counters
        )
        return keep(*(yield from spreader.run(self._bundle, self._staged, told, self._ahead)))

    def _merge_and_spread(self) -> Generator[int, None, list[Tensor]]:
        """Move a lane that merges, then what comes with it."""
        transport, nodes, lane = self._transport, self._nodes, self._lanes[0]
        assert self._told is not None, "asked for at once"
        rows, counters = self._rows_staged(0), transport.counters
        merger = Merger(nodes, transport.inside, transport.between, self._tag, lane, rows, counters)
        self._yard = self._yard or self._open_yard()
        summed = yield from merger.run(self._told, self._yard)
        if len(self._lanes) == 1:
            return [summed]
        spreader = Spreader(nodes, transport.inside, transport.between, self._tag, self._lanes[1:], counters)
        told = np.zeros((nodes.topology.num_ranks, 2 * nodes.topology.num_nodes), np.int64)
        return [summed, *keep(*(yield from spreader.run(None, self._staged[1:], told)))]


def keep(exchange: Exchange, outputs: list[Tensor]) -> list[Tensor]:
    """Take the outputs out of an exchange inside a node: the largest stays where it is, the others are copied."""
    largest = max(range(len(outputs)), key=lambda number: outputs[number].numel())
    kept = [rows if number == largest else rows.clone() for number, rows in enumerate(outputs)]
    kept[largest] = exchange.own(largest)
    exchange.release()
    return kept
