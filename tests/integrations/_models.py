"""Tiny models of several families, with random weights, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecomm import ExpertPlacement

BATCH, LENGTH, RANKS = 8, 10, 4
PER_RANK = BATCH // RANKS
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Class, and what its config has of its own. Odd on purpose: K = 3, experts that 4 does not divide, a dense first layer.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 8,
            "mlp_only_layers": [0],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen2_moe": (  # not promised by name; shared experts behind a gate
        "Qwen2Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    """A model that is the same on every rank; weights large enough that the experts matter."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **own, **changed})
    config._experts_implementation = changed.get("experts_implementation")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def tokens() -> Tensor:
    """(BATCH, LENGTH) of all ranks; a rank has its PER_RANK rows of it."""
    return torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def rows_of(rank: int) -> slice:
    return slice(PER_RANK * rank, PER_RANK * (rank + 1))


def forward_backward(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of the mean loss."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return whole(out.logits.detach()), grads


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def averaged(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """What DDP would do: all but the experts' gradients averaged over the ranks."""
    for name, grad in grads.items():
        if ".experts." not in name:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return grads


def local_part(name: str, tensor: Tensor, rank: int, num_ranks: int = RANKS) -> Tensor:
    """This rank's experts of an experts' weight; anything else as it is."""
    if ".experts." not in name:
        return tensor
    return tensor[list(ExpertPlacement.uniform(len(tensor), num_ranks).experts_of_rank[rank])]


def difference(got: Tensor, expected: Tensor, of: Tensor | None = None) -> float:
    """Largest difference, relative to the largest value (of the whole tensor)."""
    scale = expected if of is None else of
    return float((got.double() - expected.double()).abs().max() / scale.double().abs().max()) if got.numel() else 0.0


def worst_gradient(got: dict[str, Tensor], expected: dict[str, Tensor], rank: int) -> tuple[float, str]:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    cut: Callable[[str], Tensor] = lambda name: local_part(name, expected[name], rank)  # noqa: E731
    return max((difference(got[name], cut(name), expected[name]), name) for name in expected)
