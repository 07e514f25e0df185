"""`moecomm.nn`: the router, the balance loss, grouped experts, and the layer on one rank and on several."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moecomm
from moecomm.nn import GroupedExperts, MoELayer, Routing, TopKRouter, load_balancing_loss, topk_routing
from moecomm.testing import RankPool, assert_bitwise, assert_error_bounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AUX_FACTOR = 0.5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_moecomm_alone_does_not_load_it() -> None:
    code = "import moecomm, sys; assert 'moecomm.nn' not in sys.modules; import moecomm.nn; "
    code += "assert not sys.modules.keys() & {'torch._dynamo', 'torch.distributed.tensor', 'transformers'}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


# -- router ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_router_takes_the_most_probable(dtype: torch.dtype, renormalise: bool) -> None:
    router = TopKRouter(6, 5, 3, renormalise=renormalise)
    x = drawn(7, 6).to(dtype)
    routing = router(x)
    probs = (x.double() @ router.weight.double().T).softmax(1)
    weights, idx = probs.sort(dim=1, descending=True)
    weights, idx = weights[:, :3], idx[:, :3]
    if renormalise:
        weights = weights / weights.sum(1, keepdim=True)
    assert_bitwise(routing.topk_idx, idx, "topk_idx")
    for got, expected in ((routing.topk_weights, weights), (routing.probs, probs)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_router_computes_in_float32_under_autocast() -> None:
    router, x = TopKRouter(64, 5, 2), drawn(7, 64)
    plain = router(x).probs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bitwise(router(x).probs, plain, "probs")
        assert (x @ router.weight.T).dtype == torch.bfloat16  # autocast was on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, r"hidden is no count: got 0"),
        ({"num_experts": 2.0}, r"num_experts is no count: got 2\.0"),
        ({"top_k": True}, r"top_k is no count: got True"),
        ({"top_k": 5}, r"different experts: got top_k=5; expected at most 4"),
        ({"renormalise": 1}, r"renormalise has the wrong type: got 1"),
        ({"top_k": 1, "renormalise": True}, r"always 1: .*leave renormalise out"),
        ({"seed": "a"}, r"seed has the wrong type: got 'a'"),
    ],
)
def test_router_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(moecomm.ConfigError, match=message):
        TopKRouter(**{"hidden": 8, "num_experts": 4, "top_k": 2, **options})


# -- load-balancing loss ---------------------------------------------------------------------------------------------


def test_balance_loss_is_that_of_switch_transformer() -> None:
    probs = drawn(9, 4).softmax(1)
    chosen = probs.argmax(1)
    counts = torch.bincount(chosen, minlength=4)
    expected = 4 * sum((chosen == e).double().mean() * probs[:, e].double().mean() for e in range(4))
    torch.testing.assert_close(load_balancing_loss(probs, counts).double(), expected)


def test_balance_losses_of_ranks_add_up() -> None:
    """The mean over ranks, weighted by their T, is the loss of the whole batch: value and gradient."""
    logits = drawn(10, 4).requires_grad_()
    counts = torch.tensor([7, 0, 2, 11])
    (whole,) = torch.autograd.grad(load_balancing_loss(logits.softmax(1), counts), logits)
    parts = [load_balancing_loss(part.softmax(1), counts) * len(part) / 10 for part in logits.split([3, 0, 7])]
    total = torch.stack(parts).sum()
    (summed,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(total, load_balancing_loss(logits.softmax(1), counts))
    torch.testing.assert_close(summed, whole)


def test_balance_loss_of_nothing_is_zero() -> None:
    probs = torch.empty(0, 4, requires_grad=True)
    loss = load_balancing_loss(probs, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0


# -- experts ---------------------------------------------------------------------------------------------------------


def swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = (x @ w_in).tensor_split(2, dim=-1)
    return (gate * gate.sigmoid() * up) @ w_out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0], [0, 9, 0], []], ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 32), (7, 5), (9, 1)])
def test_experts_compute_their_own_rows(dtype: torch.dtype, counts: list[int], hidden: int, intermediate: int) -> None:
    experts = GroupedExperts(hidden, intermediate, range(len(counts)), dtype=dtype)
    x = drawn(sum(counts), hidden).to(dtype).requires_grad_()
    grad_y = drawn(sum(counts), hidden, seed=1).to(dtype)
    y = experts(x, torch.tensor(counts).cumsum(0).int())
    got = torch.autograd.grad(y, (x, experts.w_in, experts.w_out), grad_y)
    expected = []
    for exact in (False, True):
        to = torch.float64 if exact else dtype
        inputs = [v.detach().to(to).requires_grad_() for v in (x, experts.w_in, experts.w_out)]
        rows = [swiglu(part, w, v) for part, w, v in zip(inputs[0].split(counts), *inputs[1:], strict=True)]
        plain = torch.cat(rows) if rows else inputs[0] * 1
        gradients = torch.autograd.grad(plain, inputs, grad_y.to(to), allow_unused=True, materialize_grads=True)
        expected.append((plain, *gradients))
    names = ("rows", "grad_x", "grad_w_in", "grad_w_out")
    for name, actual, baseline, exact_value in zip(names, (y, *got), *expected, strict=True):
        assert actual.dtype == dtype
        assert_error_bounded(actual, baseline, exact_value, name)


def test_experts_take_an_expanded_gradient() -> None:
    """sum().backward() sends a gradient of stride 0, which the matmul's own backward refuses."""
    experts, offsets = GroupedExperts(8, 8, [0, 1]), torch.tensor([2, 4], dtype=torch.int32)
    x = drawn(4, 8).requires_grad_()
    experts(x, offsets).sum().backward()
    expected = torch.autograd.grad(experts(x, offsets), x, torch.ones(4, 8))
    assert x.grad is not None
    assert_bitwise(x.grad, expected[0], "grad_x")
    with pytest.raises(RuntimeError):
        F.grouped_mm(x, experts.w_in, offs=offsets).sum().backward()


