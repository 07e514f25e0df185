"""Routings for tests: scores that send more tokens to some ranks than to others."""

from __future__ import annotations

import torch
from torch import Tensor


def get_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, unbalanced_ratio: float = 1.0
) -> Tensor:
    """(T, E) float32 scores whose top-k put unbalanced_ratio times the mean load on the rank with the most tokens.

    The experts of rank 0 are given an advantage that is found by bisection; ratio 1 gives none.

    >>> scores = get_unbalanced_scores(512, 32, 4, 4, 1.5)
    >>> load = torch.bincount(scores.topk(4).indices.flatten() // 8, minlength=4)
    >>> abs(load[0] / load.float().mean() - 1.5) < 0.1
    tensor(True)
    """
    scores = torch.rand(num_tokens, num_experts)
    first = torch.arange(num_experts) < max(1, num_experts // num_ranks)
    wanted = num_tokens * num_topk / num_ranks * unbalanced_ratio
    low, high = 0.0, 1.0
    for _ in range(24 if unbalanced_ratio > 1 else 0):
        middle = (low + high) / 2
        chosen = (scores + middle * first).topk(num_topk, dim=1).indices
        low, high = (middle, high) if first[chosen].sum() < wanted else (low, middle)
    return scores + high * first if unbalanced_ratio > 1 else scores
