"""Ranks that share memory: every row is written straight into its final slot in the peer's memory.

One copy, no send staging. Each rank owns a pool of receive segments. With the last message of an operation it says
in which segment it wants the rows of the next one, so a sender never asks; a segment is announced again only when
nobody uses what arrived in it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import empty_rows
from moecomm.errors import CapacityError, MoECommError
from moecomm.group import Group
from moecomm.memory.channel import Channel, Steps
from moecomm.memory.device import device_memory_support, moves_by_kernels
from moecomm.memory.host import HostMemory, SegmentPool, host_memory_support
from moecomm.memory.mail import PLACES, Kind, Mail, mail_bytes, place_of
from moecomm.rows import copy_rows
from moecomm.topology import Topology
from moecomm.transport.base import NUM_AREAS, Exchange, Lane, PaddedSlots, Support, Transport, TransportOptions, Wave

LANE_ALIGN_BYTES = 64


@final
class SymmetricTransport(Transport):
    """Host memory shared by the ranks of one node, signals over Unix-domain sockets.

    Where the group spans several nodes each of them has its own, and rows move between the ranks of a node only; ranks
    keep their numbers.
    """

    name = "symmetric"

    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        self.group, self.buffer_id = group, options.buffer_id
        box = mail_bytes(group.size, options.count_bytes)
        segments = options.segment_bytes * options.num_segments
        nbytes = segments + box + NUM_AREAS * options.slot_bytes
        fd = HostMemory.create(nbytes)
        try:
            memory = HostMemory(fd, nbytes)
            self.pool = SegmentPool(memory, options.segment_bytes, options.num_segments)
            self.ticket = self.pool.take()
            mates = topology.ranks_of_node(topology.node_of(group.rank))
            self.channel = Channel(group, mates, options.timeout_s, fd, self.ticket)
        finally:
            os.close(fd)
        self._memory_of = {group.rank: memory.tensor}
        try:
            for peer, peer_fd in self.channel.descriptors.items():
                self._memory_of[peer] = HostMemory(peer_fd, nbytes).tensor
        except BaseException:
            self.channel.close()
            raise
        self.channel.close_descriptors()
        self.addresses = np.zeros(group.size, np.int64)  # where every rank's memory begins
        for rank, mapped in self._memory_of.items():
            self.addresses[rank] = mapped.data_ptr()
        boxes = {rank: mapped[segments : segments + box] for rank, mapped in self._memory_of.items()}
        mail = Mail(boxes, group.rank, group.size, options.count_bytes)
        self.channel.attach(mail)
        self.seq = 0  # of the next operation
        self.num_exchanges = 0
        self.unwaited: deque[SymmetricExchange] = deque()
        self.num_copies = 0
        self._nbytes = nbytes
        if options.slot_bytes and mail.is_fast:
            self.padded_slots = HostSlots(memory.tensor[segments + box :], self.addresses + segments + box, self, mail)

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        by_kernels = moves_by_kernels(device)
        if reason := device_memory_support(group, device) if by_kernels else host_memory_support():
            return Support(False, reason)
        if not topology.is_single_node:
            return Support(False, f"the ranks are spread over {topology.num_nodes} nodes")
        if by_kernels:
            return Support(True, f"all ranks reach each other's memory on {device.type} by kernels")
        return Support(True, "all ranks share the memory of one host")

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        return self.channel.gather(self.seq, tag, counts)

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        return SymmetricExchange(self, tag, lanes)

    def close(self) -> None:
        self.channel.close()
        self._memory_of.clear()
        self.pool.close()

    def abort(self, error: MoECommError) -> None:
        self.channel.abort(error)

    def is_first_report(self) -> bool:
        return self.channel.is_first_report()

    def last_seen(self) -> dict[int, str]:
        return self.channel.last_seen()

    def stats(self) -> dict[str, Any]:
        counted = {"leases": self.pool.num_leases, "copies": self.num_copies, "free_segments": self.pool.num_free}
        return counted | {"waited_s": torch.from_numpy(self.channel.waited_s())}

    @property
    def allocated_bytes(self) -> int:
        return self._nbytes

    def rows_at(self, rank: int, segment: int, offset: int, num_rows: int, row_bytes: int) -> Tensor:
        """A (num_rows, row_bytes) uint8 view into a rank's memory."""
        start = segment * self.pool.segment_bytes + offset
        return self._memory_of[rank][start : start + num_rows * row_bytes].view(num_rows, row_bytes)

    def reserve(self) -> int:
        """A free segment for the next operation; if all are taken, the oldest arrival is moved out of its own."""
        while not self.pool.num_free:
            self.unwaited[0].move_out()
        return self.pool.take()


