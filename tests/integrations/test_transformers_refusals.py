"""What `expert_parallel` and `register` refuse, by name; on one rank, with experts as transformers makes them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecomm
from moecomm.integrations.transformers import expert_parallel, register


class Experts(nn.Module):
    """Four experts, with the attributes that transformers gives them; the forward is the simplest there is."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.is_transposed, self._is_expert_parallel = 4, False, False, False
        self.up_proj = nn.Parameter(torch.ones(4, 3, 3).to(dtype), requires_grad=dtype.is_floating_point)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = torch.einsum("th,tkhi->tki", hidden_states, self.up_proj[top_k_index])
        return (rows * top_k_weights[:, :, None]).sum(1)


class Layer(nn.Module):
    def __init__(self, experts: nn.Module, name: str = "experts") -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.add_module(name, experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, topk_idx = self.gate(x).softmax(-1).topk(2)
        return self.get_submodule("experts")(x, topk_idx, weights)


def model_of(*layers: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


def changed(**attributes: Any) -> nn.Module:
    experts = Experts()
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


def spread_already() -> nn.Module:
    layer = Layer(Experts())
    expert_parallel(layer)
    return layer


def tied_to_a_dense_layer() -> nn.Module:
    layer, dense = Layer(Experts()), nn.Module()
    dense.weight = layer.get_submodule("experts").up_proj
    return model_of(layer, dense)


def memory_of_another() -> nn.Module:
    one, other = Experts(), Experts()
    other.up_proj.data = one.up_proj.data
    return model_of(Layer(one), Layer(other))


def one_argument(x: Tensor) -> Tensor:
    return x


HERE = r"rank 0: layers\.0\.experts \(Experts\) cannot be spread over ranks: got "
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dense": (
        lambda: model_of(nn.Linear(2, 2)),
        r"rank 0: Module has no experts that can be spread: got no module that is called after experts; "
        r'expected a module called "experts", .*num_experts.*forward of three arguments',
    ),
    "another_convention": (
        lambda: model_of(Layer(nn.ModuleList([nn.Linear(3, 3)]), "expert_list")),
        r"no experts that can be spread: got modules such as layers\.0\.expert_list \(ModuleList\)",
    ),
    "module_list": (
        lambda: model_of(Layer(nn.ModuleList([nn.Linear(3, 3)]))),
        r"layers\.0\.experts \(ModuleList\) cannot be spread .*num_experts=None and 0 weights",
    ),
    "twice": (lambda: model_of(spread_already()), r"layers\.0\.experts \(ExpertParallelExperts\).*-parallel already"),
    "by_transformers": (lambda: model_of(Layer(changed(_is_expert_parallel=True))), HERE + "one that is expert-para"),
    "hooked": (lambda: model_of(Layer(changed(forward=one_argument))), HERE + "one whose forward has been replaced"),
    "int8": (
        lambda: model_of(Layer(Experts(torch.int8))),
        HERE + r"quantised weights: up_proj is a Tensor of torch\.int8",
    ),
    "fp8": (lambda: model_of(Layer(Experts(torch.float8_e4m3fn))), HERE + "quantised weights: up_proj .*float8_e4m3fn"),
    "float64": (lambda: model_of(Layer(Experts(torch.float64))), HERE + "weights of another dtype: up_proj .*float64"),
    "norm_inside": (
        lambda: model_of(Layer(changed(norm=nn.LayerNorm(3)))),
        HERE + r".*not one per expert: norm\.weight",
    ),
    "other_number": (
        lambda: model_of(Layer(changed(num_experts=5))),
        HERE + r"num_experts=5 and .*up_proj \(4, 3, 3\)",
    ),
    "tied": (tied_to_a_dense_layer, r"layers\.0\.experts\.up_proj and layers\.1\.weight are tied: .*clone one of them"),
    "same_memory": (memory_of_another, r"layers\.0\.experts\.up_proj and layers\.1\.experts\.up_proj are tied"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_by_name_and_left_alone(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(moecomm.UnsupportedError, match=message):
        expert_parallel(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value.float(), before[key].float()) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"hidden": 8}, moecomm.ConfigError, r"hidden follows from the model: got hidden=8; leave it out"),
        ({"dtyp": 8}, moecomm.ConfigError, r"no such option of Buffer: got dtyp=8; expected one of .*'transport'"),
        ({"placement": [[0, 1]]}, moecomm.ConfigError, r"placement does not fit layers\.0\.experts: got one for 2 exp"),
        ({"placement": [[0, 2]]}, moecomm.ConfigError, r"every expert exactly once"),
    ],
)
def test_options_are_refused_before_anything_is_cut(options: Any, kind: type[Exception], message: str) -> None:
    model = model_of(Layer(Experts()))
    with pytest.raises(kind, match=message):
        expert_parallel(model, **options)
    expert_parallel(model)  # as good as new


def test_experts_that_layers_share_stay_shared() -> None:
    experts, twin = Experts(), Experts()
    twin.up_proj = experts.up_proj
    model = model_of(Layer(experts), Layer(experts), Layer(twin))
    expert_parallel(model, placement=[[3, 1, 0, 2]])
    assert model.get_submodule("layers.0.experts").up_proj is model.get_submodule("layers.2.experts").up_proj
    assert len(list(model.parameters())) == 1 + 3 * 2


def test_order_of_experts_is_no_part_of_the_state() -> None:
    layer = Layer(Experts())
    with torch.no_grad():
        for weights in layer.get_submodule("experts").parameters():
            weights.normal_()
    plain, x = copy.deepcopy(layer), torch.randn(5, 3)
    expert_parallel(layer, placement=[[3, 1, 0, 2]])
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        for weights in copied.get_submodule("experts").parameters():
            weights.zero_()
    torch.testing.assert_close(layer(x), plain(x))
    assert not copied(x).any(), "a copy has weights of its own"
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in layer.state_dict().items())
    copied.load_state_dict(plain.state_dict())
    torch.testing.assert_close(copied(x), plain(x))


def test_a_choice_of_no_expert_is_dropped() -> None:
    """The id E, which some models use for a token that is dropped, and -1."""
    layer = Layer(Experts())
    expert_parallel(layer)
    experts = layer.get_submodule("experts")
    x, idx = torch.ones(2, 3), torch.tensor([[0, 4], [-1, 4]])
    y = experts(hidden_states=x, top_k_index=idx, top_k_weights=torch.ones(2, 2))
    assert y.tolist() == [[3.0] * 3, [0.0] * 3]
    with pytest.raises(moecomm.RoutingError, match=r"topk_idx\[0, 0\] names no expert: got 5"):
        experts(x, torch.full((2, 2), 5), torch.ones(2, 2))
    with pytest.raises(moecomm.ConfigError, match=r"the experts got no routing: got \[\(2, 2\), \(2, 3\)\]"):
        experts(x, idx, torch.ones(2, 3))


def test_register_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(moecomm.UnsupportedError, match=r"no expert-parallel implementations.*pip install 'moecomm\[hf"):
        register()
    with pytest.raises(moecomm.ConfigError, match=r"top_k follows from the model"):
        register(top_k=2)
