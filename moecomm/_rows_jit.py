"""Machine code for the row primitives on a CPU: vector loops built with llvmlite, compiled at first use.

llvmlite is the compiler under numba; `moecomm.rows` imports this file at its first call, so `import moecomm` does not pay for it.
A kernel takes addresses, strides and counts as 64-bit integers, treats the entries `begin <= i < end`, and returns -1, or the
position of the first entry whose index is out of range. Calls go through ctypes, which lets go of the interpreter lock.

Floats are combined in the order written: no fast-math flag is set, so LLVM neither fuses nor reassociates.
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

BOOL, I16, I32, I64, F16, F32 = (*map(ir.IntType, (1, 16, 32, 64)), ir.HalfType(), ir.FloatType())
LANES = 16  # floats in one vector: one AVX-512 register, or two of AVX2, or four of 128 bits
UNROLL = 4  # vectors of one row in flight
DOT_LANES = 512  # partial sums of a row product, see `rows.scale_rows_grad`
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def supports(dtype: str) -> bool:
    """Whether this machine converts `dtype` in hardware; LLVM would call a function that may not exist."""
    x86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
    return dtype != "float16" or not x86 or bool(llvm.get_host_cpu_features().get("f16c"))


@cache
def copy_kernel(src_index_bits: int, out_index_bits: int, streaming: bool) -> Kernel:
    """Compile out[out_index[i]] = src[src_index[i]]; 0 bits: no index, row i; entries < 0 are skipped.

    Arguments: begin, end, out, out_stride, num_out, src, src_stride, num_src, row_bytes, src_index, out_index.
    `streaming` writes past the caches; it needs `out` and `out_stride` to be multiples of 64.
    """
    fn, b, args = _function("copy", 11)
    begin, end, out, out_stride, num_out, src, src_stride, num_src, row_bytes, src_index, out_index = args
    with _loop(b, begin, end, 1) as entry:
        from_row = _index(b, src_index, entry.i, src_index_bits)
        to_row = _index(b, out_index, entry.i, out_index_bits)
        used = b.and_(b.icmp_signed(">=", from_row, _i64(0)), b.icmp_signed(">=", to_row, _i64(0)))
        with b.if_then(used):
            _refuse(b, b.or_(b.icmp_signed(">=", from_row, num_src), b.icmp_signed(">=", to_row, num_out)), entry.i)
            src_row = b.add(src, b.mul(from_row, src_stride))
            out_row = b.add(out, b.mul(to_row, out_stride))
            _copy_row(b, out_row, src_row, row_bytes, streaming)
    return _finish(fn, b, streaming)


def _copy_row(b: ir.IRBuilder, out: ir.Value, src: ir.Value, row_bytes: ir.Value, streaming: bool) -> None:
    start: ir.Value = _i64(0)
    for count, kind in ((UNROLL, ir.VectorType(I64, 8)), (1, ir.VectorType(I64, 8)), (1, I64), (1, ir.IntType(8))):
        item = {ir.IntType(8): 1, I64: 8}.get(kind, 64)
        with _loop(b, start, b.sub(row_bytes, _i64(count * item - 1)), count * item) as at:
            offsets = [b.add(at.i, _i64(u * item)) for u in range(count)]
            values = [_load(b, b.add(src, o), kind) for o in offsets]
            for o, value in zip(offsets, values, strict=True):
                _store(b, value, b.add(out, o), 64 if streaming and item == 64 else 0)
        start = at.i


@cache
def reduce_kernel(
    rows: str, out: str, bias: str | None, index_bits: int, weights: str | None, streaming: bool = False
) -> Kernel:
    """Compile the sum of `rows.reduce_rows`; dtypes by name, `weights` in (None, "row", "entry").

    Arguments: begin, end, out, out_stride, rows, rows_stride, num_rows, H, table, table_stride, J, weights, weights_stride,
    bias, bias_stride.
    """
    fn, b, args = _function("reduce", 15)
    begin, end, out_ptr, out_stride, rows_ptr, rows_stride, num_rows, hidden = args[:8]
    table, table_stride, width, weights_ptr, weights_stride, bias_ptr, bias_stride = args[8:]
    addresses, factors, count = b.alloca(I64, width), b.alloca(F32, width), b.alloca(I64)
    with _loop(b, begin, end, 1) as p:
        b.store(_i64(0), count)
        table_row = b.add(table, b.mul(p.i, table_stride))
        with _loop(b, _i64(0), width, 1) as j:
            row = _index(b, table_row, j.i, index_bits)
            with b.if_then(b.icmp_signed(">=", row, _i64(0))):
                _refuse(b, b.icmp_signed(">=", row, num_rows), p.i)
                n = b.load(count)
                b.store(b.add(rows_ptr, b.mul(row, rows_stride)), b.gep(addresses, [n]))
                if weights is not None:
                    at = row if weights == "row" else j.i
                    base = b.add(weights_ptr, b.mul(p.i, weights_stride)) if weights == "entry" else weights_ptr
                    b.store(_load(b, b.add(base, b.mul(at, _i64(4))), F32), b.gep(factors, [n]))
                b.store(b.add(n, _i64(1)), count)
        n = b.load(count)
        out_row, bias_row = b.add(out_ptr, b.mul(p.i, out_stride)), b.add(bias_ptr, b.mul(p.i, bias_stride))

        def block(column: ir.Value, lanes: int, unroll: int) -> None:
            columns = [b.add(column, _i64(u * lanes)) for u in range(unroll)]  # noqa: B023
            if bias is None:
                sums: Sequence[ir.Value] = [ir.Constant(_lanes(F32, lanes), None)] * unroll
            else:
                sums = [_load_float(b, bias_row, c, bias, lanes) for c in columns]  # noqa: B023
            with _loop(b, _i64(0), n, 1, *sums) as e:  # noqa: B023
                address = b.load(b.gep(addresses, [e.i]))
                values = [_load_float(b, address, c, rows, lanes) for c in columns]
                if weights is not None:
                    factor = _splat(b, b.load(b.gep(factors, [e.i])), lanes)
                    values = [b.fmul(factor, value) for value in values]
                e.next = [b.fadd(total, value) for total, value in zip(e.carried, values, strict=True)]
            for c, total in zip(columns, e.carried, strict=True):
                _store_float(b, total, out_row, c, out, lanes, streaming)  # noqa: B023

        _over_columns(b, hidden, block)
    return _finish(fn, b, streaming)


@cache
def grad_kernel(rows: str, grad: str, out: str | None, dot: bool) -> Kernel:
    """Compile `rows.scale_rows_grad`; `out` None: no grad_rows; `dot` False: no grad_weights.

    Arguments: begin, end, out, out_stride, dots, grad, grad_stride, rows, rows_stride, weights, H.
    """
    fn, b, args = _function("grad", 11)
    begin, end, out_ptr, out_stride, dots, grad_ptr, grad_stride, rows_ptr, rows_stride, weights, hidden = args
    vector = _lanes(F32, LANES)
    partial = b.ptrtoint(b.alloca(vector, DOT_LANES // LANES), I64)
    with _loop(b, begin, end, 1) as n:
        grad_row, rows_row, out_row = (
            b.add(base, b.mul(n.i, stride))
            for base, stride in ((grad_ptr, grad_stride), (rows_ptr, rows_stride), (out_ptr, out_stride))
        )
        factor = _load(b, b.add(weights, b.mul(n.i, _i64(4))), F32)
        for lane in range(0, DOT_LANES, LANES):
            _store(b, ir.Constant(vector, None), b.add(partial, _i64(4 * lane)))

        def block(column: ir.Value, lanes: int, unroll: int) -> None:
            for c in (b.add(column, _i64(u * lanes)) for u in range(unroll)):
                value = _load_float(b, grad_row, c, grad, lanes)  # noqa: B023
                if out is not None:
                    _store_float(b, b.fmul(_splat(b, factor, lanes), value), out_row, c, out, lanes)  # noqa: B023
                if dot:
                    product = b.fmul(value, _load_float(b, rows_row, c, rows, lanes))  # noqa: B023
                    slot = b.add(partial, b.shl(b.and_(c, _i64(DOT_LANES - 1)), _i64(2)))
                    _store(b, b.fadd(_load(b, slot, _lanes(F32, lanes)), product), slot)

        _over_columns(b, hidden, block)
        if dot:
            _store(b, _fold(b, partial), b.add(dots, b.mul(n.i, _i64(4))))
    return _finish(fn, b, False)


def _fold(b: ir.IRBuilder, partial: ir.Value) -> ir.Value:
    """Add the upper half of the partial sums to the lower half until one is left."""
    half = DOT_LANES // 2
    while half:
        lanes = min(half, LANES)
        for lane in range(0, half, lanes):
            low, high = (b.add(partial, _i64(4 * at)) for at in (lane, lane + half))
            _store(b, b.fadd(_load(b, low, _lanes(F32, lanes)), _load(b, high, _lanes(F32, lanes))), low)
        half //= 2
    return _quiet(b, _load(b, partial, F32))


# --- pieces ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Loop:
    i: ir.Value
    carried: list[ir.Value]  # inside: values of this round; after the loop: the final ones
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


def _over_columns(b: ir.IRBuilder, hidden: ir.Value, block: Callable[[ir.Value, int, int], None]) -> None:
    """Emit block(column, lanes, unroll) for wide blocks, then single vectors, then single columns."""
    start: ir.Value = _i64(0)
    for lanes, unroll in ((LANES, UNROLL), (LANES, 1), (1, 1)):
        with _loop(b, start, b.sub(hidden, _i64(lanes * unroll - 1)), lanes * unroll) as at:
            block(at.i, lanes, unroll)
        start = at.i


def _i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _lanes(kind: ir.Type, lanes: int) -> ir.Type:
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def _splat(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    if lanes == 1:
        return value
    one = b.insert_element(ir.Constant(_lanes(value.type, lanes), ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(_lanes(I32, lanes), None))


def _constant(kind: ir.Type, value: int, lanes: int) -> ir.Constant:
    return ir.Constant(kind, value) if lanes == 1 else ir.Constant(_lanes(kind, lanes), [value] * lanes)


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, streaming_align: int = 0) -> None:
    store = b.store(value, b.inttoptr(address, value.type.as_pointer()), align=streaming_align or 1)
    if streaming_align:
        store.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


def _index(b: ir.IRBuilder, base: ir.Value, at: ir.Value, bits: int) -> ir.Value:
    if bits == 0:
        return at
    value = _load(b, b.add(base, b.mul(at, _i64(bits // 8))), ir.IntType(bits))
    return value if bits == 64 else b.sext(value, I64)


def _refuse(b: ir.IRBuilder, wrong: ir.Value, at: ir.Value) -> None:
    with b.if_then(wrong, likely=False):
        b.ret(at)


def _load_float(b: ir.IRBuilder, row: ir.Value, column: ir.Value, dtype: str, lanes: int) -> ir.Value:
    """Load columns as float32."""
    address = b.add(row, b.mul(column, _i64(ITEM_BYTES[dtype])))
    if dtype == "float32":
        return _load(b, address, _lanes(F32, lanes))
    if dtype == "float16":
        return b.fpext(_load(b, address, _lanes(F16, lanes)), _lanes(F32, lanes))
    bits = b.zext(_load(b, address, _lanes(I16, lanes)), _lanes(I32, lanes))
    return b.bitcast(b.shl(bits, _constant(I32, 16, lanes)), _lanes(F32, lanes))


def _store_float(
    b: ir.IRBuilder, value: ir.Value, row: ir.Value, column: ir.Value, dtype: str, lanes: int, streaming: bool = False
) -> None:
    """Round to nearest even and store; the integer way for bfloat16, as the instruction flushes subnormals."""
    address = b.add(row, b.mul(column, _i64(ITEM_BYTES[dtype])))
    value = _quiet(b, value)
    if dtype == "float16":
        value = b.fptrunc(value, _lanes(F16, lanes))
    if dtype == "bfloat16":
        bits = b.bitcast(value, _lanes(I32, lanes))
        sixteen, one, bulk = (_constant(I32, n, lanes) for n in (16, 1, 0x7FFF))
        odd = b.and_(b.lshr(bits, sixteen), one)
        value = b.trunc(b.lshr(b.add(b.add(bits, bulk), odd), sixteen), _lanes(I16, lanes))
    _store(b, value, address, lanes * ITEM_BYTES[dtype] if streaming and lanes > 1 else 0)


def _quiet(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Replace every NaN by the one that torch writes for float("nan")."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
    nan = b.bitcast(_constant(I32, 0x7FC00000, lanes), value.type)
    return b.select(b.fcmp_unordered("uno", value, value), nan, value)


# --- from a module to a callable ------------------------------------------------------------------------------------------

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
        b.fence("seq_cst")  # streamed stores are not ordered by what the caller does next
    b.ret(_i64(-1))
    module = llvm.parse_assembly(str(fn.module))
    machine = _machine()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _alive.append(engine)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(fn.args))
    return prototype(engine.get_function_address(fn.name))
