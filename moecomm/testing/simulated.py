"""A whole job in one process: W ranks, an unreliable network and the real `Buffer`, replayable from one seed.

`simulate` calls a function on every rank with a `Group` of the simulated world. A `Buffer` on that group runs as it
is: planning, checks, autograd, errors; only rows and counts travel through a network that delays, reorders,
duplicates, drops and corrupts messages, and that kills ranks. The same seed gives the same run, so that a failure is
found again, and waits end in virtual time, so that a deadline of a minute costs nothing.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from moecomm import errors
from moecomm.errors import DesyncError, MoECommError, PeerLostError, StallError, rank_names
from moecomm.group import Group
from moecomm.rows import copy_rows
from moecomm.testing._world import Faults, Killed, Outcome, World
from moecomm.topology import Topology
from moecomm.transport.base import Exchange, Lane, Support, Transport, TransportOptions

__all__ = ["Faults", "Outcome", "SimulatedTransport", "results_of", "simulate", "simulated_group"]

_POISON = 255
_NAME = "simulated"


def simulate(
    fn: Callable[..., Any], num_ranks: int, *args: Any, seed: int = 0, faults: Faults | None = None
) -> list[Outcome]:
    """Call `fn(group, *args)` on every rank of a simulated world and say what became of each.

    Args:
        fn: any callable; `group` goes to `moecomm.Buffer`, and `group.rank` says which rank it is.
        num_ranks: W.
        args: passed on, the same objects for all ranks.
        seed: of everything that is drawn: which rank runs next, delays, faults.
        faults: what goes wrong; None: messages overtake each other, and nothing else.

    Returns:
        One `Outcome` per rank; `results_of` gives the results where all must have gone well.

    >>> import torch, moecomm
    >>> def step(group):
    ...     with moecomm.Buffer(group, num_experts=256, hidden=4, top_k=2, max_tokens_per_rank=2,
    ...                         dtype=torch.float32) as buffer:
    ...         x, topk_idx = torch.full((1, 4), group.rank + 1.0), torch.tensor([[3, 200]])
    ...         out = buffer.dispatch(x, topk_idx)
    ...         return len(out.x), buffer.combine(out.x, out.handle)[0, 0].item()
    >>> results_of(simulate(step, 8, seed=1))
    [(8, 2.0), (0, 4.0), (0, 6.0), (0, 8.0), (0, 10.0), (0, 12.0), (8, 14.0), (0, 16.0)]
    """
    world = World(num_ranks, seed, faults or Faults())
    world.run(lambda rank: fn(simulated_group(world, rank), *args))
    return world.outcomes


def results_of(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks returned; None of those that were killed.

    Raises:
        AssertionError: a rank raised; its traceback is in the message.

    >>> results_of(simulate(lambda group: group.rank, 3))
    [0, 1, 2]
    """
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None:
            raise AssertionError(f"simulated rank {rank} of {len(outcomes)} failed\n{outcome.trace}") from outcome.error
    return [outcome.result for outcome in outcomes]


def simulated_group(world: World, rank: int, members: Sequence[int] | None = None, name: str = "world") -> Group:
    """The group of some ranks of a world (None: all), as one of them sees it; `name` tells groups apart."""
    members = list(range(world.num_ranks)) if members is None else list(members)
    exchange = SimulatedExchange(world, members, rank, name)
    return Group(rank=members.index(rank), size=len(members), exchange=exchange, transport=SimulatedTransport)


