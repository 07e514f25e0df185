"""The symmetric transport where kernels move the rows: memory, stream, sequence numbers, deadlines.

What the kernels do is in `moecomm.kernels`, which operation launches which in `moecomm.fused`. Every operation sends
and waits on one stream in the order of the calls, so one is in flight at a time (docs/design/symmetric.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from moecomm.errors import RoutingError, StallError, UnsupportedError, rank_names
from moecomm.group import Group
from moecomm.memory.device import device_memory_support, share_device_memory
from moecomm.topology import Topology
from moecomm.transport.base import Exchange, Lane, Support, Transport, TransportOptions

_POLLS_PER_S = {"cuda": 1_000_000, "cpu": 3_000}  # of a kernel that waits: an estimate, for there is no clock in it
_PAUSE_S = 50e-6


@final
class KernelTransport(Transport):
    """One rank's end of the wire, and the stream that its kernels run on."""

    name = "symmetric"

    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        from moecomm.kernels.wire import COUNTS, Wire, buffer_bytes, make_link, peer_table

        shape = options.kernels
        assert shape is not None, "a transport of kernels needs the shape of the layer"
        self.group, self.device, self.timeout_s = group, options.device, options.timeout_s
        self.wire = Wire.of(group.size, shape.top_k, shape.most_local, shape.row_bytes)
        self.max_tokens = shape.max_tokens
        slots = shape.max_tokens * max(group.size, shape.top_k) if shape.each else None
        nbytes = buffer_bytes(self.wire, self.max_tokens, slots)
        self._memory = share_device_memory(group, self.device, nbytes, self.timeout_s)
        peers = peer_table(self._memory.addresses, self.wire, self.max_tokens, slots)
        polls = int(min(self.timeout_s * _POLLS_PER_S.get(self.device.type, 1_000_000), 2**31 - 1))
        self.link = make_link(peers.to(self.device), group.rank, self.max_tokens, max(polls, 1))
        width = group.size * self.wire.counts_width
        starts = [int(peers[g, int(COUNTS), group.rank]) - self._memory.addresses[group.rank] for g in range(2)]
        self._counts = [
            self._memory.tensor[at : at + 8 * width].view(torch.int64).view(group.size, -1) for at in starts
        ]
        self.seq = 0
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self._reader = torch.cuda.Stream(self.device) if on_gpu else None
        self._num_polls = 0
        self._nbytes = nbytes

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        reason = device_memory_support(group, device)
        return Support(reason is None, reason or "kernels reach all ranks")

    # -- running kernels -----------------------------------------------------------------------------------------

    @contextmanager
    def launching(self, *inputs: Tensor | None) -> Iterator[None]:
        """Launch on the communication stream, behind everything that the current stream was given before."""
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

    def await_counts(self, operation: str) -> np.ndarray:
        """Wait on the host for the counts of all ranks in the operation last sent: (W, counts_width) int32."""
        start = time.monotonic()
        self._check_stalled(operation, self.read(self.link.status))  # then nothing was sent, and nothing will come
        while True:
            seen = self.read(self._counts[self.seq & 1])
            missing = np.flatnonzero((seen >> 32 != self.seq).any(1)).tolist()
            if not missing:
                return (seen & 0xFFFFFFFF).astype(np.int32)
            self._num_polls += 1
            waited = time.monotonic() - start
            if waited >= self.timeout_s:
                raise self._stall(f"gave up after {waited:.1f} s waiting for", operation, missing)
            time.sleep(_PAUSE_S)

    def check(self, operation: str, top_k: int) -> None:
        """Raise what the kernels noted. The host waits for them here: only where it has to wait anyway."""
        from moecomm.kernels.wire import BAD_ID, ROWS_NEEDED, decode_bad_id

        status = self.read(self.link.status)
        self._check_stalled(operation, status)
        bad = decode_bad_id(int(status[int(BAD_ID)]), top_k)
        if bad is not None:
            self.link.status[int(BAD_ID)] = 0
            token, k, expert = bad
            raise RoutingError(
                f"topk_idx[{token}, {k}] names no expert", got=expert, rank=self.group.rank, operation=operation
            )
        needed = int(status[int(ROWS_NEEDED)])
        assert not needed, f"{needed} rows came, more than the counts said"

    def _check_stalled(self, operation: str, status: np.ndarray) -> None:
        from moecomm.kernels.wire import LATE, STALLED

        if status[int(STALLED)]:
            late = np.flatnonzero(status[int(LATE) :]).tolist()
            raise self._stall(f"gave up in kernel operation {status[int(STALLED)]} waiting for", operation, late)

    def read(self, tensor: Tensor) -> np.ndarray:
        """A copy on the host of what a kernel is known to have written; it does not wait for kernels that wait."""
        if self._reader is None:
            return tensor.numpy().copy()
        with torch.cuda.stream(self._reader):
            return tensor.cpu().numpy()

    def _stall(self, what: str, operation: str, late: Sequence[int]) -> StallError:
        return StallError(
            f"{what} {rank_names(late)}",
            remedy="look at what those ranks do, or raise timeout_s",
            rank=self.group.rank,
            operation=operation,
            seq=self.seq,
            peers=late,
        )

    # -- the rest of a transport ---------------------------------------------------------------------------------

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        raise self._no_lanes()

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        raise self._no_lanes()

    def _no_lanes(self) -> UnsupportedError:
        return UnsupportedError("kernels move whole operations, not single lanes", rank=self.group.rank)

    def close(self) -> None:
        if hasattr(self, "_memory"):
            if self._stream is not None:
                self._stream.synchronize()  # ends: kernels wait for so many polls only
            del self._memory, self._counts, self.link

    def stats(self) -> dict[str, int]:
        return {"operations_sent": self.seq, "count_polls": self._num_polls}

    @property
    def allocated_bytes(self) -> int:
        return self._nbytes
