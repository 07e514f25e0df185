"""Slow references of `ElasticBuffer` over torch.distributed, for tests: every rank gathers what all ranks sent.

Legend: T tokens, H hidden, K top-k, E experts, R ranks, N tokens received.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ordered_accumulate(parts: Tensor, mask: Tensor | None = None, bias: Any = None) -> Tensor:
    """Sum (P, T, H) over P in ascending order in float32, the bias (or both) first, rounded once to the dtype of parts.

    mask: (P, T) bool, which parts count.

    >>> ordered_accumulate(torch.tensor([[[1.0]], [[2.0]]]), bias=torch.tensor([[3.0]])).tolist()
    [[6.0]]
    """
    total = torch.zeros(parts.shape[1:], dtype=torch.float32, device=parts.device)
    for added in () if bias is None else (bias,) if isinstance(bias, Tensor) else bias:
        total = total + added.float()
    for number, part in enumerate(parts):
        added = total + part.float()
        total = added if mask is None else torch.where(mask[number][:, None], added, total)
    return total.to(parts.dtype)


def dispatch(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What arrives without do_expand, sorted by (source rank, token).

    Returns:
        (N, H) rows, (N, K) local ids, (N, K) weights, (N, 2) source rank and token.
    """
    told: list[Any] = [None] * group.size()
    mine = [None if part is None else part.cpu() for part in (x, topk_idx, topk_weights)]
    dist.all_gather_object(told, mine, group=group)
    each = num_experts // group.size()
    first = group.rank() * each
    rows, ids, weights, origin = [], [], [], []
    for source, (their_x, their_idx, their_weights) in enumerate(told):
        local = torch.where((their_idx >= first) & (their_idx < first + each), their_idx - first, -1)
        token = (local >= 0).any(1).nonzero().flatten()
        rows.append(their_x[token])
        ids.append(local[token])
        weights.append(None if their_weights is None else their_weights[token])
        origin.append(torch.stack([torch.full_like(token, source), token], 1))
    gathered = None if topk_weights is None else torch.cat(weights).to(x.device)  # type: ignore[arg-type]
    return torch.cat(rows).to(x.device), torch.cat(ids).to(x.device), gathered, torch.cat(origin).to(x.device)


def combine(
    rows: Tensor, origin: Tensor, topk_idx: Tensor, num_experts: int, group: dist.ProcessGroup, bias: Any = None
) -> Tensor:
    """(T, H) sums at home of (N, H) rows that came from `origin`, in the order of each rank's highest choice."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, (rows.cpu(), origin.cpu()), group=group)
    num_tokens, top_k = topk_idx.shape
    parts = rows.new_zeros(top_k, num_tokens, rows.shape[1], device="cpu")
    mask = torch.zeros(top_k, num_tokens, dtype=torch.bool)
    owner = torch.where(topk_idx >= 0, topk_idx // (num_experts // group.size()), -1).cpu()
    for rank, (their_rows, their_origin) in enumerate(told):
        for row, (source, token) in zip(their_rows, their_origin.tolist(), strict=True):
            if source == group.rank():
                lane = int((owner[token] == rank).nonzero().max())
                parts[lane, token], mask[lane, token] = row, True
    bias = bias.cpu() if isinstance(bias, Tensor) else bias and tuple(part.cpu() for part in bias)
    return ordered_accumulate(parts, mask, bias).to(rows.device)


def generate_pre_combine_data(recv_x: Tensor, seed: int = 0) -> Tensor:
    """Rows that stand for expert outputs: random, of the shape and dtype of recv_x, the same for the same seed.

    >>> generate_pre_combine_data(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    random = torch.Generator().manual_seed(seed)
    return torch.randn(recv_x.shape, generator=random).to(recv_x.device, recv_x.dtype)
