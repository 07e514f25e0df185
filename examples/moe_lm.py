"""The model of `train_moe_lm.py`: a transformer over bytes whose feed-forward layers are mixtures of experts.

What a rank holds in common with the others (embeddings, attention, norms, routers) gets its gradient sequence by
sequence: `per_sequence` gives every sequence a view of the weight of its own, and adds the gradients of these views in
pairs, and pairs of pairs. However many ranks share the sequences, the additions are the same ones, so the sums are
equal bit for bit, if each rank has a power of two of them. Where bits do not matter, `nn.Linear` and an all-reduce do.

Legend: B sequences of this rank, T bytes of a sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moecomm
from moecomm.nn import MoELayer, Routing, topk_routing

VOCABULARY = 256


def tree_sum(parts: Tensor) -> Tensor:
    """Add (S, ...) over S in pairs, and pairs of pairs.

    >>> tree_sum(torch.tensor([1.0, 2.0, 4.0])), tree_sum(torch.zeros(0, 2))
    (tensor(7.), tensor([0., 0.]))
    """
    while len(parts) > 1:
        if len(parts) % 2:
            parts = torch.cat([parts, torch.zeros_like(parts[:1])])
        parts = parts[0::2] + parts[1::2]
    return parts.sum(0)


class _PerSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, num_sequences: int) -> Tensor:
        return weight.expand(num_sequences, *weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return tree_sum(grads[0]), None


def per_sequence(weight: Tensor, num_sequences: int) -> Tensor:
    """(...) as (B, ...) without a copy; its gradient is the tree sum of theirs."""
    return _PerSequence.apply(weight, num_sequences)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T, in) by a weight of (out, in)."""
    return torch.bmm(x, per_sequence(weight, len(x)).mT)


def weight_of(*shape: int, std: float) -> nn.Parameter:
    """A weight drawn from the global generator, which all ranks seed alike."""
    return nn.Parameter(std * torch.randn(shape))


class Norm(nn.Module):
    """Root mean square norm with a gain."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * per_sequence(self.gain, len(x))[:, None]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = weight_of(3 * hidden, hidden, std=hidden**-0.5)
        self.out = weight_of(hidden, hidden, std=hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = linear(x, self.qkv).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(mixed.transpose(1, 2).reshape(x.shape), self.out)


class Router(nn.Module):
    """Choose experts as `moecomm.nn.TopKRouter` does, with a gradient summed per sequence."""

    def __init__(self, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = weight_of(num_experts, hidden, std=0.02)

    def forward(self, x: Tensor) -> Routing:
        return topk_routing(linear(x, self.weight), self.top_k, renormalise=self.top_k > 1)


class Block(nn.Module):
    """Attention, then experts."""

    def __init__(self, buffer: moecomm.Buffer, *, heads: int, intermediate: int, seed: int) -> None:
        super().__init__()
        config = buffer.config
        self.attention_norm, self.moe_norm = Norm(config.hidden), Norm(config.hidden)
        self.attention = Attention(config.hidden, heads)
        router = Router(config.hidden, config.num_experts, config.top_k)
        self.moe = MoELayer(buffer, intermediate=intermediate, router=router, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class LanguageModel(nn.Module):
    """A transformer over bytes. One buffer serves all its layers; each forward is collective, B may be 0."""

    def __init__(
        self, buffer: moecomm.Buffer, *, layers: int, heads: int, intermediate: int, context: int, seed: int
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        hidden = buffer.config.hidden
        self.embedding = weight_of(VOCABULARY, hidden, std=0.05)
        self.position = weight_of(context, hidden, std=0.05)
        self.blocks = nn.ModuleList(
            Block(buffer, heads=heads, intermediate=intermediate, seed=seed * layers + i) for i in range(layers)
        )
        self.norm = Norm(hidden)

    @property
    def context(self) -> int:
        """Most bytes of a sequence."""
        return len(self.position)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 bytes to (B, T, 256) scores of the next one."""
        batch, length = tokens.shape
        embedding = per_sequence(self.embedding, batch)  # once, though used twice: one gradient, one tree
        one_hot = F.one_hot(tokens, VOCABULARY).float()
        x = torch.bmm(one_hot, embedding) + per_sequence(self.position, batch)[:, :length]
        for block in self.blocks:
            x = block(x)
        return torch.bmm(self.norm(x), embedding.mT)

    def moe_layers(self) -> list[MoELayer]:
        """The layers with experts."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def replicated(self) -> Sequence[nn.Parameter]:
        """The parameters that are the same on all ranks: all but the experts."""
        local = {id(p) for layer in self.moe_layers() for p in layer.experts.parameters()}
        return [p for p in self.parameters() if id(p) not in local]
