"""Conversions with the same bits on every target: the interpreter truncates where hardware rounds to nearest even."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def element_of(name: str, dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype that is summed or quantised."""
    assert dtype in ELEMENTS, f"{name} has dtype {dtype}, expected float32, float16 or bfloat16"
    return ELEMENTS[dtype]


@triton.jit
def widen(value):
    """float32 of a bfloat16, float16 or float32; exact."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def narrow(value, TO: tl.constexpr):
    """Round a float32 to nearest even; what is not a number becomes the one NaN that torch writes."""
    bits = tl.where(value == value, value.to(tl.uint32, bitcast=True), 0x7FC00000)
    if tl.bfloat16 == TO:
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True).to(TO)
