"""Machine code for `moecomm.memory.mail`: put letters into peers' memory, and wait for theirs without sleeping."""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from moecomm._jit import BOOL, I8, I32, I64, Kernel, finish, function, i64, index_at, loop, row_at, store

_MONOTONIC = 1  # linux/time.h


@cache
def post_kernel() -> Kernel:
    """Compile: copy a letter to several places, stamp each, and look which of the receivers sleep.

    Arguments: n, places (n addresses), letter, num_bytes, stamp, flags (n addresses), asleep (n int64, written).
    The first word of a letter is its stamp; it is written last.
    """
    fn, b, (count, places, letter, num_bytes, stamp, flags, asleep) = function("post", 7)
    pointer = I8.as_pointer()
    memcpy = b.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, I64])
    with loop(b, i64(0), count, 1) as at:
        place = index_at(b, places, at.i, 64)
        stamped = b.inttoptr(place, I64.as_pointer())
        b.store_atomic(i64(0), stamped, "monotonic", 8)  # while it is written it is no letter
        b.fence("release")
        target, source = (b.inttoptr(b.add(base, i64(8)), pointer) for base in (place, letter))
        b.call(memcpy, [target, source, b.sub(num_bytes, i64(8)), ir.Constant(BOOL, 0)])
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
    clock_gettime = ir.Function(b.module, ir.FunctionType(I32, [I32, I8.as_pointer()]), "clock_gettime")
    moment = b.alloca(I64, i64(2))
    sleeping = b.inttoptr(flag, I64.as_pointer())
    seen, waited = (b.add(clock, b.mul(i64(8), at)) for at in (i64(1), b.add(count, i64(1))))

    def now() -> ir.Value:
        b.call(clock_gettime, [ir.Constant(I32, _MONOTONIC), b.bitcast(moment, I8.as_pointer())])
        return b.add(b.mul(b.load(moment), i64(1_000_000_000)), b.load(b.gep(moment, [i64(1)])))

    def look(*, awake: bool = True) -> None:
        """Return 1 if everything is there."""
        with loop(b, i64(0), count, 1, ir.Constant(BOOL, 1)) as at:
            place = b.inttoptr(index_at(b, places, at.i, 64), I64.as_pointer())
            there = b.icmp_signed(">=", b.load_atomic(place, "acquire", 8), stamp)
            with b.if_then(b.and_(there, b.icmp_signed("==", index_at(b, seen, at.i, 64), i64(0)))):
                took = b.sub(now(), index_at(b, clock, i64(0), 64))
                store(b, b.add(index_at(b, waited, at.i, 64), took), row_at(b, waited, at.i, i64(8)))
                store(b, i64(1), row_at(b, seen, at.i, i64(8)))
            at.next = [b.and_(at.carried[0], there)]
        with b.if_then(at.carried[0]):
            if not awake:
                b.store_atomic(i64(0), sleeping, "monotonic", 8)
            b.ret(i64(1))

    with b.if_then(b.icmp_signed(">", tries, i64(0))):
        store(b, now(), clock)
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