def test_experts_start_equal_wherever_they_live() -> None:
    everywhere = GroupedExperts(8, 16, range(5), seed=3)
    for held in ([4, 2], [0], [1, 3]):
        here = GroupedExperts(8, 16, held, seed=3)
        assert_bitwise(here.w_in, everywhere.w_in[held], f"w_in of {held}")
        assert_bitwise(here.w_out, everywhere.w_out[held], f"w_out of {held}")
    assert len({tuple(w.flatten().tolist()) for w in everywhere.w_in}) == 5
    assert not torch.equal(GroupedExperts(8, 16, [0], seed=4).w_in, everywhere.w_in[:1])
    assert float(everywhere.w_in.detach().abs().max()) <= 8**-0.5
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    GroupedExperts(8, 16, range(5))
    assert_bitwise(torch.rand(1), expected, "the global generator, which other layers draw from")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": -1}, r"hidden is no count: got -1"),
        ({"intermediate": 1.5}, r"intermediate is no count: got 1\.5"),
        ({"expert_ids": [0, -1]}, r"no global id: got -1"),
        ({"dtype": torch.float64}, r"got torch\.float64; expected torch\.float32 or"),
        ({"seed": 0.5}, r"seed has the wrong type"),
    ],
)
def test_experts_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(moecomm.ConfigError, match=message):
        GroupedExperts(**{"hidden": 8, "intermediate": 8, "expert_ids": [0], **options})


# -- the layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, and how many tokens each of up to three ranks has."""

    name: str
    num_experts: int = 5
    hidden: int = 16
    intermediate: int = 24
    top_k: int = 2
    tokens: tuple[int, ...] = (9, 7, 8)
    dtype: torch.dtype = torch.float32
    renormalise: bool = False
    reduce: str = "rank"
    align: int | None = None
    reverse: bool = False  # the last experts live on the first rank
    transport: str = "auto"

    def x(self, rank: int) -> Tensor:
        return drawn(self.tokens[rank], self.hidden, seed=10 + rank).to(self.dtype)

    def grad_y(self, rank: int) -> Tensor:
        return drawn(self.tokens[rank], self.hidden, seed=20 + rank).to(self.dtype)

    def placement(self, num_ranks: int) -> list[list[int]]:
        held = moecomm.ExpertPlacement.uniform(self.num_experts, num_ranks).experts_of_rank
        return [list(experts) for experts in (held[::-1] if self.reverse else held)]

    def layer(self, num_ranks: int) -> MoELayer:
        buffer = moecomm.Buffer(
            num_experts=self.num_experts,
            hidden=self.hidden,
            top_k=self.top_k,
            max_tokens_per_rank=max(1, sum(self.tokens)),
            dtype=self.dtype,
            reduce=self.reduce,
            placement=self.placement(num_ranks),
            transport=self.transport if num_ranks > 1 else "auto",
            timeout_s=30,
        )
        return MoELayer(buffer, intermediate=self.intermediate, renormalise=self.renormalise, align=self.align, seed=5)


CASES = [
    Case(name="uneven_experts"),
    Case(name="fewer_experts_than_ranks", num_experts=2),
    Case(name="ragged_tokens", tokens=(13, 0, 1), top_k=3, renormalise=True),
    Case(name="reversed_placement", reverse=True, reduce="source"),
    Case(name="collective", transport="collective", top_k=5),
    Case(name="aligned_bfloat16", dtype=torch.bfloat16, align=8, top_k=3),
    Case(name="odd_sizes_float16", dtype=torch.float16, hidden=7, intermediate=5, renormalise=True),
    Case(name="top_1", top_k=1),
]


