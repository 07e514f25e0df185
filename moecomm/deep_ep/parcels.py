"""What travels beside a row: where it comes from, its choices, their weights, its scales; 4 bytes each, in this order.

Legend: T tokens sent, N rows received, K top-k, S scales of a row, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from moecomm.deep_ep.refusals import FLOATS, INDEX_DTYPES, demand, demand_tensor
from moecomm.plan import first_bad_entry


@final
@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows to send and what goes with them. scales, topk_idx, topk_weights: None where there are none.

    bits: (T, V) int32, for each of V nodes a bit for each of its ranks that the token goes to; None for one node.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    num_channels: int
    bits: Tensor | None = None

    @classmethod
    def of(cls, x: Any, topk_idx: Any = None, topk_weights: Any = None, *, num_channels: int = 1) -> Parcel:
        """Check what a caller wants to send.

        >>> Parcel.of((torch.zeros(3, 8), torch.zeros(3, 2)), torch.zeros(3, 1, dtype=torch.int64)).beside().shape
        torch.Size([3, 5])
        """
        scales = None
        if isinstance(x, (tuple, list)):
            demand(len(x) == 2, "x is no (rows, scales) pair", got=f"{len(x)} items", expected="2 items")
            x, scales = x
            demand_tensor("x[1]", scales, len(demand_tensor("x[0]", x, None, None)), None)
            size = scales.element_size()
            demand(size == 4, "scales have the wrong size", got=scales.dtype, expected="4 bytes each (float32, int32)")
        demand_tensor("x", x, None, None)
        if topk_idx is not None:
            demand_tensor("topk_idx", topk_idx, len(x), None, dtypes=INDEX_DTYPES)
        if topk_weights is not None:
            top_k = None if topk_idx is None else topk_idx.shape[1]
            demand_tensor("topk_weights", topk_weights, len(x), top_k, dtypes=(torch.float32,))
        scales = None if scales is None else scales.detach()
        topk_weights = None if topk_weights is None else topk_weights.detach()
        return cls(x.detach(), scales, topk_idx, topk_weights, num_channels)

    def beside(self) -> Tensor:
        """(T, 2 + V + K + K + S) int32: token and channel, bits, choices, weights, scales."""
        origin = _origin(len(self.x), self.num_channels, self.x.device)
        parts = [origin] if self.bits is None else [origin, self.bits]
        parts += [] if self.topk_idx is None else [self.topk_idx.int()]
        parts += self._floats()
        return torch.cat(parts, 1) if len(parts) > 1 else origin

    def beside_again(self) -> Tensor | None:
        """(T, K + S) int32: what is not known from an earlier dispatch; None for nothing."""
        parts = self._floats()
        return torch.cat(parts, 1) if parts else None

    def unpack(self, beside_NJ: Tensor) -> Arrived:
        """Take apart what came with received rows."""
        top_k = 0 if self.topk_idx is None else self.topk_idx.shape[1]
        own = 2 if self.bits is None else 2 + self.bits.shape[1]
        origin, idx, rest = beside_NJ.tensor_split([own, own + top_k], 1)
        weights, scales = self.unpack_again(rest)
        return Arrived(origin, None if self.topk_idx is None else idx, weights, scales)

    def unpack_again(self, beside_NJ: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weights and scales of rows that were sent `beside_again`."""
        top_k = 0 if self.topk_weights is None else self.topk_weights.shape[1]
        weights, scales = beside_NJ.tensor_split([top_k], 1)
        return (
            None if self.topk_weights is None else weights.view(torch.float32),
            None if self.scales is None else scales.contiguous().view(self.scales.dtype),
        )

    def _floats(self) -> list[Tensor]:
        return [part.view(torch.int32) for part in (self.topk_weights, self.scales) if part is not None]


@final
@dataclass(frozen=True, slots=True)
class Arrived:
    """What came with N rows: origin (N, 2 + V) int32 token at the source, its channel, bits; topk_idx (N, K) int32."""

    origin: Tensor
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    scales: Tensor | None

    def localise(self, first: int, num_local: int) -> tuple[Tensor, Tensor]:
        """(N, K) int32 ids among the experts first .. first + num_local - 1, -1 for others; (L,) int64 rows of each."""
        assert self.topk_idx is not None
        ids = self.topk_idx - (first - 1)  # of its own memory; from 1, so that 0 is left for others
        ids *= (ids > 0) & (ids <= num_local)
        counts = torch.bincount(ids.view(-1), minlength=num_local + 1)[1:]
        ids -= 1
        return ids, counts


@lru_cache(maxsize=64)
def _origin(num_tokens: int, num_channels: int, device: torch.device) -> Tensor:
    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    return torch.stack([token, token // channel_tokens(num_tokens, num_channels)], 1)


def channel_tokens(num_tokens: int, num_channels: int) -> int:
    """Tokens of each channel but the last ones.

    >>> channel_tokens(5, 2), channel_tokens(0, 2)
    (3, 1)
    """
    return max(1, -(-num_tokens // num_channels))


def padded_sums(counts: Any, align: int) -> tuple[list[int], list[int]]:
    """Counts rounded up, and where each group begins.

    >>> padded_sums([3, 0, 5], 4)
    ([4, 0, 8], [0, 4, 4])
    """
    padded = [-(-int(count) // align) * align for count in counts]
    return padded, [end - size for end, size in zip(accumulate(padded), padded, strict=True)]


def at_least(rows: Tensor, num_rows: int | None) -> Tensor:
    """Rows in a tensor of exactly num_rows, what follows them uninitialised; as they are if None."""
    if num_rows is None or num_rows == len(rows):
        return rows
    demand(len(rows) <= num_rows, "more rows came than the caller has room for", got=len(rows), expected=num_rows)
    out = rows.new_empty(num_rows, *rows.shape[1:])
    out[: len(rows)] = rows
    return out


def checked_ids(topk_idx: Tensor, num_experts: int) -> Tensor:
    """(T, K) ids as int32 or int64 in order in memory, all of which name an expert or none.

    >>> checked_ids(torch.tensor([[1, -1]], dtype=torch.int8), 2).dtype
    torch.int32
    """
    idx = topk_idx if topk_idx.dtype.itemsize >= 4 else topk_idx.int()
    idx = idx.contiguous()
    bad = first_bad_entry(idx, num_experts)
    if bad is not None:
        where = divmod(bad, idx.shape[1])
        what, expected = f"topk_idx{list(where)} names no expert", f"-1 to {num_experts - 1}"
        demand(False, what, got=int(idx[where]), expected=expected)
    return idx


def experts_of(num_experts: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """The first expert of a rank, and how many it holds: blocks, the first ranks hold what does not come out even.

    >>> [experts_of(5, 2, rank) for rank in (0, 1)]
    [(0, 3), (3, 2)]
    """
    each, extra = divmod(num_experts, num_ranks)
    return rank * each + min(rank, extra), each + (rank < extra)


def summed_bias(bias: Any, num_tokens: int, hidden: int) -> Tensor | None:
    """One bias as it is, two summed in float32: the sum goes on from there."""
    if bias is None or isinstance(bias, Tensor):
        return None if bias is None else demand_tensor("bias", bias, num_tokens, hidden, dtypes=FLOATS)
    demand(
        isinstance(bias, (tuple, list)) and len(bias) == 2,
        "bias is wrong",
        got=repr(bias)[:80],
        expected="a tensor or two",
    )
    first, second = (demand_tensor("bias", part, num_tokens, hidden, dtypes=FLOATS) for part in bias)
    return first.float() + second.float()
