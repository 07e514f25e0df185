"""Buffers and inputs of the tests that hold one call of machine code against the general way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moecomm

K, E, M = 3, 7, 12


def symmetric_buffer(hidden: int, **changes: Any) -> moecomm.Buffer:
    given: dict[str, Any] = {"num_experts": E, "hidden": hidden, "top_k": K, "max_tokens_per_rank": M}
    return moecomm.Buffer(None, **(given | {"timeout_s": 30.0, "transport": "symmetric"} | changes))


def inputs(rank: int, step: int, hidden: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Routings that differ in everything: none at all, int32 ids, no weights, entries and ranks without any."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = int(torch.randint(0, M + 1, (1,), generator=generator))
    idx = torch.rand(tokens, E, generator=generator).topk(K).indices
    idx[torch.rand(tokens, K, generator=generator) < 0.2] = -1
    idx = {3: torch.full_like(idx, -1), 4: idx.int()}.get(step, idx)
    weights = None if step == 5 else torch.rand(tokens, K, generator=generator)
    return torch.randn(tokens, hidden, generator=generator), idx, weights


def same(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, f"{what}: {got.shape}, {expected.shape}"
    assert torch.equal(got, expected), f"{what}: {got}, {expected}"
