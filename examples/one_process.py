"""Dispatch and combine in one process, step by step: what goes in, what arrives, what comes home.

    python examples/one_process.py

The same calls run under torchrun and mpiexec; then the rows come from all ranks.
"""

from __future__ import annotations

import sys

import torch

import moecomm


def main() -> int:
    """Print every step; 0 if the sums are right."""
    tokens, experts, top_k, hidden = 6, 4, 2, 8
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden)
    topk_weights, topk_idx = torch.randn(tokens, experts).softmax(-1).topk(top_k)
    print("token -> experts:", dict(enumerate(topk_idx.tolist())))

    plan = moecomm.Buffer.plan_memory(
        num_ranks=1, num_experts=experts, hidden=hidden, top_k=top_k, max_tokens_per_rank=tokens, dtype=x.dtype
    )
    print(f"a buffer reserves at most {plan.total_bytes} bytes")
    with moecomm.Buffer(
        num_experts=experts, hidden=hidden, top_k=top_k, max_tokens_per_rank=tokens, dtype=x.dtype
    ) as buffer:
        print(buffer.explain().splitlines()[0])
        out = buffer.dispatch(x, topk_idx, topk_weights)
        assert out.tokens_per_expert is not None and out.expert_offsets is not None  # layout "expert" has both
        print("rows of each expert:", out.tokens_per_expert.tolist(), "groups end at", out.expert_offsets.tolist())

        # Expert e multiplies its rows by e + 1: a group of rows at a time, as a grouped matrix product would.
        factor = torch.arange(1.0, experts + 1).repeat_interleave(out.tokens_per_expert)
        y = buffer.combine(out.x * factor[:, None], out.handle)

        again = buffer.dispatch(2 * x, handle=out.handle)  # the same way, without planning
        assert torch.equal(again.x, 2 * out.x)
        stats = buffer.stats()
    expected = x * (topk_weights * (topk_idx + 1)).sum(1, keepdim=True)
    error = float((y - expected).abs().max())
    print(f"combine differs from the sum by hand by at most {error:.1e}")
    print(f"{stats['dispatches']} dispatch, {stats['replays']} replay, {stats['combines']} combine")
    return int(error > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
