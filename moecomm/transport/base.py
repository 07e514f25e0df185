"""The seam between moving rows and everything else.

A transport moves rows by a route. It knows nothing of experts or weights: an exchange is a list of *lanes*, each
lane one payload with fixed row bytes, and for each lane every rank says how many rows go where in the destination's
output. One exchange is open, filled, committed and waited for; several may be in flight, in the same order on
every rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm.errors import MoECommError
from moecomm.group import Group
from moecomm.topology import Topology

TAG_BYTES = 160


@dataclass(frozen=True, slots=True)
class Support:
    """Whether something works here, and why (not)."""

    ok: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Sum rows on their way home: those of one token that start on the same node become one row.

    The sum is float32, from +0 over the ranks of the node in ascending order, rounded once.

    dtype: of the elements.
    keys: (sum of send_counts,) int32 which row of its node's a row becomes, ascending for each destination; the keys
        that the ranks of a node have for one destination are 0 to n - 1 without a gap.
    recv_rows: (number of nodes,) rows that this rank gets from each node.
    open: how to open the exchanges that rows, and then sums, cross in turn, given the last word on which of them it is;
        None: as any other. All their lanes are contiguous.
    """

    dtype: torch.dtype
    keys: Tensor
    recv_rows: np.ndarray
    open: Callable[[Transport, str, Sequence[Lane], str], Exchange] | None = None


@dataclass(kw_only=True, eq=False)  # frozen would cost 2 us each
class Lane:
    """One payload of an exchange. Only transports that write into peers' memory look at other ranks' `out_rows`.

    row_bytes: bytes of a row.
    out_rows: (W,) rows of every rank's output, rows that nobody writes included.
    send_counts: (W,) rows from this rank to each rank.
    send_slots: (sum of send_counts,) int32 their place in the destination's output, sorted by destination rank; or
        None: they are contiguous from `send_starts[w]`.
    send_starts: (W,) first row at each destination when `send_slots` is None.
    recv_counts: (W,) rows from each rank to this one.
    recv_slots: gives (sum of recv_counts,) the place of every row in order of arrival (source rank, then the order
        of its sends); None: they arrive in output order.
    repeats: a source row may be wanted in several slots, so it pays to send it to each node once. All such lanes of
        an exchange are `put` with the same indices.
    node_counts: (W, 2 V) for a lane that repeats: how many rows each rank sends to each node if it sends each of them
        once, then how many copies of them are wanted there. None: not known, the ranks must tell each other.
    num_sent: sum of send_counts, computed where it is not given.
    merge: sum rows on their way; the output is then sorted by (node, key). Only for a transport with `node_of_rank`.
    """

    row_bytes: int
    out_rows: np.ndarray
    send_counts: np.ndarray
    recv_counts: np.ndarray
    send_slots: Tensor | None = None
    send_starts: np.ndarray | None = None
    recv_slots: Callable[[], np.ndarray] | None = None
    repeats: bool = False
    node_counts: np.ndarray | None = None
    merge: Merge | None = None
    num_sent: int = -1

    def __post_init__(self) -> None:
        if self.num_sent < 0:
            self.num_sent = int(self.send_counts.sum())


class Exchange(ABC):
    """One exchange in flight; buffers are (rows, row_bytes) uint8 tensors."""

    def sections(self, lane: Lane, rank: int) -> Iterator[tuple[int, slice]]:
        """The order in which to write a lane: (destination, which of the rows sent), each row once.

        Each rank begins with the one behind it, so that not everybody writes to the same one at once.
        """
        ends = np.cumsum(lane.send_counts).tolist()
        for step in range(1, len(ends) + 1):
            dst = (rank + step) % len(ends)
            start = ends[dst] - int(lane.send_counts[dst])
            if start < ends[dst]:
                yield dst, slice(start, ends[dst])

    def area(self, lane: int, dst: int, section: slice) -> Tensor:
        """Where to write one of the `sections` of a contiguous lane."""
        return self.target(lane, dst)

    def outputs(self, lane: int) -> np.ndarray | None:
        """Where the sections of a lane go (see `rows.scatter_rows`), if they can be written all at once."""
        return None

    @abstractmethod
    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        """Send rows `src[index]` as this rank's section of `lane` to rank `dst`."""

    @abstractmethod
    def target(self, lane: int, dst: int) -> Tensor:
        """Where to write this rank's rows of a contiguous lane for rank `dst`."""

    def lend(self, lane: int, dst: int, rows: Tensor) -> None:
        """Send those rows, all of this rank's for `dst`; nobody may write to them until `release`."""
        self.target(lane, dst).copy_(rows)

    @abstractmethod
    def commit(self) -> None:
        """Everything is put: let it go. Never waits for a peer's rows."""

    @abstractmethod
    def wait(self) -> list[Tensor]:
        """Wait for all peers; the outputs of all lanes, valid until `release`."""

    @abstractmethod
    def own(self, lane: int) -> Tensor:
        """Like `wait()[lane]`, but the tensor belongs to the caller for as long as he keeps it."""

    @abstractmethod
    def release(self) -> None:
        """The outputs that are not owned are no longer needed."""

    # What follows is only for exchanges between ranks that reach each other's memory.

    def memory_at(self, rank: int) -> Tensor:
        """(n,) uint8 all that this exchange has at a rank."""
        raise NotImplementedError

    def gather_counts(self, counts: np.ndarray) -> np.ndarray:
        """All-gather (C,) int32 counts into (W, C) in the middle of it: what ranks wrote before that can be read."""
        raise NotImplementedError


class Wave(IntEnum):
    """What ranks say about slots: rows went out, can come home, or are no longer needed."""

    OUT = 0
    HOME = 1
    FREE = 2


