"""Hugging Face models spread by `expert_parallel` and through `register`: the same model as before.

All in one file: a worker of pytest that has the transformers in its ranks has paid for them.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moecomm.integrations.transformers import expert_parallel
from moecomm.testing import RankPool, assert_error_bounded
from tests.integrations._models import (
    FAMILIES,
    RANKS,
    averaged,
    build,
    difference,
    forward_backward,
    local_part,
    rows_of,
    tokens,
    worst_gradient,
)
from tests.integrations._ways import BOUND, at_odd_times, example, in_bfloat16, loaded, on_meta, page, trained

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not (importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate")),
        reason="transformers and accelerate are not installed (pip install 'moecomm[hf]')",
    ),
]
NEW_TOKENS = 5


def exchange_of(model: Any) -> Any:
    return next(m.sharding.exchange for m in model.modules() if hasattr(m, "sharding"))


# -- expert_parallel: five families and one more ---------------------------------------------------------------------


def spread(rank: int, family: str) -> dict[str, Any]:
    """One family: everything that must be equal, measured on one rank."""
    reference = build(family)
    model = copy.deepcopy(reference)
    assert expert_parallel(model, timeout_s=60) is model
    ids, mine = tokens(), tokens()[rows_of(rank)]
    logits, grads = forward_backward(reference, ids)
    got_logits, got_grads = forward_backward(model, mine)
    results: dict[str, Any] = {
        "logits of a batch per rank": difference(got_logits, logits[rows_of(rank)], logits),
        "gradients of a batch per rank": worst_gradient(averaged(got_grads), grads, rank),
    }
    got_logits, got_grads = forward_backward(model, ids)
    results["logits of the same batch"] = difference(got_logits, logits)
    results["gradients of the same batch"] = worst_gradient(got_grads, grads, rank)
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    generated = model.generate(mine, max_new_tokens=NEW_TOKENS, do_sample=False)
    results["generates the same"] = torch.equal(generated, expected[rows_of(rank)])
    results["memory"] = memory(model) / memory(reference), fair_share(reference, rank)
    results["one buffer for all layers"] = len({b.config.max_tokens_per_rank for b in exchange_of(model).buffers})
    state = model.state_dict()
    results["state"] = sorted(state) == sorted(reference.state_dict()) and all(
        torch.equal(state[name], value) for name, value in reference.state_dict().items()
    )
    return results | reloaded(rank, reference, state, logits) | bitwise(rank, reference, grads)


def memory(model: torch.nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for name, p in model.named_parameters() if ".experts." in name)


def fair_share(model: torch.nn.Module, rank: int) -> float:
    """1 / W where W divides E, else this rank's part of E."""
    name, weights = next((n, p) for n, p in model.named_parameters() if ".experts." in n)
    return len(local_part(name, weights, rank)) / len(weights)