def forward_backward(layer: MoELayer, x: Tensor, grad_y: Tensor, fraction: float) -> dict[str, Tensor]:
    """Outputs, and gradients of sum(y * grad_y) plus the rank's share of the balance loss."""
    x = x.clone().requires_grad_()
    y = layer(x)
    assert layer.aux_loss is not None and layer.expert_counts is not None
    share = layer.aux_loss * fraction
    torch.autograd.backward([y, AUX_FACTOR * share], [grad_y, None])
    named = {"grad_x": x, "grad_router": layer.router.weight}
    named |= {"grad_w_in": layer.experts.w_in, "grad_w_out": layer.experts.w_out}
    results = {"y": y.detach(), "aux_loss": share.detach(), "counts": layer.expert_counts}
    for name, tensor in named.items():
        assert tensor.grad is not None, name
        results[name] = tensor.grad
    return results | {"w_in": layer.experts.w_in.detach()}


def run_rank(rank: int, case: Case, num_ranks: int) -> dict[str, Tensor]:
    layer = case.layer(num_ranks)
    with layer.buffer:
        return forward_backward(
            layer, case.x(rank), case.grad_y(rank), case.tokens[rank] / sum(case.tokens[:num_ranks])
        )


def one_process(case: Case, num_ranks: int) -> dict[str, Tensor]:
    layer = case.layer(1)
    x, grad_y = (torch.cat([f(rank) for rank in range(num_ranks)]) for f in (case.x, case.grad_y))
    with layer.buffer:
        return forward_backward(layer, x, grad_y, 1.0)


def reference(case: Case, num_ranks: int) -> dict[str, Tensor]:
    """The layer by its definition: float64, a loop over tokens. Experts are chosen as in float32."""
    layer = case.layer(1)
    ranks = range(num_ranks)
    topk_idx = torch.cat([layer.router(case.x(rank)).topk_idx for rank in ranks])
    x = torch.cat([case.x(rank) for rank in ranks]).double().requires_grad_()
    held = case.placement(1)[0]
    by_id = sorted(range(len(held)), key=held.__getitem__)
    parameters = (layer.router.weight, layer.experts.w_in[by_id], layer.experts.w_out[by_id])
    router, w_in, w_out = (p.detach().double().requires_grad_() for p in parameters)
    probs = (x @ router.T).softmax(1)
    rows = []
    for token, chosen in enumerate(topk_idx.tolist()):
        weights = probs[token, chosen]
        if case.renormalise:
            weights = weights / weights.sum()
        rows.append(sum(w * swiglu(x[token], w_in[e], w_out[e]) for w, e in zip(weights, chosen, strict=True)))
    y = torch.stack([row for row in rows if isinstance(row, Tensor)])
    counts = torch.bincount(topk_idx.flatten(), minlength=case.num_experts)
    aux_loss = case.num_experts * (counts / counts.sum() * probs.mean(0)).sum()
    grad_y = torch.cat([case.grad_y(rank) for rank in ranks]).double()
    gradients = torch.autograd.grad([y, AUX_FACTOR * aux_loss], (x, router, w_in, w_out), [grad_y, None])
    named = dict(zip(("grad_x", "grad_router", "grad_w_in", "grad_w_out"), gradients, strict=True))
    return {"y": y, "aux_loss": aux_loss, "counts": counts, "w_in": w_in} | named


def by_expert(case: Case, parts: list[Tensor]) -> Tensor:
    """(L, ...) of every rank as (E, ...) by global id."""
    flat = [expert for experts in case.placement(len(parts)) for expert in experts]
    return torch.cat(parts)[[flat.index(expert) for expert in range(case.num_experts)]]


