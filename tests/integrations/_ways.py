"""What four ranks do with Hugging Face models: loaded by transformers with FSDP, bfloat16, on meta, at odd times."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moecomm
from moecomm.integrations.transformers import clip_grad_norm_, expert_parallel, register
from tests.integrations._models import (
    averaged,
    build,
    difference,
    forward_backward,
    rows_of,
    tokens,
    whole,
    worst_gradient,
)

BOUND = 1e-5  # largest relative difference in float32
EXPERTS = "model.layers.1.mlp.experts"

# -- from_pretrained -------------------------------------------------------------------------------------------------


def loaded(rank: int, folder: str, family: str, sizes: dict[str, int], implementation: str | None) -> dict[str, Any]:
    """Load what rank 0 saved through `register`, and compare; save it again, and load that unsharded."""
    from transformers.distributed import DistributedConfig

    register(reduce="source")
    reference = build(family)
    if rank == 0:
        reference.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(**sizes, ep_implementation="moecomm")
    model = type(reference).from_pretrained(
        folder, distributed_config=config, experts_implementation=implementation, attn_implementation="eager"
    )
    per_batch = 8 // sizes.get("fsdp_size", 1)  # ranks of a TP group share a batch
    start = per_batch * (rank // sizes.get("tp_size", 1))
    mine = slice(start, start + per_batch)
    logits, grads = forward_backward(reference, tokens())
    got_logits, got_grads = forward_backward(model, tokens()[mine])
    assert got_grads.keys() == grads.keys()
    generated = model.generate(tokens()[mine], max_new_tokens=3, do_sample=False)
    held = model.get_submodule(EXPERTS).gate_up_proj.to_local()
    model.save_pretrained(f"{folder}/again")
    again = type(reference).from_pretrained(f"{folder}/again")
    return {
        "logits": difference(got_logits, logits[mine], logits),
        "gradients": max(difference(whole(got_grads[name]), grads[name]) for name in grads),
        "generates": torch.equal(generated, reference.generate(tokens(), max_new_tokens=3, do_sample=False)[mine]),
        "held": held.numel() / reference.get_submodule(EXPERTS).gate_up_proj.numel(),
        "saved": all(torch.equal(value, again.state_dict()[key]) for key, value in reference.state_dict().items()),
    }


# -- numbers ---------------------------------------------------------------------------------------------------------


def in_bfloat16(rank: int, family: str) -> dict[str, Any]:
    """The same batch everywhere: what came out on rank 1 is compared."""
    got_logits, got_grads = forward_backward(expert_parallel(build(family, torch.bfloat16)), tokens())
    if rank != 1:
        return {}
    exact, baseline = (build(family, torch.bfloat16) for _ in range(2))
    logits, grads = forward_backward(exact.float(), tokens())
    base_logits, base_grads = forward_backward(baseline, tokens())
    names = [name for name in grads if ".experts." not in name]
    return {
        "logits": (got_logits, base_logits, logits.double()),
        **{name: (got_grads[name], base_grads[name], grads[name].double()) for name in names},
    }


# -- how it is used --------------------------------------------------------------------------------------------------


def on_meta(rank: int, folder: str) -> dict[str, Any]:
    """Built on meta, spread, and only then given memory; saved by save_pretrained, read by from_pretrained."""
    reference = build("mixtral")
    with torch.device("meta"):
        model = build("mixtral")
    expert_parallel(model)
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert all(p.is_meta and len(p) <= 2 for p in experts), "2 of 6 experts at most"
    assert model.state_dict()[f"{EXPERTS}.down_proj"].shape[0] == 6
    model.load_state_dict(reference.state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # no part of a state dict
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    held = sum(p.untyped_storage().nbytes() for p in experts)
    model.save_pretrained(folder)
    dist.barrier()
    again = type(model).from_pretrained(folder)
    with torch.no_grad():
        logits = reference(tokens()).logits
        return {
            "logits": difference(model(tokens()).logits, logits),
            "held": held,
            "needed": sum(p.numel() * 4 for p in experts),
            "saved": torch.equal(again(tokens()).logits, logits),
            "architecture": again.config.architectures,
        }


def trained(rank: int) -> dict[str, Any]:
    """DDP around it, with checkpointing; then a larger batch, then the backward of the first; then clipping."""
    reference = build("qwen3_moe")
    model = copy.deepcopy(reference)
    _, grads = forward_backward(reference, tokens())
    expert_parallel(model)
    model.train()
    model.gradient_checkpointing_enable()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    mine = tokens()[rows_of(rank)]
    loss = ddp(input_ids=mine, labels=mine, use_cache=False).loss
    exchange = model.get_submodule(EXPERTS).sharding.exchange
    before = len(exchange.buffers)
    with torch.no_grad():
        model(tokens().repeat(2, 1)[: 4 + 8 * (rank == 2)], use_cache=False)  # 120 tokens on one rank
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    results = {"gradients": worst_gradient(got, grads, rank), "buffers": (before, len(exchange.buffers))}
    norm, expected = clip_grad_norm_(model, 0.5), torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    return results | {"clipped": worst_gradient(got, grads, rank), "norm": difference(norm, expected)}


def at_odd_times(rank: int) -> dict[str, Any]:
    """A rank that is done generating, ranks without experts or tokens, one that saves alone, too large a batch."""
    reference, model = build("mixtral"), expert_parallel(build("mixtral"))
    mine = tokens()[rows_of(rank)][:1]
    first = int(reference.generate(tokens()[:1], max_new_tokens=1, do_sample=False)[0, -1])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": first}
    generated, expected = model.generate(mine, **options), reference.generate(mine, **options)
    length = expected.shape[1]
    results: dict[str, Any] = {"stops": generated.shape[1] >= length and torch.equal(generated[:, :length], expected)}
    results["length"] = length

    few, few_reference = build("mixtral", num_local_experts=2), build("mixtral", num_local_experts=2)
    expert_parallel(few, placement=[[], [1], [], [0]])
    logits, grads = forward_backward(few_reference, tokens())
    got_logits, got_grads = forward_backward(few, tokens()[rows_of(rank)])
    kept = [[], [1], [], [0]][rank]
    worst = [
        difference(grad, grads[name][kept] if ".experts." in name else grads[name], grads[name])
        for name, grad in averaged(got_grads).items()
    ]
    results["few"] = max(worst) <= BOUND and difference(got_logits, logits[rows_of(rank)], logits) <= BOUND

    layer = few.get_submodule(EXPERTS)
    x = torch.ones(0 if rank == 1 else 3, 32, requires_grad=True)
    y = layer(x, torch.ones(len(x), 2, dtype=torch.int64), torch.ones(len(x), 2) / 2)
    y.sum().backward()
    assert x.grad is not None
    results["no tokens"] = y.shape == x.shape and x.grad.shape == x.shape

    saver = expert_parallel(build("mixtral"), dist.new_group(), timeout_s=1, max_tokens_per_rank=8)
    try:
        saver(tokens())
    except moecomm.CapacityError as error:
        results["capacity"] = "got 80; expected at most max_tokens_per_rank=8" in str(error)
    try:
        if rank == 0:
            saver.state_dict()
    except moecomm.StallError as error:
        results["stall"] = error.peers
    dist.barrier()
    results["DTensors"] = refusal_of_dtensors()
    return results


def refusal_of_dtensors() -> str:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = build("mixtral", num_hidden_layers=1)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    sharded = distribute_tensor(experts.down_proj.detach(), dist.init_device_mesh("cpu", (4,)), [Shard(1)])
    experts.down_proj = torch.nn.Parameter(sharded)
    with pytest.raises(moecomm.UnsupportedError) as refused:
        expert_parallel(model)
    return str(refused.value)


# -- docs and example ------------------------------------------------------------------------------------------------


ROOT = Path(__file__).resolve().parents[2]


def page(rank: int, folder: str) -> int:
    """Run the Python of docs/huggingface.md from top to bottom."""
    text = (ROOT / "docs/huggingface.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/huggingface.md, block {number}", "exec"), names)
    finally:
        os.chdir(before)
    assert names["model"].get_submodule("model.layers.0.mlp.experts").down_proj.shape == (2, 64, 96)
    return len(blocks)


def example(rank: int, *options: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    path = ROOT / "examples/hf_expert_parallel.py"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = runpy.run_path(str(path))["main"](options)
    return status, out.getvalue(), err.getvalue()
