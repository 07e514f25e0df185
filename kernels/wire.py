"""What ranks write into each other's memory: the byte layout of one rank's buffer, and how kernels find it.

A buffer holds two *generations* of three areas, used in turn by odd and even operations, and one signal word per rank:

    rows    (num_rows, row_bytes)              a row of source rank s and slot i is row s * max_tokens + i
    meta    (W * max_tokens, meta_words) int32 beside each row: flat expert (K), index in group (K), weight (K), token
    counts  (W, counts_width) int64            per source: pairs, then entries per local expert, stamped with the
                                               sequence number in the upper 32 bits
    signals (W,) int64                         last operation that each source has finished sending, and in the lower
                                               24 bits what kind of operation that was (its tag); one for both

Legend: W ranks, K top-k, M max tokens per rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = tl.constexpr(0)
META = tl.constexpr(1)
COUNTS = tl.constexpr(2)
SIGNALS = tl.constexpr(3)
FIELDS = 4

TAG_BITS = tl.constexpr(24)
TAG_MASK = tl.constexpr((1 << 24) - 1)

# Words of `Link.status`; from LATE on three words per source rank: late, doing something else, gone.
BAD_ID = tl.constexpr(0)
ROWS_NEEDED = tl.constexpr(1)
STALLED = tl.constexpr(2)
LATE = tl.constexpr(3)

_AREA_BYTES = 256  # areas begin at multiples of this


class Wire(NamedTuple):
    """The shape of a buffer, known when kernels are compiled; `*_p2` is the next power of two.

    world: W. top_k: K. row_bytes: from row to row, a multiple of 16. meta_words: int32 words beside each row.
    counts_width: 1 + most experts on any rank. local_p2: of the most experts on any rank.
    """

    world: int
    world_p2: int
    top_k: int
    top_k_p2: int
    row_bytes: int
    meta_words: int
    meta_p2: int
    counts_width: int
    counts_p2: int
    local_p2: int

    @classmethod
    def of(cls, world: int, top_k: int, max_local: int, row_bytes: int) -> Wire:
        """The shape for W ranks, top-k, the most experts on any rank, and rows of at most `row_bytes`.

        >>> wire = Wire.of(world=2, top_k=3, max_local=4, row_bytes=10)
        >>> wire.row_bytes, wire.meta_words, wire.counts_width
        (16, 12, 5)
        """
        meta_words, p2 = _round_up(3 * top_k + 1, 4), triton.next_power_of_2
        return cls(
            world=world,
            world_p2=p2(world),
            top_k=top_k,
            top_k_p2=p2(top_k),
            row_bytes=_round_up(row_bytes, 16),
            meta_words=meta_words,
            meta_p2=p2(meta_words),
            counts_width=1 + max_local,
            counts_p2=p2(1 + max_local),
            local_p2=p2(max(max_local, 1)),
        )


class Link(NamedTuple):
    """One rank's end of the wire: what a communicating kernel is given.

    peers: (2, FIELDS, W) int64, address of each area in each rank's buffer, by generation.
    state: (2,) int64: sequence number of the last operation sent; programs of the running kernel that have finished.
    status: (3 + 3 * W,) int64, zero as long as all is well: first bad expert id (see `decode_bad_id`); rows needed when
        they did not fit; the operation that stalled; per source rank the operation that it was late for; per source
        rank the tag that it had instead of this rank's, and that one in this rank's place. The last W are read: not
        zero for a rank that has ended.
    rank: this rank. max_tokens: M. max_spins: polls after which a wait gives up.
    tag: what this operation is, the same on all ranks that do the same; odd, so that Triton compiles for it once.
    """

    peers: Tensor
    state: Tensor
    status: Tensor
    rank: int
    max_tokens: int
    max_spins: int
    tag: int = 3


def area_bytes(wire: Wire, max_tokens: int, num_rows: int | None = None) -> tuple[int, int, int, int]:
    """Bytes of the rows, meta, counts and signals areas; num_rows: W * M unless told.

    >>> area_bytes(Wire.of(world=2, top_k=1, max_local=1, row_bytes=16), max_tokens=3)
    (256, 256, 256, 256)
    """
    rows = wire.world * max_tokens if num_rows is None else num_rows
    sizes = (
        rows * wire.row_bytes,
        4 * wire.world * max_tokens * wire.meta_words,
        8 * wire.world * wire.counts_width,
        8 * wire.world,
    )
    rows_bytes, meta, counts, signals = (_round_up(size, _AREA_BYTES) for size in sizes)
    return rows_bytes, meta, counts, signals


def buffer_bytes(wire: Wire, max_tokens: int, num_rows: int | None = None) -> int:
    """Bytes of one rank's buffer, which must be zero before the first operation.

    >>> buffer_bytes(Wire.of(world=2, top_k=1, max_local=1, row_bytes=16), max_tokens=3)
    1792
    """
    *generation, signals = area_bytes(wire, max_tokens, num_rows)
    return 2 * sum(generation) + signals


def peer_table(bases: Sequence[int], wire: Wire, max_tokens: int, num_rows: int | None = None) -> Tensor:
    """The (2, FIELDS, W) int64 addresses of all areas, from the address of every rank's buffer as seen by this rank.

    >>> wire = Wire.of(world=1, top_k=1, max_local=1, row_bytes=16)
    >>> peer_table([1024], wire, max_tokens=16).flatten().tolist()
    [1024, 1280, 1536, 2560, 1792, 2048, 2304, 2560]
    """
    for base in bases:
        assert base % 16 == 0, f"buffer address {base:#x} is no multiple of 16"
    rows, meta, counts, _ = area_bytes(wire, max_tokens, num_rows)
    size = rows + meta + counts
    offsets = [[g * size, g * size + rows, g * size + rows + meta, 2 * size] for g in range(2)]
    return torch.tensor([[[base + offset for base in bases] for offset in fields] for fields in offsets])


def make_link(peers: Tensor, rank: int, max_tokens: int, max_spins: int = 1 << 24) -> Link:
    """A link with fresh state on the device of `peers`."""
    world = peers.shape[2]
    state = torch.zeros(2, dtype=torch.int64, device=peers.device)
    status = torch.zeros(int(LATE) + 3 * world, dtype=torch.int64, device=peers.device)
    return Link(peers, state, status, rank, max_tokens, max_spins)


def loopback(
    wire: Wire, max_tokens: int, num_rows: int | None = None, memory: Tensor | None = None, max_spins: int = 1000
) -> tuple[list[Link], Tensor]:
    """Links of W ranks in this one process, and the memory behind them: (W, bytes) uint8, zero; made unless given.

    >>> wire = Wire.of(world=2, top_k=1, max_local=1, row_bytes=16)
    >>> links, memory = loopback(wire, max_tokens=3)
    >>> [link.rank for link in links], memory.shape
    ([0, 1], torch.Size([2, 1792]))
    """
    shape = wire.world, buffer_bytes(wire, max_tokens, num_rows)
    if memory is None:
        memory = torch.zeros(shape, dtype=torch.uint8)
    assert memory.shape == shape, f"memory has shape {tuple(memory.shape)}, expected {shape}"
    bases = [rank_memory.data_ptr() for rank_memory in memory]
    peers = peer_table(bases, wire, max_tokens, num_rows).to(memory.device)
    return [make_link(peers, rank, max_tokens, max_spins) for rank in range(wire.world)], memory


def decode_bad_id(word: int, top_k: int) -> tuple[int, int, int] | None:
    """Token, k and id of the first expert id that was out of range, or None; ids beyond int32 are clamped.

    >>> decode_bad_id(((2**31 - 1 - 7) << 32) | (99 & 0xFFFFFFFF), top_k=2)
    (3, 1, 99)
    """
    if word == 0:
        return None
    entry, bad = 2**31 - 1 - (word >> 32), word & 0xFFFFFFFF
    return entry // top_k, entry % top_k, bad - (1 << 32) if bad >= 1 << 31 else bad


def view_memory(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor over memory at an address; nothing keeps that memory alive.

    >>> word = torch.tensor([7])
    >>> view_memory(word.data_ptr(), (1,), torch.int64).tolist()
    [7]
    """
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(*shape)


@triton.jit
def area_of(link, generation, FIELD: tl.constexpr, rank, WIRE: tl.constexpr):
    """Address of an area of a rank's buffer, int64."""
    return tl.load(link.peers + (generation * 4 + FIELD) * WIRE.world + rank)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
