"""Machine code for `moecomm.padded.quick`: dispatch and combine from one end to the other, see `Channel.run`."""

from __future__ import annotations

from enum import IntEnum
from functools import cache

from moecomm._jit import (
    Kernel,
    call,
    clock_ns,
    finish,
    function,
    i64,
    index_at,
    refuse,
    set_word,
    words,
)
from moecomm._rows_jit import reduce_kernel
from moecomm.memory._mail_jit import Letter, post, wait_step
from moecomm.memory.mail import STOP
from moecomm.padded._jit import Receive, Send, check_kernel, receive_kernel, runs_kernel, send_kernel

EVERYWHERE = 1 << 62  # as many "rows" of one byte: for kernels that are given addresses instead of row numbers
BAD_ENTRY = STOP  # beside what `check_kernel` gives
BROKEN = STOP << 2  # a token has a row that lies nowhere


class Trip(IntEnum):
    """Words of both operations."""

    BEGAN = 0  # written: times in ns
    SENT = 1
    ARRIVED = 2
    DONE = 3
    BOX = 4  # table of `_mail_jit.Box`
    PLACE = 5
    STAMP = 6
    SEQ = 7
    SEND = 8  # table of `_jit.Send`
    RECEIVE = 9  # table of `_jit.Receive`
    SCRATCH = 10  # (E,) int32
    NUM_ROWS = 11  # that arrived; written by a dispatch
    PER_EXPERT = 12  # W * M
    HIDDEN = 13
    ROW_BYTES = 14
    AREA = 15  # from which rows go home
    ROWS = 16  # (L, W * M, H) to lead there, or that area
    HOMES = 17  # (T, K) addresses
    OUT = 18
    WEIGHTS = 19
    BIAS = 20
    BIAS_STRIDE = 21
    TOKENS = 22  # of a combine


class Step(IntEnum):
    """The steps of an operation."""

    BEGIN = 0
    ARRIVE = 1
    END = 2


_LETTER = Letter(Trip.BOX, Trip.PLACE, Trip.STAMP, Trip.SEQ)


@cache
def dispatch_kernels(index_bits: int, streaming: bool) -> tuple[Kernel, Kernel, Kernel]:
    """Compile the steps of a dispatch; the argument of each is a table of `Trip`."""
    last = _dispatch_end()
    arrive = wait_step(_LETTER, Step.END, last)
    return _dispatch_begin(index_bits, streaming, arrive), arrive, last


def _dispatch_begin(index_bits: int, streaming: bool, then: Kernel) -> Kernel:
    """Write rows where experts read them, and tell how many there are."""
    fn, b, (table,) = function("begin", 1)
    word = words(b, table)
    send = word(Trip.SEND)
    set_word(b, table, Trip.BEGAN, clock_ns(b))
    names = Send.TOKENS, Send.TOP_K, Send.IDX, Send.EXPERTS, Send.MAX_TOKENS, Send.FLAT_OF_EXPERT, Send.COUNTS
    tokens, top_k, idx, experts, most, flat_of, counts = (index_at(b, send, i64(name), 64) for name in names)
    bad = call(b, check_kernel(index_bits), b.mul(tokens, top_k), idx, experts, most, flat_of, word(Trip.SCRATCH))
    refuse(b, b.icmp_signed(">=", bad, i64(0)), b.add(bad, i64(BAD_ENTRY)))
    call(b, send_kernel(index_bits, streaming), send)
    set_word(b, table, Trip.SENT, clock_ns(b))
    post(b, word, _LETTER, Step.ARRIVE, payload=(counts, b.mul(experts, i64(4))))
    b.ret(call(b, then, table))
    return finish(fn, b)


def _dispatch_end() -> Kernel:
    """Find out what came."""
    fn, b, (table,) = function("end", 1)
    word = words(b, table)
    set_word(b, table, Trip.ARRIVED, clock_ns(b))
    set_word(b, table, Trip.NUM_ROWS, call(b, receive_kernel(), word(Trip.RECEIVE)))
    set_word(b, table, Trip.DONE, clock_ns(b))
    b.ret(i64(0))
    return finish(fn, b)


@cache
def combine_kernels(dtype: str, weighted: bool, bias: str | None, streaming: bool) -> tuple[Kernel, Kernel, Kernel]:
    """Compile the steps of a combine; the argument of each is a table of `Trip`."""
    last = _combine_end(dtype, weighted, bias)
    arrive = wait_step(_LETTER, Step.END, last)
    return _combine_begin(streaming, arrive), arrive, last


def _combine_begin(streaming: bool, then: Kernel) -> Kernel:
    """Put rows where their sources read them, unless they lie there, and say so."""
    fn, b, (table,) = function("begin", 1)
    word = words(b, table)
    rows, area, receive = word(Trip.ROWS), word(Trip.AREA), word(Trip.RECEIVE)
    set_word(b, table, Trip.BEGAN, clock_ns(b))
    names = Receive.RANGES, Receive.LOCAL, Receive.RANKS
    ranges, local, ranks = (index_at(b, receive, i64(name), 64) for name in names)
    with b.if_then(b.icmp_signed("!=", rows, area)):
        call(b, runs_kernel(streaming), area, rows, word(Trip.ROW_BYTES), ranges, local, ranks, word(Trip.PER_EXPERT))
    set_word(b, table, Trip.SENT, clock_ns(b))
    post(b, word, _LETTER, Step.ARRIVE)
    b.ret(call(b, then, table))
    return finish(fn, b)


def _combine_end(dtype: str, weighted: bool, bias: str | None) -> Kernel:
    """Sum the rows of each token in ascending k, out of the memory of its experts' ranks."""
    fn, b, (table,) = function("end", 1)
    word = words(b, table)
    set_word(b, table, Trip.ARRIVED, clock_ns(b))
    top_k = index_at(b, word(Trip.SEND), i64(Send.TOP_K), 64)
    kernel = reduce_kernel(dtype, dtype, bias, 64, "entry" if weighted else None, False)
    out = i64(0), word(Trip.TOKENS), word(Trip.OUT), word(Trip.ROW_BYTES)
    rows = i64(0), i64(1), i64(EVERYWHERE), word(Trip.HIDDEN)
    places = word(Trip.HOMES), b.mul(top_k, i64(8)), top_k
    factors = word(Trip.WEIGHTS), b.mul(top_k, i64(4)), word(Trip.BIAS), word(Trip.BIAS_STRIDE)
    bad = call(b, kernel, *out, *rows, *places, *factors)
    refuse(b, b.icmp_signed(">=", bad, i64(0)), b.add(bad, i64(BROKEN)))
    set_word(b, table, Trip.DONE, clock_ns(b))
    b.ret(i64(0))
    return finish(fn, b)
