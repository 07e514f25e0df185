"""`moecomm.nn.ExpertParallel`: hand-written layers, alone and with FSDP2 over the other dimension of a 2 x 2 mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

import moecomm
from moecomm.nn import ExpertParallel, GroupedExperts
from moecomm.testing import RankPool

assert torch._dynamo  # what DTensor and FSDP take long to import: forked ranks have what this process has
BOUND = 1e-5  # largest relative difference in float32


class Experts(nn.Module):
    """Experts as anybody would write them: a loop."""

    def __init__(self, num_experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w_in = nn.Parameter(torch.randn(num_experts, hidden, inner) / 4)
        self.w_out = nn.Parameter(torch.randn(num_experts, inner, hidden) / 4)

    def forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, k = torch.where(topk_idx == expert)
            rows = (x[token] @ self.w_in[expert]).relu() @ self.w_out[expert]
            y = y.index_add(0, token, rows * topk_weights[token, k, None])
        return y


class Layer(nn.Module):
    """A router and experts that take a routing, or rows grouped by expert."""

    def __init__(self, num_experts: int, hidden: int, grouped: bool) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, num_experts)
        self.experts = GroupedExperts(hidden, 24, range(num_experts)) if grouped else Experts(num_experts, hidden, 24)
        self.num_experts, self.grouped = num_experts, grouped

    def forward(self, x: Tensor) -> Tensor:
        weights, topk_idx = self.router(x).softmax(-1).topk(2)
        if not self.grouped:
            return self.experts(x, topk_idx, weights)
        order = topk_idx.flatten().argsort(stable=True)
        ends = torch.bincount(topk_idx.flatten(), minlength=self.num_experts).cumsum(0).int()
        rows = self.experts(x[order // 2], ends)
        return torch.zeros_like(x).index_add(0, order // 2, rows * weights.flatten()[order, None])


def build(num_experts: int = 6, grouped: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), Layer(num_experts, 16, grouped), nn.Linear(16, 16))


def experts_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("1.experts")


def dtensors(model: nn.Module) -> list[Any]:
    return list(experts_of(model).parameters())


def batch(index: int) -> Tensor:
    return torch.randn(5 + index, 16, generator=torch.Generator().manual_seed(index))


def losses_and_gradients(model: nn.Module, batches: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = torch.stack([model(batch(index)).square().mean() for index in batches]).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worst_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((whole(got[k]) - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)


def on_one_dimension(rank: int, grouped: bool, num_experts: int) -> dict[str, Any]:
    """Four ranks share the experts; the other parameters are replicated and averaged by hand."""
    from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

    model, plain = build(num_experts, grouped), build(num_experts, grouped)
    mesh = dist.init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    # The layer itself, or its experts: both are in the plan of somebody.
    plan: dict[str, ParallelStyle] = {"1.experts" if grouped else "1": ExpertParallel(reduce="source")}
    parallelize_module(model, mesh["ep"], plan)
    _, got = losses_and_gradients(model, [rank])
    for name, grad in got.items():
        if "experts" not in name:
            dist.all_reduce(grad)
            grad /= 4
    _, expected = losses_and_gradients(plain, [0, 1, 2, 3])
    local: list[Tensor] = [p.to_local() for p in dtensors(model)]
    return {
        "gradients": worst_difference(got, expected),
        "output": float((model(batch(0)) - plain(batch(0))).abs().max()),
        "bytes": sum(p.untyped_storage().nbytes() for p in local),
        "all_bytes": sum(p.nbytes for p in experts_of(plain).parameters()),
        "held": len(local[0]),
    }


@pytest.mark.parametrize(("grouped", "num_experts"), [(False, 6), (True, 8), (False, 3)])
def test_four_ranks_share_the_experts(ranks: RankPool, grouped: bool, num_experts: int) -> None:
    results = ranks.run(on_one_dimension, grouped, num_experts)
    blocks = [len(block) for block in torch.arange(num_experts).chunk(4)]  # as DTensor has it: none for the last ones
    assert [result["held"] for result in results] == blocks + [0] * (4 - len(blocks))
    assert sum(result["bytes"] for result in results) == results[0]["all_bytes"], "nothing is there twice"
    for result in results:
        assert result["gradients"] <= BOUND and result["output"] <= BOUND


def on_a_mesh(rank: int, batch_per: str) -> dict[str, Any]:
    """FSDP2 over "dp", experts over "ep"; the rest over "dp" (a batch per ep group) or over the whole mesh."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    model, plain = build(), build()
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    parallelize_module(model, mesh["ep"], {"1": ExpertParallel(max_tokens_per_rank=16)})
    if batch_per == "group":
        fully_shard(model, mesh=mesh["dp"])
    else:
        fully_shard(experts_of(model), mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp", "ep"]._flatten("all"))
    held = sum(p.to_local().numel() for p in dtensors(model))
    mine, every = ([rank // 2], [0, 1]) if batch_per == "group" else ([rank], [0, 1, 2, 3])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, plain)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _, got = losses_and_gradients(model, mine)
        _, expected = losses_and_gradients(plain, every)
        difference = worst_difference(got, expected)
        for optimizer in optimizers:
            optimizer.step()
    state = {name: whole(value) for name, value in model.state_dict().items()}
    return {
        "gradients": difference,
        "weights": worst_difference(state, plain.state_dict()),
        "held": held / sum(p.numel() for p in experts_of(plain).parameters()),
    }


@pytest.mark.parametrize("batch_per", ["group", "rank"])
def test_fsdp_over_the_other_dimension(ranks: RankPool, batch_per: str) -> None:
    for result in ranks.run(on_a_mesh, batch_per):
        assert result["gradients"] <= BOUND and result["weights"] <= BOUND
        assert result["held"] == pytest.approx(0.25, abs=0.1)  # 3 experts per rank, half of them sharded: 2 or 1


class Nested(Experts):
    def __init__(self) -> None:
        super().__init__(2, 4, 4)
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (nn.ModuleList([nn.Linear(4, 4)]), r"experts \(ModuleList\) holds no experts .*got \{'0\.weight': .*as first"),
        (nn.ReLU(), r"experts \(ReLU\) holds no experts .*got no parameters"),
        (Nested(), r"experts \(Nested\) holds no experts .*norm\.weight"),
        (nn.Linear(4, 4), r"experts \(Linear\) is no experts module: got forward\(input.*topk_idx"),
    ],
    ids=["list", "empty", "nested", "one_argument"],
)
def test_what_is_no_experts_module_is_refused(experts: nn.Module, message: str) -> None:
    layer = nn.Module()
    layer.experts = experts
    with pytest.raises(moecomm.UnsupportedError, match=message):
        ExpertParallel()._apply(layer, dist.DeviceMesh("cpu", [0], _init_backend=False, _rank=0))


def test_options_are_checked_at_once() -> None:
    with pytest.raises(moecomm.ConfigError, match=r"no such option of Buffer: got max_tokens=3; expected one of"):
        ExpertParallel(max_tokens=3)
    with pytest.raises(moecomm.UnsupportedError, match=r"placement cannot be chosen here"):
        ExpertParallel(placement=[[0]])
