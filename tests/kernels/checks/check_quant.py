"""FP8 encode and decode: every code, every tie, every group, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from moecomm.kernels.quant import (
    decode_e4m3,
    dequantize,
    dequantize_ref,
    encode_e4m3,
    has_fp8,
    quantize,
    quantize_ref,
)
from torch import Tensor

import moecomm.quant
from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.worlds import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _encode_kernel(codes, values, HARDWARE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + at, encode_e4m3(tl.load(values + at), HARDWARE))


@triton.jit
def _decode_kernel(values, codes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(values + at, decode_e4m3(tl.load(codes + at)))


def encode(values: Tensor, hardware: bool = False) -> Tensor:
    padded = torch.nn.functional.pad(values, (0, -len(values) % 1024)).to(DEVICE)
    codes = torch.empty(len(padded), dtype=torch.uint8, device=DEVICE)
    _encode_kernel[(len(padded) // 1024,)](codes, padded, HARDWARE=hardware, BLOCK=1024)
    return codes[: len(values)].cpu()


def awkward_values() -> Tensor:
    """Every code's value, every midpoint between two codes and its neighbours, and random ones of every size."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = codes[codes.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    below, above = torch.nextafter(middles, middles - 1), torch.nextafter(middles, middles + 1)
    special = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-40, 2.0**-10, 449.0, 463.9, 464.0, 1e30, -1e30, torch.inf, -torch.inf]
    )
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * torch.exp2(torch.randint(-16, 10, (20000,), generator=generator))
    return torch.cat([values, middles, below, above, special, torch.tensor([torch.nan, -torch.nan]), spread])


def test_encode_rounds_to_nearest_even() -> None:
    values = awkward_values()
    wanted = torch.where(values.isnan(), torch.nan, values.clamp(-448.0, 448.0)).to(torch.float8_e4m3fn)
    assert_bitwise(encode(values), wanted.view(torch.uint8), "codes")


@pytest.mark.skipif(not has_fp8(torch.empty(0, device=DEVICE)), reason="no device with FP8 conversion")
def test_hardware_gives_the_same_codes() -> None:
    values = awkward_values()
    assert_bitwise(encode(values, hardware=True), encode(values), "codes")


def test_decode_is_exact() -> None:
    codes, values = torch.arange(256, dtype=torch.uint8, device=DEVICE), torch.empty(256, device=DEVICE)
    _decode_kernel[(1,)](values, codes, BLOCK=256)
    assert_bitwise(values.cpu(), codes.cpu().view(torch.float8_e4m3fn).float(), "values")


def groups(num_rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(num_rows, hidden, generator=generator)
    return (x * torch.exp2(torch.randint(-12, 10, (num_rows, 1), generator=generator))).to(dtype).to(DEVICE)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("hidden", [1, 16, 127, 128, 129, 640, 4224])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_against_reference(dtype: torch.dtype, hidden: int, power_of_two: bool) -> None:
    x = groups(3, hidden, dtype)
    codes, scales = quantize(x, power_of_two=power_of_two)
    wanted, wanted_scales = quantize_ref(x.cpu(), power_of_two=power_of_two)
    assert_bitwise(scales.cpu(), wanted_scales, "scales")
    assert_bitwise(codes.cpu().view(torch.uint8), wanted.view(torch.uint8), "codes")
    if power_of_two:
        assert (scales.cpu().frexp().mantissa == 0.5).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_awkward_groups(power_of_two: bool) -> None:
    """Zeros, subnormal and huge numbers, a NaN among numbers, an infinity: what the reference says."""
    x = torch.zeros(8, 128)
    x[1, 3], x[2], x[3], x[4] = 1e-42, 1e-38, 3.4e38, torch.linspace(-1, 1, 128)
    x[4, 7], x[5, 5], x[5, 6], x[6], x[7] = torch.nan, torch.inf, 1.0, torch.nan, -(2.0**-100)
    codes, scales = quantize(x.to(DEVICE), power_of_two=power_of_two)
    wanted, wanted_scales = quantize_ref(x, power_of_two=power_of_two)
    assert_bitwise(scales.cpu(), wanted_scales, "scales")
    assert_bitwise(codes.cpu().view(torch.uint8), wanted.view(torch.uint8), "codes")
    decoded = dequantize(codes, scales, torch.float32).cpu()
    assert decoded[3].isfinite().all(), "the largest numbers overflowed"
    assert (decoded[:2] == 0).all() and decoded[4].isnan().sum() == 1 and decoded[5:7].isnan().all()


@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 129, 640])
def test_dequantize_against_reference(result: torch.dtype, hidden: int) -> None:
    codes, scales = quantize(groups(3, hidden, torch.float32))
    assert_bitwise(dequantize(codes, scales, result), dequantize_ref(codes, scales, result), "rows")


@pytest.mark.parametrize(("power_of_two", "bound"), [(False, 2.0**-4), (True, 2.0**-4)])
def test_relative_error_of_normal_numbers(power_of_two: bool, bound: float) -> None:
    """Half a step of a 3-bit mantissa: 1/16 of the value, where codes are not subnormal."""
    x = groups(20, 256, torch.float32).cpu()
    decoded = dequantize(*quantize(x.to(DEVICE), power_of_two=power_of_two), torch.float32).cpu()
    amax = x.view(20, 2, 128).abs().amax(2).repeat_interleave(128, 1)
    normal = x.abs() > amax * 2.0**-13
    error = ((decoded - x).abs() / x.abs())[normal].max()
    assert 0.03 < error <= bound * 1.0001


def test_nothing_to_do() -> None:
    codes, scales = quantize(torch.zeros(0, 256, device=DEVICE))
    assert codes.shape == (0, 256) and scales.shape == (0, 2)
    assert dequantize(codes, scales, torch.bfloat16).shape == (0, 256)


def test_refused() -> None:
    with pytest.raises(AssertionError, match=r"x has dtype torch.int32, expected float32, float16 or bfloat16"):
        quantize(torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(AssertionError, match=r"scales have shape \(2, 1\), expected \(2, 2\)"):
        dequantize(torch.zeros(2, 130).to(torch.float8_e4m3fn), torch.ones(2, 1), torch.float32)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_both_references_say_the_same(power_of_two: bool) -> None:
    """The kernels import nothing of moecomm, so the format is written down twice."""
    for hidden in (1, 129, 640):
        x = groups(6, hidden, torch.float32).cpu()
        x[4, hidden // 2], x[5, 0] = torch.nan, torch.inf
        codes, scales = quantize_ref(x, power_of_two=power_of_two)
        spec = moecomm.quant.QuantSpec(scales="power_of_two" if power_of_two else "float32")
        wanted, wanted_scales = moecomm.quant.quantize(x, spec)
        assert_bitwise(scales, wanted_scales, "scales")
        assert_bitwise(codes.view(torch.uint8), wanted.view(torch.uint8), "codes")
        decoded = moecomm.quant.dequantize(wanted, wanted_scales, torch.bfloat16)
        assert_bitwise(dequantize_ref(codes, scales, torch.bfloat16), decoded, "rows")
