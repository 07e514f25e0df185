"""Small loops in machine code: what the kernels of this package share to write LLVM code and to run it.

llvmlite is the compiler under numba. A kernel takes addresses, strides (bytes) and counts as 64-bit integers and
returns one; it is called through ctypes, which lets go of the interpreter lock. One compiles in some tens of
milliseconds, at its first use. No fast-math flag is set, so LLVM neither fuses nor reassociates floats.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

import llvmlite.binding as llvm
from llvmlite import ir

Kernel = Callable[..., int]
Words = Callable[[IntEnum], ir.Value]  # see `words`

BOOL, I8, I16, I32, I64 = map(ir.IntType, (1, 8, 16, 32, 64))
LINE_BYTES = 64
_MONOTONIC = 1  # linux/time.h


@dataclass
class Loop:
    i: ir.Value
    carried: list[ir.Value]  # in the body: the values of this round; after the loop: the last ones
    next: list[ir.Value] = field(default_factory=list)  # the body says what they become


@contextmanager
def loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, *carried: ir.Value) -> Iterator[Loop]:
    """Emit `for i in range(start, stop, step)` around the body; after it `i` is the first value not visited."""
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    this = Loop(b.phi(I64), [b.phi(value.type) for value in carried])
    for phi, value in zip((this.i, *this.carried), (start, *carried), strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", this.i, stop), body, done)
    b.position_at_end(body)
    yield this
    for phi, value in zip((this.i, *this.carried), (b.add(this.i, i64(step)), *this.next), strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(done)


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def row_at(b: ir.IRBuilder, base: ir.Value, at: ir.Value, stride: ir.Value) -> ir.Value:
    return b.add(base, b.mul(at, stride))


def index_at(b: ir.IRBuilder, base: ir.Value, at: ir.Value, bits: int) -> ir.Value:
    if bits == 0:
        return at
    value = load(b, row_at(b, base, at, i64(bits // 8)), ir.IntType(bits))
    return value if bits == 64 else b.sext(value, I64)


def refuse(b: ir.IRBuilder, wrong: ir.Value, at: ir.Value) -> None:
    with b.if_then(wrong, likely=False):
        b.ret(at)


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, streaming: bool = False) -> None:
    stored = b.store(value, b.inttoptr(address, value.type.as_pointer()), align=LINE_BYTES if streaming else 1)
    if streaming:
        stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


def words(b: ir.IRBuilder, table: ir.Value) -> Words:
    """Load int64 words of a table where the function begins, each at most once.

    A kernel with many arguments that hardly ever change takes them from a table: handing them over takes longer.
    """
    loaded: dict[IntEnum, ir.Value] = {}

    def word(name: IntEnum) -> ir.Value:
        if name not in loaded:
            with b.goto_entry_block():
                loaded[name] = index_at(b, table, i64(name), 64)
        return loaded[name]

    return word


def set_word(b: ir.IRBuilder, table: ir.Value, name: IntEnum, value: ir.Value) -> None:
    store(b, value, b.add(table, i64(8 * name)))


def copy_bytes(b: ir.IRBuilder, out: ir.Value, src: ir.Value, num_bytes: ir.Value) -> None:
    pointer = I8.as_pointer()
    memcpy = b.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, I64])
    b.call(memcpy, [b.inttoptr(out, pointer), b.inttoptr(src, pointer), num_bytes, ir.Constant(BOOL, 0)])


def call(b: ir.IRBuilder, kernel: Kernel, *args: ir.Value) -> ir.Value:
    """Call another kernel, without a way back through Python."""
    address = ctypes.cast(kernel, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None, "a kernel has an address"
    kind = ir.FunctionType(I64, [I64] * len(args))
    return b.call(b.inttoptr(i64(address), kind.as_pointer()), args)


def clock_ns(b: ir.IRBuilder) -> ir.Value:
    """Nanoseconds of `time.monotonic`."""
    kind = ir.FunctionType(I32, [I32, I8.as_pointer()])
    clock_gettime = b.module.globals.get("clock_gettime") or ir.Function(b.module, kind, "clock_gettime")
    with b.goto_entry_block():
        moment = b.alloca(I64, i64(2))
    b.call(clock_gettime, [ir.Constant(I32, _MONOTONIC), b.bitcast(moment, I8.as_pointer())])
    return b.add(b.mul(b.load(moment), i64(1_000_000_000)), b.load(b.gep(moment, [i64(1)])))


# --- from a module to a callable ----------------------------------------------------------------------------------

_alive: list[object] = []  # engines own the code that the returned functions point to


def function(name: str, num_args: int) -> tuple[ir.Function, ir.IRBuilder, Sequence[ir.Value]]:
    fn = ir.Function(ir.Module(name), ir.FunctionType(I64, [I64] * num_args), name)
    return fn, ir.IRBuilder(fn.append_basic_block("entry")), fn.args


@cache
def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=2, jit=True)


def finish(fn: ir.Function, b: ir.IRBuilder, streaming: bool = False) -> Kernel:
    if streaming:
        b.fence("seq_cst")  # streamed stores wait for nobody; what the caller signals next must come after them
    if not b.block.is_terminated:
        b.ret(i64(-1))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code(str(fn.module))))  # see `shared_code`
    engine.finalize_object()
    _alive.append(engine)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(fn.args))
    return prototype(engine.get_function_address(fn.name))


def machine_code(text: str) -> bytes:
    """The object file of a module."""
    module, machine = llvm.parse_assembly(text), _machine()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    return code
