"""How Megatron-Core and torchtitan train on these APIs: calls inside autograd functions, handles used again and again.

Written from notes of what they call and read; experts here scale rows by a vector of their own, in float32. Every rank
compares with the same computation on one process: outputs, gradients of rows, of routing weights and of experts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from moecomm import deep_ep
from moecomm.deep_ep.hybrid_ep_buffer import indices_to_map
from moecomm.deep_ep.utils import EventHandle, EventOverlap
from moecomm.integrations.torchtitan import MoecommTokenDispatcher
from moecomm.testing import RankPool
from tests.deep_ep._world import World, world

MAX, E, H, K = 12, 10, 24, 3


def scales_of(num_experts: int = E, hidden: int = H) -> Tensor:
    """(E, H) what each expert multiplies rows by."""
    return torch.randn(num_experts, hidden, generator=torch.Generator().manual_seed(99))


def reference(given: World, scale: Tensor) -> list[Tensor]:
    """Outputs, then gradients of x and weights of every rank, then of the experts, on one process."""
    scale = scale.clone().requires_grad_()
    xs, ws = ([t.clone().requires_grad_() for t in part] for part in (given.x, given.weights))
    outs = []
    for x, idx, w in zip(xs, given.idx, ws, strict=True):
        factor = scale[idx.clamp(min=0)] * (w * (idx >= 0))[..., None]
        outs.append((factor * x[:, None]).sum(1))
    sum((out.sin()).sum() for out in outs).backward()  # type: ignore[union-attr]
    grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in (*xs, *ws)]
    return [*(out.detach() for out in outs), *grads, scale.grad]  # type: ignore[list-item]


def compare(rank: int, given: World, out: Tensor, x: Tensor, w: Tensor, mine: Tensor) -> None:
    expected = reference(given, scales_of())
    held = given.held(rank)
    got = (out.detach(), x.grad, w.grad, mine.grad)
    want = (expected[rank], expected[4 + rank], expected[8 + rank], expected[12][held.start : held.stop])
    for name, a, b in zip(("outputs", "grad of x", "grad of weights", "grad of experts"), got, want, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def leaves(rank: int, given: World) -> tuple[Tensor, Tensor, Tensor]:
    held = given.held(rank)
    mine = scales_of()[held.start : held.stop].clone().requires_grad_()
    return given.x[rank].clone().requires_grad_(), given.weights[rank].clone().requires_grad_(), mine


# -- Megatron-Core: Buffer -----------------------------------------------------------------------------------------


class Dispatch(torch.autograd.Function):
    """A dispatch whose backward is a combine that carries the gradients of the routing weights too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, weights: Tensor, num_experts: int, buffer: Any) -> Any:
        streams = {"async_finish": True, "allocate_on_comm_stream": True}
        event = EventOverlap(EventHandle())
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            idx, num_experts, previous_event=event, **streams
        )
        recv, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            **streams,
        )
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return recv, recv_idx, recv_weights, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _idx: Any, grad_weights: Tensor, _counts: Any, _handle: Any) -> Any:
        grad_x, grad_probs, event = ctx.buffer.combine(
            grad.contiguous(),
            ctx.handle,
            topk_weights=grad_weights.float(),
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return grad_x, None, grad_probs, None, None


class Combine(torch.autograd.Function):
    """A combine whose backward is a dispatch with the same handle."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, buffer: Any) -> Any:
        ctx.buffer, ctx.handle = buffer, handle
        previous = EventOverlap(EventHandle())
        out, _, event = buffer.combine(
            rows, handle=handle, async_finish=True, previous_event=previous, allocate_on_comm_stream=True
        )
        event.current_stream_wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_rows, *_, event = ctx.buffer.dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return grad_rows, None, None


def apply_choices(recv: Tensor, idx: Tensor, weights: Tensor, mine: Tensor) -> Tensor:
    """What the local experts make of rows that stand for several of them."""
    factor = mine[idx.clamp(min=0)] * (weights * (idx >= 0))[..., None]
    return (factor * recv[:, None]).sum(1)


def megatron(rank: int) -> None:
    group = torch.distributed.group.WORLD
    hidden_bytes, size = H * 4, 4
    nvl = rdma = 0
    for config in (deep_ep.Buffer.get_dispatch_config(size), deep_ep.Buffer.get_combine_config(size)):
        nvl = max(config.get_nvl_buffer_size_hint(hidden_bytes, size), nvl)
        rdma = max(config.get_rdma_buffer_size_hint(hidden_bytes, size), rdma)
    deep_ep.Buffer.set_num_sms(20)
    buffer = deep_ep.Buffer(group, nvl, rdma)
    assert buffer.group == group and (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (nvl, rdma)
    for seed, tokens in enumerate([(5, 0, 9, 3), (0, 0, 1, 0), (17, 6, 0, 30)]):
        given = world(tokens=tokens, seed=seed)
        x, w, mine = leaves(rank, given)
        recv, recv_idx, recv_weights, counts, handle = Dispatch.apply(x, given.idx[rank], w, E, buffer)
        assert counts.sum() == (recv_idx >= 0).sum()
        out = Combine.apply(apply_choices(recv, recv_idx, recv_weights, mine), handle, buffer)
        out.sin().sum().backward()
        compare(rank, given, out, x, w, mine)


def test_megatron_trains_through_a_buffer(ranks: RankPool) -> None:
    ranks.run(megatron)


# -- Megatron-Core, torchtitan: HybridEPBuffer ----------------------------------------------------------------------


class HybridDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing_map: Tensor, probs: Tensor, num_local: int, buffer: Any) -> Any:
        hidden, row_probs, scaling, counts, handle = buffer.dispatch_with_permute(
            hidden=x,
            routing_map=routing_map,
            probs=probs,
            scaling_factor=None,
            num_of_experts_per_rank=num_local,
            pad_multiple=4,
            num_permuted_tokens=None,
            non_blocking=False,
        )
        assert scaling is None
        ctx.buffer, ctx.handle = buffer, handle
        return hidden, row_probs, counts, handle

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_probs: Tensor, _counts: Any, _handle: Any) -> Any:
        grad_x, grad_map = ctx.buffer.combine_with_unpermute(
            hidden=grad.contiguous(), probs=grad_probs, handle=ctx.handle, pad_multiple=4
        )
        return grad_x, None, grad_map, None, None


class HybridCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, buffer: Any) -> Any:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine_with_unpermute(hidden=rows, handle=handle, pad_multiple=4)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, *_ = ctx.buffer.dispatch_with_permute(
            hidden=grad.contiguous(), scaling_factor=None, handle=ctx.handle, pad_multiple=4, num_permuted_tokens=None
        )
        return rows, None, None


def hybrid(rank: int) -> None:
    given = world()
    num_local = len(given.held(rank))
    buffer = deep_ep.HybridEPBuffer(
        group=torch.distributed.group.WORLD,
        hidden_dim=H,
        max_num_of_tokens_per_rank=MAX,
        num_local_experts=num_local,
        use_fp8=False,
        num_sms_dispatch_api=16,
        num_blocks_permute=8,
    )
    known = inspect.signature(deep_ep.HybridEPBuffer.dispatch_with_permute).parameters
    assert {"fuse_permute_dispatch", "non_blocking", "num_permuted_tokens"} <= set(known)
    x, w, mine = leaves(rank, given)
    routing_map, _ = indices_to_map(given.idx[rank], w, len(x), E)
    column = torch.where(given.idx[rank] < 0, E, given.idx[rank])
    probs = torch.zeros(len(x), E + 1).scatter(1, column, w)[:, :E]
    hidden, row_probs, counts, handle = HybridDispatch.apply(x, routing_map, probs, num_local, buffer)
    assert not (counts % 4).any() and int(counts.sum()) == len(hidden)
    of_row = torch.repeat_interleave(torch.arange(num_local), counts)
    out = HybridCombine.apply(hidden * mine[of_row] * row_probs[:, None], handle, buffer)
    out.sin().sum().backward()
    compare(rank, given, out, x, w, mine)


def test_training_through_a_hybrid_buffer(ranks: RankPool) -> None:
    ranks.run(hybrid)


# -- torchtitan: ElasticBuffer --------------------------------------------------------------------------------------


class ElasticDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, weights: Tensor, num_sms: int, buffer: Any) -> Any:
        recv, none, recv_weights, handle, event = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_experts=E,
            num_max_tokens_per_rank=MAX,
            num_sms=num_sms,
            do_expand=True,
            do_cpu_sync=True,
        )
        assert none is None and event.event is None and handle.num_sms == num_sms
        ctx.buffer, ctx.handle = buffer, handle
        return recv, recv_weights, handle

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_weights: Tensor, _handle: Any) -> Any:
        grad_x, grad_w, _ = ctx.buffer.combine(grad.contiguous(), handle=ctx.handle, topk_weights=grad_weights)
        return grad_x, None, grad_w, None, None


class ElasticCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, buffer: Any) -> Any:
        ctx.buffer, ctx.handle = buffer, handle
        out, none, event = buffer.combine(rows, handle=handle, topk_weights=None, async_with_compute_stream=True)
        assert none is None and event.event is not None
        event.current_stream_wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        handle = ctx.handle
        rows, *_ = ctx.buffer.dispatch(grad.contiguous(), handle=handle, num_sms=handle.num_sms, do_cpu_sync=False)
        return rows, None, None


def torchtitan(rank: int) -> None:
    group = torch.distributed.group.WORLD
    num_bytes = deep_ep.ElasticBuffer.get_buffer_size_hint(group, MAX, H, num_topk=K, use_fp8_dispatch=False)
    buffer = deep_ep.ElasticBuffer(
        group,
        num_bytes=num_bytes,
        num_max_tokens_per_rank=MAX,
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=False,
        deterministic=True,
        explicitly_destroy=True,
    )
    assert buffer.group == group and (buffer.num_bytes, buffer.num_max_tokens_per_rank) == (num_bytes, MAX)
    given = world()
    x, w, mine = leaves(rank, given)
    recv, recv_weights, handle = ElasticDispatch.apply(
        x, given.idx[rank], w, buffer.get_theoretical_num_sms(E, K), buffer
    )
    counts = handle.num_recv_tokens_per_expert_list
    assert handle.psum_num_recv_tokens_per_expert.tolist() == torch.tensor(counts).cumsum(0).tolist()
    of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    out = ElasticCombine.apply(recv * mine[of_row] * recv_weights[:, None], handle, buffer)
    out.sin().sum().backward()
    compare(rank, given, out, x, w, mine)
    buffer.destroy()


def test_torchtitan_trains_through_an_elastic_buffer(ranks: RankPool) -> None:
    ranks.run(torchtitan)


def native(rank: int) -> None:
    """The dispatcher of `moecomm.integrations.torchtitan` in the place of theirs."""
    mesh = torch.distributed.init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    given = world()
    config = MoecommTokenDispatcher.Config(num_experts=E, top_k=K, max_tokens_per_rank=MAX, align=8)
    dispatcher = config.build()
    dispatcher.wire_meshes(ep_mesh=mesh, tp_mesh=None)
    x, w, mine = leaves(rank, given)
    local_counts = torch.bincount(given.idx[rank].flatten() + 1, minlength=E + 1)[1:]
    rows, counts, metadata = dispatcher.dispatch(x, w, given.idx[rank], local_counts)
    assert len(rows) == int(counts.sum()) and not (counts % 8).any()
    of_row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    out = dispatcher.combine(rows * mine[of_row], metadata, x)
    out.sin().sum().backward()
    compare(rank, given, out, x, w, mine)


def test_torchtitan_with_a_dispatcher_of_its_own(ranks: RankPool) -> None:
    ranks.run(native)
