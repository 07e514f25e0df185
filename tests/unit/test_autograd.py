"""Dispatch and combine as operators: opcheck, pytrees, checkpointing, double use, gradients of every input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import moecomm
from moecomm.handle import HANDLE_TENSORS

T, K, H, E = 5, 2, 6, 4


@pytest.fixture(params=["rank", "source"])
def buffer(request: pytest.FixtureRequest) -> Iterator[moecomm.Buffer]:
    with moecomm.Buffer(
        num_experts=E, hidden=H, top_k=K, max_tokens_per_rank=8, dtype=torch.float32, reduce=request.param
    ) as made:
        yield made


def inputs(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(T, H, requires_grad=requires_grad)
    topk_idx = torch.tensor([[0, 3], [1, 2], [-1, 2], [3, 3], [-1, -1]])
    return x, topk_idx, torch.rand(T, K, requires_grad=requires_grad)


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("weighted", [True, False])
def test_operators_pass_opcheck(buffer: moecomm.Buffer, layout: str, weighted: bool) -> None:
    if layout == "rank" and buffer.config.reduce == "source":
        pytest.skip('layout "rank" needs reduce="rank"')
    x, topk_idx, weights = inputs()
    given = weights if weighted else None
    args = (buffer._id, layout, 1)
    torch.library.opcheck(torch.ops.moecomm.dispatch.default, (x, None, topk_idx, given, *args, -1))
    handle = buffer.dispatch(x.detach(), topk_idx, weights.detach(), layout=layout).handle
    tensors = [tensor.detach() for tensor in handle.tensors()]
    torch.library.opcheck(torch.ops.moecomm.replay.default, (x, None, given, tensors, *args, -1))
    rows = torch.randn(len(handle.row_weights), H, requires_grad=True)
    row_weights = handle.row_weights.clone().requires_grad_() if layout == "expert" and weighted else None
    bias = torch.randn(T, H, requires_grad=True)
    torch.library.opcheck(torch.ops.moecomm.combine.default, (rows, row_weights, bias, tensors, *args, -1))
    grad_weights = handle.row_weights if weighted else None
    torch.library.opcheck(torch.ops.moecomm.collect.default, (rows.detach(), grad_weights, tensors, *args))


def test_gradients_are_those_of_the_formula(buffer: moecomm.Buffer) -> None:
    x, topk_idx, weights = inputs()
    bias = torch.randn(T, H, requires_grad=True)
    out = buffer.dispatch(x, topk_idx, weights)
    y = buffer.combine(out.x.square(), out.handle, bias=bias)
    upstream = torch.randn(T, H)
    y.backward(upstream)

    x2, weights2 = (t.detach().double().requires_grad_() for t in (x, weights))
    total = (weights2 * (topk_idx >= 0)).sum(1, keepdim=True)
    (x2.square() * total).backward(upstream.double())
    for got, exact in ((x.grad, x2.grad), (weights.grad, weights2.grad)):
        assert exact is not None
        torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-5)
    assert bias.grad is not None and torch.equal(bias.grad, upstream)


def test_a_bias_may_be_wider_than_the_rows() -> None:
    """It is added before the sum is rounded, so two biases summed in float32 cost no rounding of their own."""
    with moecomm.Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=2) as buffer:
        out = buffer.dispatch(torch.full((1, 1), 1.0, dtype=torch.bfloat16), torch.tensor([[0]]))
        bias = torch.tensor([[2.0**-8 + 2.0**-20]], requires_grad=True)  # rounded on its own it would tie to even
        y = buffer.combine(out.x, out.handle, bias=bias)
        assert y.item() == 1 + 2.0**-7
        y.backward(torch.ones_like(y))
        assert bias.grad is not None and bias.grad.dtype == torch.float32


def test_what_lies_beside_a_row_may_be_wider_than_the_row() -> None:
    x, beside = torch.ones(2, 1, dtype=torch.bfloat16), torch.arange(20.0).view(2, 10)
    options: dict[str, Any] = {"num_experts": 1, "hidden": 1, "top_k": 1, "max_tokens_per_rank": 2}
    with moecomm.Buffer(**options, beside_bytes=40) as buffer:
        assert torch.equal(buffer.dispatch((x, beside), torch.zeros(2, 1, dtype=torch.int64)).x[1], beside)
    with moecomm.Buffer(**options) as buffer, pytest.raises(moecomm.CapacityError, match="more beside_bytes"):
        buffer.dispatch((x, beside), torch.zeros(2, 1, dtype=torch.int64))


def test_row_weights_carry_the_gradient_when_the_caller_applies_them(buffer: moecomm.Buffer) -> None:
    grads = []
    for weighted in (True, False):
        torch.manual_seed(0)
        x, topk_idx, weights = inputs()
        out = buffer.dispatch(x, topk_idx, weights)
        assert out.row_weights is not None
        rows = out.x if weighted else out.x * out.row_weights[:, None]
        buffer.combine(rows, out.handle, weighted=weighted).square().sum().backward()
        grads.append((x.grad, weights.grad))
    for with_library, by_hand in zip(*grads, strict=True):
        torch.testing.assert_close(with_library, by_hand, rtol=1e-5, atol=1e-6)


def test_checkpointing_gives_the_same_gradients(buffer: moecomm.Buffer) -> None:
    def layer(x: Tensor, weights: Tensor, topk_idx: Tensor) -> Tensor:
        out = buffer.dispatch(x, topk_idx, weights)
        return buffer.combine(out.x.sin(), out.handle)

    grads = []
    for recompute in (False, True):
        torch.manual_seed(1)
        x, topk_idx, weights = inputs()
        y = checkpoint(layer, x, weights, topk_idx, use_reentrant=False) if recompute else layer(x, weights, topk_idx)
        y.square().sum().backward()
        grads.append((x.grad, weights.grad))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_handle_is_a_pytree_of_tensors(buffer: moecomm.Buffer) -> None:
    x, topk_idx, weights = inputs(requires_grad=False)
    out = buffer.dispatch(x, topk_idx, weights)
    leaves, spec = pytree.tree_flatten(out.handle)
    assert len(leaves) == len(HANDLE_TENSORS) and all(isinstance(leaf, Tensor) for leaf in leaves)
    moved = pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
    assert torch.equal(buffer.combine(out.x, moved), buffer.combine(out.x, out.handle))
    leaves, spec = pytree.tree_flatten(out)
    assert torch.equal(pytree.tree_unflatten(leaves, spec).x, out.x)


def test_a_replay_with_new_weights_uses_them(buffer: moecomm.Buffer) -> None:
    x, topk_idx, weights = inputs(requires_grad=False)
    first = buffer.dispatch(x, topk_idx, weights)
    new = torch.rand(T, K, requires_grad=True)
    second = buffer.dispatch(x, topk_weights=new, handle=first.handle)
    fresh = buffer.dispatch(x, topk_idx, new)
    y = buffer.combine(second.x, second.handle)
    assert torch.equal(y, buffer.combine(fresh.x, fresh.handle))
    y.sum().backward()
    torch.testing.assert_close(new.grad, x.sum(1, keepdim=True) * (topk_idx >= 0), rtol=1e-5, atol=1e-6)
    kept = buffer.combine(first.x, replace(first.handle))
    assert torch.equal(kept, buffer.combine(first.x, first.handle))


def test_async_twins_are_differentiable(buffer: moecomm.Buffer) -> None:
    grads = []
    for later in (False, True):
        torch.manual_seed(2)
        x, topk_idx, weights = inputs()
        out = buffer.dispatch_async(x, topk_idx, weights).wait() if later else buffer.dispatch(x, topk_idx, weights)
        rows = out.x * 3
        y = buffer.combine_async(rows, out.handle).wait() if later else buffer.combine(rows, out.handle)
        y.square().sum().backward()
        grads.append((y.detach(), x.grad, weights.grad))
    for now, then in zip(*grads, strict=True):
        assert now is not None and then is not None and torch.equal(now, then)


def test_a_tensor_without_memory_is_refused_and_the_buffer_works_on(buffer: moecomm.Buffer) -> None:
    """Its operator refuses it; machine code would read whatever lies at address 0."""
    x, topk_idx, _ = inputs(requires_grad=False)
    out = buffer.dispatch(x, topk_idx)
    mode = FakeTensorMode()
    fake_x, fake_rows = mode.from_tensor(x), mode.from_tensor(out.x)
    calls: list[Callable[[], object]] = [
        lambda: buffer.dispatch(fake_x, topk_idx),
        lambda: buffer.dispatch_async(fake_x, topk_idx).wait(),
        lambda: buffer.dispatch_async(fake_x, handle=out.handle).wait(),
        lambda: buffer.combine(fake_rows, out.handle),
        lambda: buffer.combine_async(fake_rows, out.handle).wait(),
    ]
    for call in calls:
        with pytest.raises(AssertionError, match="FakeTensor"):
            call()
    with moecomm.Buffer(num_experts=E, hidden=H, top_k=K, max_tokens_per_rank=8, dtype=torch.float64) as wide:
        scales = torch.ones(T)
        with pytest.raises(AssertionError, match="FakeTensor"):
            wide.dispatch((x, mode.from_tensor(scales)), topk_idx)
        assert torch.equal(wide.dispatch((x, scales), topk_idx).x[0], out.x)
    assert torch.equal(buffer.dispatch(x, topk_idx).x, out.x)