@pytest.fixture(scope="module", params=[2, 3], ids=["W2", "W3"])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param) as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_several_ranks_are_one_process(pool: RankPool, case: Case) -> None:
    num_ranks = pool.world_size
    parts = pool.run(run_rank, case, num_ranks)
    whole = {name: [part[name] for part in parts] for name in parts[0]}
    alone, exact = one_process(case, num_ranks), reference(case, num_ranks)
    for counts in whole["counts"]:  # every rank knows the choices of all
        assert_bitwise(counts, exact["counts"], "expert_counts")
    assert_bitwise(by_expert(case, whole["w_in"]), exact["w_in"].to(case.dtype), "the weights at the start")
    got = {name: torch.cat(whole[name]) for name in ("y", "grad_x")}
    got["grad_router"] = torch.stack(whole["grad_router"]).sum(0)
    got |= {name: by_expert(case, whole[name]) for name in ("grad_w_in", "grad_w_out")}
    for name in ("grad_w_in", "grad_w_out"):
        alone[name] = by_expert(case, [alone[name]])
    for name, actual in got.items():
        assert_error_bounded(actual, alone[name], exact[name], name)
    # One number: a baseline that is exact by luck would bound nothing.
    aux_loss = torch.stack(whole["aux_loss"]).sum().double()
    torch.testing.assert_close(aux_loss, exact["aux_loss"].detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_rank_computes_the_formula(case: Case) -> None:
    got, exact = one_process(case, 1), reference(case, 1)
    order = case.placement(1)[0]
    tolerance = 64 * torch.finfo(case.dtype).eps
    for name in ("y", "grad_x", "grad_router", "grad_w_in", "grad_w_out", "aux_loss"):
        expected = exact[name][order] if name.startswith("grad_w") else exact[name]
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(got[name].double(), expected, rtol=0, atol=tolerance * scale, msg=name)


def test_any_leading_dimensions() -> None:
    layer = Case(name="").layer(1)
    x = drawn(2, 3, 4, 16)
    assert_bitwise(layer(x).view(24, 16), layer(x.view(24, 16)), "y")
    assert layer(x[0, 0, 0]).shape == (16,)
    assert layer(x[:0]).shape == (0, 3, 4, 16)
    assert layer.expert_counts is not None and layer.expert_counts.tolist() == [0] * 5


class Ones(torch.nn.Module):
    """A router that sends every token to experts 3 and 1, with weight 1."""

    def forward(self, x: Tensor) -> Routing:
        logits = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]).expand(*x.shape[:-1], 5)
        routing = topk_routing(logits, 2)
        return Routing(routing.topk_idx, torch.ones_like(routing.topk_weights), routing.probs)


def test_a_router_of_your_own() -> None:
    buffer, x = Case(name="").layer(1).buffer, drawn(2, 3, 16)
    layer = MoELayer(buffer, intermediate=24, router=Ones())
    w_in, w_out = layer.experts.w_in, layer.experts.w_out
    torch.testing.assert_close(layer(x), swiglu(x, w_in[3], w_out[3]) + swiglu(x, w_in[1], w_out[1]))
    assert layer.expert_counts is not None and layer.expert_counts.tolist() == [0, 6, 0, 6, 0]
    with pytest.raises(moecomm.ConfigError, match="leave it to the router you pass"):
        MoELayer(buffer, intermediate=24, router=Ones(), renormalise=True)


def test_wrong_input_is_refused_and_the_layer_works_on() -> None:
    layer = Case(name="").layer(1)
    with pytest.raises(
        moecomm.ConfigError, match=r"rank 0: x has the wrong shape: got \(4, 8\); expected \(\.\.\., 16\)"
    ):
        layer(torch.zeros(4, 8))  # as many elements as two good tokens
    with pytest.raises(moecomm.ConfigError, match=r"x has the wrong dtype: got torch\.bfloat16"):
        layer(torch.zeros(4, 16, dtype=torch.bfloat16))
    assert layer(torch.zeros(4, 16)).shape == (4, 16)


def test_options_are_refused() -> None:
    options: dict[str, Any] = {"num_experts": 2, "hidden": 8, "top_k": 3, "max_tokens_per_rank": 4}
    with moecomm.Buffer(**options) as buffer, pytest.raises(moecomm.ConfigError, match=r"top_k=3; expected at most 2"):
        MoELayer(buffer, intermediate=8)
    with moecomm.Buffer(**options, dtype=torch.int8) as buffer, pytest.raises(moecomm.ConfigError, match="int8"):
        MoELayer(buffer, intermediate=8)
    with pytest.raises(moecomm.ConfigError, match="buffer has the wrong type: got None"):
        MoELayer(None, intermediate=8)  # type: ignore[arg-type]
    with moecomm.Buffer(**options | {"top_k": 1}) as buffer:
        with pytest.raises(moecomm.ConfigError, match="intermediate is no count: got 0"):
            MoELayer(buffer, intermediate=0)
        with pytest.raises(moecomm.ConfigError, match="align is no count: got 0"):
            MoELayer(buffer, intermediate=8, align=0)


def test_layers_may_share_a_buffer_and_be_checkpointed() -> None:
    first = Case(name="").layer(1)
    second = MoELayer(first.buffer, intermediate=8, seed=6)
    x = drawn(6, 16).requires_grad_()
    gradients = []
    for recompute in (False, True):
        first.zero_grad()
        hidden = checkpoint(first, x, use_reentrant=False) if recompute else first(x)
        aux_loss = first.aux_loss
        assert aux_loss is not None and isinstance(hidden, Tensor)
        gradients.append(torch.autograd.grad(second(hidden).square().sum() + aux_loss, [x, first.router.weight]))
    for plain, again in zip(*gradients, strict=True):
        assert_bitwise(again, plain, "gradient after recomputation")


def test_state_holds_the_parameters_alone() -> None:
    layer = Case(name="").layer(1)
    layer(drawn(4, 16))
    assert sorted(layer.state_dict()) == ["experts.w_in", "experts.w_out", "router.weight"]