@final
class SymmetricExchange(Exchange):
    """Rows written into peers' segments; complete when every peer has said so."""

    def __init__(self, transport: SymmetricTransport, tag: str, lanes: Sequence[Lane]) -> None:
        self._transport, self._tag, self._lanes = transport, tag, lanes
        self._rank, self._segment = transport.group.rank, transport.ticket
        sizes = np.array([lane.out_rows for lane in lanes], np.int64).reshape(len(lanes), transport.group.size)
        sizes *= [[lane.row_bytes] for lane in lanes]
        sizes += -sizes % LANE_ALIGN_BYTES
        ends = sizes.cumsum(0)
        if ends[-1].max() > transport.pool.segment_bytes:
            raise CapacityError(
                "the rows do not fit the receive segment",
                got=f"{ends[-1].max()} bytes on rank {ends[-1].argmax()}",
                expected=f"at most {transport.pool.segment_bytes}",
                remedy="raise max_tokens_per_rank, or send smaller rows",
                rank=self._rank,
            )
        self._offsets = ends - sizes  # (lanes, W)
        self._seq, self._number = transport.seq, transport.num_exchanges
        self._segments = transport.channel.tickets(self._number) | {self._rank: self._segment}
        transport.seq += 1
        transport.num_exchanges += 1
        starts = transport.addresses.copy()
        for rank, segment in self._segments.items():
            starts[rank] += segment * transport.pool.segment_bytes
        self._addresses = starts + self._offsets  # (lanes, W)
        self._out: list[Tensor] | None = None
        self._holds_segment = True

    def outputs(self, lane: int) -> np.ndarray:
        spec = self._lanes[lane]
        starts = 0 if spec.send_starts is None else spec.send_starts
        outs = np.empty((4, len(spec.send_counts)), np.int64)
        outs[0] = self._addresses[lane]
        outs[1], outs[2], outs[3] = spec.send_counts, starts, spec.out_rows
        return outs

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        spec = self._lanes[lane]
        if spec.send_slots is None:
            copy_rows(self.target(lane, dst), src, index)
        else:
            start = int(spec.send_counts[:dst].sum())
            slots = spec.send_slots[start : start + int(spec.send_counts[dst])]
            copy_rows(self._view(lane, dst), src, index, slots)

    def target(self, lane: int, dst: int) -> Tensor:
        start = int(self._lanes[lane].send_starts[dst])  # type: ignore[index]
        return self._view(lane, dst)[start : start + int(self._lanes[lane].send_counts[dst])]

    def commit(self) -> None:
        transport = self._transport
        transport.unwaited.append(self)
        transport.ticket = transport.reserve()
        transport.channel.done(self._number, self._seq, self._tag, transport.ticket)

    def wait(self) -> list[Tensor]:
        if self._out is None:
            self._transport.channel.all_done(self._number, self._seq, self._tag)
            self._transport.unwaited.remove(self)
            self._out = [self._view(lane, self._rank) for lane in range(len(self._lanes))]
        return self._out

    def own(self, lane: int) -> Tensor:
        view = self.wait()[lane]
        if not self._holds_segment:
            return view
        if not view.numel() or not self._transport.pool.num_free:
            self._transport.num_copies += bool(view.numel())
            view = _private(view)
        else:
            offset = int(self._offsets[lane][self._rank])
            view = self._transport.pool.lease(self._segment, offset, view.numel()).view(view.shape)
            self._holds_segment = False
        return view

    def release(self) -> None:
        if self._holds_segment:
            self._transport.pool.give_back(self._segment)
            self._holds_segment = False

    def memory_at(self, rank: int) -> Tensor:
        return self._transport.rows_at(rank, self._segments[rank], 0, 1, self._transport.pool.segment_bytes)[0]

    def gather_counts(self, counts: np.ndarray) -> np.ndarray:
        return self._transport.channel.gather(self._seq, self._tag, counts)

    def move_out(self) -> None:
        """Complete early and free the segment; `wait` and `own` then give private copies."""
        self._out = [_private(view) for view in self.wait()]
        self._transport.num_copies += 1
        self.release()

    def _view(self, lane: int, rank: int) -> Tensor:
        spec = self._lanes[lane]
        offset, num_rows = int(self._offsets[lane][rank]), int(spec.out_rows[rank])
        return self._transport.rows_at(rank, self._segments[rank], offset, num_rows, spec.row_bytes)


@final
class HostSlots(PaddedSlots):
    """Slots in shared host memory; what a wave says travels as a letter."""

    def __init__(self, memory: Tensor, addresses: np.ndarray, transport: SymmetricTransport, mail: Mail) -> None:
        super().__init__(memory, addresses)
        self._transport, self._mail = transport, mail
        self._seqs = {wave: [0] * PLACES for wave in Wave}

    def post(self, wave: Wave, number: int, tag: str, counts: np.ndarray | None = None) -> None:
        transport = self._transport
        transport.channel.post(_KIND_OF_WAVE[wave], number, transport.seq, tag, -1, counts)
        self._seqs[wave][number % PLACES] = transport.seq
        transport.seq += 1

    def wait(self, wave: Wave, number: int, tag: str) -> None:
        self._transport.channel.wait(_KIND_OF_WAVE[wave], number, self._seqs[wave][number % PLACES], tag)

    def counts_at(self, number: int) -> tuple[int, int]:
        return self._mail.payload_at(Kind.OUT, number)

    @property
    def letter_boxes(self) -> int:
        return int(self._mail.words.ctypes.data)

    def next_letter(self, wave: Wave, number: int) -> tuple[int, int, int]:
        return place_of(_KIND_OF_WAVE[wave], number), number + 1, self._transport.seq

    def run(self, steps: Steps, table: int, wave: Wave, number: int, tag: str) -> int:
        transport, letter = self._transport, (_KIND_OF_WAVE[wave], number)
        code = transport.channel.run(steps, table, dict.fromkeys(range(len(steps)), letter), transport.seq, tag)
        transport.seq += code == 0
        return code


_KIND_OF_WAVE = {Wave.OUT: Kind.OUT, Wave.HOME: Kind.HOME, Wave.FREE: Kind.FREE}


def _private(rows: Tensor) -> Tensor:
    return empty_rows(len(rows), rows.shape[1], rows.dtype, rows.device).copy_(rows)
