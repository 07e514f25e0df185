"""The roof: what a plain copy of the bytes that must move costs, on all ranks at once, in warm memory."""

from __future__ import annotations

import torch

from moecomm.rows import copy_rows


class Roof:
    """Two buffers in this rank's memory, both touched before anything is timed.

    Args:
        num_bytes: most bytes that will be copied at once.
        device: where.

    >>> roof = Roof(1 << 16, torch.device("cpu"))
    >>> roof.memcpy(1 << 16)
    >>> roof.streamed_copy(1 << 16)
    """

    ROW_BYTES = 1 << 14

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        rows = -(-num_bytes // self.ROW_BYTES)
        self._src = torch.ones(rows * self.ROW_BYTES, dtype=torch.uint8, device=device)
        self._dst = torch.zeros_like(self._src)
        self._index = torch.arange(rows, device=device)

    def memcpy(self, num_bytes: int) -> None:
        """Copy with `Tensor.copy_`, which is as fast as memcpy of the C library on a CPU."""
        self._dst[:num_bytes].copy_(self._src[:num_bytes])

    def streamed_copy(self, num_bytes: int) -> None:
        """Copy with moecomm's own loop past the caches: faster than memcpy, so the higher roof."""
        rows = -(-num_bytes // self.ROW_BYTES)
        src, dst = (buffer.view(-1, self.ROW_BYTES)[:rows] for buffer in (self._src, self._dst))
        copy_rows(dst, src, self._index[:rows])
