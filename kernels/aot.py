"""Compile the kernels ahead of time, for GPUs that are not here, and look at what came out.

The launches are those of the wrappers: they run on tensors without storage while `_launch` notes their kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from moecomm.kernels import _launch
from moecomm.kernels._launch import Launch
from moecomm.kernels.combine import push_reduced
from moecomm.kernels.layout import SendLayout, layout
from moecomm.kernels.permute import permute, unpermute
from moecomm.kernels.push import push, push_quantized
from moecomm.kernels.quant import GROUP, dequantize, quantize
from moecomm.kernels.receive import receive
from moecomm.kernels.reduce import reduce
from moecomm.kernels.reduce_grad import reduce_grad_rows, reduce_grad_weights
from moecomm.kernels.rows import Arriving, RowFormat
from moecomm.kernels.sync import signal, wait
from moecomm.kernels.wire import FIELDS, LATE, Link, Wire
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


class Shape(NamedTuple):
    """A layer as its communication sees it."""

    name: str
    hidden: int
    top_k: int
    experts_per_rank: int
    world: int = 8
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 4096


SHAPES = (
    Shape("DeepSeek-V3, EP8", 7168, 8, 32),
    Shape("Mixtral 8x7B, EP8", 4096, 2, 1),
    Shape("gpt-oss-120b, EP8", 2880, 4, 16),
)


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target.

    row_widths: bytes of every access to a row, as (load or store, bytes, source line). mix: instructions by kind.
    """

    kernel: str
    target: str
    shape: str
    num_warps: int
    registers: int
    spilled: int
    stack_bytes: int
    shared_bytes: int
    row_widths: tuple[tuple[str, int, str], ...]
    mix: Counter[str]
    assembly: str


