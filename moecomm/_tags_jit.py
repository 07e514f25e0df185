"""Machine code for the tags of checked rows: the loops of `moecomm.integrity`, which say the same in torch."""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from moecomm._jit import I64, Kernel, finish, function, i64, index_at, load, loop, refuse, row_at, store

TAG_BYTES = 24
NO_TOKEN = 0xFFFFFFFF


def _sum(b: ir.IRBuilder, row: ir.Value, row_bytes: ir.Value, mix: int, every_byte: bool) -> ir.Value:
    """The check sum of a row of whole words."""
    if not every_byte:
        last = load(b, b.add(row, b.sub(row_bytes, i64(8))), I64)
        return b.add(b.mul(load(b, row, I64), i64(mix)), last)
    with loop(b, i64(0), row_bytes, 8, i64(0), i64(mix)) as at:
        total, step = at.carried
        word = load(b, b.add(row, at.i), I64)
        at.next = [b.add(total, b.mul(word, b.or_(step, i64(1)))), b.add(step, i64(mix))]
    return at.carried[0]


@cache
def sums_kernel(mix: int, every_byte: bool) -> Kernel:
    """Compile `integrity.row_sums`. Arguments: N, rows, stride, row_bytes (a multiple of 8), sums (int64)."""
    fn, b, (count, rows, stride, row_bytes, sums) = function("sums", 5)
    with loop(b, i64(0), count, 1) as at:
        total = _sum(b, row_at(b, rows, at.i, stride), row_bytes, mix, every_byte)
        store(b, total, row_at(b, sums, at.i, i64(8)))
    return finish(fn, b)


@cache
def seal_kernel(index_bits: int, shift: int, one_in: int, mix: int) -> Kernel:
    """Compile the tags of rows that leave.

    Arguments: W, counts, index, every, sums, rows, stride, row_bytes, head, tags. counts: (W,) int64. 0 index_bits:
    entry i is of row i, and its token is not known. shift: the power of 2 that `every` is, or -1. one_in: every so many
    rows of a section get a sum (a power of two), the others 0. mix: 0 if the sums are given, else they are made here of
    the first and last word of a row.
    """
    fn, b, (ranks, counts, index, every, sums, rows, stride, row_bytes, head, tags) = function("seal", 10)
    with loop(b, i64(0), ranks, 1, i64(0)) as section:
        first = section.carried[0]
        last = b.add(first, index_at(b, counts, section.i, 64))
        with loop(b, first, last, 1) as at:
            source = index_at(b, index, at.i, index_bits)
            if index_bits:
                source = b.udiv(source, every) if shift < 0 else b.lshr(source, i64(shift))
            tag = row_at(b, tags, at.i, i64(TAG_BYTES))
            place = b.shl(b.sub(at.i, first), i64(32))
            store(b, head, tag)
            store(b, b.or_(place, source if index_bits else i64(NO_TOKEN)), b.add(tag, i64(8)))
            store(b, i64(0), b.add(tag, i64(16)))
            with b.if_then(b.icmp_signed("==", b.and_(b.sub(at.i, first), i64(one_in - 1)), i64(0))):
                row = row_at(b, rows, source, stride)
                total = _sum(b, row, row_bytes, mix, False) if mix else index_at(b, sums, source, 64)
                store(b, total, b.add(tag, i64(16)))
        section.next = [last]
    return finish(fn, b)


@cache
def verify_kernel(slot_bits: int, mix: int, every_byte: bool, one_in: int) -> Kernel:
    """Compile the comparison of rows that came. Arguments: W, counts, slots, rows, row_bytes, head, tags.

    One in `one_in` rows is compared with its sum, all with their places. Gives the first entry that is wrong, or -1.
    """
    fn, b, (ranks, counts, slots, rows, row_bytes, head, tags) = function("verify", 7)
    with loop(b, i64(0), ranks, 1, i64(0)) as section:
        first = section.carried[0]
        last = b.add(first, index_at(b, counts, section.i, 64))
        expected = b.or_(head, section.i)
        with loop(b, first, last, 1) as at:
            slot = index_at(b, slots, at.i, slot_bits)
            tag, row = row_at(b, tags, slot, i64(TAG_BYTES)), row_at(b, rows, slot, row_bytes)
            place = b.ashr(load(b, b.add(tag, i64(8)), I64), i64(32))
            wrong = b.or_(
                b.icmp_signed("!=", load(b, tag, I64), expected), b.icmp_signed("!=", place, b.sub(at.i, first))
            )
            refuse(b, wrong, at.i)
            with b.if_then(b.icmp_signed("==", b.and_(b.sub(at.i, first), i64(one_in - 1)), i64(0))):
                total = _sum(b, row, row_bytes, mix, every_byte)
                refuse(b, b.icmp_signed("!=", load(b, b.add(tag, i64(16)), I64), total), at.i)
        section.next = [last]
    return finish(fn, b)
