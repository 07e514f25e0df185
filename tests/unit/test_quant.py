"""Quantised rows: error bounds on what activations look like, special values, and the reference of the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecomm.errors import ConfigError
from moecomm.quant import FORMATS, QuantSpec, by_columns, dequantize, error_bound, quantize
from moecomm.testing import assert_bitwise

SPECS = (
    QuantSpec(),
    QuantSpec(scales="power_of_two"),
    QuantSpec(scales="ue8m0"),
    QuantSpec(format="int8"),
    QuantSpec(format="logfmt10"),
)
SPEC_NAMES = [f"{spec.format}-{spec.scales}" for spec in SPECS]


def activations(kind: str, num_rows: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows like those of a layer: Gaussian, with heavy tails, or with a few channels that are always large."""
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(num_rows, hidden, generator=generator)
    if kind == "heavy":  # Student's t with two degrees of freedom: no variance
        x /= (torch.empty(num_rows, hidden).exponential_(generator=generator)).sqrt()
    if kind == "outliers":
        x[:, torch.randperm(hidden, generator=generator)[: max(1, hidden // 100)]] *= 300
    return x.to(dtype)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outliers"])
@pytest.mark.parametrize("spec", SPECS, ids=SPEC_NAMES)
def test_error_is_within_the_stated_bound(spec: QuantSpec, kind: str) -> None:
    for hidden in (1, 3, 128, 131, 1152):
        for dtype in (torch.bfloat16, torch.float32):
            x = activations(kind, 8, hidden, dtype)
            codes, scales = quantize(x, spec)
            assert codes.shape == (8, spec.code_width(hidden)) and scales.shape == (8, spec.num_scales(hidden))
            assert codes.dtype == spec.code_dtype and scales.dtype == spec.scale_dtype
            assert codes.nbytes + scales.nbytes == 8 * spec.row_bytes(hidden)
            error = (dequantize(codes, scales, torch.float32, hidden).double() - x.double()).abs()
            bound = error_bound(x, spec)
            assert (error <= bound).all(), f"{(error / bound).max()} of the bound at {hidden} of {dtype}"
            if hidden == 1152:
                assert (error / bound).max() > 0.9, "the bound says nothing"


def test_logarithms_keep_what_eight_bits_lose() -> None:
    """Relative error of a row as the issue of a low-precision combine has it: real statistics, not only Gaussian."""
    for kind, most in (("gaussian", 0.008), ("heavy", 0.01), ("outliers", 0.015)):
        x = activations(kind, 16, 1152).double()
        of_format = {}
        for name in FORMATS:
            y = dequantize(*quantize(x.float(), name), torch.float32, 1152).double()
            of_format[name] = float(((y - x).norm(dim=1) / x.norm(dim=1)).median())  # some rows are one number
        assert of_format["logfmt10"] < most and of_format["fp8"] < 0.05, of_format
        assert of_format["logfmt10"] < of_format["fp8"] / 3, of_format


@pytest.mark.parametrize("spec", SPECS, ids=SPEC_NAMES)
def test_special_values(spec: QuantSpec) -> None:
    """What the table in the module says of NaN, infinities, zeros, subnormal and huge numbers."""
    x = torch.zeros(8, 256)
    x[1, 3], x[1, 4], x[2, 3], x[2, 4], x[3] = torch.nan, 1.0, torch.inf, 1.0, 1e-42
    x[4], x[5, 7], x[6, 200], x[6, 3], x[7, 9] = 3.4e38, -torch.inf, -5.0, -0.0, torch.finfo(torch.float32).max
    y = dequantize(*quantize(x, spec), torch.float32, 256)
    nan_rows = {"fp8": [0, 1, 128, 0, 0, 128, 0, 0], "int8": [0, 256, 256, 0, 0, 256, 0, 0]}
    assert y.isnan().sum(1).tolist() == nan_rows.get(spec.format, [0, 128, 128, 0, 0, 128, 0, 0])
    assert_bitwise(y[[0, 3]].abs(), torch.zeros(2, 256), "zeros")
    assert y[6, 200] == -5
    for row in (4, 7):  # the largest numbers do not overflow
        error, bound = (y[row].double() - x[row].double()).abs(), error_bound(x[row], spec)
        assert y[row].isfinite().all() and (error <= bound).all(), (error / bound).max()


def test_scales_that_are_powers_of_two() -> None:
    x = activations("heavy", 64, 640) * torch.exp2(torch.randint(-90, 90, (64, 1)))
    codes, scales = quantize(x, QuantSpec(scales="power_of_two"))
    assert (scales.frexp().mantissa == 0.5).all() and codes.float().isfinite().all()
    same, exponents = quantize(x, QuantSpec(scales="ue8m0"))
    assert_bitwise(same.view(torch.uint8), codes.view(torch.uint8), "codes")
    assert_bitwise(exponents.float(), scales, "scales")


def test_logarithms_take_the_nearest_magnitude() -> None:
    """Every magnitude decodes to itself; what lies between two becomes the nearer one."""
    x = torch.cat([torch.tensor([1.0, 2.0**-31]), torch.exp2(-torch.arange(1, 127) / 16)])[None]
    y = dequantize(*quantize(x, "logfmt10"), torch.float32)
    assert_bitwise(y, dequantize(*quantize(y, "logfmt10"), torch.float32), "a second time")
    between = x.clone()
    low, high = y[0, 3:], y[0, 2:-1]
    between[0, 3:] = low + (high - low) * torch.where(torch.arange(125) % 2 == 0, 0.49, 0.51)
    wanted = torch.where(torch.arange(125) % 2 == 0, low, high)
    assert_bitwise(dequantize(*quantize(between, "logfmt10"), torch.float32)[0, 3:], wanted, "nearest")


def test_shapes_and_orders() -> None:
    x = activations("gaussian", 12, 200).view(3, 4, 200)
    for spec in SPECS:
        codes, scales = quantize(x, spec)
        flat_codes, flat_scales = quantize(x.view(12, 200), spec)
        assert_bitwise(codes.view(torch.uint8), flat_codes.view(torch.uint8).view_as(codes.view(torch.uint8)), "codes")
        columns = by_columns(scales)
        assert columns.stride()[-2] == 1 and torch.equal(columns.float(), scales.float())
        wanted = dequantize(flat_codes, flat_scales, torch.bfloat16, 200).view(3, 4, 200)
        assert_bitwise(dequantize(codes, columns, torch.bfloat16, 200), wanted, "decoded")
        assert dequantize(*quantize(x[:0], spec), torch.float32, 200).shape == (0, 4, 200)


def test_refused() -> None:
    for wrong, message in (
        ("fp4", "no such format"),
        (8, "quant is no format"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantSpec.of(wrong)
    with pytest.raises(ConfigError, match="no such scales: got 'ue8m0'; expected 'float32' with int8"):
        QuantSpec(format="int8", scales="ue8m0")
