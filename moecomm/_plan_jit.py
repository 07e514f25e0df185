"""Machine code for planning on a CPU: the loops of `moecomm.plan`, which say the same in torch."""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from moecomm._jit import I32, I64, Kernel, finish, function, i64, index_at, loop, refuse, row_at, store


@cache
def range_kernel(index_bits: int) -> Kernel:
    """Compile `plan.first_bad_entry`. Arguments: n, topk_idx (index_bits), E; gives the entry, or -1."""
    fn, b, (count, idx, experts) = function("range", 3)
    with loop(b, i64(0), count, 1) as at:
        expert = index_at(b, idx, at.i, index_bits)
        refuse(b, b.icmp_unsigned(">", b.add(expert, i64(1)), experts), at.i)
    return finish(fn, b)


@cache
def plan_kernel(index_bits: int) -> Kernel:
    """Compile `plan.plan_send`.

    Arguments: T, K, E, W, topk_idx (index_bits), flat_of_expert, rank_of_flat (int64), then written: counts (E + W)
    int32, flat, rank, order int64, pos int32 (T * K each), pair_tokens, pair_ranks int64 (T * min(K, W)), pair_pos
    (T * W) int32, scratch (E + W + 2) int64: its last two become S and Q, the entries and pairs sent.
    """
    fn, b, args = function("plan", 16)
    tokens, top_k, experts, ranks, idx, flat_of, rank_of, counts, flat, rank, order, pos = args[:12]
    pair_tokens, pair_ranks, pair_pos, cursor = args[12:]
    entries = b.mul(tokens, top_k)
    _fill(b, counts, b.add(experts, ranks), 0)
    _fill(b, pair_pos, b.mul(tokens, ranks), -1)

    with loop(b, i64(0), tokens, 1) as t:
        first = b.mul(t.i, top_k)
        with loop(b, first, b.add(first, top_k), 1) as at:
            expert = index_at(b, idx, at.i, index_bits)
            refuse(b, b.icmp_signed(">=", expert, experts), at.i)
            expert = b.select(b.icmp_signed("<", expert, i64(0)), experts, expert)
            of = index_at(b, flat_of, expert, 64)
            to = index_at(b, rank_of, of, 64)
            _put(b, flat, at.i, of, 64)
            _put(b, rank, at.i, to, 64)
            with b.if_then(b.icmp_signed("<", of, experts)):
                _next(b, counts, of, 32)
                place = b.add(b.mul(t.i, ranks), to)
                with b.if_then(b.icmp_signed("<", index_at(b, pair_pos, place, 32), i64(0))):
                    _put(b, pair_pos, place, i64(0), 32)
                    _next(b, counts, b.add(experts, to), 32)

    both = b.add(experts, ranks)
    for number, (low, high) in enumerate(((i64(0), experts), (experts, both))):
        with loop(b, low, high, 1, i64(0)) as at:
            _put(b, cursor, at.i, at.carried[0], 64)
            at.next = [b.add(at.carried[0], index_at(b, counts, at.i, 32))]
        _put(b, cursor, b.add(both, i64(number)), at.carried[0], 64)

    with loop(b, i64(0), entries, 1) as at:
        of = index_at(b, flat, at.i, 64)
        with b.if_else(b.icmp_signed("<", of, experts)) as (sent, none):
            with sent:
                place = _next(b, cursor, of, 64)
                _put(b, order, place, at.i, 64)
                _put(b, pos, at.i, place, 32)
            with none:
                _put(b, pos, at.i, i64(-1), 32)

    with loop(b, i64(0), tokens, 1) as t, loop(b, i64(0), ranks, 1) as w:
        at_pair = b.add(b.mul(t.i, ranks), w.i)
        with b.if_then(b.icmp_signed(">=", index_at(b, pair_pos, at_pair, 32), i64(0))):
            place = _next(b, cursor, b.add(experts, w.i), 64)
            _put(b, pair_pos, at_pair, place, 32)
            _put(b, pair_tokens, place, t.i, 64)
            _put(b, pair_ranks, place, w.i, 64)
    return finish(fn, b)