def operations(shape: Shape) -> dict[str, Callable[[], Any]]:
    """The launches of a forward and a backward pass at a shape, by name, on tensors without storage.

    >>> sorted(operations(SHAPES[1]))[:3]
    ['barrier: signal', 'barrier: wait', 'combine: push_reduced']
    """
    hidden, top_k, experts, world, dtype, tokens = shape[1:]
    groups = -(-hidden // int(GROUP))
    fp8 = RowFormat(hidden, torch.float8_e4m3fn, groups)
    form = RowFormat(hidden, dtype)
    wire = Wire.of(world, top_k, experts, max(form.wire_bytes, fp8.wire_bytes))
    rows_out = world * tokens
    x, rows = _meta(tokens, hidden, dtype=dtype), _meta(rows_out, hidden, dtype=dtype)
    table, by_row = _meta(rows_out, top_k, dtype=torch.int32), _meta(rows_out)
    places = _meta(rows_out, dtype=torch.int32)
    pair_row = _meta(tokens, world, dtype=torch.int32)
    ends = _meta(2, experts, dtype=torch.int32)
    sent = SendLayout(
        _meta(tokens, wire.meta_words, dtype=torch.int32), pair_row, _meta(world, wire.counts_width, dtype=torch.int32)
    )
    link = Link(
        _meta(2, FIELDS, world, dtype=torch.int64),
        _meta(2, dtype=torch.int64),
        _meta(int(LATE) + world, dtype=torch.int64),
        rank=3,
        max_tokens=tokens,
        max_spins=1 << 24,
    )
    ids, weights = _meta(tokens, top_k, dtype=torch.int64), _meta(tokens, top_k)
    tables = _meta(world * experts, dtype=torch.int32), _meta(world + 1, dtype=torch.int32)
    come, grads = Arriving(link, wire, form), Arriving(link, wire, form, places)
    room = {"experts": (3 * experts, experts), "num_pairs": rows_out, "num_rows": rows_out}
    padded = {"num_rows": rows_out, "align": 128}
    home = {"wire_row": places, "token": places, "link": link, "wire": wire}
    codes, scales = _meta(tokens, hidden, dtype=torch.float8_e4m3fn), _meta(tokens, groups)
    return {
        "dispatch: layout": lambda: layout(ids, weights, *tables, wire=wire, max_tokens=tokens, status=link.status),
        "dispatch: push": lambda: push(x, sent, link, wire=wire),
        "dispatch: push, replayed": lambda: push(x, sent, link, wire=wire, replay=True),
        "dispatch: push_quantized": lambda: push_quantized(x, sent, link, wire=wire),
        "dispatch: receive": lambda: receive(come, **room, align=128),
        "dispatch: receive, FP8": lambda: receive(Arriving(link, wire, fp8), **room, align=128),
        "dispatch: receive, padded": lambda: receive(come, **room, layout="padded", align=tokens),
        "dispatch: receive, rank": lambda: receive(come, **room, layout="rank"),
        "dispatch: permute, replayed": lambda: permute(grads, table, ends, **padded),
        "combine: push_reduced": lambda: push_reduced(rows, table, by_row, **home),
        "combine: push_reduced, each": lambda: push_reduced(rows, table, None, **home, each=True),
        "combine: reduce": lambda: reduce(come, pair_row, None, x),
        "combine: reduce, each": lambda: reduce(come, ids.int(), weights),
        "gradient: reduce_grad_rows": lambda: reduce_grad_rows(grads, table, by_row, ends, **padded),
        "gradient: reduce_grad_weights": lambda: reduce_grad_weights(grads, rows, table),
        "local: permute": lambda: permute(rows, table, ends, **padded),
        "local: unpermute": lambda: unpermute(rows, places),
        "local: quantize": lambda: quantize(x),
        "local: dequantize": lambda: dequantize(codes, scales, dtype),
        "barrier: signal": lambda: signal(link, wire),
        "barrier: wait": lambda: wait(link, wire),
    }


def launches(shape: Shape) -> dict[str, Launch]:
    """The launch behind each operation."""
    found = {}
    for name, operation in operations(shape).items():
        with recorded() as noted:
            operation()
        assert len(noted) == 1, f"{name} is {len(noted)} launches"
        found[name] = noted[0]
    return found


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note launches and do not run them."""
    assert _launch.recorder is None, "launches are being recorded already"
    noted: list[Launch] = []
    _launch.recorder = noted
    try:
        yield noted
    finally:
        _launch.recorder = None


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a launch for a target as it would be compiled there."""
    assert not triton.knobs.runtime.interpret, "compiling needs a process without TRITON_INTERPRET"
    names = [parameter.name for parameter in launch.kernel.params]
    values = dict(zip(names, launch.args, strict=False)) | launch.constexprs
    if "HARDWARE" in values:
        values["HARDWARE"] = target in ("sm_90", "sm_100")
    constexprs: dict[Any, Any] = {}
    attrs: dict[Any, Any] = {}
    signature = {}
    for at, name in enumerate(names):
        constant = launch.kernel.params[at].is_constexpr
        signature[name] = "constexpr" if constant else _type_of(values[name], (at,), constexprs, attrs)
        if constant:
            constexprs[(at,)] = values[name]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[target], options=options)


def inspect(name: str, shape: Shape, target: str, launch: Launch) -> Compiled:
    """Compile a launch and measure the result."""
    compiled = compile_launch(launch, target)
    amd = target.startswith("gfx")
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    use, mix = _use_amd(assembly) if amd else _use_nvidia(compiled.asm["cubin"])
    widths = tuple(row_widths(assembly))
    return Compiled(name, target, shape.name, launch.num_warps, *use, compiled.metadata.shared, widths, mix, assembly)


def row_widths(assembly: str) -> Iterator[tuple[str, int, str]]:
    """Every access to memory from a source line marked `# row access`: load or store, bytes, place."""
    files = {number: Path(path).name for number, path in re.findall(r"\.file\s+(\d+)[^\n]*\"([^\"\n]*)\"", assembly)}
    place, inline = "", 0  # lines of inline assembly count up from the true place, which comes first
    for line in assembly.splitlines():
        words = line.split()
        if words[:1] == [".loc"]:
            inline += inline > 0
            if inline <= 2:
                place = f"{files.get(words[1], '?')}:{words[2]}"
        elif "begin inline asm" in line:
            inline = 1
        elif "end inline asm" in line:
            inline = 0
        elif place in _row_lines():
            access = _access(line)
            if access:
                yield (*access, place)