@final
class SimulatedExchange:
    """How the ranks of a simulated group hand objects to each other: messages that are never lost."""

    def __init__(self, world: World, members: list[int], rank: int, name: str) -> None:
        self.world, self.members, self.rank, self.name = world, members, rank, name
        self._seq = 0

    def all_gather(self, blob: bytes, wait: Any) -> list[bytes]:
        """The blobs of all members, or StallError or PeerLostError."""
        world, seq = self.world, self._seq
        self._seq += 1
        mine = self._board(self.rank)[seq]
        mine[self.rank] = blob
        for peer in self.members:
            if peer != self.rank:
                world.send(self.rank, peer, lambda peer=peer: self._board(peer)[seq].setdefault(self.rank, blob))  # type: ignore[misc]

        def lost() -> list[int]:
            return [peer for peer in self.members if peer not in mine and peer in world.known_dead[self.rank]]

        in_time = world.wait(self.rank, lambda: len(mine) == len(self.members) or bool(lost()), wait.timeout_s)
        if len(mine) == len(self.members):
            return [mine[peer] for peer in self.members]
        absent = [i for i, peer in enumerate(self.members) if peer not in mine]
        if not in_time:
            raise wait.stall(absent)
        gone = [self.members.index(peer) for peer in lost()]
        raise PeerLostError(f"{rank_names(gone)} is gone", rank=wait.rank, operation=wait.operation, peers=gone)

    def board(self, name: str) -> SimulatedBoard:
        """A store that outlives every rank; each access is a moment at which others may come first."""
        return SimulatedBoard(self.world, self.rank, self.world.shared.setdefault(("store", name), {}))

    @property
    def address(self) -> str:
        """Its number in the world."""
        return str(self.rank)

    def regroup(self, rank: int, addresses: Sequence[str], name: str) -> SimulatedExchange:
        """The exchange of the ranks of the world that have these numbers."""
        return SimulatedExchange(self.world, [int(address) for address in addresses], self.rank, name)

    def _board(self, rank: int) -> defaultdict[int, dict[int, bytes]]:
        return self.world.shared.setdefault(("board", self.name, rank), defaultdict(dict))


@final
class SimulatedBoard:
    """A board of a simulated world."""

    def __init__(self, world: World, rank: int, keys: dict[str, str]) -> None:
        self.world, self.rank, self.keys = world, rank, keys

    def write(self, key: str, value: str) -> None:
        """Write a key, some time."""
        self._reach()
        self.keys[key] = value

    def wait(self, keys: Sequence[str], timeout_s: float, is_over: Callable[[], bool]) -> set[str]:
        """The keys that are there, when one is, or it is over, or the deadline has passed."""
        self._reach()
        deadline_s = self.world.now_s + timeout_s
        patience = 1.0
        while not (found := {key for key in keys if key in self.keys}) and self.world.now_s < deadline_s:
            if is_over():
                break
            self._reach(patience)  # whoever looks for long looks less often
            patience *= 1.2
        return found

    def propose(self, key: str, value: str) -> str:
        """Write a key unless it is there; what it then holds."""
        self._reach()
        return self.keys.setdefault(key, value)

    def read(self, key: str) -> str:
        """What a key holds."""
        self._reach()
        return self.keys[key]

    def _reach(self, patience: float = 1.0) -> None:
        """It takes a moment to get there, another one each time."""
        delay_s = patience * max(1e-4, self.world.faults.delay_s) * (0.5 + self.world.random.random())
        self.world.wait(self.rank, lambda: False, delay_s)


