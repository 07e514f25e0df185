"""Compile the kernels ahead of time, for GPUs that are not here, and look at what came out.

The launches are those of the wrappers: they run on tensors without storage while `_launch` notes their kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import triton
from moecomm.kernels import _launch
from moecomm.kernels._launch import Launch
from moecomm.kernels.assembly import Use, flushes, fused_products, memory_orders, row_widths, use_amd, uses_nvidia
from moecomm.kernels.combine import push_reduced
from moecomm.kernels.layout import SendLayout, layout
from moecomm.kernels.padded import padded_receive, padded_send
from moecomm.kernels.padded_home import padded_return, padded_sum
from moecomm.kernels.permute import permute, unpermute
from moecomm.kernels.push import push, push_quantized
from moecomm.kernels.quant import GROUP, dequantize, quantize
from moecomm.kernels.receive import receive
from moecomm.kernels.reduce import reduce
from moecomm.kernels.reduce_grad import reduce_grad_rows, reduce_grad_weights
from moecomm.kernels.rows import Arriving, RowFormat
from moecomm.kernels.slots import FLOAT_SCALES, Slots
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
    """A layer as its communication sees it; decodes: tokens of a step for which layout "padded" is compiled too."""

    name: str
    hidden: int
    top_k: int
    experts_per_rank: int
    world: int = 8
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 4096
    decodes: int = 0


SHAPES = (
    Shape("DeepSeek-V3, EP8", 7168, 8, 32, decodes=128),
    Shape("Mixtral 8x7B, EP8", 4096, 2, 1),
    Shape("gpt-oss-120b, EP8", 2880, 4, 16),
)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one kernel became on one target.

    spilled: instructions that move registers to memory and back. row_widths: every access to a row, as (load or store,
    bytes, source line). orders: what it orders at system scope. fused: multiply-adds. flushes: operations that take
    subnormal numbers for zero. mix: instructions by kind. traffic: bytes read and written per row.
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
    orders: tuple[str, ...]
    fused: int
    flushes: int
    converts_to_fp8: bool
    mix: dict[str, int]
    traffic: tuple[int, int]

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def operations(shape: Shape, rank: int = 3) -> dict[str, Callable[[], Any]]:
    """The launches of a forward and a backward pass at a shape on a rank, by name, on tensors without storage.

    >>> sorted(operations(SHAPES[1]))[:3]
    ['barrier: signal', 'barrier: wait', 'combine: push_reduced']
    """
    hidden, top_k, experts, world, dtype, tokens, _ = shape[1:]
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
        rank=rank,
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
        "dispatch: receive, static": lambda: receive(come, **room, align=128, zero_rest=True),
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
        **(_decode_operations(shape, wire, link._replace(max_tokens=shape.decodes)) if shape.decodes else {}),
    }


def _decode_operations(shape: Shape, wire: Wire, link: Link) -> dict[str, Callable[[], Any]]:
    """The launches of layout "padded"."""
    hidden, top_k, local, world, dtype, *_ = shape[1:]
    tokens, rows, fp8 = link.max_tokens, local * world * link.max_tokens, int(FLOAT_SCALES)
    int32, int64 = torch.int32, torch.int64
    slots = Slots(
        out=link,
        home=link,
        rank_of_expert=_meta(world * local, dtype=int32),
        local_of_expert=_meta(world * local, dtype=int32),
        topk_idx=_meta(tokens, top_k, dtype=int64),
        topk_weights=_meta(tokens, top_k),
        places=_meta(tokens, top_k, dtype=int32),
        ranges=_meta(local, world, 2, dtype=int32),
        tokens=_meta(local, dtype=int32),
        totals=_meta(local, dtype=int64),
        book=_meta(2, dtype=int64),
        notes=_meta(3, dtype=int64),
    )
    x, y, many = (_meta(count, hidden, dtype=dtype) for count in (tokens, tokens, rows))
    sent = {"topk_weights": _meta(tokens, top_k), "wire": wire, "number": 6}
    home, weights = {"wire": wire, "number": 6}, _meta(tokens, top_k)
    return {
        "padded: send": lambda: padded_send(x, _meta(tokens, top_k, dtype=int64), slots, **sent),
        "padded: send, FP8": lambda: padded_send(x, _meta(tokens, top_k, dtype=int64), slots, **sent, quant=fp8),
        "padded: receive": lambda: padded_receive(slots, wire=wire),
        "padded: receive, copied": lambda: padded_receive(slots, wire=wire, out=many),
        "padded: return": lambda: padded_return(None, slots, **home),
        "padded: return, copied": lambda: padded_return(many, slots, **home),
        "padded: return, FP8": lambda: padded_return(many, slots, **home, quant=fp8),
        "padded: sum": lambda: padded_sum(y, slots, **home, weights=weights),
        "padded: sum, FP8": lambda: padded_sum(y, slots, **home, weights=weights, quant=fp8),
    }


def launches(shape: Shape, rank: int = 3) -> dict[str, Launch]:
    """The launch behind each operation."""
    found = {}
    for name, operation in operations(shape, rank).items():
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


def compile_launch(launch: Launch, target: str, *, fused: bool = False) -> Any:
    """Compile a launch for a target as it would be compiled there; fused: let products and sums fuse."""
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
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": fused}
    return triton.compile(source, target=TARGETS[target], options=options)


def inspect(shape: Shape, target: str, chosen: dict[str, Launch] | None = None) -> list[Compiled]:
    """Compile launches at a shape for a target, all of them unless told, and measure what came out."""
    found = launches(shape) if chosen is None else chosen
    compiled = [compile_launch(launch, target) for launch in found.values()]
    if target.startswith("gfx"):
        uses = [use_amd(one.asm["amdgcn"]) for one in compiled]
    else:
        uses = uses_nvidia([one.asm["cubin"] for one in compiled], target.replace("sm_", "SM"))
    measured = zip(found.items(), compiled, uses, strict=True)
    return [_measured(name, shape, target, (launch, one, use)) for (name, launch), one, use in measured]


def _measured(name: str, shape: Shape, target: str, result: tuple[Launch, Any, Use]) -> Compiled:
    launch, compiled, use = result
    amd = target.startswith("gfx")
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    fused = fused_products(assembly)
    if not amd and "div.rn" not in assembly:
        fused += use.mix["fused"]
    return Compiled(
        kernel=name,
        target=target,
        shape=shape.name,
        num_warps=launch.num_warps,
        registers=use.registers,
        spilled=use.spilled,
        stack_bytes=use.stack_bytes,
        shared_bytes=compiled.metadata.shared,
        row_widths=tuple(row_widths(assembly)),
        orders=tuple(memory_orders(assembly)),
        fused=fused,
        flushes=flushes(assembly),
        converts_to_fp8="cvt.rn.satfinite.e4m3x2" in assembly,
        mix=dict(use.mix),
        traffic=row_traffic(name, shape),
    )


def row_traffic(name: str, shape: Shape) -> tuple[int, int]:
    """Bytes read and written for one row with one destination, its metadata and table entries included.

    >>> row_traffic("dispatch: push", SHAPES[0])  # 7168 bfloat16; 8 x 3 + 1 words of metadata, padded; W slots
    (14480, 14448)
    """
    hidden, top_k, _, world, dtype, *_ = shape[1:]
    row, groups = hidden * dtype.itemsize, -(-hidden // int(GROUP))
    meta = 4 * Wire.of(world, top_k, 1, row).meta_words
    fp8, places = hidden + 4 * groups, 4 * world
    back = {"receive": (meta, 4 * top_k + 8 + 4), "rank": (meta, 8 * top_k + 8)}
    tables = {
        "dispatch: layout": (12 * top_k, meta + places),
        "dispatch: push": (row + meta + places, row + meta),
        "dispatch: push, replayed": (row + places, row),
        "dispatch: push_quantized": (row + meta + places, fp8 + meta),
        "dispatch: receive": (row + back["receive"][0], row + back["receive"][1]),
        "dispatch: receive, static": (row + back["receive"][0], row + back["receive"][1]),
        "dispatch: receive, FP8": (fp8 + back["receive"][0], fp8 + back["receive"][1]),
        "dispatch: receive, padded": (row + back["receive"][0], row + back["receive"][1]),
        "dispatch: receive, rank": (row + back["rank"][0], row + back["rank"][1]),
        "dispatch: permute, replayed": (row + 4 * top_k + 4, row),
        "combine: push_reduced": (row + 4 * top_k + 8, row),
        "combine: push_reduced, each": (row + 4 * top_k + 8, row),
        "combine: reduce": (world * row + row + places, row),
        "combine: reduce, each": (top_k * row + 8 * top_k, row),
        "gradient: reduce_grad_rows": (row + 8 * top_k + 4, row),
        "gradient: reduce_grad_weights": (2 * row + 4, 4),
        "local: permute": (row + 4 * top_k, row),
        "local: unpermute": (row + 4, row),
        "local: quantize": (row, fp8),
        "local: dequantize": (fp8, row),
        "padded: send": (row, row),
        "padded: send, FP8": (row, fp8),
        "padded: receive, copied": (row, row),
        "padded: return, copied": (row, row),
        "padded: return, FP8": (row, fp8),
        "padded: sum": (top_k * row, row),
        "padded: sum, FP8": (top_k * fp8, row),
    }
    return tables.get(name, (0, 0))


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
    if len(path) > 1 and value == 1:  # inside tuples integers are specialised
        constexprs[path] = 1
        return "constexpr"
    if len(path) > 1 and value % 16 == 0:
        attrs[path] = [["tt.divisibility", 16]]
    return "i32"


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