@cache
def settle_kernel() -> Kernel:
    """Compile the counts and slots of `plan.settle`.

    Arguments: gathered (W, E + W) int32, W, E, rank, align, rank_starts (W + 1) int64, then written: totals (W + 1, W)
    int64 (entries, then rows_of_rank) and behind them groups (2, L) int32 (expert_offsets, then tokens_per_expert),
    slots (S) int32.
    """
    fn, b, args = function("settle", 8)
    gathered, ranks, experts, rank, align, starts, entries, slots = args
    groups = row_at(b, entries, b.mul(b.add(ranks, i64(1)), ranks), i64(8))
    width = b.add(experts, ranks)
    first, last = (index_at(b, starts, b.add(rank, i64(n)), 64) for n in (0, 1))
    num_local = b.sub(last, first)
    sent = b.alloca(I64)
    b.store(i64(0), sent)
    with loop(b, i64(0), b.mul(ranks, ranks), 1) as at:
        _put(b, entries, at.i, i64(0), 64)
    with loop(b, i64(0), ranks, 1) as to:
        low, high = index_at(b, starts, to.i, 64), index_at(b, starts, b.add(to.i, i64(1)), 64)
        mine = b.icmp_signed("==", to.i, rank)
        with loop(b, low, high, 1, i64(0)) as e:
            group = e.carried[0]
            with loop(b, i64(0), ranks, 1, i64(0)) as source:
                before = source.carried[0]
                count = index_at(b, gathered, b.add(b.mul(source.i, width), e.i), 32)
                place = b.add(b.mul(source.i, ranks), to.i)
                _put(b, entries, place, b.add(index_at(b, entries, place, 64), count), 64)
                with b.if_then(b.icmp_signed("==", source.i, rank)):
                    done = b.load(sent)
                    with loop(b, i64(0), count, 1) as n:
                        _put(b, slots, b.add(done, n.i), b.add(b.add(group, before), n.i), 32)
                    b.store(b.add(done, count), sent)
                source.next = [b.add(before, count)]
            total = source.carried[0]
            padded = b.mul(b.sdiv(b.add(total, b.sub(align, i64(1))), align), align)
            padded = b.select(b.icmp_signed("<", align, i64(0)), b.neg(align), padded)
            end = b.add(group, padded)
            with b.if_then(mine):
                local = b.sub(e.i, low)
                _put(b, groups, local, end, 32)
                _put(b, groups, b.add(num_local, local), total, 32)
            e.next = [end]
        _put(b, entries, b.add(b.mul(ranks, ranks), to.i), e.carried[0], 64)
    return finish(fn, b)


@cache
def table_kernel(by_bits: int) -> Kernel:
    """Compile `plan.pair_table` of `values[by_entry]`.

    Arguments: Q, K, pair_tokens, pair_ranks (Q int64), rank (T * K int64), by_entry (T * K of by_bits), values (int32),
    table (Q, K) int32, written.
    """
    fn, b, args = function("table", 8)
    pairs, top_k, pair_tokens, pair_ranks, rank, by_entry, values, table = args
    with loop(b, i64(0), pairs, 1) as q:
        token, to = index_at(b, pair_tokens, q.i, 64), index_at(b, pair_ranks, q.i, 64)
        first = b.mul(token, top_k)
        with loop(b, i64(0), top_k, 1) as k:
            entry, place = b.add(first, k.i), b.add(b.mul(q.i, top_k), k.i)
            with b.if_else(b.icmp_signed("==", index_at(b, rank, entry, 64), to)) as (here, elsewhere):
                with here:
                    _put(b, table, place, index_at(b, values, index_at(b, by_entry, entry, by_bits), 32), 32)
                with elsewhere:
                    _put(b, table, place, i64(-1), 32)
    return finish(fn, b)


def _put(b: ir.IRBuilder, base: ir.Value, at: ir.Value, value: ir.Value, bits: int) -> None:
    store(b, value if bits == 64 else b.trunc(value, I32), row_at(b, base, at, i64(bits // 8)))


def _next(b: ir.IRBuilder, base: ir.Value, at: ir.Value, bits: int) -> ir.Value:
    """Count up; the value before."""
    before = index_at(b, base, at, bits)
    _put(b, base, at, b.add(before, i64(1)), bits)
    return before


def _fill(b: ir.IRBuilder, base: ir.Value, count: ir.Value, value: int) -> None:
    with loop(b, i64(0), count, 1) as at:
        _put(b, base, at.i, i64(value), 32)
