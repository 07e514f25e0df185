"""Rows as kernels see them: words of 4 bytes where that is possible, 16 bytes per access where they are aligned."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from moecomm.kernels.sync import wait_ref
from moecomm.kernels.wire import ROWS, Link, Wire, view_memory
from torch import Tensor

_BYTES_PER_PROGRAM = 16384  # of a row, in flight at once
_BYTES_PER_THREAD = 64
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


class Row(NamedTuple):
    """The geometry of a row, known when kernels are compiled.

    words: per row, of `word_bytes`. block: words at a time, `chunks` times. aligned: whether every row starts at a
    multiple of 16 bytes. scale_words: float32 scales that follow at byte `scale_offset`, 0 for none; scale_p2: the next
    power of two.
    """

    words: int
    word_bytes: int
    block: int
    chunks: int
    aligned: bool
    scale_words: int
    scale_p2: int
    scale_offset: int


class RowFormat(NamedTuple):
    """What a row on the wire holds: `hidden` elements of `dtype`, then `scale_columns` float32.

    >>> RowFormat(100, torch.float8_e4m3fn, 1).wire_bytes
    128
    """

    hidden: int
    dtype: torch.dtype
    scale_columns: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of the elements."""
        return self.hidden * self.dtype.itemsize

    @property
    def scale_offset(self) -> int:
        """Where the scales begin."""
        return -(-self.row_bytes // 16) * 16

    @property
    def wire_bytes(self) -> int:
        """Bytes on the wire, a multiple of 16."""
        return -(-(self.scale_offset + 4 * self.scale_columns) // 16) * 16


class Arriving(NamedTuple):
    """Rows that peers are sending in the operation that this rank has just sent: the kernel waits for them.

    If the wait gives up, nothing is read, results are undefined and `link.status` says who was late.

    link, wire: this rank's end and the shape of the wire. form: what the rows hold.
    wire_row: (P,) int32 place of each row in the rows area, -1 for none; None: rows are named by that place.
    """

    link: Link
    wire: Wire
    form: RowFormat
    wire_row: Tensor | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """Wait, then copy (P, H) rows and (P, G) scales in plain torch; P is the whole area without `wire_row`."""
        wait_ref(self.link, self.wire)
        base = int(self.link.peers[int(self.link.state[0]) & 1, int(ROWS), self.link.rank])
        num_rows = self.wire.world * self.link.max_tokens if self.wire_row is None else int(self.wire_row.max()) + 1
        raw = view_memory(base, (num_rows, self.wire.row_bytes), torch.uint8)
        raw = raw.clone() if self.wire_row is None else raw[self.wire_row.long()]
        form, scale_end = self.form, self.form.scale_offset + 4 * self.form.scale_columns
        rows = raw[:, : form.row_bytes].contiguous().view(form.dtype)
        return rows, raw[:, form.scale_offset : scale_end].contiguous().view(torch.float32)


def row_geometry(form: RowFormat, *tensors: Tensor | None) -> Row:
    """The geometry of rows that lie contiguous in all of `tensors`; wire rows are always aligned.

    >>> row_geometry(RowFormat(7168, torch.bfloat16))[:5]
    (3584, 4, 4096, 1, True)
    >>> row_geometry(RowFormat(5, torch.bfloat16))[:5]
    (5, 2, 8, 1, False)
    """
    places = [form.row_bytes, *(t.data_ptr() for t in tensors if t is not None)]
    aligned = all(place % 16 == 0 for place in places)
    word_bytes = next(size for size in _WORDS if all(place % size == 0 for place in places))
    words = form.row_bytes // word_bytes
    block = min(triton.next_power_of_2(max(words, 1)), _BYTES_PER_PROGRAM // word_bytes)
    scale_p2 = triton.next_power_of_2(max(form.scale_columns, 1))
    chunks = -(-words // block)
    return Row(words, word_bytes, block, chunks, aligned, form.scale_columns, scale_p2, form.scale_offset)


def warps_for(block_bytes: int) -> int:
    """Warps so that a thread holds 64 bytes of a block."""
    return max(1, min(8, block_bytes // (32 * _BYTES_PER_THREAD)))


def as_words(rows: Tensor, row: Row) -> Tensor:
    """View (N, H) rows as (N, words) integers."""
    assert rows.is_contiguous(), f"rows of strides {rows.stride()} are not contiguous"
    return rows.view(_WORDS[row.word_bytes])


def contiguous_rows(name: str, rows: Tensor) -> Tensor:
    """The rows, copied if they do not lie one after the other."""
    assert rows.ndim == 2, f"{name} has shape {tuple(rows.shape)}, expected two dimensions"
    return rows.contiguous()


@triton.jit
def row_at(base, row, ROW_BYTES: tl.constexpr, WORD: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a row of WORD elements, from an int64 base address; without the hint accesses would be narrow."""
    pointer = (base + tl.cast(row, tl.int64) * ROW_BYTES).to(tl.pointer_type(WORD))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def used(inside, row):
    """The mask `inside` where the scalar `row` is not negative."""
    # Not `inside & (row >= 0)`: the interpreter makes an integer of a scalar condition that it spreads over a block.
    return inside & (row + tl.zeros(inside.shape, tl.int32) >= 0)
