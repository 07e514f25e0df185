"""Rows that travel in fewer bits: what each format means, in plain torch, the same bits on every machine.

fp8        e4m3 codes, one scale per 128 elements. amax = largest |x| of the group, at least 2^-100, a NaN counts as 0;
           scale = amax / 448, or the next power of two at or above it; code = e4m3 of x * (448 / amax), or of x / scale
           where it is a power of two, to nearest even and at most 448 (240 if scale is 2^120); x' = code * scale.
int8       one scale per row. amax likewise; scale = amax / 127; code = x * (127 / amax) to nearest even.
logfmt10   a sign and 9 bits of logarithm, one scale word per 128 elements. Magnitudes are 0 or amax * 2^(-n / d) with n
           from 0 to 510. d is the largest of STEPS with which that reaches the smallest magnitude of the group that is
           not 0, or 16, which reaches 32 octaves down. amax is rounded up to a multiple of 16 of its last places,
           and those four bits hold the place of d in STEPS. Every x becomes the nearest magnitude, the larger one of
           two that are equally near. Four elements take five bytes: four with the low bits, one with a pair
           (sign, bit 8) of each, lowest first.

| what      | fp8                                       | int8, logfmt10                                        |
|-----------|-------------------------------------------|-------------------------------------------------------|
| NaN       | that element decodes to NaN               | the row (int8) or group (logfmt10) decodes to NaN     |
| infinity  | its group decodes to NaN                  | the row or group decodes to NaN                       |
| zeros     | zeros                                     | zeros                                                 |
| subnormal | amax is at least 2^-100: zeros            | zeros                                                 |

Everything is float32 with each operation rounded to nearest. Legend: H hidden, G = ceil(H / 128) groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor

from moecomm.errors import ConfigError

GROUP = 128
SMALLEST = 2.0**-100
STEPS = (16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)  # magnitudes of logfmt10 per octave
LEVELS = 511  # magnitudes of logfmt10 that are not zero
FORMATS = ("fp8", "int8", "logfmt10")
_MOST_INT8 = 2.6793883890187504e36  # times 127 it is still finite
SCALES = ("float32", "power_of_two", "ue8m0")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """How rows are quantised on their way.

    Args:
        format: "fp8", "int8" or "logfmt10"; see the module.
        scales: of "fp8": "float32"; "power_of_two": float32 numbers, all powers of two; or "ue8m0": those as the bytes
            of their exponents, torch.float8_e8m0fnu.
        column_major: whether the scales of neighbouring rows lie next to each other in what dispatch gives.

    Raises:
        ConfigError: no such format, or scales that it does not have.

    >>> QuantSpec.of("fp8").row_bytes(7168), QuantSpec.of("logfmt10").row_bytes(7168)
    (7392, 9184)
    """

    format: str = "fp8"
    scales: str = "float32"
    column_major: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError("no such format of quantised rows", got=repr(self.format), expected=f"one of {FORMATS}")
        if self.scales not in (SCALES if self.format == "fp8" else SCALES[:1]):
            expected = f"one of {SCALES}" if self.format == "fp8" else f"{SCALES[0]!r} with {self.format}"
            raise ConfigError("no such scales", got=repr(self.scales), expected=expected)

    @classmethod
    def of(cls, given: object) -> QuantSpec:
        """The spec that a format's name stands for, or the one given."""
        if isinstance(given, QuantSpec):
            return given
        if isinstance(given, str):
            return cls(format=given)
        raise ConfigError("quant is no format", got=repr(given), expected=f"None, a QuantSpec or one of {FORMATS}")

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of the codes."""
        return {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "logfmt10": torch.uint8}[self.format]

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scales."""
        if self.format == "logfmt10":
            return torch.int32
        return torch.float8_e8m0fnu if self.scales == "ue8m0" else torch.float32

    def code_width(self, hidden: int) -> int:
        """Codes per row: H, or bytes of packed ones."""
        return 5 * -(-hidden // 4) if self.format == "logfmt10" else hidden

    def num_scales(self, hidden: int) -> int:
        """Scales per row."""
        return 1 if self.format == "int8" else -(-hidden // GROUP)

    def kinds(self, hidden: int) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """Dtype and shape of the codes of a row, and of its scales."""
        widths = self.code_width(hidden), self.num_scales(hidden)
        return (self.code_dtype, widths[:1]), (self.scale_dtype, widths[1:])

    def row_bytes(self, hidden: int) -> int:
        """Bytes of a row and its scales."""
        return self.code_width(hidden) + self.num_scales(hidden) * self.scale_dtype.itemsize


def quantize(x: Tensor, spec: QuantSpec | str = "fp8") -> tuple[Tensor, Tensor]:
    """Encode rows.

    Args:
        x: (..., H) float32, float16 or bfloat16.
        spec: the format, or its name.

    Returns:
        (..., code_width) codes and (..., num_scales) scales; see `QuantSpec`.

    >>> codes, scales = quantize(torch.tensor([[896.0, 2.0, -1.0]]))
    >>> codes.float().tolist(), scales.tolist()
    ([[448.0, 1.0, -0.5]], [[2.0]])
    >>> [t.tolist() for t in quantize(torch.tensor([[254.0, 3.0, -1.0]]), "int8")]
    [[[127, 2, 0]], [[2.0]]]
    """
    spec = QuantSpec.of(spec)
    value = x.detach().float().flatten(0, -2) if x.ndim > 1 else x.detach().float()[None]
    codes, scales = {"fp8": _to_fp8, "int8": _to_int8, "logfmt10": _to_log}[spec.format](value, spec)
    codes, scales = (t.reshape(*x.shape[:-1], t.shape[1]) for t in (codes, scales))
    return codes, by_columns(scales) if spec.column_major else scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, hidden: int | None = None) -> Tensor:
    """Decode rows; their dtypes say the format.

    Args:
        codes: (..., code_width) as `quantize` gives them.
        scales: (..., num_scales) likewise, in any order in memory.
        dtype: of the result; each product is rounded to float32 first.
        hidden: H; None: as many as there are codes.

    Returns:
        (..., H) of `dtype`.

    >>> dequantize(*quantize(torch.tensor([[896.0, 2.0, -1.0]])), torch.float32).tolist()
    [[896.0, 2.0, -1.0]]
    >>> dequantize(*quantize(torch.tensor([[1.0, 0.5, 0.0, -1e-3]]), "logfmt10"), torch.float32, 4)[0, :3].tolist()
    [1.0, 0.5, 0.0]
    """
    flat, scale = (t.flatten(0, -2) if t.ndim > 1 else t[None] for t in (codes, scales))
    if codes.dtype == torch.uint8:
        value = _from_log(flat, scale.contiguous(), codes.shape[-1] // 5 * 4 if hidden is None else hidden)
    elif codes.dtype == torch.int8:
        value = flat.float() * scale
    else:
        value = flat.float() * scale.float().repeat_interleave(GROUP, 1)[:, : flat.shape[1]]
    value = torch.where(value.isnan(), torch.nan, value)  # all of them the same one
    value = value if dtype == torch.float32 else torch.where(value.isnan(), torch.nan, value.to(dtype))
    return value.reshape(*codes.shape[:-1], value.shape[1])


def by_columns(scales: Tensor) -> Tensor:
    """The same scales, those of neighbouring rows next to each other in memory.

    >>> by_columns(torch.zeros(2, 6, 3)).stride()
    (18, 1, 6)
    """
    return scales.transpose(-1, -2).contiguous().transpose(-1, -2)


def error_bound(x: Tensor, spec: QuantSpec | str) -> Tensor:
    """Most by which a decoded float32 can differ from each element of x, all of them finite.

    fp8: half a step of a 3-bit mantissa, |x| / 16, or of a subnormal code, scale / 1024. int8: scale / 2.
    logfmt10: |x| * (2^(1 / 2d) - 1), or half the smallest magnitude. A little more for float32's own roundings.

    >>> [round(bound, 3) for bound in error_bound(torch.tensor([1.0, 448.0]), "fp8").tolist()]
    [0.063, 28.001]
    """
    spec = QuantSpec.of(spec)
    value = x.detach().double().abs()
    scales = quantize(x, spec)[1]
    if spec.format == "logfmt10":
        words = scales.repeat_interleave(GROUP, -1)[..., : x.shape[-1]]
        per_octave = torch.tensor((*STEPS, *[STEPS[0]] * 4), dtype=torch.float64, device=x.device)[(words & 15).long()]
        smallest = (words & -16).view(torch.float32).double() * torch.exp2((1 - LEVELS) / per_octave)
        bound = torch.maximum(value * (torch.exp2(0.5 / per_octave) - 1), smallest / 2)
    elif spec.format == "int8":
        bound = (scales.double() / 2).expand_as(value)
    else:
        scale = scales.double().repeat_interleave(GROUP, -1)[..., : x.shape[-1]]
        bound = torch.maximum(value / 16, scale / 1024)
    return bound * (1 + 2.0**-18) + value * 2.0**-19


def _groups(value: Tensor) -> Tensor:
    """(T, G, 128) float32, filled up with zeros."""
    num_rows, hidden = value.shape
    count = -(-hidden // GROUP)
    return torch.nn.functional.pad(value, (0, count * GROUP - hidden)).view(num_rows, count, GROUP)


def _to_fp8(value: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    groups = _groups(value)
    amax = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(2).clamp(min=SMALLEST)
    largest = torch.full_like(amax, 448.0)  # a tensor: torch divides by and through a number less exactly
    scales, inverse, most = amax / largest, largest / amax, largest
    if spec.scales != "float32":
        bits = (scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scales = bits.view(torch.float32)
        inverse = torch.where(bits == 0x7F800000, 0.0, ((254 << 23) - bits).view(torch.float32))
        most = torch.where(bits == 247 << 23, 240.0, largest)  # 2^120: the code 256 would be an infinity
        if spec.scales == "ue8m0":
            scales = (bits >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
    scaled = (groups * inverse[..., None]).clamp(-most[..., None], most[..., None])
    codes = torch.where(scaled.isnan(), torch.nan, scaled).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, : value.shape[1]].contiguous(), scales


def _to_int8(value: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    amax = value.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    largest = torch.full_like(amax, 127.0)
    finite = amax.isfinite()
    scales = torch.where(finite, (amax / largest).clamp(max=_MOST_INT8), torch.nan)
    inverse = torch.where(finite, largest / amax, 0.0)
    codes = (value * inverse).nan_to_num(nan=0.0).clamp(-127.0, 127.0).round()
    return codes.to(torch.int8), scales


@cache
def _log_tables() -> tuple[Tensor, Tensor]:
    """For each of STEPS: (1 + LEVELS,) float32 magnitudes by code relative to amax; and the (LEVELS,) bounds between.

    Bounds are of all codes, so that rounding is one search: bounds[c - 1] is the smallest magnitude that becomes c.
    """
    code = torch.arange(1, LEVELS + 1, dtype=torch.float64)
    exact = torch.stack([torch.exp2((code - LEVELS) / step) for step in STEPS])
    exact = torch.nn.functional.pad(exact, (1, 0))
    return exact.float(), ((exact[:, 1:] + exact[:, :-1]) / 2).float()


def _to_log(value: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    groups = _groups(value)
    magnitude = groups.abs()
    amax = magnitude.amax(2)
    finite = amax.isfinite()
    amax = torch.where(finite, amax, 1.0).clamp(min=SMALLEST)
    word = ((amax.view(torch.int32) + 15) & -16).clamp(max=0x7F7FFFF0)
    amax = word.view(torch.float32)
    ratio = torch.where(finite[..., None], magnitude, 0.0) / amax[..., None]
    smallest = torch.where(ratio > 0, ratio, 1.0).amin(2)
    values, bounds = (table.to(value.device) for table in _log_tables())
    step = (smallest[..., None] >= values[1:, 1]).sum(2, dtype=torch.int32)
    of_step = ratio.new_empty(ratio.shape, dtype=torch.int32)
    for number in range(len(STEPS)):  # one search for each table, of the groups that use it
        mine = step == number
        of_step[mine] = torch.searchsorted(bounds[number], ratio[mine], right=True, out_int32=True)
    codes = of_step | (groups.signbit().to(torch.int32) << 9)
    width = 4 * -(-value.shape[1] // 4)
    quads = codes.flatten(1)[:, :width].unflatten(1, (width // 4, 4))
    high = (quads >> 8) << torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=value.device)
    packed = torch.cat([quads & 255, high.sum(2, keepdim=True, dtype=torch.int32)], 2).to(torch.uint8)
    return packed.flatten(1), torch.where(finite, word | step, 0x7FC00000)


def _from_log(packed: Tensor, words: Tensor, hidden: int) -> Tensor:
    values, _ = _log_tables()
    quads = packed.unflatten(1, (packed.shape[1] // 5, 5)).to(torch.int32)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=packed.device)
    high = (quads[..., 4:] >> shift) & 3
    codes = (quads[..., :4] | ((high & 1) << 8)).flatten(1)[:, :hidden]
    negative = (high & 2).bool().flatten(1)[:, :hidden]
    of_element = words.repeat_interleave(GROUP, 1)[:, :hidden]
    step = (of_element & 15).clamp(max=len(STEPS) - 1)
    magnitude = (of_element & -16).view(torch.float32) * values.to(packed.device)[step.long(), codes.long()]
    return torch.where(negative, -magnitude, magnitude)
