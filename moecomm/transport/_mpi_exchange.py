"""One exchange of transport `mpi`: rows packed by destination, their requests, and rows in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import empty_rows
from moecomm.errors import DesyncError, rank_names
from moecomm.rows import copy_rows
from moecomm.transport._staging import StagedRows
from moecomm.transport.base import Exchange, Lane

if TYPE_CHECKING:
    from moecomm.transport.mpi import MpiTransport


@final
class _LaneRows:
    """The rows of a lane on this rank, on their way: packed by destination, as received, and in their places."""

    def __init__(self, transport: MpiTransport, lane: Lane) -> None:
        rank = transport.group.rank
        self.lane = lane
        self.send_counts, self.recv_counts = _without(lane.send_counts, rank), _without(lane.recv_counts, rank)
        self.send_starts = np.cumsum(self.send_counts) - self.send_counts
        self.packed = transport.take_scratch(int(self.send_counts.sum()), lane.row_bytes)
        self.out = empty_rows(int(lane.out_rows[rank]), lane.row_bytes, torch.uint8, transport.device)
        if lane.recv_slots is None:
            self.received = self.out
            self.recv_starts = np.cumsum(lane.recv_counts) - lane.recv_counts
        else:
            self.received = transport.take_scratch(int(self.recv_counts.sum()), lane.row_bytes)
            self.recv_starts = np.cumsum(self.recv_counts) - self.recv_counts

    def unpack(self, rank: int) -> Tensor:
        """Put the rows of peers where they belong."""
        if self.lane.recv_slots is not None and len(self.received):
            start = int(self.lane.recv_counts[:rank].sum())
            own = slice(start, start + int(self.lane.recv_counts[rank]))
            slots = torch.from_numpy(np.delete(self.lane.recv_slots(), own)).to(self.out.device)
            copy_rows(self.out, self.received, torch.arange(len(self.received), device=self.out.device), slots)
        return self.out


def _without(counts: np.ndarray, rank: int) -> np.ndarray:
    """The counts with nothing for this rank."""
    counts = counts.astype(np.int64)
    counts[rank] = 0
    return counts


@final
class MpiExchange(Exchange):
    """Packed, launched when all ranks agree and the device is done packing, unpacked."""

    def __init__(self, transport: MpiTransport, seq: int, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> None:
        self.seq, self.tag, self.agreed, self.done = seq, tag, agreed, False
        self.is_ready: Callable[[], bool] = lambda: True
        self._transport, self._rank = transport, transport.group.rank
        self._rows = [_LaneRows(transport, lane) for lane in lanes]
        self._requests: list[Any] = []
        self._staged: StagedRows | None = None
        self._out: list[Tensor] | None = None

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        rows = self._rows[lane]
        slots = rows.lane.send_slots
        if dst == self._rank and slots is not None:
            start = int(rows.lane.send_counts[:dst].sum())
            copy_rows(rows.out, src, index, slots[start : start + int(rows.lane.send_counts[dst])])
        else:
            copy_rows(self.target(lane, dst), src, index)

    def target(self, lane: int, dst: int) -> Tensor:
        rows = self._rows[lane]
        if dst == self._rank and rows.lane.recv_slots is None:
            start = int(rows.recv_starts[dst])
            return rows.out[start : start + int(rows.lane.recv_counts[dst])]
        start = int(rows.send_starts[dst])
        return rows.packed[start : start + int(rows.send_counts[dst])]

    def commit(self) -> None:
        if self._transport.engine is not None:
            self.is_ready = self._transport.engine.mark()
        self._transport.commit(self)

    def wait(self) -> list[Tensor]:
        if self._out is None:
            self._transport.finish(self)
            self._out = [rows.unpack(self._rank) for rows in self._rows]
            for rows in self._rows:
                self._transport.give_scratch(rows.packed)
                if rows.received is not rows.out:
                    self._transport.give_scratch(rows.received)
            self._rows = []
        return self._out

    def own(self, lane: int) -> Tensor:
        return self.wait()[lane]

    def release(self) -> None: ...

    # -- called with the lock ----------------------------------------------------------------------------------------

    def agrees_with(self, headers: dict[int, tuple[str, bytes]]) -> DesyncError | None:
        """The error to raise if a peer sends other numbers of rows than this rank expects, or None."""
        expected = np.array([rows.lane.recv_counts for rows in self._rows], "<i8")
        told = {peer: np.frombuffer(payload, "<i8") for peer, (_, payload) in headers.items()}
        others = [peer for peer in sorted(told) if not np.array_equal(told[peer], expected[:, peer])]
        if not others:
            return None
        peer = others[0]
        return DesyncError(
            f"the ranks do not use handles of the same dispatch: {rank_names(others)} sent other rows than expected",
            got=f"{told[peer].tolist()} rows from rank {peer}",
            expected=expected[:, peer].tolist(),
            remedy="use the handle of the same dispatch on every rank",
            rank=self._rank,
            operation=self.tag.split(" ")[0],
            seq=self.seq,
            peers=others,
        )

    def launch(self) -> int:
        """Let the rows go; how many collectives of MPI that took."""
        transport = self._transport
        moved = [rows for rows in self._rows if rows.lane.row_bytes and transport.post.peers]
        if transport.slots is not None:
            self._staged = StagedRows(transport.slots, transport.comm, transport.mpi)
            for number, rows in enumerate(moved):
                row_type = transport.row_type(rows.lane.row_bytes)
                outward = rows.packed, rows.send_counts, rows.send_starts
                inward = rows.received, rows.recv_counts, rows.recv_starts
                self._staged.add(number, row_type, outward, inward)
            return 0
        for rows in moved:
            row_type = transport.row_type(rows.lane.row_bytes)
            sent = [_memory(transport.mpi, rows.packed), (rows.send_counts, rows.send_starts), row_type]
            received = [_memory(transport.mpi, rows.received), (rows.recv_counts, rows.recv_starts), row_type]
            self._requests.append(transport.comm.Ialltoallv(sent, received))
        return len(moved)

    def test(self) -> bool:
        """Whether all rows are here, and all of this rank's are off; lets MPI work on it."""
        if self._staged is not None:
            self.done = self._staged.advance()
        else:
            self.done = self._transport.mpi.Request.Testall(self._requests)
        return self.done


def _memory(mpi: Any, rows: Tensor) -> Any:
    """The memory of a tensor, on whatever device, as MPI takes it."""
    return mpi.buffer.fromaddress(rows.data_ptr(), rows.numel())
