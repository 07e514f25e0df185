"""Machine code for the row primitives on a CPU: vector loops built with llvmlite, compiled at first use.

llvmlite is the compiler under numba. `moecomm.rows` imports this file at its first call, so `import moecomm` does not
pay for it; one kernel compiles in some tens of milliseconds. A kernel takes addresses, strides (bytes) and counts as
64-bit integers, treats the entries `begin <= i < end`, and returns -1, or the position of the first entry whose index
is too large. It is called through ctypes, which lets go of the interpreter lock.

Floats are combined in the order written: no fast-math flag is set, so LLVM neither fuses nor reassociates. While a row
is worked on, the same columns of the next one are prefetched: rows lie scattered, and hardware does not guess the next.
What was tried, with figures: docs/design/cpu_rows.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import llvmlite.binding as llvm
from llvmlite import ir

Kernel = Callable[..., int]

BOOL, I8, I16, I32, I64 = map(ir.IntType, (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LINE_BYTES = 64
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
    fn, b, args = _function("copy", 11)
    begin, end, out, out_stride, num_out, src, src_stride, num_src, row_bytes, src_index, out_index = args
    with _loop(b, begin, end, 1) as entry:
        source, target = _index(b, src_index, entry.i, src_index_bits), _index(b, out_index, entry.i, out_index_bits)
        following = b.add(entry.i, _i64(1))
        following = b.select(b.icmp_signed("<", following, end), following, entry.i)
        upcoming = _row(b, src, _index(b, src_index, following, src_index_bits), src_stride)
        with b.if_then(b.icmp_signed(">=", b.or_(source, target), _i64(0))):  # the sign bit of either
            wrong = b.or_(b.icmp_signed(">=", source, num_src), b.icmp_signed(">=", target, num_out))
            _refuse(b, wrong, entry.i)
            rows = _row(b, out, target, out_stride), _row(b, src, source, src_stride), upcoming
            _copy_row(b, *rows, row_bytes, streaming)
    return _finish(fn, b, streaming)


@cache
def sort_kernel(src_index_bits: int, out_index_bits: int) -> Kernel:
    """Compile a stable counting sort of the entries of `copy_kernel` by source row; those < 0 fall out.

    Arguments: count, num_out, num_src, src_index, out_index, starts (num_src + 1 zeros, int32), sorted_src, sorted_out
    (count int32 each).
    """
    fn, b, args = _function("sort", 8)
    count, num_out, num_src, src_index, out_index, starts, sorted_src, sorted_out = args

    def add(address: ir.Value, value: ir.Value) -> ir.Value:
        before = _load(b, address, I32)
        _store(b, b.add(before, value), address)
        return b.sext(before, I64)

    for place in (False, True):
        with _loop(b, _i64(0), count, 1) as at:
            source, target = _index(b, src_index, at.i, src_index_bits), _index(b, out_index, at.i, out_index_bits)
            with b.if_then(b.icmp_signed(">=", b.or_(source, target), _i64(0))):  # the sign bit of either
                if place:
                    slot = add(_row(b, starts, source, _i64(4)), ir.Constant(I32, 1))
                    _store(b, b.trunc(source, I32), _row(b, sorted_src, slot, _i64(4)))
                    _store(b, b.trunc(target, I32), _row(b, sorted_out, slot, _i64(4)))
                else:
                    wrong = b.or_(b.icmp_signed(">=", source, num_src), b.icmp_signed(">=", target, num_out))
                    _refuse(b, wrong, at.i)
                    add(_row(b, starts, b.add(source, _i64(1)), _i64(4)), ir.Constant(I32, 1))
        if not place:
            with _loop(b, _i64(0), num_src, 1) as row:
                here = _row(b, starts, row.i, _i64(4))
                add(b.add(here, _i64(4)), _load(b, here, I32))
    return _finish(fn, b, False)


def _copy_row(
    b: ir.IRBuilder, out: ir.Value, src: ir.Value, upcoming: ir.Value, row_bytes: ir.Value, streaming: bool
) -> None:
    """Stream whole blocks; the rest, or everything, is left to memcpy of the C library, which knows the machine."""
    done: ir.Value = _i64(0)
    if streaming:
        line = ir.VectorType(I64, LINE_BYTES // 8)
        with _loop(b, done, b.sub(row_bytes, _i64(LINE_BYTES * UNROLL - 1)), LINE_BYTES * UNROLL) as at:
            offsets = [b.add(at.i, _i64(LINE_BYTES * n)) for n in range(UNROLL)]
            _prefetch(b, upcoming, offsets)
            values = [_load(b, b.add(src, offset), line) for offset in offsets]
            for offset, value in zip(offsets, values, strict=True):
                _store(b, value, b.add(out, offset), streaming)
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
    fn, b, args = _function("reduce", 15)
    begin, end, out_ptr, out_stride, rows_ptr, rows_stride, num_rows, hidden, *_ = args
    table, table_stride, width, weights_ptr, weights_stride, bias_ptr, bias_stride = args[8:]
    # The rows and weights to add, for this sum and for the next one (to prefetch): two halves that swap.
    addresses, factors = (b.alloca(kind, b.mul(width, _i64(2))) for kind in (I64, F32))
    counts = b.alloca(I64, _i64(2))

    def collect(p: ir.Value, half: ir.Value) -> None:
        count, table_row = b.gep(counts, [half]), _row(b, table, p, table_stride)
        with _loop(b, _i64(0), width, 1) as j:
            row = _index(b, table_row, j.i, index_bits)
            with b.if_then(b.icmp_signed(">=", row, _i64(0))):
                _refuse(b, b.icmp_signed(">=", row, num_rows), p)
                n = b.load(count)
                slot = b.add(b.mul(half, width), n)
                b.store(_row(b, rows_ptr, row, rows_stride), b.gep(addresses, [slot]))
                if weights is not None:
                    base, at = (
                        (weights_ptr, row) if weights == "row" else (_row(b, weights_ptr, p, weights_stride), j.i)
                    )
                    b.store(_load(b, _row(b, base, at, _i64(4)), F32), b.gep(factors, [slot]))
                b.store(b.add(n, _i64(1)), count)

    b.store(_i64(0), b.gep(counts, [b.and_(begin, _i64(1))]))
    with b.if_then(b.icmp_signed("<", begin, end)):
        collect(begin, b.and_(begin, _i64(1)))
    with _loop(b, begin, end, 1) as p:
        half = b.and_(p.i, _i64(1))
        other, following = b.xor(half, _i64(1)), b.add(p.i, _i64(1))
        b.store(_i64(0), b.gep(counts, [other]))
        with b.if_then(b.icmp_signed("<", following, end)):
            collect(following, other)
        used, upcoming = (b.load(b.gep(counts, [which])) for which in (half, other))
        first, first_upcoming = b.mul(half, width), b.mul(other, width)
        out_row, bias_row = _row(b, out_ptr, p.i, out_stride), _row(b, bias_ptr, p.i, bias_stride)

        def block(columns: Sequence[ir.Value], lanes: int) -> None:
            if len(columns) > 1:
                with _loop(b, _i64(0), upcoming, 1) as e:
                    address = b.load(b.gep(addresses, [b.add(first_upcoming, e.i)]))
                    step = LINE_BYTES // ITEM_BYTES[rows]
                    ahead = range(0, lanes * len(columns), step)
                    _prefetch(b, address, [_byte(b, b.add(columns[0], _i64(n)), rows) for n in ahead])
            sums: Sequence[ir.Value] = [ir.Constant(_vector(F32, lanes), None) for _ in columns]
            if bias is not None:
                sums = [_load_float(b, bias_row, column, bias, lanes) for column in columns]
            with _loop(b, _i64(0), used, 1, *sums) as e:
                slot = b.add(first, e.i)
                address = b.load(b.gep(addresses, [slot]))
                values = [_load_float(b, address, column, rows, lanes) for column in columns]
                if weights is not None:
                    factor = _splat(b, b.load(b.gep(factors, [slot])), lanes)
                    values = [b.fmul(factor, value) for value in values]
                e.next = [b.fadd(total, value) for total, value in zip(e.carried, values, strict=True)]
            _store_floats(b, e.carried, out_row, columns, out, streaming)

        _over_columns(b, hidden, block)
    return _finish(fn, b, streaming)


@cache
def grad_kernel(rows: str, grad: str, out: str | None, dot: bool, streaming: bool) -> Kernel:
    """Compile `rows.scale_rows_grad`; `out` None: no grad_rows; `dot` False: no grad_weights.

    Arguments: begin, end, out, out_stride, dots, grad, grad_stride, rows, rows_stride, weights, H.
    """
    fn, b, args = _function("grad", 11)
    begin, end, out_ptr, out_stride, dots, grad_ptr, grad_stride, rows_ptr, rows_stride, weights, hidden = args
    vector = _vector(F32, LANES)
    partial = b.ptrtoint(b.alloca(vector, _i64(DOT_LANES // LANES)), I64)
    with _loop(b, begin, end, 1) as n:
        grad_row, rows_row = _row(b, grad_ptr, n.i, grad_stride), _row(b, rows_ptr, n.i, rows_stride)
        out_row, factor = _row(b, out_ptr, n.i, out_stride), _load(b, _row(b, weights, n.i, _i64(4)), F32)
        for lane in range(0, DOT_LANES, LANES):
            _store(b, ir.Constant(vector, None), b.add(partial, _i64(4 * lane)))

        def block(columns: Sequence[ir.Value], lanes: int) -> None:
            values = [_load_float(b, grad_row, column, grad, lanes) for column in columns]
            if out is not None:
                scaled = [b.fmul(_splat(b, factor, lanes), value) for value in values]
                _store_floats(b, scaled, out_row, columns, out, streaming)
            for column, value in zip(columns, values, strict=True) if dot else ():
                product = b.fmul(value, _load_float(b, rows_row, column, rows, lanes))
                slot = _row(b, partial, b.and_(column, _i64(DOT_LANES - 1)), _i64(4))
                _store(b, b.fadd(_load(b, slot, product.type), product), slot)

        _over_columns(b, hidden, block)
        if dot:
            _store(b, _fold(b, partial), _row(b, dots, n.i, _i64(4)))
    return _finish(fn, b, streaming)


def _fold(b: ir.IRBuilder, partial: ir.Value) -> ir.Value:
    """Add the upper half of the partial sums to the lower half until one is left."""
    half = DOT_LANES // 2
    while half:
        lanes = min(half, LANES)
        for lane in range(0, half, lanes):
            low, high = (b.add(partial, _i64(4 * at)) for at in (lane, lane + half))
            _store(b, b.fadd(*(_load(b, at, _vector(F32, lanes)) for at in (low, high))), low)
        half //= 2
    return _quiet(b, _load(b, partial, F32))


# --- pieces -------------------------------------------------------------------------------------------------------


@dataclass
class _Loop:
    i: ir.Value
    carried: list[ir.Value]  # in the body: the values of this round; after the loop: the last ones
    next: list[ir.Value] = field(default_factory=list)  # the body says what they become


@contextmanager
def _loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, *carried: ir.Value) -> Iterator[_Loop]:
    """Emit `for i in range(start, stop, step)` around the body; after it `i` is the first value not visited."""
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    loop = _Loop(b.phi(I64), [b.phi(value.type) for value in carried])
    for phi, value in zip((loop.i, *loop.carried), (start, *carried), strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", loop.i, stop), body, done)
    b.position_at_end(body)
    yield loop
    for phi, value in zip((loop.i, *loop.carried), (b.add(loop.i, _i64(step)), *loop.next), strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(done)


def _over_columns(b: ir.IRBuilder, hidden: ir.Value, block: Callable[[Sequence[ir.Value], int], None]) -> None:
    """Emit block(columns, lanes): several vectors at a time, then single vectors, then single columns."""
    start: ir.Value = _i64(0)
    for lanes, count in ((LANES, UNROLL), (LANES, 1), (1, 1)):
        with _loop(b, start, b.sub(hidden, _i64(lanes * count - 1)), lanes * count) as at:
            block([b.add(at.i, _i64(lanes * n)) for n in range(count)], lanes)
        start = at.i


def _i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


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


def _row(b: ir.IRBuilder, base: ir.Value, at: ir.Value, stride: ir.Value) -> ir.Value:
    return b.add(base, b.mul(at, stride))


def _byte(b: ir.IRBuilder, column: ir.Value, dtype: str) -> ir.Value:
    return b.mul(column, _i64(ITEM_BYTES[dtype]))


def _index(b: ir.IRBuilder, base: ir.Value, at: ir.Value, bits: int) -> ir.Value:
    if bits == 0:
        return at
    value = _load(b, _row(b, base, at, _i64(bits // 8)), ir.IntType(bits))
    return value if bits == 64 else b.sext(value, I64)


def _refuse(b: ir.IRBuilder, wrong: ir.Value, at: ir.Value) -> None:
    with b.if_then(wrong, likely=False):
        b.ret(at)


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, streaming: bool = False) -> None:
    store = b.store(value, b.inttoptr(address, value.type.as_pointer()), align=LINE_BYTES if streaming else 1)
    if streaming:
        store.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


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
        return _load(b, address, _vector(F32, lanes))
    if dtype == "float16":
        return b.fpext(_load(b, address, _vector(F16, lanes)), _vector(F32, lanes))
    bits = b.zext(_load(b, address, _vector(I16, lanes)), _vector(I32, lanes))
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
        _store(b, value, b.add(row, _byte(b, column, dtype)), streaming)


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


# --- from a module to a callable ----------------------------------------------------------------------------------

_alive: list[object] = []  # engines own the code that the returned functions point to


def _function(name: str, num_args: int) -> tuple[ir.Function, ir.IRBuilder, Sequence[ir.Value]]:
    fn = ir.Function(ir.Module(name), ir.FunctionType(I64, [I64] * num_args), name)
    return fn, ir.IRBuilder(fn.append_basic_block("entry")), fn.args


@cache
def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=2, jit=True)


def _finish(fn: ir.Function, b: ir.IRBuilder, streaming: bool) -> Kernel:
    if streaming:
        b.fence("seq_cst")  # streamed stores wait for nobody; what the caller signals next must come after them
    b.ret(_i64(-1))
    module, machine = llvm.parse_assembly(str(fn.module)), _machine()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _alive.append(engine)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(fn.args))
    return prototype(engine.get_function_address(fn.name))
