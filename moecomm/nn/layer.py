"""A complete mixture-of-experts layer on top of `moecomm.Buffer`: router, dispatch, experts, combine.

Every weight is drawn from a seed and, for an expert, its global id: the same seed gives the same model on any number of
ranks.

Legend: T tokens of this rank, H hidden, E experts in all, L experts of this rank, K top-k, N rows received, D
intermediate size of an expert, W ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecomm import Buffer, ConfigError, DispatchHandle
from moecomm.memory.device import moves_by_kernels

__all__ = [
    "GroupedExperts",
    "MoELayer",
    "Routing",
    "TopKRouter",
    "group_limited_topk",
    "load_balancing_loss",
    "topk_routing",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROW_BYTES = 16  # grouped_mm takes rows of a multiple of this only, on a CPU too


@final
@dataclass(frozen=True, eq=False, slots=True)
class Routing:
    """What a router decided; T may be several dimensions.

    topk_idx: (T, K) int64 global expert ids, different ones in each row, most probable first.
    topk_weights: (T, K) float32, what each expert's output is multiplied by.
    probs: (T, E) float32, softmax over all experts; what `load_balancing_loss` takes.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    probs: Tensor


def topk_routing(logits: Tensor, top_k: int, *, renormalise: bool = False) -> Routing:
    """Turn scores into a routing: a softmax over all experts, the K largest. For routers of your own.

    Args:
        logits: (T, E) floating; T may be several dimensions.
        top_k: K, at most E.
        renormalise: divide the K weights by their sum, so that they add up to 1.

    >>> routing = topk_routing(torch.tensor([[0.0, 2.0, 1.0]]), 2, renormalise=True)
    >>> routing.topk_idx.tolist(), round(float(routing.topk_weights.sum()), 6)
    ([[1, 2]], 1.0)
    """
    probs = F.softmax(logits, dim=-1, dtype=torch.float32)
    weights, idx = probs.topk(top_k, dim=-1)
    return Routing(idx, weights / weights.sum(-1, keepdim=True) if renormalise else weights, probs)


class TopKRouter(nn.Module):
    """Choose K experts for every token: a linear map, a softmax over all experts, the K largest.

    Computes in float32 whatever the dtype of the tokens is. Parameter `weight`: (E, H) float32, the same on all ranks;
    its gradient is this rank's share.

    Args:
        hidden: H.
        num_experts: E.
        top_k: K, at most E.
        renormalise: divide the K weights by their sum, so that they add up to 1. Not with K = 1: the weight would be 1
            whatever the router says, and the router would learn nothing from it.
        seed: of the weight.
        device: of the weight.

    Raises:
        ConfigError: a size is no count, K > E, or K = 1 with renormalise.

    >>> router = TopKRouter(hidden=8, num_experts=4, top_k=2, renormalise=True)
    >>> routing = router(torch.randn(3, 8))
    >>> routing.topk_idx.shape, routing.topk_weights.dtype, routing.probs.shape
    (torch.Size([3, 2]), torch.float32, torch.Size([3, 4]))
    >>> torch.allclose(routing.topk_weights.sum(1), torch.ones(3))
    True
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        renormalise: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_counts(hidden=hidden, num_experts=num_experts, top_k=top_k)
        _check_type("renormalise", renormalise, bool)
        if top_k > num_experts:
            raise ConfigError(
                "a router chooses different experts", got=f"top_k={top_k}", expected=f"at most {num_experts}"
            )
        if top_k == 1 and renormalise:
            raise ConfigError(
                "a single weight, renormalised, is always 1",
                got="top_k=1, renormalise=True",
                remedy="leave renormalise out, or the router learns nothing",
            )
        self.hidden, self.num_experts, self.top_k, self.renormalise = hidden, num_experts, top_k, renormalise
        self.weight = nn.Parameter(_uniform((num_experts, hidden), hidden, seed, "router").to(device))

    def forward(self, x: Tensor) -> Routing:
        """Route (T, H) tokens of any floating dtype; T may be several dimensions."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        return topk_routing(logits, self.top_k, renormalise=self.renormalise)

    def extra_repr(self) -> str:
        return f"{self.hidden}, {self.num_experts}, top_k={self.top_k}, renormalise={self.renormalise}"