@dataclass(slots=True)
class Box:
    """What has come for one rank of one buffer; peers are numbered as in the group.

    counts: gathering -> peer -> (tag, counts). rows: (operation, lane) -> (peer, first row) -> (rows, slots).
    """

    counts: defaultdict[int, dict[int, tuple[str, np.ndarray]]] = field(default_factory=lambda: defaultdict(dict))
    rows: defaultdict[tuple[int, int], dict[tuple[int, int], tuple[Tensor, Tensor]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    num_rows: defaultdict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    left: set[int] = field(default_factory=set)
    aborts: dict[int, dict[str, Any]] = field(default_factory=dict)

    def take(self, key: tuple[int, int], at: tuple[int, int], piece: tuple[Tensor, Tensor]) -> None:
        """Take rows in; a second copy changes nothing."""
        if at not in self.rows[key]:
            self.rows[key][at] = piece
            self.num_rows[key] += len(piece[0])


@final
class SimulatedTransport(Transport):
    """Rows as messages of a simulated world; every message says where in the receiver's output it belongs."""

    name = _NAME

    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        exchange = group.exchange
        assert isinstance(exchange, SimulatedExchange)
        self.group, self.world, self.members = group, exchange.world, exchange.members
        self.timeout_s, self._id = options.timeout_s, options.buffer_id
        self.buffer_id = options.buffer_id
        self.me = self.members[group.rank]
        self.box = self.box_of(group.rank)
        self.seq = self._num_gathered = 0
        self._closed = False
        self._gave_up: dict[str, Any] | None = None

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        if not isinstance(group.exchange, SimulatedExchange):
            return Support(False, "the group is not one of moecomm.testing.simulated")
        if device.type != "cpu":
            return Support(False, "simulated ranks have CPU memory only")
        return Support(True, f"{group.size} ranks simulated in one process")

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        number, self._num_gathered = self._num_gathered, self._num_gathered + 1
        mine = self.box.counts[number]
        mine[self.group.rank] = tag, counts
        for peer in range(self.group.size):
            box = self.box_of(peer)
            self.tell(peer, lambda box=box: box.counts[number].setdefault(self.group.rank, (tag, counts)), faulty=True)  # type: ignore[misc]
        self.wait(lambda: len(mine) == self.group.size, lambda: _absent(mine, self.group.size), tag, self.seq)
        del self.box.counts[number]
        if error := DesyncError.among([mine[peer][0] for peer in range(self.group.size)], self.group.rank, self.seq):
            raise error
        return np.stack([mine[peer][1] for peer in range(self.group.size)])

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        if not agreed:
            self.gather_counts(tag, np.empty(0, np.int32))
        self.seq += 1
        return SimulatedRows(self, tag, self.seq - 1, lanes)

    def is_first_report(self) -> bool:
        return False  # thousands of worlds fail on purpose

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._say(lambda box: box.left.add(self.group.rank), is_last=True)

    def abort(self, error: MoECommError) -> None:
        told = {"error": type(error).__name__, "what": error.what, "remedy": error.remedy, "peers": error.peers}
        told = json.loads(json.dumps(told | {"operation": error.operation}))  # it must fit on a wire
        self._gave_up = told
        self._say(lambda box: box.aborts.setdefault(self.group.rank, told))

    # -- what exchanges use ----------------------------------------------------------------------------------------

    def box_of(self, rank: int) -> Box:
        """The box of a rank of this buffer."""
        return self.world.shared.setdefault(("box", self._id, self.members[rank]), Box())

    def tell(self, peer: int, deliver: Callable[[], Any], *, faulty: bool, is_last: bool = False) -> None:
        """Send something to another rank of the group."""
        if peer != self.group.rank:
            self.world.send(self.me, self.members[peer], deliver, faulty=faulty, is_last=is_last)

    def wait(self, done: Callable[[], bool], missing: Callable[[], list[int]], tag: str, seq: int) -> None:
        """Wait until it is done, or something is known that prevents it, or the deadline has passed."""
        start_s = self.world.now_s

        def over() -> bool:
            return done() or bool(self._lost(missing) or self.box.aborts or self._gave_up)

        self.world.wait(self.me, over, self.timeout_s)
        if done():
            return
        where: dict[str, Any] = {"rank": self.group.rank, "operation": tag.split(" ")[0], "seq": seq}
        for peer, told in [*self.box.aborts.items(), *([(self.group.rank, self._gave_up)] if self._gave_up else [])]:
            who = f"rank {peer} gave up in {told['operation']} because of {rank_names(told['peers'])}"
            error = getattr(errors, told["error"])(f"{who}: {told['what']}", **where, peers=told["peers"])
            error.told_by = peer
            raise error
        if lost := self._lost(missing):
            how = "closed its buffer" if self.box.left.issuperset(lost) else "is gone"
            error = PeerLostError(f"{rank_names(lost)} {how}", remedy="build a new Buffer", **where, peers=lost)
        else:
            what = f"gave up after {self.world.now_s - start_s:.1f} s waiting for {rank_names(missing())}"
            error = StallError(what, remedy="look at what those ranks do", **where, peers=missing())
        self.abort(error)
        raise error

    def _lost(self, missing: Callable[[], list[int]]) -> list[int]:
        dead = self.world.known_dead[self.me]
        if not dead and not self.box.left:
            return []
        return [peer for peer in missing() if self.members[peer] in dead or peer in self.box.left]

    def _say(self, change: Callable[[Box], Any], *, is_last: bool = False) -> None:
        """Tell every peer something that is never lost; the dead say nothing."""
        try:
            for peer in range(self.group.size):
                box = self.box_of(peer)
                self.tell(peer, lambda box=box: change(box), faulty=False, is_last=is_last)  # type: ignore[misc]
        except Killed:  # while it ends: whoever closes what a dead rank left must not die of it
            return


def _absent(came: dict[int, Any], size: int) -> list[int]:
    return [peer for peer in range(size) if peer not in came]


@final
class SimulatedRows(Exchange):
    """Rows packed by destination, sent in pieces, written where the sender says."""

    def __init__(self, transport: SimulatedTransport, tag: str, seq: int, lanes: Sequence[Lane]) -> None:
        self._transport, self._tag, self._seq, self._lanes = transport, tag, seq, lanes
        self._packed = [torch.empty(lane.num_sent, lane.row_bytes, dtype=torch.uint8) for lane in lanes]
        self._starts = [np.cumsum(lane.send_counts) - lane.send_counts for lane in lanes]
        self._out: list[Tensor] | None = None

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        copy_rows(self.target(lane, dst), src, index)

    def target(self, lane: int, dst: int) -> Tensor:
        start = int(self._starts[lane][dst])
        return self._packed[lane][start : start + int(self._lanes[lane].send_counts[dst])]

    def commit(self) -> None:
        me = self._transport.group.rank
        for number, lane in enumerate(self._lanes):
            for dst in np.flatnonzero(lane.send_counts).tolist():
                box, rows = self._transport.box_of(dst), self.target(number, dst)
                slots = self._slots(lane, dst)
                cuts = [0, len(rows)] if dst == me else self._cut(len(rows))
                for first, last in itertools.pairwise(cuts):
                    piece = self._on_the_wire(rows[first:last].clone(), dst == me), slots[first:last]
                    if dst == me:
                        box.take((self._seq, number), (me, first), piece)
                    else:
                        self._send(box, dst, number, first, piece)
        self._packed = []

    def _send(self, box: Box, dst: int, number: int, first: int, piece: tuple[Tensor, Tensor]) -> None:
        key, at = (self._seq, number), (self._transport.group.rank, first)
        self._transport.tell(dst, lambda: box.take(key, at, piece), faulty=True)

    def _cut(self, num_rows: int) -> list[int]:
        """Where the rows for one rank are cut into pieces."""
        world = self._transport.world
        most = min(world.faults.fragments, num_rows)
        inner = world.random.sample(range(1, num_rows), world.random.randrange(most)) if most > 1 else []
        return [0, *sorted(inner), num_rows]

    def _on_the_wire(self, rows: Tensor, is_local: bool) -> Tensor:
        world = self._transport.world
        if world.faults.corrupt and not is_local and rows.numel() and world.random.random() < world.faults.corrupt:
            rows.view(-1)[world.random.randrange(rows.numel())] ^= 1 << world.random.randrange(8)
        return rows

    def _slots(self, lane: Lane, dst: int) -> Tensor:
        start, count = int(lane.send_counts[:dst].sum()), int(lane.send_counts[dst])
        if lane.send_slots is not None:
            return lane.send_slots[start : start + count].long().clone()
        assert lane.send_starts is not None
        return int(lane.send_starts[dst]) + torch.arange(count)

    def wait(self) -> list[Tensor]:
        if self._out is None:
            box = self._transport.box
            expected = {(self._seq, number): int(lane.recv_counts.sum()) for number, lane in enumerate(self._lanes)}

            def done() -> bool:
                return all(box.num_rows[key] == count for key, count in expected.items())

            self._transport.wait(done, self._missing, self._tag, self._seq)
            self._out = [self._place(number, lane) for number, lane in enumerate(self._lanes)]
        return self._out

    def _missing(self) -> list[int]:
        """The ranks of which not all rows have come."""
        late = set()
        for number, lane in enumerate(self._lanes):
            came = np.zeros_like(lane.recv_counts)
            for (peer, _), (rows, _) in self._transport.box.rows[self._seq, number].items():
                came[peer] += len(rows)
            late.update(np.flatnonzero(came < lane.recv_counts).tolist())
        return sorted(late)

    def _place(self, number: int, lane: Lane) -> Tensor:
        num_rows = int(lane.out_rows[self._transport.group.rank])
        out = torch.full((num_rows, lane.row_bytes), _POISON, dtype=torch.uint8)
        for rows, slots in self._transport.box.rows.pop((self._seq, number), {}).values():
            out[slots] = rows
        return out

    def own(self, lane: int) -> Tensor:
        return self.wait()[lane]

    def release(self) -> None: ...
