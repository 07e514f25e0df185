"""Machine code for layout "padded" on a CPU: what a rank does between two waves, each in one call.

The arguments of a kernel are words of an int64 table, whose address it takes: most of them never change, and handing
over twenty of them would take longer than some kernels run. Legend: see `moecomm.padded`.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache

from llvmlite import ir

from moecomm._jit import (
    I32,
    I64,
    Kernel,
    copy_bytes,
    finish,
    function,
    i64,
    index_at,
    loop,
    refuse,
    row_at,
    store,
    words,
)
from moecomm._rows_jit import copy_row

TOO_MANY = 1 << 40  # beside the entry: its expert has no slot left


class Send(IntEnum):
    """Words of `send_kernel`."""

    TOKENS = 0
    TOP_K = 1
    EXPERTS = 2
    MAX_TOKENS = 3
    FIRST_ROW = 4  # rank * M
    ROWS_PER_EXPERT = 5  # W * M
    IDX = 6
    WEIGHTS = 7  # (T, K) float32, or 0: all are 1
    FLAT_OF_EXPERT = 8
    RANK_OF_FLAT = 9
    LOCAL_OF_FLAT = 10
    OUT_AREAS = 11  # (W,) int64 addresses
    HOME_AREAS = 12
    HOME_ROW_BYTES = 13
    COUNTS = 14  # from here on written: (E,) int32
    IDX_KEPT = 15  # (T, K) int64
    WEIGHTS_KEPT = 16  # (T, K) float32
    PLACES = 17  # (T, K) int32 row at the expert's rank, -1 for none
    HOMES = 18  # (T, K) int64 address from which its row comes home, -1 for none
    SENT = 19  # how many entries have an expert
    SENT_HERE = 20  # how many of them on this rank
    HERE = 21  # this rank
    PAYLOADS = 22
    FIRST_PAYLOAD = 23  # address, bytes of a row, offset in the area: three words each


class Receive(IntEnum):
    """Words of `receive_kernel`."""

    LOCAL = 0
    RANKS = 1
    MAX_TOKENS = 2
    COUNTS = 3  # of rank 0, of the first expert here
    COUNTS_STRIDE = 4
    RANGES = 5  # from here on written: (L, W, 2) int32
    TOKENS = 6  # (L,) int32
    TOTAL = 7  # (L,) int64, added to


@cache
def check_kernel(index_bits: int) -> Kernel:
    """Compile: whether every entry has an expert and a place there; a bad entry, `TOO_MANY` + one, or -1.

    Arguments: entries, idx, E, M, flat_of_expert, counts (E,) int32, written.
    """
    fn, b, (entries, idx, experts, max_tokens, flat_of, counts) = function("check", 6)
    with loop(b, i64(0), experts, 1) as at:
        store(b, ir.Constant(I32, 0), row_at(b, counts, at.i, i64(4)))
    with loop(b, i64(0), entries, 1) as at:
        expert = index_at(b, idx, at.i, index_bits)
        refuse(b, b.icmp_unsigned(">", b.add(expert, i64(1)), experts), at.i)
        with b.if_then(b.icmp_signed(">=", expert, i64(0))):
            flat = index_at(b, flat_of, expert, 64)
            count = index_at(b, counts, flat, 32)
            refuse(b, b.icmp_signed(">=", count, max_tokens), b.add(at.i, i64(TOO_MANY)))
            store(b, b.trunc(b.add(count, i64(1)), I32), row_at(b, counts, flat, i64(4)))
    return finish(fn, b)


@cache
def send_kernel(index_bits: int, streaming: bool = False) -> Kernel:
    """Compile: find the place of every entry, then write payloads there; `check_kernel` says that there are places.

    `streaming` writes past the caches: row bytes and offsets must then be multiples of 64.
    """
    fn, b, (table,) = function("send", 1)
    word = words(b, table)
    tokens, top_k, experts = word(Send.TOKENS), word(Send.TOP_K), word(Send.EXPERTS)
    counts, places, homes, kept = word(Send.COUNTS), word(Send.PLACES), word(Send.HOMES), word(Send.IDX_KEPT)
    flat_of, rank_of, local_of = word(Send.FLAT_OF_EXPERT), word(Send.RANK_OF_FLAT), word(Send.LOCAL_OF_FLAT)
    entries = b.mul(tokens, top_k)
    copy_bytes(b, word(Send.WEIGHTS_KEPT), word(Send.WEIGHTS), b.mul(entries, i64(4)))
    with loop(b, i64(0), experts, 1) as at:
        store(b, ir.Constant(I32, 0), row_at(b, counts, at.i, i64(4)))
    with loop(b, i64(0), entries, 1, i64(0), i64(0)) as at:
        expert = index_at(b, word(Send.IDX), at.i, index_bits)
        store(b, expert, row_at(b, kept, at.i, i64(8)))
        wanted = b.icmp_signed(">=", expert, i64(0))
        store(b, ir.Constant(I32, -1), row_at(b, places, at.i, i64(4)))
        store(b, i64(-1), row_at(b, homes, at.i, i64(8)))
        with b.if_then(wanted):
            flat = index_at(b, flat_of, expert, 64)
            slot, rank = index_at(b, counts, flat, 32), index_at(b, rank_of, flat, 64)
            store(b, b.trunc(b.add(slot, i64(1)), I32), row_at(b, counts, flat, i64(4)))
            group = b.mul(index_at(b, local_of, flat, 32), word(Send.ROWS_PER_EXPERT))
            place = b.add(b.add(group, word(Send.FIRST_ROW)), slot)
            area = index_at(b, word(Send.HOME_AREAS), rank, 64)
            store(b, b.trunc(place, I32), row_at(b, places, at.i, i64(4)))
            store(b, row_at(b, area, place, word(Send.HOME_ROW_BYTES)), row_at(b, homes, at.i, i64(8)))
        at_flat = index_at(b, flat_of, b.select(wanted, expert, experts), 64)
        here = b.icmp_signed("==", index_at(b, rank_of, at_flat, 64), word(Send.HERE))
        at.next = [b.add(n, b.zext(flag, I64)) for n, flag in zip(at.carried, (wanted, here), strict=True)]
    for name, value in zip((Send.SENT, Send.SENT_HERE), at.carried, strict=True):
        store(b, value, b.add(table, i64(8 * name)))
    with loop(b, i64(0), word(Send.PAYLOADS), 1) as p:
        payload = row_at(b, b.add(table, i64(8 * Send.FIRST_PAYLOAD)), p.i, i64(24))
        rows, row_bytes, offset = (index_at(b, payload, i64(n), 64) for n in range(3))
        with loop(b, i64(0), tokens, 1) as t, loop(b, i64(0), top_k, 1) as k:
            entry = b.add(b.mul(t.i, top_k), k.i)
            place = index_at(b, places, entry, 32)
            with b.if_then(b.icmp_signed(">=", place, i64(0))):
                flat = index_at(b, flat_of, index_at(b, kept, entry, 64), 64)
                area = index_at(b, word(Send.OUT_AREAS), index_at(b, rank_of, flat, 64), 64)
                target = row_at(b, b.add(area, offset), place, row_bytes)
                source = row_at(b, rows, t.i, row_bytes)
                copy_row(b, target, source, source, row_bytes, streaming)
    return finish(fn, b, streaming)


@cache
def receive_kernel() -> Kernel:
    """Compile: what the counts of all ranks say of the rows here; gives how many there are."""
    fn, b, (table,) = function("receive", 1)
    word = words(b, table)
    local, ranks = word(Receive.LOCAL), word(Receive.RANKS)
    with loop(b, i64(0), local, 1, i64(0)) as e:
        with loop(b, i64(0), ranks, 1, i64(0)) as source:
            counts = row_at(b, word(Receive.COUNTS), source.i, word(Receive.COUNTS_STRIDE))
            count, begin = index_at(b, counts, e.i, 32), b.mul(source.i, word(Receive.MAX_TOKENS))
            pair = b.mul(b.add(b.mul(e.i, ranks), source.i), i64(2))
            for n, value in enumerate((begin, b.add(begin, count))):
                store(b, b.trunc(value, I32), row_at(b, word(Receive.RANGES), b.add(pair, i64(n)), i64(4)))
            source.next = [b.add(source.carried[0], count)]
        came, total = source.carried[0], row_at(b, word(Receive.TOTAL), e.i, i64(8))
        store(b, b.trunc(came, I32), row_at(b, word(Receive.TOKENS), e.i, i64(4)))
        store(b, b.add(index_at(b, total, i64(0), 64), came), total)
        e.next = [b.add(e.carried[0], came)]
    b.ret(e.carried[0])
    return finish(fn, b)


@cache
def runs_kernel(streaming: bool = False) -> Kernel:
    """Compile: copy the rows of all ranges from one (L, W * M, ...) array to another; `streaming` as in `send_kernel`.

    Arguments: out, rows, row_bytes, ranges (L, W, 2) int32, L, W, W * M.
    """
    fn, b, (out, rows, row_bytes, ranges, local, ranks, per_expert) = function("runs", 7)
    with loop(b, i64(0), local, 1) as e, loop(b, i64(0), ranks, 1) as source:
        pair = b.mul(b.add(b.mul(e.i, ranks), source.i), i64(2))
        begin, end = (index_at(b, ranges, b.add(pair, i64(n)), 32) for n in range(2))
        offset = b.mul(b.add(b.mul(e.i, per_expert), begin), row_bytes)
        run = b.add(rows, offset)
        copy_row(b, b.add(out, offset), run, run, b.mul(b.sub(end, begin), row_bytes), streaming)
    return finish(fn, b, streaming)
