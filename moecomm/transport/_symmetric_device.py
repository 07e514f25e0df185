"""The symmetric transport where kernels move the rows: memory, stream, sequence numbers, deadlines.

What the kernels do is in `moecomm.kernels`, which operation launches which in `moecomm.fused`. Every operation sends
and waits on one stream in the order of the calls, so one is in flight at a time (docs/design/symmetric.md).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor

from moecomm.errors import CapacityError, DesyncError, MoECommError, StallError, UnsupportedError, rank_names
from moecomm.group import Group
from moecomm.memory.device import DeviceMemory, device_memory_support, share_device_memory
from moecomm.memory.watch import Watch
from moecomm.topology import Topology
from moecomm.transport._copy_engine import CopyEngine
from moecomm.transport.base import Exchange, Lane, Support, Transport, TransportOptions

_POLLS_PER_S = {"cuda": 3_000_000, "cpu": 1_000}  # of a kernel that waits, for there is no clock in it; 2.6e6: H200
_PAUSE_S = 50e-6
_KINDS = ("dispatch", "combine")
_ASKS, _STATIC = "asks the host for the counts", "build the buffer with max_recv_tokens"


@final
class KernelTransport(Transport):
    """One rank's end of the wire, and the stream that its kernels run on."""

    name = "symmetric"
    is_fused = True

    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        from moecomm.kernels.wire import COUNTS, SIGNALS, Wire, buffer_bytes, make_link, peer_table

        shape = options.kernels
        assert shape is not None, "a transport of kernels needs the shape of the layer"
        self.group, self.device, self.timeout_s = group, options.device, options.timeout_s
        self.num_sms, self.max_recv_tokens = shape.num_sms, shape.max_recv_tokens
        self.wire = Wire.of(group.size, shape.top_k, shape.most_local, shape.row_bytes)
        self.max_tokens = shape.max_tokens
        entries = shape.top_k * (group.size if shape.copies else 1)  # in blocks by source where they are copied
        slots = shape.max_tokens * max(group.size, entries) if shape.each else None
        self._nbytes = buffer_bytes(self.wire, self.max_tokens, slots)
        self._memory = share_device_memory(group, self.device, self._nbytes, self.timeout_s)
        self._more: list[DeviceMemory] = []
        peers = peer_table(self._memory.addresses, self.wire, self.max_tokens, slots)
        polls = int(min(self.timeout_s * _POLLS_PER_S.get(self.device.type, 3_000_000), 2**31 - 1))
        self.link = make_link(peers.to(self.device), group.rank, self.max_tokens, max(polls, 1))
        size, width = group.size, self.wire.counts_width
        self._counts = [self._own_words(peers[g, int(COUNTS)], size * width).view(size, -1) for g in range(2)]
        self._signals = self._own_words(peers[0, int(SIGNALS)], size)
        self.copies = CopyEngine(self, self._memory.views, peers, shape.each) if shape.copies else None
        self.seq = 0  # of the last operation whose number was read from the device
        self.num_sent = 0
        self._tags: dict[int, str] = {}
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self._reader = torch.cuda.Stream(self.device) if on_gpu else None
        self._teller = torch.cuda.Stream(self.device) if on_gpu else None
        self._one = torch.ones(1, dtype=torch.int64, pin_memory=on_gpu)
        self._num_polls = self._num_reads = 0
        self._watch = Watch(group, self.timeout_s, self._note_end)

    def _own_words(self, addresses: Tensor, count: int) -> Tensor:
        start = int(addresses[self.group.rank]) - self._memory.addresses[self.group.rank]
        return self._memory.tensor[start : start + 8 * count].view(torch.int64)

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        reason = device_memory_support(group, device)
        return Support(reason is None, reason or "kernels reach all ranks")

    # -- running kernels -----------------------------------------------------------------------------------------

    def begin(self, tag: str) -> Any:
        """This rank's end of the wire in an operation; `tag`: what every rank must agree on."""
        number = tag_number(tag)
        self._tags[number] = tag
        return self.link._replace(tag=number)

    @contextmanager
    def launching(self, *inputs: Tensor | None) -> Iterator[None]:
        """Launch on the communication stream, behind everything that the current stream was given before."""
        from moecomm.kernels._launch import on_multiprocessors

        with on_multiprocessors(self.num_sms):
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            for tensor in inputs:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                yield

    def mark(self) -> Any:
        """What `join` waits for: everything launched so far."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, marked: Any, *outputs: Tensor | None) -> None:
        """Have the current stream wait for what was launched before the mark; the host does not."""
        if marked is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_event(marked)
        for tensor in outputs:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(current)

    # -- looking at what came ------------------------------------------------------------------------------------

    def await_own(self, operation: str, sent: Any) -> None:
        """Wait on the host for kernels of this rank, up to a mark; raise if one of them gave up. Reads the number."""
        start = time.monotonic()
        while sent is not None and not sent.query():
            self._pause(start, operation, [self.group.rank])
        self.check(operation)  # then nothing was sent, and nothing will come
        self.seq = int(self.read(self.link.state)[0])

    def await_counts(self, tag: str, sent: Any) -> np.ndarray:
        """Wait on the host for the counts of all ranks in the operation just sent: (W, counts_width) int32."""
        self.await_own(tag.split(" ")[0], sent)
        start = time.monotonic()
        while True:
            ended = self._watch.ended  # read before the counts: what a rank sent before it ended is there
            seen = self.read(self._counts[self.seq & 1])
            missing = np.flatnonzero((seen >> 32 != self.seq).any(1)).tolist()
            if not missing:
                return (seen & 0xFFFFFFFF).astype(np.int32)
            self._compare_tags(tag)
            if lost := [rank for rank in missing if rank in ended]:
                self._watch.raise_ended(lost, self.seq, tag)
            self._pause(start, tag.split(" ")[0], missing)

    def _pause(self, start: float, operation: str, missing: Sequence[int]) -> None:
        self._num_polls += 1
        waited = time.monotonic() - start
        if waited >= self.timeout_s:
            self._stall(f"gave up after {waited:.1f} s waiting for", operation, missing)
        time.sleep(_PAUSE_S)

    def _compare_tags(self, tag: str) -> None:
        """Raise if a rank has sent something else in the current operation."""
        from moecomm.kernels.wire import TAG_BITS, TAG_MASK

        words = self.read(self._signals)
        here = words >> int(TAG_BITS) == self.seq
        numbers = np.where(here, words & int(TAG_MASK), tag_number(tag))
        if error := DesyncError.among([self._name(int(n)) for n in numbers], self.group.rank, self.seq):
            self._fail(error)

    def check(self, operation: str) -> np.ndarray:
        """Raise what kernels noted that gave up; the status. The host waits here: only where it has to wait anyway."""
        from moecomm.kernels.wire import LATE, ROWS_NEEDED, STALLED

        status = self.read(self.link.status)
        late, others, gone = status[int(LATE) :].reshape(3, -1)
        seq = int(status[int(STALLED)])
        names = [self._name(int(number or others[self.group.rank])) for number in others]
        if error := DesyncError.among(names, self.group.rank, seq):
            self._fail(error)
        if lost := np.flatnonzero((late != 0) & (gone != 0)).tolist():
            self._watch.raise_ended(lost, seq, operation)
        if seq:
            self.seq = seq
            self._stall("a kernel gave up waiting for", operation, np.flatnonzero(late).tolist())
        if needed := int(status[int(ROWS_NEEDED)]):
            self.link.status[int(ROWS_NEEDED)] = 0
            overflow = CapacityError(
                "more rows came than a dispatch may give; the rest was left out",
                got=needed,
                expected=f"at most max_recv_tokens={self.max_recv_tokens}",
                remedy="raise max_recv_tokens, or leave it out",
                rank=self.group.rank,
                operation="dispatch",
            )
            overflow.harmless = True
            raise overflow
        return status

    def read(self, tensor: Tensor) -> np.ndarray:
        """A copy on the host of what a kernel is known to have written; it does not wait for kernels that wait."""
        self._num_reads += 1
        if self._reader is None:
            return tensor.numpy().copy()
        with torch.cuda.stream(self._reader):
            return tensor.cpu().numpy()

    def synchronize(self) -> None:
        """Wait on the host until everything that was launched is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def share(self, nbytes: int) -> DeviceMemory:
        """More memory that all ranks reach, for as long as this transport is open; collective."""
        memory = share_device_memory(self.group, self.device, nbytes, self.timeout_s)
        self._nbytes += nbytes
        self._more.append(memory)
        return memory

    def refuse_capture(self, what: str, why: str = _ASKS, remedy: str = _STATIC) -> None:
        """Refuse in the middle of a CUDA graph what cannot be captured."""
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            error = UnsupportedError(
                f"{what} {why}, which a CUDA graph cannot capture",
                remedy=remedy,
                rank=self.group.rank,
            )
            error.harmless = True
            raise error

    def _name(self, number: int) -> str:
        """The tag behind a number, or what can be said of one that this rank never had."""
        known = self._tags.get(number)
        return known or f"{_KINDS[number >> 1 & 1] if number else 'nothing'} with other arguments"

    def _note_end(self, peer: int) -> None:
        """Have kernels that wait for a peer stop: it has ended. In the thread that watches."""
        from moecomm.kernels.wire import LATE

        word = self.link.status[int(LATE) + 2 * self.group.size + peer :][:1]
        if self._teller is None:
            word.fill_(1)
            return
        # By a copy engine, for kernels that wait may occupy the whole GPU. It allocates nothing and waits for nothing:
        # while another thread captures a CUDA graph either would be an error, and would break the capture.
        with torch.cuda.stream(self._teller):
            word.copy_(self._one, non_blocking=True)

    def _stall(self, what: str, operation: str, late: Sequence[int]) -> NoReturn:
        remedy, rank = "look at what those ranks do, or raise timeout_s", self.group.rank
        what = f"{what} {rank_names(late)}"
        self._fail(StallError(what, remedy=remedy, rank=rank, operation=operation, seq=self.seq, peers=late))

    def _fail(self, error: MoECommError) -> NoReturn:
        self._watch.abort(error)
        raise error

    # -- the rest of a transport ---------------------------------------------------------------------------------

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        raise self._no_lanes()

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        raise self._no_lanes()

    def _no_lanes(self) -> UnsupportedError:
        return UnsupportedError("kernels move whole operations, not single lanes", rank=self.group.rank)

    def abort(self, error: MoECommError) -> None:
        self._watch.abort(error)

    def close(self) -> None:
        if hasattr(self, "_watch"):
            self.synchronize()  # ends: kernels wait for so many polls only
            self._watch.close()
            if self._teller is not None:
                self._teller.synchronize()
            self._more.clear()
            del self._watch, self._memory, self._counts, self._signals, self.copies, self.link

    def stats(self) -> dict[str, int]:
        return {
            "operations_sent": self.num_sent,
            "count_polls": self._num_polls,
            "host_reads": self._num_reads,
        }

    @property
    def allocated_bytes(self) -> int:
        return self._nbytes


def tag_number(tag: str) -> int:
    """A tag in 24 bits, odd: a check sum, and what kind of operation it is.

    >>> tag_number("dispatch a") & 3, tag_number("combine a") & 3
    (1, 3)
    """
    return (zlib.crc32(tag.encode()) & 0x1FFFFF) << 2 | _KINDS.index(tag.split(" ")[0]) << 1 | 1
