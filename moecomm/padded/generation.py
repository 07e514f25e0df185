"""One padded dispatch, as a buffer remembers it, and what moves its rows.

Legend: T tokens of this rank, K top-k, H hidden, E experts in flat order, L experts of this rank, W ranks, M max tokens
per rank; row `s * M + slot` of a local expert is the slot-th that source rank s sends to it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moecomm.handle import Pending
from moecomm.quant import QuantSpec, quantize
from moecomm.transport.base import SLOT_ALIGN_BYTES, as_bytes

# The dtype and the shape of one row of each payload.
Kind = tuple[torch.dtype, tuple[int, ...]]
Kinds = tuple[Kind, ...]


def bytes_of_row(kind: Kind) -> int:
    """Bytes of one row."""
    dtype, shape = kind
    return dtype.itemsize * math.prod(shape)


def bytes_of_rows(num_rows: int, kind: Kind) -> int:
    """Bytes of rows in an area, up to where those of the next kind begin."""
    return -(-num_rows * bytes_of_row(kind) // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


def rows_in(area: Tensor, kinds: Kinds, local: int, per_expert: int, most_rows: int) -> list[Tensor]:
    """(L, W * M, ...) views of an area as rows of those kinds, one behind the other.

    most_rows: for how many there is room before the next kind, the same on every rank.
    """
    views, start = [], 0
    for kind in kinds:
        rows = area[start : start + local * per_expert * bytes_of_row(kind)].view(kind[0])
        views.append(rows.view(local, per_expert, *kind[1]))
        start += bytes_of_rows(most_rows, kind)
    return views


@dataclass(eq=False, slots=True)
class Generation:
    """The last dispatch of every other one.

    number: of the dispatch, -1 before the first. has_arrived: whether it was waited for. is_free: whether every rank is
    done with its rows, or will be before it says anything else. home: its last combine, if that is not finished.
    led: how many combines it had. trip: what the mover remembers.
    """

    index: int
    number: int = -1
    num_tokens: int = 0
    kinds: Kinds = ()
    tag: str = ""
    ranges: Tensor | None = None
    has_arrived: bool = False
    is_free: bool = True
    home: Pending[Tensor] | None = None
    led: int = 0
    trip: Any = field(default=None)


@dataclass(frozen=True, slots=True)
class Home:
    """What a combine leads home: (L, W * M, H) rows, (T, K) weights, (T, H) bias to add first, (T, H) sums to write."""

    rows: Tensor
    weights: Tensor | None
    bias: Tensor | None
    out: Tensor


def encoded(payloads: Sequence[Tensor], spec: QuantSpec | None) -> Sequence[Tensor]:
    """The pair (codes, scales) of rows, row by row; what was already a pair stays as it is."""
    if spec is None or len(payloads) == 2:
        return payloads
    return quantize(payloads[0], replace(spec, column_major=False))


def encode_home(g: Generation, rows: Tensor, spec: QuantSpec, areas: Sequence[Tensor]) -> None:
    """Write codes and scales of the (L, W * M, H) rows that arrived into areas; the other rows are not looked at."""
    assert g.ranges is not None
    spans = g.ranges.flatten(0, 1).long()
    num_rows, first = spans[:, 1] - spans[:, 0], torch.arange(len(spans), device=rows.device)
    starts = first // g.ranges.shape[1] * rows.shape[1] + spans[:, 0]
    before = num_rows.cumsum(0) - num_rows
    here = torch.repeat_interleave(starts - before, num_rows)
    here += torch.arange(len(here), device=rows.device)
    for part, area in zip(encoded((rows.flatten(0, 1)[here],), spec), areas, strict=True):
        as_bytes(area.flatten(0, 1))[here] = as_bytes(part)


class Mover(ABC):
    """Moves padded rows. Operations come in the same order on every rank."""

    @property
    def acts_at_once(self) -> bool:
        """Whether an operation may be one call."""
        return False

    @abstractmethod
    def check(self, topk_idx_TK: Tensor) -> tuple[int, bool] | None:
        """The first entry that names no expert, or (True) whose expert has no slot left; None if all is well."""

    @abstractmethod
    def send(
        self,
        g: Generation,
        payloads: Sequence[Tensor],
        topk_idx_TK: Tensor,
        topk_weights_TK: Tensor | None,
        tag: str,
        spec: QuantSpec | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send (T, ...) payloads to their slots; the routing (T, K), weights (T, K), and places (T, K) to keep.

        spec: how a single payload becomes the two that `g.kinds` says.
        """

    @abstractmethod
    def receive(self, g: Generation, tag: str, out: Sequence[Tensor] | None) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Wait for every rank; (L, W * M, ...) payloads, (L, W, 2) int32 ranges, (L,) int32 rows per expert.

        out: tensors that the rows that arrived, and no others, are copied to; the payloads are then these.
        """

    @abstractmethod
    def home_rows(self, g: Generation, kinds: Kinds) -> list[Tensor]:
        """(L, W * M, ...) tensors from which rows go home without a copy."""

    @abstractmethod
    def lead_home(self, g: Generation, rows: Tensor, spec: QuantSpec | None, number: int, tag: str) -> Kinds:
        """Let (L, W * M, H) rows go home, those that arrived, or rather what experts made of them; what travels."""

    @abstractmethod
    def sum_home(
        self, g: Generation, out_TH: Tensor, kinds: Kinds, number: int, tag: str, weights_TK: Tensor | None, bias: Any
    ) -> None:
        """Wait for every rank and sum the rows of each token in ascending k."""

    def dispatch_at_once(
        self, g: Generation, number: int, x: Any, topk_idx: Any, topk_weights: Any, tag: str
    ) -> tuple[Tensor, ...] | None:
        """`check`, `send` and `receive` of plain rows in one call.

        Gives rows, ranges, rows per expert, routing, weights, places. None, and nothing was done: take the long way,
        which can do it, or says what is wrong.
        """
        return None

    def combine_at_once(self, g: Generation, home: Home, number: int, tag: str) -> bool:
        """`lead_home` and `sum_home` of plain rows in one call; False, and nothing was done: take the long way."""
        return False

    @abstractmethod
    def free(self, g: Generation, tag: str) -> None:
        """Wait until every rank has no more use for the rows of this generation."""

    @property
    @abstractmethod
    def rows_of_expert(self) -> Tensor:
        """(L,) int64 rows that arrived for each local expert so far."""
