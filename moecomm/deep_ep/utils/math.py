"""Numbers that scripts of DeepEP's kind compute: casts to FP8, differences, scores, hashes, bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moecomm.deep_ep.fp8 import encode
from moecomm.quant import dequantize


def calc_diff(x: Tensor, y: Tensor) -> float:
    """One minus the cosine similarity of (x + 1) and (y + 1) in float64, with squares for lengths: 0 where equal.

    >>> calc_diff(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.0
    """
    a, b = x.double() + 1, y.double() + 1
    squares = (a * a + b * b).sum()
    return float(1 - 2 * (a * b).sum() / squares) if float(squares) else 0.0


def safe_div(a: float, b: float) -> float:
    """a / b, or 0 where b is 0.

    >>> safe_div(1, 2), safe_div(1, 0)
    (0.5, 0.0)
    """
    return a / b if b else 0.0


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up.

    >>> ceil_div(5, 4)
    2
    """
    return -(-a // b)


def align(a: int, b: int) -> int:
    """The next multiple of b.

    >>> align(5, 4)
    8
    """
    return ceil_div(a, b) * b


def per_token_cast_to_fp8(x: Tensor, round_scale: bool = False, use_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Encode (T, H) rows as e4m3 with a scale per 128 columns.

    Returns:
        (T, H) codes; (T, ceil(H / 128)) float32 scales, powers of two with round_scale, or with use_ue8m0
        (T, ceil(H / 512)) int32 that hold the exponents of four.

    >>> codes, scales = per_token_cast_to_fp8(torch.full((1, 256), 448.0))
    >>> codes.float().unique().tolist(), scales.tolist()
    ([448.0], [[1.0, 1.0]])
    """
    return encode(x, round_scale, use_ue8m0)


def per_token_cast_back(x_fp8: Tensor, x_scales: Tensor) -> Tensor:
    """Decode to (T, H) bfloat16 what `per_token_cast_to_fp8` gave.

    >>> per_token_cast_back(*per_token_cast_to_fp8(torch.full((1, 128), 3.0), use_ue8m0=True)).unique().tolist()
    [3.0]
    """
    # A clone: one column is contiguous with any stride, but not for a view of other elements.
    if x_scales.dtype == torch.int32:
        exponents = x_scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        x_scales = (exponents[:, : ceil_div(x_fp8.shape[1], 128)].int() << 23).view(torch.float32)
    return dequantize(x_fp8, x_scales, torch.bfloat16)


def inplace_unique(x: Tensor, num_slots: int) -> None:
    """Keep of each row of (T, K) integers below num_slots the different ones, the most frequent first; -1 for the rest.

    >>> x = torch.tensor([[2, 1, 2], [-1, 0, -1]])
    >>> inplace_unique(x, 3)
    >>> x.tolist()
    [[2, 1, -1], [0, -1, -1]]
    """
    counts = torch.zeros(len(x), num_slots + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, torch.where(x < 0, num_slots, x).long(), torch.ones_like(x, dtype=torch.int64))
    most, slot = counts[:, :num_slots].sort(dim=1, descending=True, stable=True)
    width = min(x.shape[1], num_slots)
    x.fill_(-1)
    x[:, :width] = torch.where(most > 0, slot, -1)[:, :width].to(x.dtype)


def create_grouped_scores(scores: Tensor, group_idx: Tensor, num_groups: int) -> Tensor:
    """(T, E) scores, zero in the groups of neighbouring experts that (T, G) group_idx does not name.

    >>> create_grouped_scores(torch.ones(1, 4), torch.tensor([[1]]), 2).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    keep = torch.zeros(len(scores), num_groups, dtype=torch.bool, device=scores.device).scatter_(1, group_idx, True)
    return (scores.view(len(scores), num_groups, -1) * keep[..., None]).view(scores.shape)


def hash_tensor(t: Tensor) -> int:
    """A number that stands for the bytes of a tensor.

    >>> hash_tensor(torch.tensor([1])) == hash_tensor(torch.tensor([1])) != hash_tensor(torch.tensor([2]))
    True
    """
    flat = t.detach().contiguous().cpu().flatten().view(torch.uint8)
    return int.from_bytes(hashlib.blake2b(flat.numpy().tobytes(), digest_size=7).digest(), "little")


def hash_tensors(*tensors: Any) -> int:
    """The exclusive or of the hashes of all tensors in nested sequences."""
    result = 0
    for tensor in _tensors(tensors):
        result ^= hash_tensor(tensor)
    return result


def count_bytes(*tensors: Any) -> int:
    """Bytes of all tensors in nested sequences; None counts nothing.

    >>> count_bytes(torch.zeros(2), (torch.zeros(1, dtype=torch.int8), None))
    9
    """
    return sum(tensor.nbytes for tensor in _tensors(tensors))


def _tensors(nested: Any) -> Iterable[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from _tensors(item)
