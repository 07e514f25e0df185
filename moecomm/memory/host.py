"""Shared host memory: one memfd per rank, cut into receive segments that are leased to callers.

A memfd has no name in any file system: it goes away with the last process that maps it, also after `kill -9`.
Pages are committed when they are first written, so reserving the worst case costs address space only.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from typing import final

import numpy as np
import torch
from torch import Tensor

from moecomm.errors import CapacityError

_ADD_SEALS, _SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1033, 1, 2, 4  # linux/fcntl.h; Python names them from 3.13 on


def host_memory_support() -> str | None:
    """The reason why shared host memory does not work here, or None."""
    if not hasattr(os, "memfd_create"):
        return "this operating system has no memfd_create (Linux has)"
    return None


@final
class HostMemory:
    """A mapping of shared memory, made here or by another rank. nbytes: its size."""

    def __init__(self, fd: int, nbytes: int) -> None:
        try:
            self._map = mmap.mmap(fd, nbytes)
        except (OSError, ValueError, OverflowError) as error:
            raise CapacityError(
                "cannot map shared memory",
                got=f"{nbytes} bytes ({error})",
                expected="enough address space",
                remedy="lower max_tokens_per_rank or num_segments, or raise `ulimit -v`",
            ) from error
        self.nbytes = nbytes
        self.tensor = torch.from_numpy(np.frombuffer(self._map, np.uint8))

    @staticmethod
    def create(nbytes: int) -> int:
        """A new sealed memfd of that size; the caller closes it once everybody has mapped it."""
        try:
            fd = os.memfd_create("moecomm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            what, remedy = "cannot make shared memory", "raise `ulimit -n` if there are no descriptors left"
            raise CapacityError(what, got=str(error), remedy=remedy) from error
        try:
            os.fchmod(fd, 0o600)  # a memfd is born open to everybody who finds a way to it
            os.ftruncate(fd, nbytes)
            # Nobody can shrink it under a peer's feet, which would be a SIGBUS there.
            fcntl.fcntl(fd, _ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise CapacityError(
                "cannot reserve shared memory", got=f"{nbytes} bytes ({error})", remedy="lower max_tokens_per_rank"
            ) from error
        return fd

    def lease(self, offset: int, nbytes: int) -> tuple[Tensor, np.ndarray]:
        """A uint8 tensor over a range, and the object that dies together with its storage."""
        exporter = np.frombuffer(self._map, np.uint8, nbytes, offset)
        return torch.from_numpy(exporter), exporter


@final
class SegmentPool:
    """The segments of one rank's memory: free, or in use by an exchange or by a caller's tensor.

    Finalizers return segments from any thread at any time, so there is no lock: the set's own operations are atomic.
    """

    def __init__(self, memory: HostMemory, segment_bytes: int, num_segments: int) -> None:
        self._memory: HostMemory | None = memory
        self.segment_bytes = segment_bytes
        self._free = set(range(num_segments))
        self._leases: dict[int, weakref.ref[np.ndarray]] = {}
        self.num_leases = 0

    @property
    def num_free(self) -> int:
        """Segments that nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """Take the lowest free segment: the warmest one, and the fewest pages get touched."""
        segment = min(self._free)
        self._free.discard(segment)
        return segment

    def give_back(self, segment: int) -> None:
        """Say that nobody uses the segment any more."""
        self._leases.pop(segment, None)
        self._free.add(segment)

    def close(self) -> None:
        """Let go of the memory: it goes away with the last tensor that was leased."""
        self._memory = None

    def lease(self, segment: int, offset: int, nbytes: int) -> Tensor:
        """A uint8 tensor in a taken segment; the segment comes back when the tensor's storage dies."""
        assert self._memory is not None, "the pool is closed"
        tensor, exporter = self._memory.lease(segment * self.segment_bytes + offset, nbytes)
        self._leases[segment] = weakref.ref(exporter, lambda _: self.give_back(segment))
        self.num_leases += 1
        return tensor
