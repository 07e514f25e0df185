"""Rows between a device and an MPI that cannot reach it: through pinned host memory, in chunks.

While one chunk travels the next is copied. Each pair of ranks has chunks of its own, in point-to-point messages: both
ends know how many rows travel between them, so nobody has to agree on a number of chunks.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 4 << 20
NUM_SLOTS = 4  # in each direction

Done = Callable[[], bool]


class CopyEngine(Protocol):
    """How rows come from a device to the host and back; the seam at which tests put a pretended device."""

    def host(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 host memory that the device can reach."""

    def mark(self) -> Done:
        """Something that tells whether all that the device was given until now is done."""

    def start(self, dst: Tensor, src: Tensor) -> Done:
        """Begin to copy bytes; something that tells whether that is done."""


@final
class StreamEngine:
    """Copies on a stream of their own, beside the caller's work."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._stream = self._module.Stream(device)

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Done:
        event = self._module.Event()
        event.record(self._module.current_stream(self._device))
        return event.query

    def start(self, dst: Tensor, src: Tensor) -> Done:
        with self._module.stream(self._stream):
            dst.copy_(src, non_blocking=True)
            event = self._module.Event()
            event.record(self._stream)
        return event.query


def copy_engine(device: torch.device) -> CopyEngine | None:
    """The engine of a device; None for the CPU, whose memory MPI reaches."""
    return None if device.type == "cpu" else StreamEngine(device)


def device_awareness(comm: Any, device: torch.device) -> tuple[bool, str]:
    """Whether MPI takes addresses of that device, and the reason; an MPI that does not say so does not."""
    from mpi4py import MPI

    if device.type == "cpu":
        return True, "memory of the host"
    kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    known = comm.Get_info().get("mpi_memory_alloc_kinds") or ""
    if kind in [name.split(":")[0] for name in known.split(",")]:
        return True, f"this MPI takes {kind} memory as it is (it names {known!r} among its memory kinds)"
    library = ctypes.CDLL(MPI.__file__)
    query = f"MPIX_Query_{kind}_support"
    if hasattr(library, query) and getattr(library, query)():
        return True, f"this MPI takes {kind} memory as it is (by {query})"
    how = f"{query} denies it" if hasattr(library, query) else f"it has no {query}"
    return False, f"this MPI does not take {kind} memory ({how}): staged through pinned host memory"


@final
class Slots:
    """Pinned memory of one transport: for each direction a few chunks, kept from one exchange to the next."""

    def __init__(self, engine: CopyEngine, chunk_bytes: int = CHUNK_BYTES, num_slots: int = NUM_SLOTS) -> None:
        self.engine, self.chunk_bytes, self.num_slots = engine, chunk_bytes, num_slots
        self.num_chunks = 0
        self._memory: dict[str, list[Tensor]] = {"send": [], "recv": []}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of pinned memory."""
        return sum(slot.numel() for slots in self._memory.values() for slot in slots)

    def of(self, direction: str, row_bytes: int) -> list[Tensor]:
        """The slots of a direction, each large enough for a row."""
        nbytes = max(self.chunk_bytes, row_bytes)
        if not self._memory[direction] or self._memory[direction][0].numel() < nbytes:
            self._memory[direction] = [self.engine.host(nbytes) for _ in range(self.num_slots)]
        return self._memory[direction]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Some rows of one lane that go to one peer, or come from it. rows: (n * row_bytes,) uint8 on the device."""

    peer: int
    tag: int
    num_rows: int
    row_type: Any
    rows: Tensor


@final
class Pipeline:
    """Jobs that go through two steps each in a slot: from device to host and send, or receive and from host to device.

    Both steps begin in the order of the jobs. All ranks order theirs by lane, then by distance of the peer, then by
    place, so of all chunks that have not arrived anywhere the first has a slot at both ends: no deadlock.
    """

    def __init__(self, jobs: Iterator[Chunk], slots: list[Tensor], first: Any, second: Any) -> None:
        self._jobs, self._free, self._first, self._second = jobs, list(slots), first, second
        self._in_first: deque[tuple[Chunk, Tensor, Done]] = deque()
        self._in_second: list[tuple[Tensor, Done]] = []
        self.num_done = 0

    def advance(self) -> bool:
        """Go on as far as is possible without waiting; True when all jobs are through."""
        while self._in_first and self._in_first[0][2]():
            copied, slot, _ = self._in_first.popleft()
            self._in_second.append((slot, self._second(copied, slot[: copied.rows.numel()])))
        waiting = []
        for slot, done in self._in_second:
            if done():
                self._free.append(slot)
                self.num_done += 1
            else:
                waiting.append((slot, done))
        self._in_second = waiting
        while self._free and (job := next(self._jobs, None)) is not None:
            slot = self._free.pop()
            self._in_first.append((job, slot, self._first(job, slot[: job.rows.numel()])))
        return not self._in_first and not self._in_second


Side = tuple[Tensor, np.ndarray, np.ndarray]  # rows on the device, and for each peer how many and from where on


@final
class StagedRows:
    """The rows of one exchange, in both directions."""

    def __init__(self, slots: Slots, comm: Any, mpi: Any) -> None:
        self._slots, self._comm, self._mpi = slots, comm, mpi
        self._sends: list[Chunk] = []
        self._receives: list[Chunk] = []
        self._pipelines: list[Pipeline] = []
        self._row_bytes = 1

    def add(self, tag: int, row_type: Any, sent: Side, received: Side) -> None:
        """Add a lane."""
        rank, size = self._comm.Get_rank(), self._comm.Get_size()
        self._row_bytes = max(self._row_bytes, sent[0].shape[1])
        for step in range(1, size):
            self._sends += self._chunks((rank + step) % size, tag, row_type, sent)
            self._receives += self._chunks((rank - step) % size, tag, row_type, received)

    def advance(self) -> bool:
        """Go on as far as is possible without waiting; True when all rows are through."""
        if not self._pipelines:
            engine = self._slots.engine
            outward = Pipeline(
                iter(self._sends),
                self._slots.of("send", self._row_bytes),
                lambda job, slot: engine.start(slot, job.rows),
                self._send,
            )
            inward = Pipeline(
                iter(self._receives),
                self._slots.of("recv", self._row_bytes),
                self._receive,
                lambda job, slot: engine.start(job.rows, slot),
            )
            self._pipelines = [outward, inward]
            self._slots.num_chunks += len(self._sends)
        outward_done, inward_done = (pipeline.advance() for pipeline in self._pipelines)
        return outward_done and inward_done

    def _chunks(self, peer: int, tag: int, row_type: Any, side: Side) -> Iterator[Chunk]:
        rows, counts, starts = side
        step = max(1, self._slots.chunk_bytes // rows.shape[1])
        start, end = int(starts[peer]), int(starts[peer] + counts[peer])
        for at in range(start, end, step):
            part = rows[at : min(at + step, end)]
            yield Chunk(peer, tag, len(part), row_type, part.view(-1))

    def _send(self, job: Chunk, slot: Tensor) -> Done:
        return self._comm.Isend(self._message(job, slot), job.peer, job.tag).Test

    def _receive(self, job: Chunk, slot: Tensor) -> Done:
        return self._comm.Irecv(self._message(job, slot), job.peer, job.tag).Test

    def _message(self, job: Chunk, slot: Tensor) -> list[Any]:
        return [self._mpi.buffer.fromaddress(slot.data_ptr(), slot.numel()), job.num_rows, job.row_type]
