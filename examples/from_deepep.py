"""A mixture-of-experts layer that was written for DeepEP; the import is all that changed.

    torchrun --standalone --nproc-per-node 4 examples/from_deepep.py

With `import deep_ep` left as it was: torchrun --standalone --nproc-per-node 4 -m moecomm.deep_ep SCRIPT.
Prefill goes through the normal mode, decoding through the low-latency mode of the same buffer.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.deep_ep as deep_ep  # was: import deep_ep

EXPERTS, TOP_K, HIDDEN, INNER, MOST_DECODED = 8, 2, 256, 128, 16


def weights_of(experts: range) -> tuple[Tensor, Tensor]:
    """Both matrices of each expert, the same on whichever rank it lies."""
    made = [torch.Generator().manual_seed(expert) for expert in experts]
    up = torch.stack([torch.randn(HIDDEN, INNER, generator=g) / HIDDEN**0.5 for g in made])
    return up.bfloat16(), torch.stack([torch.randn(INNER, HIDDEN, generator=g) / INNER**0.5 for g in made]).bfloat16()


class Layer:
    """This rank's experts, and how tokens get there and back."""

    def __init__(self, group: Any) -> None:
        each = EXPERTS // group.size()
        self.up, self.down = weights_of(range(each * group.rank(), each * (group.rank() + 1)))
        num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(MOST_DECODED, HIDDEN, group.size(), EXPERTS)
        self.buffer: Any = deep_ep.Buffer(
            group, 0, num_bytes, low_latency_mode=True, num_qps_per_rank=each, explicitly_destroy=True
        )

    def expert(self, number: int, rows: Tensor) -> Tensor:
        return torch.relu(rows @ self.up[number]) @ self.down[number]

    def prefill(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Any number of tokens: layout, dispatch, experts with their weights, combine."""
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(topk_idx, EXPERTS)
        recv_x, recv_idx, recv_weights, counts, handle, _ = self.buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        y = torch.zeros_like(recv_x, dtype=torch.float32)
        for number in range(len(counts)):
            row, k = torch.where(recv_idx == number)
            y.index_add_(0, row, self.expert(number, recv_x[row]).float() * recv_weights[row, k, None])
        return self.buffer.combine(y.bfloat16(), handle)[0]

    def decode(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """A few tokens: FP8 rows in slots, experts, a weighted combine; what is behind a hook could overlap."""
        (codes, scales), count, handle, _, hook = self.buffer.low_latency_dispatch(
            x, topk_idx, MOST_DECODED, EXPERTS, return_recv_hook=True
        )
        hook()
        y = torch.empty(codes.shape, dtype=torch.bfloat16)
        for number, here in enumerate(count.tolist()):
            rows = deep_ep.utils.per_token_cast_back(codes[number, :here], scales[number, :here])
            y[number, :here] = self.expert(number, rows)
        combined, _, hook = self.buffer.low_latency_combine(y, topk_idx, topk_weights, handle, return_recv_hook=True)
        hook()
        return combined


def main() -> int:
    """Run both modes on every rank and compare with all experts in one place; 0 if they agree."""
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    layer, (up, down), worst = Layer(dist.group.WORLD), weights_of(range(EXPERTS)), 0.0
    for name, forward, tokens, bound in (("prefill", layer.prefill, 64, 0.02), ("decode", layer.decode, 8, 0.1)):
        x = torch.randn(tokens, HIDDEN).bfloat16()
        topk_weights, topk_idx = torch.randn(tokens, EXPERTS).softmax(-1).topk(TOP_K)
        y = forward(x, topk_idx, topk_weights).float()
        all_experts = torch.relu(x.float() @ up.float()) @ down.float()  # (EXPERTS, tokens, HIDDEN)
        chosen = all_experts[topk_idx, torch.arange(tokens)[:, None]]
        expected = (chosen * topk_weights[..., None]).sum(1)
        error = float((y - expected).norm() / expected.norm())
        print(f"rank {dist.get_rank()}: {name} of {tokens} tokens differs by {error:.4f}", flush=True)
        worst = max(worst, error / bound)
    layer.buffer.destroy()
    dist.destroy_process_group()
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
