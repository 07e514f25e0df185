"""Machine code for FP8 and int8 rows on a CPU: what `moecomm.quant` says, bit for bit, without its tensors in between.

form: how rows travel: "float32", "power_of_two" or "ue8m0" (FP8 with such scales), or "int8".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from llvmlite import ir

from moecomm._jit import I8, I32, Kernel, finish, function, i64, index_at, load, loop, row_at, store
from moecomm._rows_jit import F32, ITEM_BYTES, LANES, _load_float, _num_lanes, _same, _splat, _vector

_GROUP = 128
_SMALLEST = (127 - 100) << 23  # bits of 2^-100
_INFINITY = 0x7F800000
_MOST_INT8 = 2.6793883890187504e36


@cache
def encode_kernel(dtype: str, form: str) -> Kernel:
    """Compile the encoding of rows. Arguments: num_rows, rows, H, codes, scales; each row follows the one before."""
    fn, b, (num_rows, rows, hidden, codes, scales) = function("encode", 5)
    with loop(b, i64(0), num_rows, 1) as row:
        _encode_row(b, (rows, codes, scales), row.i, hidden, dtype, form)
    return finish(fn, b)


@cache
def encode_runs_kernel(dtype: str, form: str) -> Kernel:
    """Compile the encoding of the rows of all ranges of (L, W * M, H).

    Arguments: rows, H, codes, scales, ranges (L, W, 2) int32, L, W, W * M.
    """
    fn, b, (rows, hidden, codes, scales, ranges, local, ranks, per_expert) = function("encode_runs", 8)
    with loop(b, i64(0), local, 1) as e, loop(b, i64(0), ranks, 1) as source:
        pair = b.mul(b.add(b.mul(e.i, ranks), source.i), i64(2))
        begin, end = (index_at(b, ranges, b.add(pair, i64(n)), 32) for n in range(2))
        first = b.mul(e.i, per_expert)
        with loop(b, b.add(first, begin), b.add(first, end), 1) as row:
            _encode_row(b, (rows, codes, scales), row.i, hidden, dtype, form)
    return finish(fn, b)


@cache
def decode_kernel(form: str) -> Kernel:
    """Compile the decoding of the rows of all entries that come home, wherever they are.

    Arguments: entries, idx int64, places int32, flat_of_expert int64, rank_of_flat int64, areas (W,) int64, offset of
    the scales, H, out (entries, H) float32, addresses (entries,) int64: of what became of each, -1 for none.
    """
    fn, b, args = function("decode", 10)
    entries, idx, places, flat_of, rank_of, areas, offset, hidden, out, addresses = args
    with loop(b, i64(0), entries, 1) as entry:
        place, kept = index_at(b, places, entry.i, 32), row_at(b, addresses, entry.i, i64(8))
        store(b, i64(-1), kept)
        with b.if_then(b.icmp_signed(">=", place, i64(0))):
            rank = index_at(b, rank_of, index_at(b, flat_of, index_at(b, idx, entry.i, 64), 64), 64)
            area, target = index_at(b, areas, rank, 64), row_at(b, out, entry.i, b.mul(hidden, i64(4)))
            store(b, target, kept)
            codes, scales = row_at(b, area, place, hidden), b.add(area, offset)
            scales = row_at(b, scales, place, _scale_bytes(b, hidden, form))

            def block(column: ir.Value, lanes: int, scale: ir.Value) -> None:
                code = load(b, b.add(codes, column), _vector(I8, lanes))
                value = b.fmul(_decoded(b, code, form), _splat(b, scale, lanes))
                store(b, value, b.add(target, b.mul(column, i64(4))))

            for_groups(b, hidden, form, scales, block)
    return finish(fn, b)


def for_groups(
    b: ir.IRBuilder, hidden: ir.Value, form: str, scales: ir.Value, block: Callable[[ir.Value, int, ir.Value], None]
) -> None:
    """Emit block(column, lanes, scale) for all columns, with the scale of their group."""
    with loop(b, i64(0), _num_groups(b, hidden, form), 1) as group:
        scale = _load_scale(b, scales, group.i, form)
        for column, lanes in _columns(b, *_span(b, group.i, hidden, form)):
            block(column, lanes, scale)


def _encode_row(
    b: ir.IRBuilder, bases: tuple[ir.Value, ...], at: ir.Value, hidden: ir.Value, dtype: str, form: str
) -> None:
    rows, codes, scales = bases
    source = row_at(b, rows, at, b.mul(hidden, i64(ITEM_BYTES[dtype])))
    target, scales = row_at(b, codes, at, hidden), row_at(b, scales, at, _scale_bytes(b, hidden, form))
    with loop(b, i64(0), _num_groups(b, hidden, form), 1) as group:
        start, stop = _span(b, group.i, hidden, form)
        bits = _largest(b, source, start, stop, dtype, keep_nan=form == "int8")
        inverse, most = _store_scale(b, bits, scales, group.i, form)
        for column, lanes in _columns(b, start, stop):
            value = b.fmul(_load_float(b, source, column, dtype, lanes), _splat(b, inverse, lanes))
            store(b, _encoded(b, value, _splat(b, most, lanes), form), b.add(target, column))


def _num_groups(b: ir.IRBuilder, hidden: ir.Value, form: str) -> ir.Value:
    return i64(1) if form == "int8" else b.udiv(b.add(hidden, i64(_GROUP - 1)), i64(_GROUP))


def _scale_bytes(b: ir.IRBuilder, hidden: ir.Value, form: str) -> ir.Value:
    return b.mul(_num_groups(b, hidden, form), i64(1 if form == "ue8m0" else 4))


def _span(b: ir.IRBuilder, group: ir.Value, hidden: ir.Value, form: str) -> tuple[ir.Value, ir.Value]:
    if form == "int8":
        return i64(0), hidden
    start = b.mul(group, i64(_GROUP))
    stop = b.add(start, i64(_GROUP))
    return start, b.select(b.icmp_signed("<", stop, hidden), stop, hidden)


def _columns(b: ir.IRBuilder, start: ir.Value, stop: ir.Value):  # type: ignore[no-untyped-def]
    """Vectors of columns, then single ones; a generator whose body is emitted into loops."""
    for lanes in (LANES, 1):
        with loop(b, start, b.sub(stop, i64(lanes - 1)), lanes) as at:
            yield at.i, lanes
        start = at.i


def _largest(
    b: ir.IRBuilder, row: ir.Value, start: ir.Value, stop: ir.Value, dtype: str, *, keep_nan: bool
) -> ir.Value:
    """The bits of the largest magnitude, at least those of 2^-100; a NaN counts as 0, or is kept."""
    found = ir.Constant(I32, _SMALLEST)
    for lanes in (LANES, 1):
        with loop(b, start, b.sub(stop, i64(lanes - 1)), lanes, _splat(b, found, lanes)) as at:
            bits = b.bitcast(_load_float(b, row, at.i, dtype, lanes), _vector(I32, lanes))
            bits = b.and_(bits, _same(0x7FFFFFFF, lanes))
            if not keep_nan:
                bits = b.select(b.icmp_signed(">", bits, _same(_INFINITY, lanes)), _same(0, lanes), bits)
            at.next = [b.select(b.icmp_signed(">", bits, at.carried[0]), bits, at.carried[0])]
        start, found = at.i, at.carried[0]
        if lanes > 1:
            values = [b.extract_element(found, ir.Constant(I32, lane)) for lane in range(lanes)]
            found = values[0]
            for value in values[1:]:
                found = b.select(b.icmp_signed(">", value, found), value, found)
    return found


def _store_scale(
    b: ir.IRBuilder, bits: ir.Value, scales: ir.Value, group: ir.Value, form: str
) -> tuple[ir.Value, ir.Value]:
    """Store a scale; what elements are multiplied by, and the largest magnitude that they may have then."""
    amax, largest = b.bitcast(bits, F32), ir.Constant(F32, 127.0 if form == "int8" else 448.0)
    scale, inverse, most = b.fdiv(amax, largest), b.fdiv(largest, amax), largest
    if form == "int8":
        is_finite = b.icmp_signed("<", bits, ir.Constant(I32, _INFINITY))
        limit = ir.Constant(F32, _MOST_INT8)
        scale = b.select(b.fcmp_ordered(">", scale, limit), limit, scale)
        scale = b.select(is_finite, scale, b.bitcast(ir.Constant(I32, 0x7FC00000), F32))
        inverse = b.select(is_finite, inverse, ir.Constant(F32, 0.0))
    elif form != "float32":
        word = b.and_(b.add(b.bitcast(scale, I32), ir.Constant(I32, 0x7FFFFF)), ir.Constant(I32, _INFINITY))
        scale, inverse = b.bitcast(word, F32), b.bitcast(b.sub(ir.Constant(I32, 254 << 23), word), F32)
        is_infinite = b.icmp_signed("==", word, ir.Constant(I32, _INFINITY))
        inverse = b.select(is_infinite, ir.Constant(F32, 0.0), inverse)
        top = b.icmp_signed("==", word, ir.Constant(I32, 247 << 23))  # 2^120: the code 256 would be an infinity
        most = b.select(top, ir.Constant(F32, 240.0), largest)
        if form == "ue8m0":
            store(b, b.trunc(b.lshr(word, ir.Constant(I32, 23)), I8), b.add(scales, group))
            return inverse, most
    store(b, scale, row_at(b, scales, group, i64(4)))
    return inverse, most


def _load_scale(b: ir.IRBuilder, scales: ir.Value, group: ir.Value, form: str) -> ir.Value:
    if form != "ue8m0":
        return load(b, row_at(b, scales, group, i64(4)), F32)
    byte = b.zext(load(b, b.add(scales, group), I8), I32)
    bits = b.shl(byte, ir.Constant(I32, 23))
    bits = b.select(b.icmp_signed("==", byte, ir.Constant(I32, 0)), ir.Constant(I32, 0x400000), bits)
    return b.bitcast(
        b.select(b.icmp_signed("==", byte, ir.Constant(I32, 255)), ir.Constant(I32, 0x7FC00000), bits), F32
    )


def _encoded(b: ir.IRBuilder, value: ir.Value, most: ir.Value, form: str) -> ir.Value:
    """Codes of scaled values: to nearest even, at most `most`."""
    lanes = _num_lanes(value)
    ints, floats = _vector(I32, lanes), value.type
    is_nan = b.fcmp_unordered("uno", value, value)
    value = b.select(b.fcmp_ordered(">", value, most), most, value)
    value = b.select(b.fcmp_ordered("<", value, b.fneg(most)), b.fneg(most), value)
    if form == "int8":
        value = b.select(is_nan, b.bitcast(_same(0, lanes), floats), value)
        shift = b.bitcast(_same(0x4B400000, lanes), floats)  # 1.5 * 2^23: its last place is 1
        whole = b.sub(b.bitcast(b.fadd(value, shift), ints), _same(0x4B400000, lanes))
        return b.trunc(whole, _vector(I8, lanes))
    bits = b.bitcast(value, ints)
    magnitude = b.and_(bits, _same(0x7FFFFFFF, lanes))
    odd = b.and_(b.lshr(magnitude, _same(20, lanes)), _same(1, lanes))
    normal = b.lshr(b.add(b.add(magnitude, _same(0x7FFFF, lanes)), odd), _same(20, lanes))
    normal = b.sub(normal, _same(120 << 3, lanes))
    base = b.bitcast(_same(0x46800000, lanes), floats)  # 2^14: its last place is that of subnormal codes
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, floats), base), ints), _same(0x46800000, lanes))
    code = b.select(b.icmp_signed("<", magnitude, _same(121 << 23, lanes)), small, normal)
    code = b.or_(code, b.and_(b.lshr(bits, _same(24, lanes)), _same(0x80, lanes)))
    return b.trunc(b.select(is_nan, _same(0x7F, lanes), code), _vector(I8, lanes))


def _decoded(b: ir.IRBuilder, code: ir.Value, form: str) -> ir.Value:
    """float32 values of codes; exact."""
    lanes = _num_lanes(code)
    ints, floats = _vector(I32, lanes), _vector(F32, lanes)
    if form == "int8":
        return b.sitofp(b.sext(code, ints), floats)
    bits = b.zext(code, ints)
    rest = b.and_(bits, _same(0x7F, lanes))
    normal = b.shl(b.add(rest, _same(120 << 3, lanes)), _same(20, lanes))
    small = b.fmul(b.sitofp(rest, floats), b.bitcast(_same(0x3B000000, lanes), floats))  # times 2^-9
    value = b.select(b.icmp_signed("<", rest, _same(8, lanes)), b.bitcast(small, ints), normal)
    value = b.select(b.icmp_signed("==", rest, _same(0x7F, lanes)), _same(0x7FC00000, lanes), value)
    return b.bitcast(b.or_(value, b.shl(b.and_(bits, _same(0x80, lanes)), _same(24, lanes))), floats)
