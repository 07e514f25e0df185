"""Machine code for the row primitives on a CPU: vector loops built with llvmlite, compiled at first use.

`moecomm.rows` imports this file at its first call, so `import moecomm` does not pay for it. A kernel treats the entries
`begin <= i < end`, and returns -1, or the position of the first entry whose index is too large.

Floats are combined in the order written. While a row is worked on, the same columns of the next one are prefetched:
rows lie scattered, and hardware does not guess the next. What was tried, with figures: docs/design/cpu_rows.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import llvmlite.binding as llvm
from llvmlite import ir

from moecomm._jit import (
    BOOL,
    I8,
    I16,
    I32,
    I64,
    LINE_BYTES,
    Kernel,
    finish,
    function,
    i64,
    index_at,
    load,
    loop,
    refuse,
    row_at,
    store,
)

F16, F32 = ir.HalfType(), ir.FloatType()
LANES = 16  # floats in one vector: one AVX-512 register, or two of AVX2, or four of 128 bits
UNROLL = 4  # vectors of one row in flight
DOT_LANES = 512  # partial sums of a row product, see `rows.scale_rows_grad`
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@cache
def supports(dtype: str) -> bool:
    """Whether this machine converts `dtype` in hardware; else LLVM calls a function that may not exist."""
    x86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
    return dtype != "float16" or not x86 or bool(llvm.get_host_cpu_features().get("f16c"))


@cache
def copy_kernel(src_index_bits: int, out_index_bits: int, streaming: bool) -> Kernel:
    """Compile out[out_index[i]] = src[src_index[i]]; 0 bits: no index, row i; entries < 0 are skipped.

    Arguments: begin, end, out, out_stride, num_out, src, src_stride, num_src, row_bytes, src_index, out_index.
    `streaming` writes past the caches; `out` and `out_stride` must then be multiples of 64.
    """
    fn, b, args = function("copy", 11)
    begin, end, out, out_stride, num_out, src, src_stride, num_src, row_bytes, src_index, out_index = args
    with loop(b, begin, end, 1) as entry:
        source, target = (
            index_at(b, src_index, entry.i, src_index_bits),
            index_at(b, out_index, entry.i, out_index_bits),
        )
        following = b.add(entry.i, i64(1))
        following = b.select(b.icmp_signed("<", following, end), following, entry.i)
        upcoming = row_at(b, src, index_at(b, src_index, following, src_index_bits), src_stride)
        with b.if_then(b.icmp_signed(">=", b.or_(source, target), i64(0))):  # the sign bit of either
            wrong = b.or_(b.icmp_signed(">=", source, num_src), b.icmp_signed(">=", target, num_out))
            refuse(b, wrong, entry.i)
            rows = row_at(b, out, target, out_stride), row_at(b, src, source, src_stride), upcoming
            copy_row(b, *rows, row_bytes, streaming)
    return finish(fn, b, streaming)


@cache
def scatter_kernel(src_index_bits: int, slot_bits: int) -> Kernel:
    """Compile the copies of `rows.scatter_rows`: entries in sections, one for each output.

    Arguments: W, outs (4, W) int64, src, num_src, row_bytes, src_index, every, slots. Entry i
    becomes row slots[i] of its section's output; 0 slot_bits: the next row from the section's start on.
    """
    fn, b, args = function("scatter", 8)
    num_outs, outs, src, num_src, row_bytes, src_index, every, slots = args
    with loop(b, i64(0), num_outs, 1, i64(0)) as section:
        first = section.carried[0]
        fields = (b.add(section.i, b.mul(num_outs, i64(n))) for n in range(4))
        out, count, start, most = (index_at(b, outs, at, 64) for at in fields)
        last = b.add(first, count)
        with loop(b, first, last, 1) as entry:
            source = index_at(b, src_index, entry.i, src_index_bits)
            source = b.udiv(source, every) if src_index_bits else source
            target = b.add(start, index_at(b, slots, entry.i, slot_bits) if slot_bits else b.sub(entry.i, first))
            wrong = b.or_(b.icmp_unsigned(">=", source, num_src), b.icmp_unsigned(">=", target, most))
            refuse(b, wrong, entry.i)
            source_row = row_at(b, src, source, row_bytes)
            copy_row(b, row_at(b, out, target, row_bytes), source_row, source_row, row_bytes, False)
        section.next = [last]
    return finish(fn, b)


@cache
def sort_kernel(src_index_bits: int, out_index_bits: int) -> Kernel:
    """Compile a stable counting sort of the entries of `copy_kernel` by source row; those < 0 fall out.

    Arguments: count, num_out, num_src, src_index, out_index, starts (num_src + 1 zeros, int32), sorted_src, sorted_out
    (count int32 each).
    """
    fn, b, args = function("sort", 8)
    count, num_out, num_src, src_index, out_index, starts, sorted_src, sorted_out = args

    def add(address: ir.Value, value: ir.Value) -> ir.Value:
        before = load(b, address, I32)
        store(b, b.add(before, value), address)
        return b.sext(before, I64)

    for place in (False, True):
        with loop(b, i64(0), count, 1) as at:
            source, target = index_at(b, src_index, at.i, src_index_bits), index_at(b, out_index, at.i, out_index_bits)
            with b.if_then(b.icmp_signed(">=", b.or_(source, target), i64(0))):  # the sign bit of either
                if place:
                    slot = add(row_at(b, starts, source, i64(4)), ir.Constant(I32, 1))
                    store(b, b.trunc(source, I32), row_at(b, sorted_src, slot, i64(4)))
                    store(b, b.trunc(target, I32), row_at(b, sorted_out, slot, i64(4)))
                else:
                    wrong = b.or_(b.icmp_signed(">=", source, num_src), b.icmp_signed(">=", target, num_out))
                    refuse(b, wrong, at.i)
                    add(row_at(b, starts, b.add(source, i64(1)), i64(4)), ir.Constant(I32, 1))
        if not place:
            with loop(b, i64(0), num_src, 1) as row:
                here = row_at(b, starts, row.i, i64(4))
                add(b.add(here, i64(4)), load(b, here, I32))
    return finish(fn, b, False)


def copy_row(
    b: ir.IRBuilder, out: ir.Value, src: ir.Value, upcoming: ir.Value, row_bytes: ir.Value, streaming: bool
) -> None:
    """Stream whole blocks; the rest, or everything, is left to memcpy of the C library, which knows the machine."""
    done: ir.Value = i64(0)
    if streaming:
        line = ir.VectorType(I64, LINE_BYTES // 8)
        with loop(b, done, b.sub(row_bytes, i64(LINE_BYTES * UNROLL - 1)), LINE_BYTES * UNROLL) as at:
            offsets = [b.add(at.i, i64(LINE_BYTES * n)) for n in range(UNROLL)]
            _prefetch(b, upcoming, offsets)
            values = [load(b, b.add(src, offset), line) for offset in offsets]
            for offset, value in zip(offsets, values, strict=True):
                store(b, value, b.add(out, offset), streaming)
        done = at.i
    pointer = I8.as_pointer()
    memcpy = b.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, I64])
    places = (b.inttoptr(b.add(base, done), pointer) for base in (out, src))
    b.call(memcpy, [*places, b.sub(row_bytes, done), ir.Constant(BOOL, 0)])


@cache
def reduce_kernel(
    rows: str, out: str, bias: str | None, index_bits: int, weights: str | None, streaming: bool
) -> Kernel:
    """Compile the sum of `rows.reduce_rows`; dtypes by name, `weights` in (None, "row", "entry").

    Arguments: begin, end, out, out_stride, rows, rows_stride, num_rows, H, table, table_stride, J, weights,
    weights_stride, bias, bias_stride.
    """
    fn, b, args = function("reduce", 15)
    begin, end, out_ptr, out_stride, rows_ptr, rows_stride, num_rows, hidden, *_ = args
    table, table_stride, width, weights_ptr, weights_stride, bias_ptr, bias_stride = args[8:]
    # The rows and weights to add, for this sum and for the next one (to prefetch): two halves that swap.
    addresses, factors = (b.alloca(kind, b.mul(width, i64(2))) for kind in (I64, F32))
    counts = b.alloca(I64, i64(2))

    def collect(p: ir.Value, half: ir.Value) -> None:
        count, table_row = b.gep(counts, [half]), row_at(b, table, p, table_stride)
        with loop(b, i64(0), width, 1) as j:
            row = index_at(b, table_row, j.i, index_bits)
            with b.if_then(b.icmp_signed(">=", row, i64(0))):
                refuse(b, b.icmp_signed(">=", row, num_rows), p)
                n = b.load(count)
                slot = b.add(b.mul(half, width), n)
                b.store(row_at(b, rows_ptr, row, rows_stride), b.gep(addresses, [slot]))
                if weights is not None:
                    base, at = (
                        (weights_ptr, row) if weights == "row" else (row_at(b, weights_ptr, p, weights_stride), j.i)
                    )
                    b.store(load(b, row_at(b, base, at, i64(4)), F32), b.gep(factors, [slot]))
                b.store(b.add(n, i64(1)), count)

    b.store(i64(0), b.gep(counts, [b.and_(begin, i64(1))]))
    with b.if_then(b.icmp_signed("<", begin, end)):
        collect(begin, b.and_(begin, i64(1)))
    with loop(b, begin, end, 1) as p:
        half = b.and_(p.i, i64(1))
        other, following = b.xor(half, i64(1)), b.add(p.i, i64(1))
        b.store(i64(0), b.gep(counts, [other]))
        with b.if_then(b.icmp_signed("<", following, end)):
            collect(following, other)
        used, upcoming = (b.load(b.gep(counts, [which])) for which in (half, other))
        first, first_upcoming = b.mul(half, width), b.mul(other, width)
        out_row, bias_row = row_at(b, out_ptr, p.i, out_stride), row_at(b, bias_ptr, p.i, bias_stride)

        def block(columns: Sequence[ir.Value], lanes: int) -> None:
            if len(columns) > 1:
                with loop(b, i64(0), upcoming, 1) as e:
                    address = b.load(b.gep(addresses, [b.add(first_upcoming, e.i)]))
                    step = LINE_BYTES // ITEM_BYTES[rows]
                    ahead = range(0, lanes * len(columns), step)
                    _prefetch(b, address, [_byte(b, b.add(columns[0], i64(n)), rows) for n in ahead])
            sums: Sequence[ir.Value] = [ir.Constant(_vector(F32, lanes), None) for _ in columns]
            if bias is not None:
                sums = [_load_float(b, bias_row, column, bias, lanes) for column in columns]
            with loop(b, i64(0), used, 1, *sums) as e:
                slot = b.add(first, e.i)
                address = b.load(b.gep(addresses, [slot]))
                values = [_load_float(b, address, column, rows, lanes) for column in columns]
                if weights is not None:
                    factor = _splat(b, b.load(b.gep(factors, [slot])), lanes)
                    values = [b.fmul(factor, value) for value in values]
                e.next = [b.fadd(total, value) for total, value in zip(e.carried, values, strict=True)]
            _store_floats(b, e.carried, out_row, columns, out, streaming)

        _over_columns(b, hidden, block)
    return finish(fn, b, streaming)


@cache
def grad_kernel(rows: str, grad: str, out: str | None, dot: bool, streaming: bool) -> Kernel:
    """Compile `rows.scale_rows_grad`; `out` None: no grad_rows; `dot` False: no grad_weights.

    Arguments: begin, end, out, out_stride, dots, grad, grad_stride, rows, rows_stride, weights, H.
    """
    fn, b, args = function("grad", 11)
    begin, end, out_ptr, out_stride, dots, grad_ptr, grad_stride, rows_ptr, rows_stride, weights, hidden = args
    vector = _vector(F32, LANES)
    partial = b.ptrtoint(b.alloca(vector, i64(DOT_LANES // LANES)), I64)
    with loop(b, begin, end, 1) as n:
        grad_row, rows_row = row_at(b, grad_ptr, n.i, grad_stride), row_at(b, rows_ptr, n.i, rows_stride)
        out_row, factor = row_at(b, out_ptr, n.i, out_stride), load(b, row_at(b, weights, n.i, i64(4)), F32)
        for lane in range(0, DOT_LANES, LANES):
            store(b, ir.Constant(vector, None), b.add(partial, i64(4 * lane)))

        def block(columns: Sequence[ir.Value], lanes: int) -> None:
            values = [_load_float(b, grad_row, column, grad, lanes) for column in columns]
            if out is not None:
                scaled = [b.fmul(_splat(b, factor, lanes), value) for value in values]
                _store_floats(b, scaled, out_row, columns, out, streaming)
            for column, value in zip(columns, values, strict=True) if dot else ():
                product = b.fmul(value, _load_float(b, rows_row, column, rows, lanes))
                slot = row_at(b, partial, b.and_(column, i64(DOT_LANES - 1)), i64(4))
                store(b, b.fadd(load(b, slot, product.type), product), slot)

        _over_columns(b, hidden, block)
        if dot:
            store(b, _fold(b, partial), row_at(b, dots, n.i, i64(4)))
    return finish(fn, b, streaming)


def _fold(b: ir.IRBuilder, partial: ir.Value) -> ir.Value:
    """Add the upper half of the partial sums to the lower half until one is left."""
    half = DOT_LANES // 2
    while half:
        lanes = min(half, LANES)
        for lane in range(0, half, lanes):
            low, high = (b.add(partial, i64(4 * at)) for at in (lane, lane + half))
            store(b, b.fadd(*(load(b, at, _vector(F32, lanes)) for at in (low, high))), low)
        half //= 2
    return _quiet(b, load(b, partial, F32))


# --- pieces -------------------------------------------------------------------------------------------------------


def _over_columns(b: ir.IRBuilder, hidden: ir.Value, block: Callable[[Sequence[ir.Value], int], None]) -> None:
    """Emit block(columns, lanes): several vectors at a time, then single vectors, then single columns."""
    start: ir.Value = i64(0)
    for lanes, count in ((LANES, UNROLL), (LANES, 1), (1, 1)):
        with loop(b, start, b.sub(hidden, i64(lanes * count - 1)), lanes * count) as at:
            block([b.add(at.i, i64(lanes * n)) for n in range(count)], lanes)
        start = at.i


def _vector(kind: ir.Type, lanes: int) -> ir.Type:
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def _num_lanes(value: ir.Value) -> int:
    return int(value.type.count) if isinstance(value.type, ir.VectorType) else 1


def _same(value: int, lanes: int) -> ir.Constant:
    return ir.Constant(I32, value) if lanes == 1 else ir.Constant(ir.VectorType(I32, lanes), [value] * lanes)


def _splat(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    if lanes == 1:
        return value
    one = b.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, _same(0, lanes))


def _byte(b: ir.IRBuilder, column: ir.Value, dtype: str) -> ir.Value:
    return b.mul(column, i64(ITEM_BYTES[dtype]))


def _prefetch(b: ir.IRBuilder, base: ir.Value, offsets: Sequence[ir.Value]) -> None:
    """Fetch lines into the first cache; an address that does not exist does no harm."""
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    prefetch = b.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    for offset in offsets:
        read_keep_data = [ir.Constant(I32, n) for n in (0, 3, 1)]
        b.call(prefetch, [b.inttoptr(b.add(base, offset), pointer), *read_keep_data])


def _load_float(b: ir.IRBuilder, row: ir.Value, column: ir.Value, dtype: str, lanes: int) -> ir.Value:
    """Load columns as float32."""
    address = b.add(row, _byte(b, column, dtype))
    if dtype == "float32":
        return load(b, address, _vector(F32, lanes))
    if dtype == "float16":
        return b.fpext(load(b, address, _vector(F16, lanes)), _vector(F32, lanes))
    bits = b.zext(load(b, address, _vector(I16, lanes)), _vector(I32, lanes))
    return b.bitcast(b.shl(bits, _same(16, lanes)), _vector(F32, lanes))


def _store_floats(
    b: ir.IRBuilder,
    values: Sequence[ir.Value],
    row: ir.Value,
    columns: Sequence[ir.Value],
    dtype: str,
    streaming: bool,
) -> None:
    """Round and store; a streamed store writes whole lines, so two vectors of 2-byte items go together."""
    streaming = streaming and len(values) > 1
    rounded = [_round(b, _quiet(b, value), dtype) for value in values]
    if streaming and ITEM_BYTES[dtype] == 2:
        both = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
        rounded = [b.shuffle_vector(*rounded[n : n + 2], both) for n in range(0, len(rounded), 2)]
        columns = columns[::2]
    for value, column in zip(rounded, columns, strict=True):
        store(b, value, b.add(row, _byte(b, column, dtype)), streaming)


def _round(b: ir.IRBuilder, value: ir.Value, dtype: str) -> ir.Value:
    """Round float32 to nearest even; bfloat16 in integers, because the instruction flushes subnormals."""
    lanes = _num_lanes(value)
    if dtype == "float32":
        return value
    if dtype == "float16":
        return b.bitcast(b.fptrunc(value, _vector(F16, lanes)), _vector(I16, lanes))
    bits = b.bitcast(value, _vector(I32, lanes))
    odd = b.and_(b.lshr(bits, _same(16, lanes)), _same(1, lanes))
    carried = b.add(b.add(bits, _same(0x7FFF, lanes)), odd)
    return b.trunc(b.lshr(carried, _same(16, lanes)), _vector(I16, lanes))


def _quiet(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Replace every NaN by the one that torch writes for float("nan")."""
    nan = b.bitcast(_same(0x7FC00000, _num_lanes(value)), value.type)
    return b.select(b.fcmp_unordered("uno", value, value), nan, value)