def load_balancing_loss(probs: Tensor, expert_counts: Tensor) -> Tensor:
    """Measure how unevenly a router spreads its tokens: E * sum over e of f_e * P_e; 1 when even, E at worst.

    f_e is the fraction of all choices that went to expert e, P_e the mean probability of e. From Switch Transformer
    (Fedus, Zoph, Shazeer 2021, section 2.2); f_e counts all K choices of a token and adds up to 1.

    Only P_e has a gradient. With f_e of all ranks and the probabilities of one rank, the mean of this loss over ranks,
    weighted by their T, is the loss of the whole batch, in value and gradient.

    Args:
        probs: (T, E) float32, softmax output; T may be 0, the loss is then 0.
        expert_counts: (E,) integer, choices of every expert in order of global id.

    Returns:
        () float32.

    >>> load_balancing_loss(torch.full((3, 4), 0.25), torch.tensor([2, 1, 2, 1]))
    tensor(1.)
    >>> load_balancing_loss(torch.eye(4)[:1], torch.tensor([3, 0, 0, 0]))
    tensor(4.)
    """
    counts = expert_counts.to(probs.device, torch.float32)
    fraction = counts / counts.sum().clamp(min=1)
    mean_prob = probs.sum(0) / max(1, probs.shape[0])
    return probs.shape[1] * (fraction * mean_prob).sum()