def _access(line: str) -> tuple[str, int] | None:
    found = re.search(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bu](\d+)\b", line)
    if found:
        return ("load" if found[1] == "ld" else "store"), int(found[2] or 1) * int(found[3]) // 8
    found = re.search(r"\b(?:global|buffer|flat)_(load|store)_(?:[a-z_]*?)(dword|short|byte|[bu]\d+)(?:x(\d))?", line)
    if found:
        size = {"dword": 4, "short": 2, "byte": 1}.get(found[2]) or int(found[2][1:]) // 8
        return found[1], size * int(found[3] or 1)
    return None


@cache
def _row_lines() -> frozenset[str]:
    folder = Path(__file__).parent
    return frozenset(
        f"{path.name}:{number}"
        for path in folder.glob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.rstrip().endswith("# row access")
    )


def _type_of(value: Any, path: tuple[int, ...], constexprs: dict[Any, Any], attrs: dict[Any, Any]) -> Any:
    if value is None:
        constexprs[path] = None
        return "constexpr"
    if isinstance(value, tuple):
        return type(value)(*(_type_of(part, (*path, i), constexprs, attrs) for i, part in enumerate(value)))
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            attrs[path] = [["tt.divisibility", 16]]
        return triton.runtime.jit.mangle_type(value)
    return "i32"


def _use_nvidia(cubin: bytes) -> tuple[tuple[int, int, int], Counter[str]]:
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    opcodes = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", text)
    spilled = sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes)
    return (registers, spilled, stack), Counter(_kind_nvidia(opcode) for opcode in opcodes if opcode != "NOP")


def _kind_nvidia(opcode: str) -> str:
    head = opcode.split(".")[0]
    if head in ("LDG", "STG"):
        width = next((part for part in opcode.split(".") if part in ("64", "128", "256")), "32 or less")
        return f"{head} {width}"
    kinds = {
        "barrier": ("BAR", "MEMBAR", "FENCE", "ERRBAR", "CCTL"),
        "atomic": ("ATOM", "ATOMG", "RED", "REDG"),
        "shared": ("LDS", "STS", "LDSM", "SHFL"),
        "float": ("FADD", "FMUL", "FFMA", "FSEL", "FMNMX", "FSETP", "MUFU", "F2F", "F2FP", "HADD2", "HMUL2", "I2F"),
        "branch": ("BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC"),
    }
    return next((kind for kind, heads in kinds.items() if head in heads), "integer")


def _use_amd(assembly: str) -> tuple[tuple[int, int, int], Counter[str]]:
    def number(name: str) -> int:
        return int(re.search(rf"{re.escape(name)}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    opcodes = re.findall(r"^\s+([vs]_\w+|global_\w+|buffer_\w+|flat_\w+|ds_\w+)", assembly, re.MULTILINE)
    spilled = number(".vgpr_spill_count") + number(".sgpr_spill_count")
    return (number(".vgpr_count"), spilled, number(".private_segment_fixed_size")), Counter(map(_kind_amd, opcodes))


def _kind_amd(opcode: str) -> str:
    access = _access(opcode)
    if access:
        head = "LDG" if access[0] == "load" else "STG"
        return f"{head} {access[1] * 8}" if access[1] > 4 else f"{head} 32 or less"
    if opcode.startswith("ds_"):
        return "shared"
    if "atomic" in opcode:
        return "atomic"
    if opcode.startswith(("buffer_wb", "buffer_inv", "s_barrier", "s_waitcnt")):
        return "barrier"
    if opcode.startswith(("s_cbranch", "s_branch", "s_endpgm")):
        return "branch"
    return "float" if re.search(r"_f(16|32|64)|_pk_", opcode) else "integer"


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
