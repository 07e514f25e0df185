"""Machine code for `moecomm.memory.mail`: put letters into peers' memory, and wait for theirs without sleeping."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

from llvmlite import ir

from moecomm._jit import (
    BOOL,
    I32,
    I64,
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
    store,
    words,
)
from moecomm.memory.mail import WAIT, WAKE


class Box(IntEnum):
    """Words of what `send_kernel` and `arrive_kernel` know of the letter boxes of all ranks."""

    COUNT = 0  # boxes, that of this rank first
    OUTWARD = 1  # (places, boxes) addresses: where letters go
    INWARD = 2  # (places, boxes - 1) addresses: where those of peers come
    DRAFT = 3
    FIXED_BYTES = 4  # of a letter before its payload
    FLAGS = 5
    ASLEEP = 6
    CLOCK = 7
    FLAG = 8
    TRIES = 9


class Head(IntEnum):
    """Words of a letter."""

    STAMP = 0
    SEQ = 1
    CHECK = 2
    TICKET = 3
    TAG_BYTES = 4


@cache
def post_kernel() -> Kernel:
    """Compile: copy a letter to several places, stamp each, and look which of the receivers sleep.

    Arguments: n, places (n addresses), letter, num_bytes, stamp, flags (n addresses), asleep (n int64, written).
    The first word of a letter is its stamp; it is written last.
    """
    fn, b, (count, places, letter, num_bytes, stamp, flags, asleep) = function("post", 7)
    with loop(b, i64(0), count, 1) as at:
        place = index_at(b, places, at.i, 64)
        stamped = b.inttoptr(place, I64.as_pointer())
        b.store_atomic(i64(0), stamped, "monotonic", 8)  # while it is written it is no letter
        b.fence("release")
        target, source = (b.add(base, i64(8)) for base in (place, letter))
        copy_bytes(b, target, source, b.sub(num_bytes, i64(8)))
        b.store_atomic(stamp, stamped, "release", 8)
    b.fence("seq_cst")  # a receiver that goes to sleep sets its flag before it looks at the stamp once more
    with loop(b, i64(0), count, 1) as at:
        flag = b.inttoptr(index_at(b, flags, at.i, 64), I64.as_pointer())
        store(b, b.load_atomic(flag, "acquire", 8), row_at(b, asleep, at.i, i64(8)))
    return finish(fn, b)


@cache
def await_kernel() -> Kernel:
    """Compile: wait until all letters carry at least the stamp; 1 if they do, else 0 with `flag` set.

    Arguments: n, places (n addresses), stamp, tries, flag (address), clock (address). Between tries other processes
    get their turn. With tries the wait begins, without it goes on: `clock` is 1 + 2n int64 words, when it began (ns),
    then for each letter whether it was seen, then the total time (ns) it was waited for.
    """
    fn, b, (count, places, stamp, tries, flag, clock) = function("wait", 6)
    sched_yield = ir.Function(b.module, ir.FunctionType(I32, []), "sched_yield")
    sleeping = b.inttoptr(flag, I64.as_pointer())
    seen, waited = (b.add(clock, b.mul(i64(8), at)) for at in (i64(1), b.add(count, i64(1))))

    def look(*, awake: bool = True) -> None:
        """Return 1 if everything is there."""
        with loop(b, i64(0), count, 1, ir.Constant(BOOL, 1)) as at:
            place = b.inttoptr(index_at(b, places, at.i, 64), I64.as_pointer())
            there = b.icmp_signed(">=", b.load_atomic(place, "acquire", 8), stamp)
            with b.if_then(b.and_(there, b.icmp_signed("==", index_at(b, seen, at.i, 64), i64(0)))):
                took = b.sub(clock_ns(b), index_at(b, clock, i64(0), 64))
                store(b, b.add(index_at(b, waited, at.i, 64), took), row_at(b, waited, at.i, i64(8)))
                store(b, i64(1), row_at(b, seen, at.i, i64(8)))
            at.next = [b.and_(at.carried[0], there)]
        with b.if_then(at.carried[0]):
            if not awake:
                b.store_atomic(i64(0), sleeping, "monotonic", 8)
            b.ret(i64(1))

    with b.if_then(b.icmp_signed(">", tries, i64(0))):
        store(b, clock_ns(b), clock)
        with loop(b, i64(0), count, 1) as at:
            store(b, i64(0), row_at(b, seen, at.i, i64(8)))
    look()
    with loop(b, i64(0), tries, 1):
        b.call(sched_yield, [])
        look()
    b.store_atomic(i64(1), sleeping, "seq_cst", 8)
    b.fence("seq_cst")
    look(awake=False)
    b.ret(i64(0))
    return finish(fn, b)


@cache
def send_kernel() -> Kernel:
    """Compile: finish the draft of a letter and post it; gives how many of its receivers sleep.

    Arguments: box (table of `Box`), place, stamp, seq, ticket, payload, bytes of it.
    """
    fn, b, (box, place, stamp, seq, ticket, payload, payload_bytes) = function("send", 7)
    word = words(b, box)
    count, draft, asleep = word(Box.COUNT), word(Box.DRAFT), word(Box.ASLEEP)
    for name, value in ((Head.SEQ, seq), (Head.TICKET, ticket)):
        store(b, value, b.add(draft, i64(8 * name)))
    copy_bytes(b, b.add(draft, word(Box.FIXED_BYTES)), payload, payload_bytes)
    places = row_at(b, word(Box.OUTWARD), b.mul(place, count), i64(8))
    num_bytes = b.add(word(Box.FIXED_BYTES), payload_bytes)
    call(b, post_kernel(), count, places, draft, num_bytes, stamp, word(Box.FLAGS), asleep)
    with loop(b, i64(1), count, 1, i64(0)) as at:
        at.next = [b.add(at.carried[0], b.and_(index_at(b, asleep, at.i, 64), i64(1)))]
    b.ret(at.carried[0])
    return finish(fn, b)


@cache
def arrive_kernel() -> Kernel:
    """Compile: look for letters for a while; 1 if all are there and say what the draft says, 0 if some are missing.

    If they say something else: 2. Arguments: box, place, stamp.
    """
    fn, b, (box, place, stamp) = function("arrive", 3)
    word = words(b, box)
    count = b.sub(word(Box.COUNT), i64(1))
    places = row_at(b, word(Box.INWARD), b.mul(place, count), i64(8))
    check = index_at(b, word(Box.DRAFT), i64(Head.CHECK), 64)
    given = count, places, stamp, word(Box.TRIES), word(Box.FLAG), word(Box.CLOCK)
    is_there = call(b, await_kernel(), *given)
    with b.if_then(b.icmp_signed("==", is_there, i64(0)), likely=False):
        b.ret(i64(0))
    with loop(b, i64(0), count, 1, i64(1)) as at:
        letter = index_at(b, places, at.i, 64)
        same = b.icmp_signed("==", index_at(b, letter, i64(Head.CHECK), 64), check)
        later = b.icmp_signed("!=", index_at(b, letter, i64(Head.STAMP), 64), stamp)
        at.next = [b.select(b.or_(same, later), at.carried[0], i64(2))]
    b.ret(at.carried[0])
    return finish(fn, b)


# -- pieces of operations that go from one wait to the next without a way through Python, see `Channel.run` -----------


@dataclass(frozen=True, slots=True)
class Letter:
    """Words of an operation's table that say which letter is meant. box: the table of `Box`; seq: sequence number."""

    box: IntEnum
    place: IntEnum
    stamp: IntEnum
    seq: IntEnum


def post(
    b: ir.IRBuilder,
    word: Words,
    letter: Letter,
    then: int,
    *,
    ticket: ir.Value | None = None,
    payload: tuple[ir.Value, ir.Value] | None = None,
) -> None:
    """Post a letter, with its payload (address, bytes); where somebody must be woken, step `then` comes after that."""
    given = word(letter.box), word(letter.place), word(letter.stamp), word(letter.seq)
    num_asleep = call(b, send_kernel(), *given, ticket or i64(-1), *(payload or (i64(0), i64(0))))
    refuse(b, b.icmp_signed("!=", num_asleep, i64(0)), i64(then + WAKE))


def wait_step(letter: Letter, step: int, then: Kernel) -> Kernel:
    """Compile: look for letters, then go on; where they do not come soon, or are others, `step` comes after that."""
    fn, b, (table,) = function("wait", 1)
    word = words(b, table)
    said = call(b, arrive_kernel(), word(letter.box), word(letter.place), word(letter.stamp))
    refuse(b, b.icmp_signed("!=", said, i64(1)), i64(step + WAIT))
    b.ret(call(b, then, table))
    return finish(fn, b)