NUM_AREAS = 4  # of slots: two generations for rows on their way out, and two for rows on their way home


SLOT_ALIGN_BYTES = 64  # where scales begin behind the rows of an area


class PaddedSlots(ABC):
    """Fixed places for rows in the memory of every rank, which every rank can reach: for layout "padded".

    memory: (4 * area_bytes,) uint8 this rank's four areas, out 0, out 1, home 0, home 1.
    addresses: (4, W) int64 where each area begins in every rank.
    """

    def __init__(self, memory: Tensor, starts: np.ndarray) -> None:
        self.memory = memory
        area_bytes = memory.numel() // NUM_AREAS
        self.areas = memory.view(NUM_AREAS, area_bytes).unbind(0)
        self.addresses = starts + area_bytes * np.arange(NUM_AREAS)[:, None]

    @abstractmethod
    def post(self, wave: Wave, number: int, tag: str, counts: np.ndarray | None = None) -> None:
        """Say, after everything written so far, that this rank reached `number` of a wave; counts: (E,) int32."""

    @abstractmethod
    def wait(self, wave: Wave, number: int, tag: str) -> None:
        """Wait until every rank said so; `tag` must agree."""

    @abstractmethod
    def counts_at(self, number: int) -> tuple[int, int]:
        """The address of the counts that rank 0 sent with OUT `number`, and the bytes from one rank to the next."""

    @property
    def letter_boxes(self) -> int:
        """The table of `_mail_jit.Box` with which machine code posts letters; 0 where there are none."""
        return 0

    def next_letter(self, wave: Wave, number: int) -> tuple[int, int, int]:
        """Place, stamp and sequence number of the letter by which machine code is to post `number` of a wave."""
        raise NotImplementedError

    def run(self, steps: Sequence[Callable[[int], int]], table: int, wave: Wave, number: int, tag: str) -> int:
        """Run an operation of compiled steps that posts and awaits that letter, see `memory.channel.Channel.run`."""
        raise NotImplementedError


class Transport(ABC):
    """Moves rows between the ranks of one group."""

    name: str
    group: Group
    buffer_id: int | None = None  # the same on all ranks
    node_of_rank: np.ndarray | None = None  # (W,) of a transport that merges rows per node
    padded_slots: PaddedSlots | None = None  # where ranks reach each other's memory
    goes_on: bool = False  # whether the caller does something else before it waits for what it opens now
    takes_less: bool = False  # whether a rank may send fewer rows than a contiguous lane says: they lie in front
    is_fused: bool = False  # made of kernels that do whole operations: see `moecomm.fused`

    @abstractmethod
    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        """Set up; collective."""

    @classmethod
    @abstractmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        """Say whether this transport works for that group on that device."""

    @abstractmethod
    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        """All-gather (C,) int32 counts into (W, C); `tag` (what is being done) must agree on all ranks."""

    def send_ahead(  # noqa: B027
        self, tag: str, counts: np.ndarray, payloads: Sequence[Tensor], places_TV: Tensor
    ) -> None:
        """Hear what the next `gather_counts` will tell, and what the exchange after it will send in lanes that repeat.

        All of the first and some of the second may leave at once. payloads: (T, ...) rows. places_TV: (T, V) see
        `plan.node_places`.
        """

    @abstractmethod
    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        """Begin an exchange; `tag` must agree on all ranks, and has already if `agreed` (after `gather_counts`)."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; idempotent, never waits for a peer."""

    def abort(self, error: MoECommError) -> None:  # noqa: B027
        """Tell the peers, where that is possible, that this rank gave up in the middle of an operation."""

    def is_first_report(self) -> bool:
        """Whether no rank that shares memory with this one has said this before."""
        return True

    def last_seen(self) -> dict[int, str]:
        """What is known of other ranks: the operation in which each was last seen, and whether it left or gave up."""
        return {}

    def stats(self) -> dict[str, Any]:
        """Counters of this transport; `waited_s`, if it knows, is (W,) float64 seconds waited for each rank."""
        return {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes that this transport holds for as long as it is open."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelShape:
    """What kernels need to know of a layer when they are compiled.

    top_k: K. most_local: most experts on any rank. max_tokens: M. row_bytes: of the longest row with what travels
    behind it. each: whether every (token, k) row may come home by itself. num_sms: multiprocessors for the kernels,
    None: as Triton's interpreter likes it. copies: whether copy engines move the rows. max_recv_tokens: rows that a
    dispatch gives, whatever comes; None: as many as come.
    """

    top_k: int
    most_local: int
    max_tokens: int
    row_bytes: int
    each: bool
    num_sms: int | None = None
    copies: bool = False
    max_recv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """What a transport needs to know of its buffer.

    segment_bytes: bytes of one receive area. count_bytes: bytes of what a rank says before a planned dispatch.
    buffer_id: unique in the group, the same on all its ranks. kernels: for a transport that is made of kernels.
    slot_bytes: bytes of one of the areas for layout "padded", 0 for none.
    """

    device: torch.device
    timeout_s: float
    segment_bytes: int
    count_bytes: int
    num_segments: int
    buffer_id: int
    kernels: KernelShape | None = None
    slot_bytes: int = 0


def as_bytes(rows: Tensor) -> Tensor:
    """View (N, ...) rows of any dtype as (N, row_bytes) uint8; copies only if a row is not contiguous.

    >>> as_bytes(torch.zeros(2, 3, dtype=torch.bfloat16)).shape, as_bytes(torch.zeros(0, 3)).shape
    (torch.Size([2, 6]), torch.Size([0, 12]))
    """
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
    # Not `contiguous()`: of a single column it says that it is, whatever its stride.
    return (flat if flat.stride(1) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)
