"""Machine code for `moecomm.express`: a whole operation, waiting included, without a way through Python.

An operation is a chain of steps, see `memory.channel.Channel.run`. Legend: see `moecomm.operations`.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache

from llvmlite import ir

from moecomm._jit import (
    Kernel,
    Words,
    call,
    clock_ns,
    copy_bytes,
    finish,
    function,
    i64,
    index_at,
    loop,
    refuse,
    row_at,
    set_word,
    store,
    words,
)
from moecomm._plan_jit import plan_kernel, range_kernel, settle_kernel, table_kernel
from moecomm._rows_jit import reduce_kernel, scatter_kernel
from moecomm.memory._mail_jit import Head, Letter, post, wait_step
from moecomm.memory.mail import STOP
from moecomm.transport.symmetric import LANE_ALIGN_BYTES

BAD_ID = STOP  # beside the entry: it names no expert
TOO_LARGE = 1 << 41  # the rows do not fit the segment of a rank
BROKEN = 1 << 42  # an index says where no row is


class Wire(IntEnum):
    """Words of both operations: where to write, and which letters say so."""

    BEGAN = 0  # written: times in ns
    PLANNED = 1
    COUNTED = 2
    SETTLED = 3
    SENT = 4
    ARRIVED = 5
    DONE = 6
    BOX = 7  # table of `_mail_jit.Box`
    RANKS = 8
    RANK = 9
    MEMORY = 10  # (W,) int64 addresses of the segments of each rank
    SEGMENT_BYTES = 11
    STRIDE = 12  # bytes from one letter to the next
    STARTS = 13  # (W,) int64, written: where the segments of this operation begin
    LETTERS = 14  # given each time, from here on: the letter DONE of rank 0 that came before this operation
    SEQ = 15
    NEXT = 16  # this rank's segment for the next operation
    DONE_PLACE = 17
    DONE_STAMP = 18


class Out(IntEnum):
    """Further words of a dispatch."""

    COUNTS_PLACE = 19
    COUNTS_STAMP = 20
    COUNTS_CAME = 21  # payload of the letter ARRIVE of rank 0
    TOKENS = 22
    IDX = 23
    X = 24
    WEIGHTS = 25  # or 0; the last one that is given each time
    TOP_K = 26
    EXPERTS = 27
    ROW_BYTES = 28
    FLAT_OF_EXPERT = 29
    RANK_OF_FLAT = 30
    RANK_STARTS = 31
    NUM_LOCAL = 32
    COUNTS = 33  # memory that is written: what `plan.plan_send` makes
    FLAT = 34
    RANK_TK = 35
    ORDER = 36
    POS = 37
    PAIR_TOKENS = 38
    PAIR_RANKS = 39
    PAIR_POS = 40
    CURSOR = 41
    GATHERED = 42  # (W, E + W) int32
    TOTALS = 43  # what `_plan_jit.settle_kernel` makes
    SLOTS = 44
    TABLE = 45
    LANES = 46  # (3, 4, W) int64: outputs of rows, weights, table as `rows.scatter_rows` takes them
    ROWS_SO_FAR = 47  # (L,) int64, added to
    NUM_SENT = 48  # written: S, Q, those of them to this rank itself, N and P
    NUM_PAIRS = 49
    SENT_HERE = 50
    PAIRS_HERE = 51
    NUM_ROWS = 52
    NUM_RECEIVED = 53


class Home(IntEnum):
    """Further words of a combine."""

    TOKENS = 19
    ROWS = 20
    NUM_ROWS = 21
    WEIGHTS = 22
    TABLE = 23
    PAIR_COUNTS = 24
    PAIR_POS = 25
    OUT = 26
    BIAS = 27
    BIAS_STRIDE = 28  # the last one that is given each time
    TOP_K = 29
    ROW_BYTES = 30
    HIDDEN = 31
    NUM_SENT = 32  # written: sums sent, and those of them to this rank itself
    SENT_HERE = 33


class Part(IntEnum):
    """What a handle keeps, in one block."""

    SEND_ORDER = 0
    PAIR_TOKENS = 1
    TOPK_IDX = 2
    TOPK_WEIGHTS = 3
    ROW_WEIGHTS = 4
    SEND_SLOTS = 5
    SEND_POS = 6
    PAIR_POS = 7
    RECV_TABLE = 8
    GROUPS = 9  # end of each local expert's rows, then how many they are
    EXPERT_COUNTS = 10
    PAIR_COUNTS = 11


class OutStep(IntEnum):
    """The steps of a dispatch."""

    BEGIN = 0
    COUNTS = 1
    SEND = 2
    ARRIVE = 3
    END = 4


class HomeStep(IntEnum):
    """The steps of a combine."""

    BEGIN = 0
    ARRIVE = 1
    END = 2


_DONE = Letter(Wire.BOX, Wire.DONE_PLACE, Wire.DONE_STAMP, Wire.SEQ)
_COUNTS = Letter(Wire.BOX, Out.COUNTS_PLACE, Out.COUNTS_STAMP, Wire.SEQ)


# -- dispatch ------------------------------------------------------------------------------------------------------


@cache
def dispatch_kernels(index_bits: int, weighted: bool) -> list[Kernel]:
    """Compile the steps of a dispatch in layout "expert"; the argument of each is a table of `Wire` and `Out`."""
    last = _dispatch_end()
    arrive = wait_step(_DONE, OutStep.END, last)
    send = _dispatch_send(weighted, arrive)
    counts = wait_step(_COUNTS, OutStep.SEND, send)
    return [_dispatch_begin(index_bits, counts), counts, send, arrive, last]


def _dispatch_begin(index_bits: int, then: Kernel) -> Kernel:
    """Plan, and tell the counts."""
    fn, b, (table,) = function("begin", 1)
    word = words(b, table)
    set_word(b, table, Wire.BEGAN, clock_ns(b))
    entries, experts, ranks = b.mul(word(Out.TOKENS), word(Out.TOP_K)), word(Out.EXPERTS), word(Wire.RANKS)
    bad = call(b, range_kernel(index_bits), entries, word(Out.IDX), experts)
    refuse(b, b.icmp_signed(">=", bad, i64(0)), b.add(bad, i64(BAD_ID)))
    given = Out.IDX, Out.FLAT_OF_EXPERT, Out.RANK_OF_FLAT, Out.COUNTS, Out.FLAT, Out.RANK_TK, Out.ORDER, Out.POS
    made = Out.PAIR_TOKENS, Out.PAIR_RANKS, Out.PAIR_POS, Out.CURSOR
    sizes = word(Out.TOKENS), word(Out.TOP_K), experts, ranks
    call(b, plan_kernel(index_bits), *sizes, *(word(name) for name in (*given, *made)))
    told = b.add(experts, ranks)
    for name, value in ((Out.NUM_SENT, told), (Out.NUM_PAIRS, b.add(told, i64(1)))):
        set_word(b, table, name, index_at(b, word(Out.CURSOR), value, 64))
    set_word(b, table, Wire.PLANNED, clock_ns(b))
    payload = word(Out.COUNTS), b.mul(told, i64(4))
    post(b, word, _COUNTS, OutStep.COUNTS, payload=payload)
    b.ret(call(b, then, table))
    return finish(fn, b)


def _dispatch_send(weighted: bool, then: Kernel) -> Kernel:
    """Find every row its place from the counts of all ranks, write rows, weights and table there, and say so."""
    fn, b, (table,) = function("send", 1)
    word = words(b, table)
    ranks, rank, experts, top_k = word(Wire.RANKS), word(Wire.RANK), word(Out.EXPERTS), word(Out.TOP_K)
    set_word(b, table, Wire.COUNTED, clock_ns(b))
    width = b.add(experts, ranks)
    row = b.mul(width, i64(4))
    with loop(b, i64(0), ranks, 1) as at:
        came = row_at(b, word(Out.COUNTS_CAME), at.i, word(Wire.STRIDE))
        copy_bytes(b, row_at(b, word(Out.GATHERED), at.i, row), came, row)
    placed = word(Out.RANK_STARTS), word(Out.TOTALS), word(Out.SLOTS)
    call(b, settle_kernel(), word(Out.GATHERED), ranks, experts, rank, i64(1), *placed)
    num_pairs, pairs = word(Out.NUM_PAIRS), (word(Out.PAIR_TOKENS), word(Out.PAIR_RANKS), word(Out.RANK_TK))
    call(b, table_kernel(32), num_pairs, top_k, *pairs, word(Out.POS), word(Out.SLOTS), word(Out.TABLE))
    _segments(b, word)
    _lanes(b, table, word, weighted)
    set_word(b, table, Wire.SETTLED, clock_ns(b))
    entries = b.mul(word(Out.TOKENS), top_k)
    lane_bytes = b.mul(ranks, i64(32))
    lanes = [row_at(b, word(Out.LANES), i64(n), lane_bytes) for n in range(3)]
    by_slot, in_turn = scatter_kernel(64, 32), scatter_kernel(0, 0)
    moved = word(Out.X), word(Out.TOKENS), word(Out.ROW_BYTES), word(Out.ORDER), top_k, word(Out.SLOTS)
    results = [call(b, by_slot, ranks, lanes[0], *moved)]
    if weighted:
        moved = word(Out.WEIGHTS), entries, i64(4), word(Out.ORDER), i64(1), word(Out.SLOTS)
        results.append(call(b, by_slot, ranks, lanes[1], *moved))
    moved = word(Out.TABLE), num_pairs, b.mul(top_k, i64(4)), i64(0), i64(1), i64(0)
    results.append(call(b, in_turn, ranks, lanes[2], *moved))
    for result in results:
        refuse(b, b.icmp_signed(">=", result, i64(0)), i64(BROKEN))
    set_word(b, table, Wire.SENT, clock_ns(b))
    post(b, word, _DONE, OutStep.ARRIVE, ticket=word(Wire.NEXT))
    b.ret(call(b, then, table))
    return finish(fn, b)


def _lanes(b: ir.IRBuilder, table: ir.Value, word: Words, weighted: bool) -> None:
    """Where the sections of each lane go: address, rows to write, the first of them, rows in all, for every rank."""
    ranks, rank, experts, totals = word(Wire.RANKS), word(Wire.RANK), word(Out.EXPERTS), word(Out.TOTALS)
    width, table_bytes = b.add(experts, ranks), b.mul(word(Out.TOP_K), i64(4))
    align = i64(-LANE_ALIGN_BYTES)

    def put(lane: int, to: ir.Value, *fields: ir.Value) -> None:
        for n, value in enumerate(fields):
            place = b.add(b.mul(ranks, i64(4 * lane + n)), to)
            store(b, value, row_at(b, word(Out.LANES), place, i64(8)))

    with loop(b, i64(0), ranks, 1) as to:
        sent = index_at(b, totals, b.add(b.mul(rank, ranks), to.i), 64)
        arrive = index_at(b, totals, b.add(b.mul(ranks, ranks), to.i), 64)
        with loop(b, i64(0), ranks, 1, i64(0), i64(0), i64(0)) as source:
            before, mine, all_pairs = source.carried
            at = b.add(b.mul(source.i, width), b.add(experts, to.i))
            count = index_at(b, word(Out.GATHERED), at, 32)
            before = b.select(b.icmp_signed("<", source.i, rank), b.add(before, count), before)
            mine = b.select(b.icmp_signed("==", source.i, rank), count, mine)
            source.next = [before, mine, b.add(all_pairs, count)]
        before, mine, all_pairs = source.carried
        start = index_at(b, word(Wire.STARTS), to.i, 64)
        used = b.add(b.mul(arrive, word(Out.ROW_BYTES)), i64(LANE_ALIGN_BYTES - 1))
        ends = [b.and_(used, align)]
        if weighted:
            ends.append(b.and_(b.add(b.add(ends[0], b.mul(arrive, i64(4))), i64(LANE_ALIGN_BYTES - 1)), align))
            put(1, to.i, b.add(start, ends[0]), sent, i64(0), arrive)
        put(0, to.i, start, sent, i64(0), arrive)
        put(2, to.i, b.add(start, ends[-1]), mine, before, all_pairs)
        end = b.and_(b.add(b.add(ends[-1], b.mul(all_pairs, table_bytes)), i64(LANE_ALIGN_BYTES - 1)), align)
        refuse(b, b.icmp_signed(">", end, word(Wire.SEGMENT_BYTES)), b.add(to.i, i64(TOO_LARGE)))
        with b.if_then(b.icmp_signed("==", to.i, rank)):
            found = (Out.SENT_HERE, sent), (Out.PAIRS_HERE, mine), (Out.NUM_ROWS, arrive), (Out.NUM_RECEIVED, all_pairs)
            for name, value in found:
                set_word(b, table, name, value)


def _dispatch_end() -> Kernel:
    """Count what came."""
    fn, b, (table,) = function("end", 1)
    word = words(b, table)
    set_word(b, table, Wire.ARRIVED, clock_ns(b))
    ranks, local = word(Wire.RANKS), word(Out.NUM_LOCAL)
    groups = row_at(b, word(Out.TOTALS), b.mul(b.add(ranks, i64(1)), ranks), i64(8))
    with loop(b, i64(0), local, 1) as at:
        total = row_at(b, word(Out.ROWS_SO_FAR), at.i, i64(8))
        came = index_at(b, groups, b.add(local, at.i), 32)
        store(b, b.add(index_at(b, total, i64(0), 64), came), total)
    b.ret(i64(0))
    return finish(fn, b)


@cache
def keep_kernel(index_bits: int, weighted: bool) -> Kernel:
    """Compile: copy what a handle keeps into one block, in the order of `Part`, each at a multiple of 8 bytes.

    Arguments: table of `Wire` and `Out`, block, where each part begins in it (int64, written).
    """
    fn, b, (table, block, begins) = function("keep", 3)
    word = words(b, table)
    ranks, rank, experts, tokens = word(Wire.RANKS), word(Wire.RANK), word(Out.EXPERTS), word(Out.TOKENS)
    top_k, entries = word(Out.TOP_K), b.mul(tokens, word(Out.TOP_K))
    lane_bytes = b.mul(ranks, i64(32))
    weights_came, table_came = (index_at(b, row_at(b, word(Out.LANES), i64(n), lane_bytes), rank, 64) for n in (1, 2))
    groups = row_at(b, word(Out.TOTALS), b.mul(b.add(ranks, i64(1)), ranks), i64(8))
    pairs_came = b.mul(word(Out.NUM_RECEIVED), top_k)
    nothing = i64(0)
    parts = {
        Part.SEND_ORDER: (word(Out.ORDER), word(Out.NUM_SENT), 8),
        Part.PAIR_TOKENS: (word(Out.PAIR_TOKENS), word(Out.NUM_PAIRS), 8),
        Part.TOPK_IDX: (word(Out.IDX), entries, index_bits // 8),
        Part.TOPK_WEIGHTS: (word(Out.WEIGHTS), entries if weighted else nothing, 4),
        Part.ROW_WEIGHTS: (weights_came, word(Out.NUM_ROWS) if weighted else nothing, 4),
        Part.SEND_SLOTS: (word(Out.SLOTS), word(Out.NUM_SENT), 4),
        Part.SEND_POS: (word(Out.POS), entries, 4),
        Part.PAIR_POS: (word(Out.PAIR_POS), b.mul(tokens, ranks), 4),
        Part.RECV_TABLE: (table_came, pairs_came, 4),
        Part.GROUPS: (groups, word(Out.NUM_LOCAL), 8),
    }
    at = block
    for part, (source, count, item_bytes) in parts.items():
        num_bytes = b.mul(count, i64(item_bytes))
        copy_bytes(b, at, source, num_bytes)
        store(b, b.sub(at, block), b.add(begins, i64(8 * part)))
        at = b.and_(b.add(b.add(at, num_bytes), i64(7)), i64(-8))
    width = b.mul(b.add(experts, ranks), i64(4))
    for part, first, count in ((Part.EXPERT_COUNTS, i64(0), experts), (Part.PAIR_COUNTS, experts, ranks)):
        num_bytes = b.mul(count, i64(4))
        store(b, b.sub(at, block), b.add(begins, i64(8 * part)))
        with loop(b, i64(0), ranks, 1) as row:
            counts = row_at(b, row_at(b, word(Out.GATHERED), row.i, width), first, i64(4))
            copy_bytes(b, row_at(b, at, row.i, num_bytes), counts, num_bytes)
        at = b.and_(b.add(b.add(at, b.mul(ranks, num_bytes)), i64(7)), i64(-8))
    set_word(b, table, Wire.DONE, clock_ns(b))
    b.ret(i64(0))
    return finish(fn, b)


# -- combine -------------------------------------------------------------------------------------------------------


@cache
def combine_kernels(dtype: str, weighted: bool, bias: str | None) -> list[Kernel]:
    """Compile the steps of a combine with reduce="rank"; the argument of each is a table of `Wire` and `Home`."""
    last = _combine_end(dtype, bias)
    arrive = wait_step(_DONE, HomeStep.END, last)
    return [_combine_begin(dtype, weighted, arrive), arrive, last]


def _combine_begin(dtype: str, weighted: bool, then: Kernel) -> Kernel:
    """Sum rows per token of every rank into its memory, and say so."""
    fn, b, (table,) = function("begin", 1)
    word = words(b, table)
    ranks, rank, pair_counts = word(Wire.RANKS), word(Wire.RANK), word(Home.PAIR_COUNTS)
    row_bytes, top_k = word(Home.ROW_BYTES), word(Home.TOP_K)
    set_word(b, table, Wire.BEGAN, clock_ns(b))
    _segments(b, word)
    rows = word(Home.ROWS), row_bytes, word(Home.NUM_ROWS), word(Home.HIDDEN)
    sums = *rows, word(Home.TABLE), b.mul(top_k, i64(4)), top_k, word(Home.WEIGHTS), i64(0), i64(0), i64(0)
    kernel = reduce_kernel(dtype, dtype, None, 32, "row" if weighted else None, False)
    with loop(b, i64(0), ranks, 1, i64(0)) as to:
        first = to.carried[0]
        counts = row_at(b, pair_counts, b.mul(to.i, ranks), i64(4))
        with loop(b, i64(0), rank, 1, i64(0)) as source:
            source.next = [b.add(source.carried[0], index_at(b, counts, source.i, 32))]
        count = index_at(b, counts, rank, 32)
        start, last = index_at(b, word(Wire.STARTS), to.i, 64), b.add(first, count)
        out = row_at(b, start, b.sub(source.carried[0], first), row_bytes)
        bad = call(b, kernel, first, last, out, row_bytes, *sums)
        refuse(b, b.icmp_signed(">=", bad, i64(0)), b.add(bad, i64(BROKEN)))
        with b.if_then(b.icmp_signed("==", to.i, rank)):
            set_word(b, table, Home.SENT_HERE, count)
        to.next = [last]
    set_word(b, table, Home.NUM_SENT, to.carried[0])
    set_word(b, table, Wire.SENT, clock_ns(b))
    post(b, word, _DONE, HomeStep.ARRIVE, ticket=word(Wire.NEXT))
    b.ret(call(b, then, table))
    return finish(fn, b)


def _combine_end(dtype: str, bias: str | None) -> Kernel:
    """Sum what came home of every token, in ascending rank order."""
    fn, b, (table,) = function("end", 1)
    word = words(b, table)
    ranks, rank, row_bytes = word(Wire.RANKS), word(Wire.RANK), word(Home.ROW_BYTES)
    set_word(b, table, Wire.ARRIVED, clock_ns(b))
    mine = row_at(b, word(Home.PAIR_COUNTS), b.mul(rank, ranks), i64(4))
    with loop(b, i64(0), ranks, 1, i64(0)) as at:
        at.next = [b.add(at.carried[0], index_at(b, mine, at.i, 32))]
    rows = index_at(b, word(Wire.STARTS), rank, 64), row_bytes, at.carried[0], word(Home.HIDDEN)
    places = word(Home.PAIR_POS), b.mul(ranks, i64(4)), ranks
    kernel = reduce_kernel(dtype, dtype, bias, 32, None, False)
    added = i64(0), i64(0), word(Home.BIAS), word(Home.BIAS_STRIDE)
    bad = call(b, kernel, i64(0), word(Home.TOKENS), word(Home.OUT), row_bytes, *rows, *places, *added)
    refuse(b, b.icmp_signed(">=", bad, i64(0)), b.add(bad, i64(BROKEN)))
    set_word(b, table, Wire.DONE, clock_ns(b))
    b.ret(i64(0))
    return finish(fn, b)


# -- what both do --------------------------------------------------------------------------------------------------


def _segments(b: ir.IRBuilder, word: Words) -> None:
    """Where every rank wants the rows of this operation, as its last letter said."""
    with loop(b, i64(0), word(Wire.RANKS), 1) as at:
        ticket = index_at(b, row_at(b, word(Wire.LETTERS), at.i, word(Wire.STRIDE)), i64(Head.TICKET), 64)
        start = row_at(b, index_at(b, word(Wire.MEMORY), at.i, 64), ticket, word(Wire.SEGMENT_BYTES))
        store(b, start, row_at(b, word(Wire.STARTS), at.i, i64(8)))
