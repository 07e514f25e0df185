"""Payloads that say where they come from: rank, token, round and column, exact in every dtype.

Element `c` of a row holds the number `1 + (digits[c % 5] + 37 * c) % 255`, where `digits` are (token mod 255, rank,
round mod 255, token // 255 mod 255, token // 255**2), so a row that lost, gained or shifted columns decodes to nothing.
The numbers 1..255 are exact in float32, float16 and bfloat16; every other dtype carries them as bytes, and bool only
whether they are odd. 0 never occurs, so padding and untouched memory are told apart from a payload, and NaN stays free
for poison.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BASE = 255
_STEP = 37
_NUM_DIGITS = 5
_NUMERIC_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class RowOrigin(NamedTuple):
    """Where a row was made."""

    rank: int
    token: int
    round: int


def provenance_rows(rank: int, num_tokens: int, hidden: int, dtype: torch.dtype, round: int = 0) -> Tensor:
    """Make rows that encode (rank, token, round, column).

    Rows narrower than five elements hold only the leading digits: still right to compare, too short to decode.

    Args:
        rank: sender, below 255.
        num_tokens: T.
        hidden: H, elements of a row.
        dtype: numbers in float32, float16 and bfloat16, bytes in any other.
        round: distinguishes payloads of successive calls; modulo 255.

    Returns:
        (T, H) dtype.

    >>> rows = provenance_rows(rank=2, num_tokens=3, hidden=6, dtype=torch.bfloat16, round=1)
    >>> rows[1].tolist()
    [2.0, 40.0, 76.0, 112.0, 149.0, 187.0]
    >>> decode_provenance(rows)[1]
    RowOrigin(rank=2, token=1, round=1)
    """
    if not 0 <= rank < _BASE:
        raise ValueError(f"provenance_rows: rank does not fit one digit: got {rank}; expected 0 to {_BASE - 1}")
    if num_tokens > _BASE**3:
        raise ValueError(f"provenance_rows: too many tokens: got {num_tokens}; expected at most {_BASE**3}")
    width = hidden if dtype in _NUMERIC_DTYPES else hidden * dtype.itemsize
    tokens_T = torch.arange(num_tokens)
    digits_T5 = torch.stack(
        [
            tokens_T % _BASE,
            torch.full((num_tokens,), rank),
            torch.full((num_tokens,), round % _BASE),
            tokens_T // _BASE % _BASE,
            tokens_T // _BASE**2,
        ],
        dim=1,
    )
    columns = torch.arange(width)
    numbers = 1 + (digits_T5[:, columns % _NUM_DIGITS] + _STEP * columns) % _BASE
    if dtype == torch.bool:
        return numbers % 2 == 1
    if dtype in _NUMERIC_DTYPES:
        return numbers.to(dtype)
    return numbers.to(torch.uint8).view(dtype) if width else torch.empty((num_tokens, hidden), dtype=dtype)


def decode_provenance(rows: Tensor) -> list[RowOrigin | None]:
    """Say where each row was made, or None for a row that is no whole payload (padding, poison, mixed, shifted).

    Args:
        rows: (N, H) any dtype.

    Returns:
        One `RowOrigin` or None per row; all None when rows have fewer than five elements (or bytes), or are bool.

    >>> decode_provenance(torch.zeros(1, 8))
    [None]
    """
    if rows.dtype == torch.bool:
        return [None] * rows.shape[0]
    numbers = rows.detach().cpu()
    if rows.dtype in _NUMERIC_DTYPES:
        numbers = torch.nan_to_num(numbers.to(torch.float64), nan=-1.0, posinf=-1.0, neginf=-1.0)
        is_number = ((numbers == numbers.floor()) & (numbers >= 1) & (numbers <= _BASE)).all(dim=1)
        numbers = numbers.to(torch.int64)
    else:
        numbers = numbers.contiguous().view(torch.uint8) if rows.numel() else torch.empty((rows.shape[0], 0))
        numbers = numbers.to(torch.int64)
        is_number = (numbers >= 1).all(dim=1)
    if numbers.shape[1] < _NUM_DIGITS:
        return [None] * rows.shape[0]
    columns = torch.arange(numbers.shape[1])
    digits = (numbers - 1 - _STEP * columns) % _BASE
    agrees = (digits == digits[:, columns % _NUM_DIGITS]).all(dim=1) & is_number
    return [
        RowOrigin(rank, low + _BASE * middle + _BASE**2 * high, round) if whole else None
        for whole, (low, rank, round, middle, high) in zip(agrees.tolist(), digits[:, :5].tolist(), strict=True)
    ]
