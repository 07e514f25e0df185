"""FP8 as DeepEP casts it: e4m3 with a scale for every 128 columns, of a largest magnitude of at least 1e-4."""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.quant import GROUP, QuantSpec, quantize

LEAST = 1e-4  # what a group's largest magnitude counts as at least: zeros have the scale LEAST / 448
_LARGEST = 448.0
_LEAST_EXPONENT = -22  # 2^-22 is the power of two at or above LEAST / 448


def encode(x: Tensor, round_scale: bool = False, use_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Encode (T, H) rows.

    Returns:
        (T, H) codes; (T, ceil(H / 128)) float32 scales, powers of two with round_scale, or with use_ue8m0
        (T, ceil(H / 512)) int32 that hold the exponents of four, the lowest byte first, zeros behind the last.

    >>> codes, scales = encode(torch.zeros(1, 128))
    >>> codes.float().abs().max().item(), scales.item() == torch.tensor(1e-4).div(448).item()
    (0.0, True)
    """
    kind = "ue8m0" if use_ue8m0 else "power_of_two" if round_scale else "float32"
    codes, scales = quantize(x, QuantSpec(scales=kind))
    exact = kind == "float32"
    least = torch.tensor(LEAST) / _LARGEST if exact else torch.tensor(2.0**_LEAST_EXPONENT)
    small = scales.view(torch.uint8) < 127 + _LEAST_EXPONENT if use_ue8m0 else scales < float(least)
    if bool(small.any()):
        inverse = torch.tensor(_LARGEST) / LEAST if exact else 1 / least
        scales = scales.view(torch.uint8) if use_ue8m0 else scales
        scales = torch.where(small, 127 + _LEAST_EXPONENT if use_ue8m0 else float(least), scales).to(scales.dtype)
        again = (x.detach().float() * inverse.to(x.device)).clamp(-_LARGEST, _LARGEST).to(codes.dtype)
        of_column = small.repeat_interleave(GROUP, 1)[:, : x.shape[1]]
        codes = torch.where(of_column, again.view(torch.uint8), codes.view(torch.uint8)).view(codes.dtype)
    return codes, packed_exponents(scales) if use_ue8m0 else scales


def packed_exponents(scales: Tensor) -> Tensor:
    """(T, ceil(G / 4)) int32: four exponents each, the lowest byte first, zeros behind the last.

    >>> hex(packed_exponents(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8))[0, 0].item())
    '0x4030201'
    """
    return torch.nn.functional.pad(scales.view(torch.uint8), (0, -scales.shape[1] % 4)).view(torch.int32)
