"""Proof that rows arrive as they left: a tag beside each row, and the evidence where one does not fit.

With `check="cheap"` or `"full"` every exchange has one more lane, which knows nothing of experts either: for each row
three int64 words, written by the sender beside the row and compared by the receiver with what must stand there.

| word | holds |
|---|---|
| 0 | operation number (32 bits), check sum of the operation's arguments (16), source rank (16) |
| 1 | which of the source's rows for this rank it is (32), its token (32; in a combine the receiver knows it) |
| 2 | check sum of the row: of all its bytes ("full"); of the first and last 8 of one row in 32 ("cheap"), else 0 |

A row of an older operation, in another place, of another rank, from a call with other arguments, or never written does
not fit. When the tags have been read they are poisoned, so that what is left of an operation never fits again; "full"
does so with the rows as well that are not the caller's. In "full" every lane has such tags, in "cheap" the rows.

Legend: S rows sent, N rows of the output, C rows received, W ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm._compiled import compiled
from moecomm.checks import TAG_BYTES
from moecomm.core import Core
from moecomm.errors import CorruptionError, UnsupportedError
from moecomm.operations import Parcel
from moecomm.transport.base import Exchange, Lane, Transport, as_bytes

_POISON = 255
_MIX = 0x5851F42D4C957F2D  # odd, with bits everywhere
_ONE_IN = 32  # rows whose bytes "cheap" looks at: of each it costs two cache misses
_KEPT_ROWS = 64  # rows in an evidence file
_NO_TOKEN = 0xFFFFFFFF
_NEVER = "nothing that belongs here was ever written"


def attach(core: Core, check: str) -> None:
    """Give a buffer its checks, "cheap" or "full"."""
    if core.fused is not None:
        raise UnsupportedError(
            "rows cannot be checked on this transport: kernels move whole operations",
            got=f"check={check!r}",
            expected='check="off", or a transport on the host',
            remedy="leave check out",
            rank=core.rank,
        )
    core.integrity = Integrity(core, check)


def row_sums(rows: Tensor, *, every_byte: bool) -> Tensor:
    """(N,) int64 check sums of (N, row_bytes) uint8 rows, which depend on the place of every byte that counts.

    >>> rows = torch.tensor([[1, 2, 3], [3, 2, 1]], dtype=torch.uint8)
    >>> row_sums(rows, every_byte=True).unique().numel()
    2
    """
    num_rows, row_bytes = rows.shape
    jit = _jit(rows)
    if jit is None:
        return row_sums_ref(rows, every_byte=every_byte)
    sums = torch.empty(num_rows, dtype=torch.int64, device="cpu")
    jit.sums_kernel(_MIX, every_byte)(num_rows, rows.data_ptr(), rows.stride(0), row_bytes, sums.data_ptr())
    return sums


def row_sums_ref(rows: Tensor, *, every_byte: bool) -> Tensor:
    """`row_sums` in plain torch."""
    num_rows, row_bytes = rows.shape
    if not num_rows or not row_bytes:
        return torch.zeros(num_rows, dtype=torch.int64, device=rows.device)
    if row_bytes % 8 or rows.stride(0) % 8 or rows.storage_offset() % 8:
        if not every_byte:
            edge = min(8, row_bytes)
            rows = torch.cat([rows[:, :edge], rows[:, row_bytes - edge :]], 1)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    words = rows.view(torch.int64)
    if every_byte:
        steps = torch.arange(1, words.shape[1] + 1, device=rows.device) * _MIX | 1
        return (words * steps).sum(1)
    return words[:, 0] * _MIX + words[:, -1]


def _jit(rows: Tensor) -> ModuleType | None:
    """The loops in machine code, where they can read these rows: on a CPU, in whole words."""
    if not rows.is_cpu or not rows.shape[1] or rows.shape[1] % 8:
        return None
    return compiled("moecomm._tags_jit")


@dataclass(eq=False)
class Integrity:
    """What one buffer checks. num_operations: exchanges begun, the same on all ranks."""

    core: Core
    check: str
    num_operations: int = 0

    def watch(self, tag: str, parcels: Sequence[Parcel]) -> Watch | None:
        """The tags of one exchange; None where nothing is left as it is on its way: sums have tags on each hop."""
        number, self.num_operations = self.num_operations, self.num_operations + 1
        for lane in (parcel.lane for parcel in parcels):
            if lane.merge is not None:
                lane.merge = replace(lane.merge, open=partial(self.open_hop, number))
        lanes = range(len(parcels)) if self.check == "full" else range(1)
        watched = {lane: parcels[lane] for lane in lanes if parcels[lane].lane.merge is None}
        return Watch(self, tag, number, watched, len(parcels)) if watched else None

    def open_hop(self, number: int, transport: Transport, tag: str, lanes: Sequence[Lane], which: str) -> Exchange:
        """Open one of the exchanges of which an operation consists, with tags of its own. Lanes are contiguous."""
        watched = {}
        for at, lane in enumerate(lanes if self.check == "full" else lanes[:1]):
            written = torch.empty(0, lane.row_bytes, dtype=torch.uint8, device=self.core.tables.device)
            watched[at] = Parcel(lane, written, table_PK=written)  # rows that exist only where they are written
        watch = Watch(self, f"{tag} {which}", number, watched, len(lanes), hop=which)
        return watch.checked(transport.open(tag, [*lanes, *watch.lanes], agreed=True))


@final
class Watch:
    """One exchange with tags: `lanes` to open beside the others, `seal` before it is committed, `checked` after.

    parcels: those that are watched, by the number of their lane. hop: where rows are, of several on their way.
    """

    def __init__(
        self, of: Integrity, tag: str, number: int, parcels: Mapping[int, Parcel], num_lanes: int, hop: str = ""
    ) -> None:
        self._hop = hop
        self.core, self.full, self.tag, self.number = of.core, of.check == "full", tag, number
        self.one_in = 1 if self.full else _ONE_IN
        self.num_lanes, self._parcels = num_lanes, parcels
        self.homes = {number: parcel.homes for number, parcel in parcels.items()}
        self.payloads = {number: parcel.lane for number, parcel in parcels.items()}
        self.lanes = [replace(lane, row_bytes=TAG_BYTES, repeats=False) for lane in self.payloads.values()]
        self.head = (number & 0xFFFFFFFF) << 32 | (zlib.crc32(tag.encode()) & 0xFFFF) << 16
        self.head -= (self.head >> 63) << 64  # as int64

    def seal(self, exchange: Exchange) -> list[Parcel]:
        """The tags of what has been put, as parcels of their own."""
        lanes = zip(self._parcels.items(), self.lanes, strict=True)
        sealed = [self._seal(exchange, number, parcel, tags) for (number, parcel), tags in lanes]
        self._parcels = {}
        return sealed

    def _seal(self, exchange: Exchange, number: int, parcel: Parcel, tag_lane: Lane) -> Parcel:
        lane, rows, index = parcel.lane, as_bytes(parcel.rows), parcel.index
        jit = _jit(rows)
        mix = (
            _MIX if jit is not None and parcel.table_PK is None and not self.full else 0
        )  # sums are made with the tags
        if mix:
            sums = rows
        elif parcel.table_PK is None:
            sums = row_sums(rows, every_byte=self.full)
        else:  # these rows exist only where they were written
            sums, first = torch.zeros(lane.num_sent, dtype=torch.int64, device=rows.device), 0
            for dst in np.flatnonzero(lane.send_counts).tolist():
                written = exchange.target(number, dst)
                last = first + len(written)
                sums[first : last : self.one_in] = row_sums(written[:: self.one_in], every_byte=self.full)
                first = last
        tags = torch.empty(lane.num_sent, 3, dtype=torch.int64, device=rows.device)
        place = torch.arange(lane.num_sent, device=rows.device)
        if jit is None:
            token = place if index is None else index.long() // parcel.every
            tags[:, 0] = self.head | self.core.rank
            in_section = _places(lane.send_counts, rows.device)
            tags[:, 1] = in_section << 32 | (_NO_TOKEN if index is None else token)
            tags[:, 2] = sums[token] * (in_section % self.one_in == 0)
        else:
            counts = np.ascontiguousarray(lane.send_counts, np.int64)
            address, bits = (0, 0) if index is None else (index.data_ptr(), 8 * index.element_size())
            shift = parcel.every.bit_length() - 1 if parcel.every.bit_count() == 1 else -1
            given = len(counts), counts.ctypes.data, address, parcel.every, sums.data_ptr()
            row = rows.data_ptr(), rows.stride(0), rows.shape[1]
            seal = jit.seal_kernel(bits, shift, self.one_in, mix)
            seal(*given, *row, self.head | self.core.rank, tags.data_ptr())
        return Parcel(tag_lane, tags, place)

    def checked(self, exchange: Exchange) -> Exchange:
        """The exchange, which will compare before it gives anything out."""
        return CheckedExchange(exchange, self)

    def verify(self, arrived: list[Tensor]) -> None:
        """Compare what came with what must have come, and poison the tags."""
        for place, (number, lane) in enumerate(self.payloads.items()):
            rows, tags = arrived[number], arrived[self.num_lanes + place].view(torch.int64)
            slots = None if lane.recv_slots is None else torch.from_numpy(lane.recv_slots()).to(rows.device)
            jit = _jit(rows)
            if jit is None or not rows.is_contiguous() or not tags.is_contiguous():
                self._compare(number, tags, rows, slots)
            else:
                counts = np.ascontiguousarray(lane.recv_counts, np.int64)
                address, bits = (0, 0) if slots is None else (slots.data_ptr(), 64)
                given = len(counts), counts.ctypes.data, address, rows.data_ptr(), rows.shape[1], self.head
                if jit.verify_kernel(bits, _MIX, self.full, self.one_in)(*given, tags.data_ptr()) >= 0:
                    self._compare(number, tags, rows, slots)
                    raise AssertionError("machine code sees a wrong row where torch sees none")
            tags.fill_(-1)

    def _compare(self, number: int, tags: Tensor, rows: Tensor, slots: Tensor | None) -> None:
        lane, sums = self.payloads[number], row_sums_ref(rows, every_byte=self.full)
        got, sums = (tags, sums) if slots is None else (tags[slots], sums[slots])
        counts = torch.from_numpy(np.asarray(lane.recv_counts, np.int64)).to(tags.device)
        sources = torch.repeat_interleave(torch.arange(len(counts), device=tags.device), counts)
        places = _places(lane.recv_counts, tags.device)
        sums = sums * (places % self.one_in == 0)
        wrong = (got[:, 0] != (self.head | sources)) | (got[:, 1] >> 32 != places) | (got[:, 2] != sums)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            claim = Claim(number, first, int(sources[first]), int(places[first]), int(sums[first]))
            self._accuse(claim, got, rows, wrong, slots)

    def _accuse(self, claim: Claim, got: Tensor, rows: Tensor, wrong: Tensor, slots: Tensor | None) -> None:
        homes, found = self.homes[claim.lane], got[claim.entry].tolist()
        token = found[1] & _NO_TOKEN if found[1] >> 32 == claim.place and found[1] & _NO_TOKEN != _NO_TOKEN else None
        if homes is not None:
            token = int(homes[claim.entry])
        operation = self.tag.split(" ")[0]
        phase = f"arrival of {operation}, {'rows' if not claim.lane else f'lane {claim.lane}'}"
        phase += f" {self._hop}" if self._hop else ""
        what = f"{self._reason(claim, found)} (1 of {int(wrong.sum())} wrong rows of {len(got)})"
        evidence = self._keep(what, got, rows, wrong, slots)
        error = CorruptionError(
            f"{phase}: row {claim.place} of those from rank {claim.source}"
            + (
                f" (token {token} of rank {self.core.rank if homes is not None else claim.source})"
                if token is not None
                else ""
            )
            + f" is not what was sent: {what}",
            remedy=f"the evidence is in {evidence}",
            rank=self.core.rank,
            operation=operation,
            seq=self.number,
            peers=[claim.source],
            token=token,
            phase=phase,
            evidence=evidence,
        )
        self.core.transport.abort(error)
        raise error

    def _reason(self, claim: Claim, found: list[int]) -> str:
        head, place, total = found
        number, arguments, source = head >> 32 & 0xFFFFFFFF, head >> 16 & 0xFFFF, head & 0xFFFF
        if head == -1 or (head, place, total) == (0, 0, 0):
            return _NEVER
        if number != self.number & 0xFFFFFFFF:
            return f"its tag is of operation {number}, this is {self.number}"
        if arguments != (self.head >> 16 & 0xFFFF):
            return "it was sent by a call with other arguments"
        if source != claim.source:
            return f"its tag says that rank {source} sent it"
        if place >> 32 != claim.place:
            return f"its tag says that it is row {place >> 32}"
        return f"its check sum is {claim.total & (1 << 64) - 1:016x}, and was {total & (1 << 64) - 1:016x}"

    def _keep(self, what: str, got: Tensor, rows: Tensor, wrong: Tensor, slots: Tensor | None) -> str:
        """Write what is known to a file that only this user can read; its path."""
        entries = wrong.nonzero().view(-1)[:_KEPT_ROWS].cpu()
        places = entries if slots is None else slots.cpu()[entries]
        told = {"what": what, "tag": self.tag, "operation": self.number, "rank": self.core.rank, "pid": os.getpid()}
        prefix = f"moecomm-corruption-rank{self.core.rank}-operation{self.number}-"
        with contextlib.suppress(OSError):
            handle, path = tempfile.mkstemp(".npz", prefix)
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    told=json.dumps(told),
                    entries=entries.numpy(),
                    output_rows=places.numpy(),
                    tags=got.cpu()[entries].numpy(),
                    rows=rows.cpu()[places].numpy(),
                )
            return path
        return "no file: the temporary folder cannot be written to"


@dataclass(frozen=True, slots=True)
class Claim:
    """The first wrong row: which lane, which entry of it, and what it should have been. total: its sum as it is."""

    lane: int
    entry: int
    source: int
    place: int
    total: int


def _places(counts: np.ndarray, device: torch.device) -> Tensor:
    """(sum of counts,) int64 place of every row among those of its section."""
    ends = np.cumsum(counts, dtype=np.int64)
    before = torch.from_numpy(ends - counts).to(device)
    sizes = torch.from_numpy(np.asarray(counts, np.int64)).to(device)
    return torch.arange(int(ends[-1]), device=device) - torch.repeat_interleave(before, sizes)


@final
class CheckedExchange(Exchange):
    """An exchange whose outputs are compared with their tags the first time that somebody wants them.

    One that is not committed yet is sealed when it is.
    """

    def __init__(self, inner: Exchange, watch: Watch) -> None:
        self._inner, self._watch = inner, watch
        self._out: list[Tensor] | None = None
        self._owned: set[int] = set()

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        self._inner.put(lane, dst, src, index)

    def target(self, lane: int, dst: int) -> Tensor:
        return self._inner.target(lane, dst)

    def commit(self) -> None:
        for number, parcel in enumerate(self._watch.seal(self._inner), start=self._watch.num_lanes):
            for dst, section in self._inner.sections(parcel.lane, self._watch.core.rank):
                self._inner.target(number, dst).copy_(as_bytes(parcel.rows)[section])
        self._inner.commit()

    def wait(self) -> list[Tensor]:
        if self._out is None:
            arrived = self._inner.wait()
            self._watch.verify(arrived)
            self._out = arrived[: self._watch.num_lanes]
        return self._out

    def own(self, lane: int) -> Tensor:
        self.wait()
        self._owned.add(lane)
        return self._inner.own(lane)

    def release(self) -> None:
        if self._watch.full and self._out is not None:
            for number, rows in enumerate(self._out):
                if number not in self._owned:
                    rows.fill_(_POISON)
        self._inner.release()
