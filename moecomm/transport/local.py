"""One rank: dispatch is a permutation and nothing travels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm.blocks import empty_rows
from moecomm.group import Group
from moecomm.memory.host import HostMemory, host_memory_support
from moecomm.rows import copy_rows
from moecomm.topology import Topology
from moecomm.transport.base import NUM_AREAS, Exchange, Lane, PaddedSlots, Support, Transport, TransportOptions, Wave


@final
class LocalExchange(Exchange):
    """Rows go from the caller's tensor to the output; the output is the caller's."""

    def __init__(self, lanes: Sequence[Lane], device: torch.device) -> None:
        self._lanes = lanes
        self._out = [empty_rows(int(lane.out_rows[0]), lane.row_bytes, torch.uint8, device) for lane in lanes]

    def outputs(self, lane: int) -> np.ndarray:
        spec = self._lanes[lane]
        return np.array([[self._out[lane].data_ptr()], spec.send_counts, [0], spec.out_rows], np.int64)

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        spec = self._lanes[lane]
        if spec.send_slots is None:
            copy_rows(self.target(lane, dst), src, index)
        else:
            copy_rows(self._out[lane], src, index, spec.send_slots)

    def target(self, lane: int, dst: int) -> Tensor:
        start = int(self._lanes[lane].send_starts[dst])  # type: ignore[index]
        return self._out[lane][start : start + int(self._lanes[lane].send_counts[dst])]

    def commit(self) -> None: ...

    def wait(self) -> list[Tensor]:
        return self._out

    def own(self, lane: int) -> Tensor:
        return self._out[lane]

    def release(self) -> None: ...


@final
class LocalSlots(PaddedSlots):
    """Slots in this rank's own memory, whose pages are committed when they are first written."""

    def __init__(self, nbytes: int) -> None:
        fd = HostMemory.create(nbytes)  # any other memory of that size might count as taken at once
        try:
            memory = HostMemory(fd, nbytes).tensor
        finally:
            os.close(fd)
        super().__init__(memory, np.array([memory.data_ptr()], np.int64))
        self._counts = [np.empty(0, np.int32)] * 2

    def post(self, wave: Wave, number: int, tag: str, counts: np.ndarray | None = None) -> None:
        if counts is not None:
            self._counts[number % 2] = counts

    def wait(self, wave: Wave, number: int, tag: str) -> None: ...

    def counts_at(self, number: int) -> tuple[int, int]:
        return int(self._counts[number % 2].ctypes.data), 0


@final
class LocalTransport(Transport):
    """A group of one rank."""

    name = "local"

    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        self.group = group
        self._device = options.device
        if options.slot_bytes and options.device.type == "cpu" and host_memory_support() is None:
            self.padded_slots = LocalSlots(NUM_AREAS * options.slot_bytes)

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        if group.size == 1:
            return Support(True, "the group has one rank")
        return Support(False, f"the group has {group.size} ranks, local serves one")

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        return counts[None]

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        return LocalExchange(lanes, self._device)

    def close(self) -> None:
        self.padded_slots = None

    @property
    def allocated_bytes(self) -> int:
        return 0 if self.padded_slots is None else self.padded_slots.memory.numel()