def group_limited_topk(
    scores: Tensor, top_k: int, *, groups: Sequence[int], max_groups: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose K experts for every token out of at most `max_groups` groups of experts, such as those of a node.

    A group's score is the sum of its two best experts'; the best groups are taken, then the best experts in them. Of
    equal scores the lower id wins. From DeepSeek-V3 (2024, sections 2.1.2 and 3.2.2), which calls it node-limited
    routing: a token then crosses the network to that many nodes at most.

    Args:
        scores: (T, E) floating, how well each expert suits each token.
        top_k: K.
        groups: (E,) group of each expert, numbered from 0.
        max_groups: groups that a token may use.
        bias: (E,) floating, added where experts are compared and nowhere else (balancing without a loss), or None.

    Returns:
        (T, K) int64 different expert ids, best first, and (T, K) their scores without the bias, differentiable.

    Raises:
        ConfigError: a count is wrong, groups do not fit the scores, or some max_groups groups hold too few experts.

    >>> group_limited_topk(torch.tensor([[0.9, 0.0, 0.5, 0.6]]), 2, groups=[0, 0, 1, 1], max_groups=1)
    (tensor([[3, 2]]), tensor([[0.6000, 0.5000]]))
    """
    _check_counts(top_k=top_k, max_groups=max_groups)
    num_groups = max(groups, default=-1) + 1
    if scores.shape[1] != len(groups) or set(groups) != set(range(num_groups)) or max_groups > num_groups:
        expected = f"a group from 0 on, without a gap, for each of {scores.shape[1]} experts, and max_groups of them"
        raise ConfigError("groups do not fit", got=f"{list(groups)}, max_groups={max_groups}", expected=expected)
    group_E = torch.tensor(groups, device=scores.device)
    if sum(sorted(torch.bincount(group_E).tolist())[:max_groups]) < top_k:
        raise ConfigError("max_groups groups hold fewer than top_k experts", got=f"{max_groups} groups", expected=top_k)
    with torch.no_grad():
        compared = (scores if bias is None else scores + bias).to(torch.promote_types(scores.dtype, torch.float32))
        of_group = [compared[:, group_E == group] for group in range(num_groups)]
        group_scores = torch.stack([part.topk(min(2, part.shape[1]), dim=1).values.sum(1) for part in of_group], 1)
        chosen = group_scores.sort(dim=1, descending=True, stable=True).indices[:, :max_groups]
        allowed = (chosen[:, :, None] == group_E).any(1)
        order = compared.sort(dim=1, descending=True, stable=True).indices
        allowed_first = allowed.gather(1, order).int().sort(dim=1, descending=True, stable=True).indices
        idx = order.gather(1, allowed_first)[:, :top_k]
    return idx, scores.gather(1, idx)


class GroupedExperts(nn.Module):
    """SwiGLU experts, each applied to its own group of rows: (silu(x @ gate) * (x @ up)) @ down, without biases.

    Holds the experts of one rank. Parameters: `w_in` (L, H, 2 D), gate beside up; `w_out` (L, D, H). They differ
    between ranks, so their gradients are not to be averaged over the ranks that share the experts: every token that
    came here has left its share already.

    Args:
        hidden: H.
        intermediate: D.
        expert_ids: (L,) global ids of the experts to hold, in local order; may be empty.
        seed: of the weights, together with the global id: an expert starts equal wherever it lives.
        dtype: float32, float16 or bfloat16.
        device: of the weights.

    Raises:
        ConfigError: a size is no count, an id is negative, or the dtype is another one.

    >>> experts = GroupedExperts(hidden=8, intermediate=16, expert_ids=[4, 5])
    >>> rows, expert_offsets = torch.randn(3, 8), torch.tensor([3, 3], dtype=torch.int32)
    >>> experts(rows, expert_offsets).shape  # all rows are expert 4's
    torch.Size([3, 8])
    >>> torch.equal(experts.w_in[1], GroupedExperts(8, 16, [5]).w_in[0])
    True
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        expert_ids: Sequence[int],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_counts(hidden=hidden, intermediate=intermediate)
        _check_dtype(dtype)
        self.expert_ids = tuple(expert_ids)
        for expert in self.expert_ids:
            if not _is_int(expert) or expert < 0:
                raise ConfigError("an expert id is no global id", got=repr(expert), expected="0 or more")
        self.hidden, self.intermediate = hidden, intermediate

        def stack(name: str, rows: int, columns: int) -> nn.Parameter:
            drawn = [_uniform((rows, columns), rows, seed, f"{name}/{expert}") for expert in self.expert_ids]
            empty = torch.empty(0, rows, columns, dtype=torch.float32, device="cpu")
            return nn.Parameter((torch.stack(drawn) if drawn else empty).to(device, dtype))

        self.w_in = stack("in", hidden, 2 * intermediate)
        self.w_out = stack("out", intermediate, hidden)

    def forward(self, x: Tensor, expert_offsets: Tensor) -> Tensor:
        """Apply every expert to its rows.

        Args:
            x: (N, H) rows in the dtype of the weights, grouped by local expert; N may be 0.
            expert_offsets: (L,) int32 end of each group; the last is N.

        Returns:
            (N, H) in the dtype of x. Rows of zeros, such as padding, give zeros.
        """
        gate, up = _grouped_mm(x, self.w_in, expert_offsets).chunk(2, dim=-1)
        return _grouped_mm(F.silu(gate) * up, self.w_out, expert_offsets)

    def extra_repr(self) -> str:
        return f"{self.hidden}, {self.intermediate}, expert_ids={list(self.expert_ids)}, dtype={self.w_in.dtype}"


class MoELayer(nn.Module):
    """A mixture-of-experts layer whose experts are spread over the ranks of a buffer's group.

    Every call is collective: all ranks call forward, and then backward, the same number of times in the same order,
    also a rank without tokens. H, E, K, the dtype and the placement are those of the buffer. Several layers may share
    one buffer.

    Gradients: if each rank's loss is its share of a sum over all ranks, then expert gradients are complete as they are,
    and all others (router included) are to be summed over the ranks. For a mean over ranks divide all of them by W.

    Attributes:
        router: TopKRouter, or what was given.
        experts: GroupedExperts, those of this rank.
        aux_loss: () float32, `load_balancing_loss` of the last forward: this rank's probabilities, the choices of all
            ranks. Add it, times a small factor (0.01 in Switch Transformer), to the loss. None before the first one.
        expert_counts: (E,) int64 on the host: choices of all ranks in the last forward, by global id. None before.

    Args:
        buffer: what moves the rows; its dtype is that of tokens and experts.
        intermediate: D of each expert.
        router: gives a Routing for x; None: a TopKRouter.
        renormalise: of the TopKRouter.
        align: rows that each expert's group is padded to a multiple of; None: 1 on a CPU, and on an accelerator the 16
            bytes that its grouped matmul asks for.
        seed: of all weights. Give every layer of a model another one.

    Raises:
        ConfigError: an option is wrong; forward: x has the wrong shape.

    >>> buffer = Buffer(num_experts=4, hidden=8, top_k=2, max_tokens_per_rank=16, dtype=torch.float32)
    >>> layer = MoELayer(buffer, intermediate=32, renormalise=True)
    >>> x = torch.randn(2, 5, 8)
    >>> y = layer(x)
    >>> (y.square().mean() + 0.01 * layer.aux_loss).backward()
    >>> y.shape, layer.experts.w_in.grad.shape, int(layer.expert_counts.sum())
    (torch.Size([2, 5, 8]), torch.Size([4, 8, 64]), 20)
    """

    router: Any  # a module with whatever attributes its owner gave it
    experts: GroupedExperts
    aux_loss: Tensor | None
    expert_counts: Tensor | None

    def __init__(
        self,
        buffer: Buffer,
        *,
        intermediate: int,
        router: nn.Module | None = None,
        renormalise: bool = False,
        align: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_type("buffer", buffer, Buffer)
        if router is not None and renormalise:
            raise ConfigError("renormalise is for the layer's own router", remedy="leave it to the router you pass")
        config = buffer.config
        _check_dtype(config.dtype)
        align = _default_align(config.device, config.dtype) if align is None else align
        _check_counts(align=align)
        self.buffer, self.align = buffer, align
        expert_ids = config.placement.experts_of_rank[buffer.group.rank]
        if router is None:
            sizes = config.hidden, config.num_experts, config.top_k
            router = TopKRouter(*sizes, renormalise=renormalise, seed=seed, device=config.device)
        self.router = router
        self.experts = GroupedExperts(
            config.hidden, intermediate, expert_ids, seed=seed, dtype=config.dtype, device=config.device
        )
        self.aux_loss = self.expert_counts = None

    def forward(self, x: Tensor) -> Tensor:
        """Send every token through its K experts and add up what they say.

        Args:
            x: (..., H) in the buffer's dtype; at most max_tokens_per_rank tokens, which may differ between ranks and be
                0.

        Returns:
            (..., H) in the buffer's dtype, without a residual.
        """
        config = self.buffer.config
        if x.ndim < 1 or x.shape[-1] != config.hidden:
            raise ConfigError(
                "x has the wrong shape",
                got=tuple(x.shape),
                expected=f"(..., {config.hidden})",
                rank=self.buffer.group.rank,
            )
        routing = self.router(x)
        topk_idx, topk_weights, probs = (
            part.reshape(-1, part.shape[-1]) for part in (routing.topk_idx, routing.topk_weights, routing.probs)
        )
        out = self.buffer.dispatch(x.reshape(-1, config.hidden), topk_idx, topk_weights, align=self.align)
        rows = self.experts(out.x, out.expert_offsets)
        y_TH = self.buffer.combine(rows, out.handle)
        self.expert_counts = self._choices_of_all(topk_idx, out.handle)
        self.aux_loss = load_balancing_loss(probs, self.expert_counts)
        return y_TH.view(x.shape)

    def _choices_of_all(self, topk_idx: Tensor, handle: DispatchHandle) -> Tensor:
        """(E,) int64 choices of all ranks, on the host, by global id."""
        config, group = self.buffer.config, self.buffer.group
        if self.buffer.transport == "symmetric" and moves_by_kernels(config.device):  # the handle knows this rank's
            named = topk_idx.detach()[topk_idx >= 0].cpu()
            own = torch.bincount(named, minlength=config.num_experts)
            told = group.all_gather_object(own, timeout_s=config.timeout_s, operation="MoELayer")
            return torch.stack(told).sum(0)
        flat_counts = handle.expert_counts.sum(0)  # in the order of ranks and their local ids
        flat_experts = torch.tensor(config.placement.flat_experts, device="cpu")
        return torch.empty_like(flat_counts).index_copy_(0, flat_experts, flat_counts)


class _ContiguousGrad(torch.autograd.Function):
    """Nothing, with a gradient made contiguous: the backward of grouped_mm refuses an expanded one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _grouped_mm(x_NI: Tensor, w_LIO: Tensor, offs_L: Tensor) -> Tensor:
    """x[n] @ w[group of n], with rows padded to what the kernel takes; padding of zeros changes no sum."""
    step = _ROW_BYTES // x_NI.element_size()
    num_in, num_out = w_LIO.shape[1:]
    pad_in, pad_out = -num_in % step, -num_out % step
    if pad_in or pad_out:
        x_NI, w_LIO = F.pad(x_NI, (0, pad_in)), F.pad(w_LIO, (0, pad_out, 0, pad_in))
    y_NO = _ContiguousGrad.apply(F.grouped_mm(x_NI.contiguous(), w_LIO, offs=offs_L))
    return y_NO[:, :num_out]


def _default_align(device: torch.device, dtype: torch.dtype) -> int:
    return 1 if device.type == "cpu" else _ROW_BYTES // dtype.itemsize


def _uniform(shape: tuple[int, int], fan_in: int, seed: int, name: str) -> Tensor:
    """A float32 matrix between -1/sqrt(fan_in) and 1/sqrt(fan_in), by seed and name alone."""
    _check_type("seed", seed, int)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_counts(**counts: object) -> None:
    for name, value in counts.items():
        if not _is_int(value) or value < 1:  # type: ignore[operator]
            raise ConfigError(f"{name} is no count", got=repr(value), expected="an integer of at least 1")


def _check_type(name: str, value: object, kind: type) -> None:
    if not (_is_int(value) if kind is int else isinstance(value, kind)):
        raise ConfigError(f"{name} has the wrong type", got=repr(value), expected=f"a value of type {kind.__name__}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        expected = " or ".join(str(accepted) for accepted in _DTYPES)
        raise ConfigError("experts compute in another dtype", got=dtype, expected=expected)