@functools.cache
def groups(world: Any) -> tuple[Any, Any]:
    """This rank's group of two, and of one; made once, since making one takes as long as using it."""
    twos = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    ones = [dist.new_group([rank]) for rank in range(RANKS)]
    return twos[dist.get_rank() // 2], ones[dist.get_rank()]


def reloaded(rank: int, reference: Any, state: Any, logits: Any) -> dict[str, Any]:
    """What was saved with EP = 4, unsharded and with EP = 2."""
    alone, two = copy.deepcopy(reference), copy.deepcopy(reference)
    for model in (alone, two):
        for parameter in model.parameters():
            parameter.data.zero_()
    alone.load_state_dict(state)
    expert_parallel(two, groups(dist.group.WORLD)[0])
    two.load_state_dict(state)
    with torch.no_grad():
        return {
            "loaded unsharded": difference(alone(tokens()).logits, logits),
            "loaded with EP = 2": difference(two(tokens()).logits, logits),
        }


def bitwise(rank: int, reference: Any, grads: dict[str, Any]) -> dict[str, Any]:
    """EP = 4 against EP = 1 with reduce="source", and ranks that share one batch."""
    ids, alone = tokens(), groups(dist.group.WORLD)[1]
    models = [expert_parallel(copy.deepcopy(reference), group, reduce="source") for group in (alone, None)]
    shared = expert_parallel(copy.deepcopy(reference), reduce="source", replicated=True)
    with torch.no_grad():
        one, four, share = (model(ids).logits for model in (*models, shared))
    rows = [rows_sent(model) for model in (models[1], shared)]
    _, got_grads = forward_backward(shared, ids)
    return {
        "bitwise": torch.equal(one, four),
        "shares of one batch": difference(share, one),
        "gradients of shares": worst_gradient(got_grads, grads, rank),
        "rows": rows,
    }


def rows_sent(model: Any) -> int:
    stats = [buffer.stats() for buffer in exchange_of(model).buffers]
    return int(sum(each["rows_remote"] + each["rows_local"] for each in stats))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_the_model_it_was(hf_ranks: RankPool, family: str) -> None:
    results = hf_ranks.run(spread, family)
    for rank, result in enumerate(results):
        for name, value in result.items():
            if "logits" in name or name.startswith(("loaded", "shares")):
                assert value <= BOUND, (rank, name, value)
            elif name.startswith("gradients"):
                assert value[0] <= BOUND, (rank, name, value)
        assert result["generates the same"] and result["state"] and result["bitwise"], (rank, result)
        held, fair = result["memory"]
        assert held == pytest.approx(fair, rel=0.02), (rank, held)
    everywhere, shares = (sum(result["rows"][i] for result in results) for i in range(2))
    assert shares * RANKS == everywhere, "each rank sends its share of the batch only"


# -- other ways to it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sizes", "implementation"),
    [
        ("olmoe", {"fsdp_size": 4, "ep_size": 4}, None),
        ("gpt_oss", {"fsdp_size": 4, "ep_size": 2}, "eager"),  # two copies of each expert, halved by FSDP
        ("qwen3_moe", {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}, "batched_mm"),
    ],
)
def test_from_pretrained_just_works(
    hf_ranks: RankPool, tmp_path: Path, family: str, sizes: dict[str, int], implementation: str | None
) -> None:
    for result in hf_ranks.run(loaded, str(tmp_path), family, sizes, implementation):
        assert result["logits"] <= BOUND and result["gradients"] <= BOUND, result
        assert result["generates"] and result["saved"], result
        assert result["held"] == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss"])
def test_bfloat16_is_as_exact_as_unsharded(hf_ranks: RankPool, family: str) -> None:
    for name, (got, baseline, exact) in hf_ranks.run(in_bfloat16, family)[1].items():
        assert_error_bounded(got, baseline, exact, name)


def test_meta_and_save_pretrained(hf_ranks: RankPool, tmp_path: Path) -> None:
    for result in hf_ranks.run(on_meta, str(tmp_path)):
        assert result["logits"] <= BOUND and result["held"] == result["needed"] and result["saved"], result
        assert result["architecture"] == ["MixtralForCausalLM"]


def test_ddp_checkpointing_and_growing_batches(hf_ranks: RankPool) -> None:
    for result in hf_ranks.run(trained):
        assert result["gradients"][0] <= BOUND and result["clipped"][0] <= BOUND and result["norm"] <= BOUND, result
        assert result["buffers"] == (1, 2)


def test_odd_times(hf_ranks: RankPool) -> None:
    results = hf_ranks.run(at_odd_times)
    for result in results:
        assert result["stops"] and result["few"] and result["no tokens"] and result["capacity"], result
    assert len({result["length"] for result in results}) > 1, "one rank is done before the others"
    assert results[0]["stall"] == (1, 2, 3)
    assert re.search(r"layers\.0\.mlp\.experts \(MixtralExperts\).*parallelised already.*DTen", results[0]["DTensors"])


def test_the_page_runs(hf_ranks: RankPool, tmp_path: Path) -> None:
    assert hf_ranks.run(page, str(tmp_path)) == [5] * 4


def test_the_example_runs(hf_ranks: RankPool) -> None:
    results = hf_ranks.run(example, "--layers", "1", "--new-tokens", "4")
    assert [status for status, _, _ in results] == [0] * 4
    printed = results[0][1]
    assert "MixtralForCausalLM: 8 experts in each of 1 layers on 4 rank(s)" in printed
    assert len(re.findall(r"rank \d: \[\d+, \d+, \d+, \d+\]; experts 0\.20 of 0\.79 MB; logits within", printed)) == 4
    for family, message in (("Llama", "LlamaForCausalLM has no experts that can be spread"), ("Nobody", "Nobody")):
        for status, _, complaint in hf_ranks.run(example, "--family", family, "--layers", "1"):
            assert status == 2 and message in complaint
