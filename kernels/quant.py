"""Rows as FP8 (e4m3) with one scale per 128 elements.

    amax  = largest |x| of the group, at least 2^-100; a NaN counts as 0
    scale = amax / 448; with power_of_two the next power of two at or above it
    code  = e4m3 of x * (448 / amax), or x / scale with power_of_two: round to nearest even, subnormals included;
            at most 448, and 240 with the power of two 2^120, where 256 would decode to an infinity
    x'    = code * scale

All in float32 with every operation rounded to nearest. A NaN becomes the code 0x7f; a group that holds an infinity
decodes to NaN. GPUs with the instruction (sm_89 and later) use it; everywhere else integers round, with the same bits.

Legend: T rows, H hidden, G = ceil(H / 128) groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch, num_programs
from moecomm.kernels._numeric import element_of, narrow, widen
from moecomm.kernels.rows import contiguous_rows, row_at
from torch import Tensor

GROUP = tl.constexpr(128)
_GROUPS_AT_ONCE = 32
_SMALLEST = 2.0**-100


def has_fp8(like: Tensor) -> bool:
    """Whether the device of a tensor converts to e4m3 in hardware."""
    if like.device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(like.device) >= (8, 9)


@triton.jit
def encode_e4m3(value, HARDWARE: tl.constexpr):
    """uint8 codes of float32 values: nearest even, at most 448."""
    if HARDWARE:
        code = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(value == value, code, 0x7F)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7F800000)
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        shift = tl.minimum(141 - (magnitude >> 23), 25)
        shift = tl.maximum(shift, 1)
        mantissa = (magnitude & 0x7FFFFF) | 0x800000
        half = tl.full(mantissa.shape, 1, tl.int32) << (shift - 1)
        subnormal = (mantissa + half - 1 + ((mantissa >> shift) & 1)) >> shift
        code = tl.where(magnitude < (121 << 23), subnormal, tl.minimum(normal, 0x7E))
        code = code | ((bits >> 24) & 0x80)
        return tl.where(value == value, code, 0x7F).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """float32 values of uint8 codes; exact."""
    bits = code.to(tl.int32)
    exponent = (bits >> 3) & 15
    normal = (((exponent + 120) << 23) | ((bits & 7) << 20)).to(tl.float32, bitcast=True)
    subnormal = (bits & 7).to(tl.float32) * 0.001953125
    value = tl.where(exponent == 0, subnormal, normal)
    value = (value.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def encode_groups(value, POWER_OF_TWO: tl.constexpr, HARDWARE: tl.constexpr):
    """(n, 128) uint8 codes and (n,) scales of (n, 128) float32 values."""
    known = tl.where(value == value, tl.abs(value), 0.0)
    amax = tl.maximum(tl.max(known, axis=1), 7.888609052210118e-31)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        inverse = tl.where(bits == 0x7F800000, 0.0, inverse)
        most = tl.where(bits == (247 << 23), 240.0, 448.0)[:, None]
        value = value * inverse[:, None]
        value = tl.where(value > most, most, tl.where(value < -most, -most, value))
    else:
        value = value * tl.div_rn(tl.full(amax.shape, 448.0, tl.float32), amax)[:, None]
    return encode_e4m3(value, HARDWARE), scale


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    codes,
    scales,
    x,
    num_rows,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_AT_ONCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    WORD: tl.constexpr = x.dtype.element_ty
    group = tl.program_id(1) * GROUPS_AT_ONCE + tl.arange(0, GROUPS_AT_ONCE)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        source = row_at(x.to(tl.int64), row, HIDDEN * (WORD.primitive_bitwidth // 8), WORD, ALIGNED)
        value = tl.load(source + column, mask=column < HIDDEN, other=0.0)  # row access
        code, scale = encode_groups(widen(value), POWER_OF_TWO, HARDWARE)
        target = row_at(codes.to(tl.int64), row, HIDDEN, tl.uint8, ALIGNED)
        tl.store(target + column, code, mask=column < HIDDEN)  # row access
        tl.store(scales + tl.cast(row, tl.int64) * GROUPS + group, scale, mask=group < GROUPS)


def quantize(x: Tensor, *, power_of_two: bool = False, max_programs: int | None = None) -> tuple[Tensor, Tensor]:
    """Encode rows: (T, H) float8_e4m3fn and (T, G) float32 scales.

    Args:
        x: (T, H) float32, float16 or bfloat16.
        power_of_two: whether scales are rounded up to a power of two.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> codes, scales = quantize(torch.tensor([[896.0, 2.0, -1.0]]))
    >>> codes.float().tolist(), scales.tolist()
    ([[448.0, 1.0, -0.5]], [[2.0]])
    """
    element_of("x", x.dtype)
    x = contiguous_rows("x", x)
    num_rows, hidden = x.shape
    groups = -(-hidden // int(GROUP))
    codes = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, groups, dtype=torch.float32, device=x.device)
    if x.numel():
        at_once = min(_GROUPS_AT_ONCE, triton.next_power_of_2(groups))
        warps, blocks = max(1, at_once // 8), -(-groups // at_once)
        launch(
            _quantize_kernel,
            (num_programs(num_rows, x, max_programs, warps=warps, columns=blocks), blocks),
            *(codes.view(torch.uint8), scales, x, num_rows),
            num_warps=warps,
            HIDDEN=hidden,
            GROUPS=groups,
            GROUPS_AT_ONCE=at_once,
            ALIGNED=hidden % 16 == 0 and x.data_ptr() % 16 == 0,
            POWER_OF_TWO=power_of_two,
            HARDWARE=has_fp8(x),
        )
    return codes, scales


def quantize_ref(x: Tensor, *, power_of_two: bool = False, max_programs: int | None = None) -> tuple[Tensor, Tensor]:
    """`quantize` in plain torch."""
    num_rows, hidden = x.shape
    groups = -(-hidden // int(GROUP))
    value = torch.nn.functional.pad(x.float(), (0, groups * int(GROUP) - hidden)).view(num_rows, groups, int(GROUP))
    amax = value.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(2).clamp(min=_SMALLEST)
    largest = torch.full_like(amax, 448.0)  # a tensor: torch divides by and through a number less exactly
    scales, inverse, most = amax / largest, largest / amax, largest
    if power_of_two:
        bits = (scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scales = bits.view(torch.float32)
        inverse = torch.where(bits == 0x7F800000, 0.0, ((254 << 23) - bits).view(torch.float32))
        most = torch.where(bits == 247 << 23, 240.0, largest)
    scaled = (value * inverse[..., None]).clamp(-most[..., None], most[..., None])
    codes = torch.where(scaled.isnan(), torch.nan, scaled).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :hidden].contiguous(), scales


@triton.jit(do_not_specialize=["num_rows"])
def _dequantize_kernel(
    x,
    codes,
    scales,
    num_rows,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_AT_ONCE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    WORD: tl.constexpr = x.dtype.element_ty
    group = tl.program_id(1) * GROUPS_AT_ONCE + tl.arange(0, GROUPS_AT_ONCE)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        source = row_at(codes.to(tl.int64), row, HIDDEN, tl.uint8, ALIGNED)
        code = tl.load(source + column, mask=column < HIDDEN, other=0)  # row access
        scale = tl.load(scales + tl.cast(row, tl.int64) * GROUPS + group, mask=group < GROUPS, other=0.0)
        target = row_at(x.to(tl.int64), row, HIDDEN * (WORD.primitive_bitwidth // 8), WORD, ALIGNED)
        tl.store(target + column, narrow(decode_e4m3(code) * scale[:, None], WORD), mask=column < HIDDEN)  # row access


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, *, max_programs: int | None = None) -> Tensor:
    """Decode rows: (T, H) of `dtype`, each product rounded once.

    Args:
        codes: (T, H) float8_e4m3fn.
        scales: (T, G) float32.
        dtype: float32, float16 or bfloat16.
        max_programs: upper bound for the grid; what fits on the GPU unless told.

    >>> dequantize(*quantize(torch.tensor([[896.0, 2.0, -1.0]])), torch.float32).tolist()
    [[896.0, 2.0, -1.0]]
    """
    element_of("the result", dtype)
    assert codes.dtype == torch.float8_e4m3fn, f"codes have dtype {codes.dtype}, expected float8_e4m3fn"
    codes, scales = contiguous_rows("codes", codes), contiguous_rows("scales", scales)
    num_rows, hidden = codes.shape
    groups = -(-hidden // int(GROUP))
    assert scales.shape == (num_rows, groups), f"scales have shape {tuple(scales.shape)}, expected {num_rows, groups}"
    x = torch.empty(num_rows, hidden, dtype=dtype, device=codes.device)
    if x.numel():
        at_once = min(_GROUPS_AT_ONCE, triton.next_power_of_2(groups))
        warps, blocks = max(1, at_once // 8), -(-groups // at_once)
        launch(
            _dequantize_kernel,
            (num_programs(num_rows, x, max_programs, warps=warps, columns=blocks), blocks),
            *(x, codes.view(torch.uint8), scales, num_rows),
            num_warps=warps,
            HIDDEN=hidden,
            GROUPS=groups,
            GROUPS_AT_ONCE=at_once,
            ALIGNED=hidden % 16 == 0 and codes.data_ptr() % 16 == 0,
        )
    return x


def dequantize_ref(codes: Tensor, scales: Tensor, dtype: torch.dtype, *, max_programs: int | None = None) -> Tensor:
    """`dequantize` in plain torch."""
    hidden = codes.shape[1]
    product = codes.float() * scales.repeat_interleave(int(GROUP), 1)[:, :hidden]
    return torch.where(product.isnan(), torch.nan, product).to(dtype)
