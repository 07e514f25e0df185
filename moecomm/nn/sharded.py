"""`ShardedExperts`: an experts module that has kept this rank's experts and takes the tokens of all ranks.

Legend: T tokens of this rank, H hidden, E experts in all, L experts of this rank, K top-k, N rows received, W ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from moecomm.errors import ConfigError, UnsupportedError
from moecomm.nn.exchange import ExpertExchange
from moecomm.placement import ExpertPlacement


@final
@dataclass(frozen=True, slots=True)
class Sharding:
    """How the experts of a module are spread.

    exchange: what brings the tokens.
    placement: which rank holds which expert.
    grad_factor: what gradients of the experts' weights are multiplied by.
    grouped: the module takes rows that its caller has grouped by expert, not tokens and a routing.
    """

    exchange: ExpertExchange
    placement: ExpertPlacement
    grad_factor: float
    grouped: bool = False

    @property
    def expert_ids(self) -> tuple[int, ...]:
        """Global ids of this rank's experts, in local order."""
        return self.placement.experts_of_rank[self.exchange.group.rank]


class ShardedExperts(nn.Module):
    """What `shard_experts` puts before the class of an experts module; its own forward then sees local experts only."""

    sharding: Sharding

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Do what the experts did when all of them were here. Collective."""
        sharding, local = self.sharding, super().forward
        x, *routing = inspect.signature(local).bind(*args, **named).args if named else args

        def experts(rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
            return run_experts(self, local, rows, tokens_per_expert, sharding.grad_factor, grouped=sharding.grouped)

        if sharding.grouped:
            (ends,) = routing
            counts = ends.diff(prepend=ends.new_zeros(1)).long()
            topk_idx = torch.arange(len(counts), device=x.device).repeat_interleave(counts)[:, None]
            return sharding.exchange(x, topk_idx, None, experts, sharding.placement)
        if len(routing) != 2 or routing[0].shape != routing[1].shape:
            got = [tuple(part.shape) if isinstance(part, Tensor) else part for part in routing]
            expected = "(T, K) expert ids and (T, K) weights"
            raise ConfigError("the experts got no routing", got=got, expected=expected)
        topk_idx, topk_weights = (part.reshape(-1, part.shape[-1]) for part in routing)
        y = sharding.exchange(x.reshape(-1, x.shape[-1]), topk_idx, topk_weights, experts, sharding.placement)
        return y.view(x.shape)


def shard_experts(experts: nn.Module, sharding: Sharding, mixin: type[ShardedExperts] = ShardedExperts) -> None:
    """Let `experts`, whose parameters have been cut to this rank's experts, take the tokens of all ranks."""
    cls = type(experts)
    if (mixin, cls) not in _classes:
        _classes[mixin, cls] = type(f"ExpertParallel{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})
    experts.__class__ = _classes[mixin, cls]
    experts.sharding = sharding  # type: ignore[assignment]
    if getattr(experts, "num_experts", None) is not None:
        experts.num_experts = len(sharding.expert_ids)  # type: ignore[assignment]


_classes: dict[tuple[type, type], type] = {}


def run_experts(
    module: nn.Module,
    forward: Callable[..., Tensor],
    rows: Tensor,
    tokens_per_expert: Tensor,
    grad_factor: float,
    *,
    grouped: bool = False,
) -> Tensor:
    """Call the forward of an experts module, as it is, for rows that were brought to this rank.

    Args:
        module: holds the parameters; DTensors are seen as their local part by `forward`.
        forward: takes (N, H) tokens, (N, 1) local expert ids and (N, 1) weights, all 1; with `grouped` (N, H) rows and
            (L,) int32 end of each expert's rows.
        rows: (N, H) grouped by local expert; N may be 0: then there is one row of zeros, whose result is dropped, so
            that every rank takes part in backward.
        tokens_per_expert: (L,) int32.
        grad_factor: what gradients of the parameters are multiplied by.

    Returns:
        (N, H).

    >>> experts = nn.Linear(2, 2, bias=False)
    >>> run_experts(experts, lambda x, ids, w: experts(x) * w, torch.ones(0, 2), torch.tensor([0]), 1.0).shape
    torch.Size([0, 2])
    """
    num_rows, num_local = len(rows), len(tokens_per_expert)
    if num_local == 0:  # and so no rows; the empty weights still get their empty gradients
        with _local_parameters(module, grad_factor):
            return sum((p.sum() for p in module._parameters.values() if p is not None), rows)
    counts = tokens_per_expert
    if num_rows == 0:
        rows = rows.sum(0, keepdim=True)
        counts = torch.eye(1, num_local, dtype=torch.int32, device=rows.device)[0]
    with _local_parameters(module, grad_factor):
        if grouped:
            return forward(rows, counts.cumsum(0, dtype=torch.int32))[:num_rows]
        local_ids = torch.arange(num_local, device=rows.device)
        local_ids = local_ids.repeat_interleave(counts.long(), output_size=len(rows))[:, None]
        return forward(rows, local_ids, rows.new_ones(len(rows), 1))[:num_rows]


@contextmanager
def _local_parameters(module: nn.Module, grad_factor: float) -> Iterator[None]:
    held = dict(module._parameters)
    scale = grad_factor != 1 and torch.is_grad_enabled()
    for name, parameter in held.items():
        if parameter is None:
            continue
        local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if scale and local.requires_grad:
            local = _ScaledGrad.apply(local, grad_factor)
        module._parameters[name] = local  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(held)


class _ScaledGrad(torch.autograd.Function):
    """Nothing, with its gradient multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def takes_grouped_rows(name: str, experts: nn.Module) -> bool:
    """Whether a forward takes (rows, expert_offsets); False if it takes (x, topk_idx, topk_weights).

    Raises:
        UnsupportedError: neither.

    >>> from moecomm.nn import GroupedExperts
    >>> takes_grouped_rows("experts", GroupedExperts(8, 8, [0]))
    True
    """
    signature = inspect.signature(experts.forward)
    takes = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(takes) in (2, 3):
        return len(takes) == 2
    raise UnsupportedError(
        f"{name} ({type(experts).__name__}) is no experts module",
        got=f"forward{signature}",
        expected="forward(x, topk_idx, topk_weights), or forward(rows, expert_offsets)",
        remedy="let its forward take tokens, their routing and the weights, and give the weighted sum",
    )
