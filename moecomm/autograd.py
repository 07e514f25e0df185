"""Dispatch and combine as differentiable custom operators: the backward of each is the other.

The operators take tensors, numbers and the id of a buffer, so that they can be traced; sizes that depend on the
routing of other ranks are dynamic. An operation that was started before (`started` >= 0) is only finished here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moecomm._operator import operator
from moecomm.blocks import empty_rows
from moecomm.core import Core
from moecomm.errors import StaleHandleError
from moecomm.handle import HANDLE_TENSORS, Dispatched, DispatchHandle
from moecomm.operations import (
    Homecoming,
    Planned,
    groups_of,
    start_combine,
    start_dispatch,
    start_replay,
)
from moecomm.rows import scale_rows_grad

CORES: WeakValueDictionary[int, Core] = WeakValueDictionary()


def core_of(buffer_id: int) -> Core:
    """The buffer that an operator belongs to."""
    try:
        return CORES[buffer_id]
    except KeyError:
        what = "the buffer of this operation is gone"
        raise StaleHandleError(what, remedy="keep the Buffer until backward is done") from None


def _run(core: Core, started: int, start: Any) -> Any:
    with core.guarded():
        return (core.started.pop(started) if started >= 0 else start())()


def nobody_watches(*tensors: Tensor | None) -> bool:
    """Whether an operation may skip its operator: no gradient is recorded, and nothing traces or intercepts.

    The layers around an operator cost more than the planning of a few tokens (docs/design/latency.md).

    >>> nobody_watches(torch.zeros(1), None), nobody_watches(torch.zeros(1, requires_grad=True))
    (True, False)
    """
    if torch._C._len_torch_function_stack() or not can_start(*tensors):
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (type(t) in _PLAIN and not (grad and t.requires_grad)) for t in tensors)


def can_start(*tensors: Tensor | None) -> bool:
    """Whether an operation may start outside its operator: nothing traces it, and all tensors have their own memory.

    >>> can_start(torch.zeros(1, requires_grad=True), None)
    True
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def _handle(tensors: Sequence[Tensor], layout: str, align: int, buffer_id: int) -> DispatchHandle:
    named = dict(zip(HANDLE_TENSORS, tensors, strict=True))
    return DispatchHandle(**named, layout=layout, align=align, buffer_id=buffer_id)


def _payloads(x: Tensor, scales: Tensor | None) -> list[Tensor]:
    return [x] if scales is None else [x, scales]


# -- dispatch ----------------------------------------------------------------------------------------------------


def dispatch_now(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer_id: int,
    layout: str,
    align: int,
    started: int,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """Send rows to their experts.

    Gives rows, scales (empty without), weights, expert_offsets, tokens_per_expert, then send_order, send_slots,
    send_pos, pair_tokens, pair_pos, recv_table, recv_keys, expert_counts and pair_counts of the handle.
    """
    core = core_of(buffer_id)
    planned: Planned = _run(
        core, started, lambda: start_dispatch(core, _payloads(x, scales), topk_idx, topk_weights, layout, align)
    )
    arrived, route, plan = planned.arrived, planned.route, planned.plan
    assert arrived.table is not None and arrived.keys is not None
    weights = arrived.weights
    if weights is None:
        weights = _unit_weights(planned, layout)
    if route is not None and route.slots_S is not None:
        slots = route.slots_S
    else:
        slots = plan.order_S.new_empty(0, dtype=torch.int32)
    small, held = _count_tensors(planned, x.device)
    scales_out = x.new_empty(0) if arrived.scales is None else arrived.scales
    sent = [plan.order_S, slots, plan.pos_TK, plan.pair_tokens_Q, plan.pair_pos_TW]
    return (arrived.rows, scales_out, weights, *small, *sent, arrived.table, arrived.keys, *held)  # type: ignore[return-value]


def _count_tensors(planned: Planned, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """What a dispatch says of its counts, and what its handle keeps of them."""
    groups = planned.groups
    if groups is not None:
        small = [part.clone() for part in groups.unbind()]
        if planned.route is None:
            return small, [groups, groups.new_empty(0)]
    assert planned.route is not None, "without a route the device knows the groups"
    counts = planned.route.counts
    if groups is None:
        small = [torch.from_numpy(a).to(device) for a in (counts.expert_offsets, counts.tokens_per_expert)]
    return small, [torch.from_numpy(counts.expert_counts.copy()), torch.from_numpy(counts.pair_counts.copy())]


def _unit_weights(planned: Planned, layout: str) -> Tensor:
    """Weight 1 for every entry, 0 where there is none."""
    arrived, route = planned.arrived, planned.route
    assert arrived.table is not None and route is not None
    if layout == "rank":
        return (arrived.table >= 0).float()
    weights = torch.ones(arrived.rows.shape[0], dtype=torch.float32, device=arrived.rows.device)
    weights[torch.from_numpy(route.counts.padding_rows()).to(weights.device)] = 0
    return weights


operator(dispatch_now)


@torch.library.register_fake("moecomm::dispatch")
def _(
    x: Any, scales: Any, topk_idx: Any, topk_weights: Any, buffer_id: Any, layout: Any, align: Any, started: Any
) -> Any:
    (tables, size, rank), fused = _facts(buffer_id), core_of(buffer_id).fused
    num_tokens, top_k = topk_idx.shape
    num_experts = tables.placement.num_experts
    num_local = tables.placement.experts_per_rank[rank]
    by_entry, i32, host = layout == "expert", {"dtype": torch.int32}, {"dtype": torch.int32, "device": "cpu"}
    sizes = None if fused is None else fused.static_sizes(layout)
    num_rows: Any
    num_sent: Any
    num_pairs: Any
    if sizes is None:
        context = torch.library.get_ctx()
        num_rows, num_sent, num_pairs = (context.new_dynamic_size() for _ in range(3))
        num_received = context.new_dynamic_size() if by_entry else num_rows
        counts = [x.new_empty(size, num_experts, **host), x.new_empty(size, size, **host)]
    else:
        num_rows, num_received = sizes
        num_sent, num_pairs = 0, 0
        counts = [x.new_empty(2, num_local, **i32), x.new_empty(0, **i32)]
    return (
        x.new_empty(num_rows, x.shape[1]),
        x.new_empty(0) if scales is None else scales.new_empty(num_rows, *scales.shape[1:]),
        x.new_empty((num_rows,) if by_entry else (num_rows, top_k), dtype=torch.float32),
        x.new_empty(num_local, **i32),
        x.new_empty(num_local, **i32),
        x.new_empty(num_sent, dtype=torch.int64),
        x.new_empty(num_sent if by_entry else 0, **i32),
        x.new_empty(num_tokens, top_k, **i32),
        x.new_empty(num_pairs, dtype=torch.int64),
        x.new_empty(num_tokens, size, **i32),
        x.new_empty(num_received, top_k, **i32),
        x.new_empty(core_of(buffer_id).keys_per_pair * num_received, **i32),
        *counts,
    )


def _facts(buffer_id: int) -> tuple[Any, int, int]:
    core = core_of(buffer_id)
    return core.tables, core.transport.group.size, core.rank


def _dispatch_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, topk_idx, topk_weights, ctx.buffer_id, ctx.layout, ctx.align, _ = inputs
    weights = topk_idx.new_empty(0, dtype=torch.float32) if topk_weights is None else topk_weights
    ctx.save_for_backward(topk_idx, weights, *output[5:12], output[2], *output[12:])


def _dispatch_backward(ctx: Any, *grads: Any) -> Any:
    needs_x, _, _, needs_weights = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors
    grad_x, grad_weights = torch.ops.moecomm.collect(
        grads[0] if needs_x else None, grads[2] if needs_weights else None, saved, ctx.buffer_id, ctx.layout, ctx.align
    )
    outs = (grad_x if needs_x else None, None, None, grad_weights if needs_weights else None)
    return (*outs, None, None, None, None)


torch.library.register_autograd("moecomm::dispatch", _dispatch_backward, setup_context=_dispatch_setup)


def replay_now(
    x: Tensor,
    scales: Tensor | None,
    topk_weights: Tensor | None,
    handle: Sequence[Tensor],
    buffer_id: int,
    layout: str,
    align: int,
    started: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Send rows along a planned routing: rows, scales (empty without), weights (empty if none were given)."""
    core = core_of(buffer_id)
    planned = _handle(handle, layout, align, buffer_id)
    arrived = _run(core, started, lambda: start_replay(core, _payloads(x, scales), topk_weights, planned))
    empty = x.new_empty(0)
    weights = x.new_empty(0, dtype=torch.float32) if arrived.weights is None else arrived.weights
    return arrived.rows, empty if arrived.scales is None else arrived.scales, weights


operator(replay_now)


@torch.library.register_fake("moecomm::replay")
def _(
    x: Any, scales: Any, topk_weights: Any, handle: Any, buffer_id: Any, layout: Any, align: Any, started: Any
) -> Any:
    row_weights = _handle(handle, layout, align, buffer_id).row_weights
    num_rows = row_weights.shape[0]
    return (
        x.new_empty(num_rows, *x.shape[1:]),
        x.new_empty(0) if scales is None else scales.new_empty(num_rows, *scales.shape[1:]),
        x.new_empty(0, dtype=torch.float32) if topk_weights is None else row_weights.new_empty(row_weights.shape),
    )


def _replay_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, handle, ctx.buffer_id, ctx.layout, ctx.align, _ = inputs
    ctx.save_for_backward(*handle)


def _replay_backward(ctx: Any, *grads: Any) -> Any:
    needs_x, _, needs_weights = ctx.needs_input_grad[:3]
    grad_x, grad_weights = torch.ops.moecomm.collect(
        grads[0] if needs_x else None,
        grads[2] if needs_weights else None,
        ctx.saved_tensors,
        ctx.buffer_id,
        ctx.layout,
        ctx.align,
    )
    outs = (grad_x if needs_x else None, None, grad_weights if needs_weights else None)
    return (*outs, [None] * len(HANDLE_TENSORS), None, None, None, None)


torch.library.register_autograd("moecomm::replay", _replay_backward, setup_context=_replay_setup)


@operator
def collect(
    grad_rows: Tensor | None,
    grad_weights: Tensor | None,
    handle: Sequence[Tensor],
    buffer_id: int,
    layout: str,
    align: int,
) -> tuple[Tensor, Tensor]:
    """Lead the gradients of rows and weights home: (T, H) and (T, K), empty for what is None."""
    core = core_of(buffer_id)
    planned = _handle(handle, layout, align, buffer_id)
    rows = None if grad_rows is None else grad_rows.contiguous()
    carried = None if grad_weights is None else grad_weights.float().contiguous()
    home = Homecoming(rows=rows, carried=carried)
    summed, came = _run(core, -1, lambda: start_combine(core, home, planned))
    empty = planned.topk_weights.new_empty(0)
    return (
        empty.to(core.dtype) if summed is None else summed,
        empty.clone() if came is None else came,
    )


@torch.library.register_fake("moecomm::collect")
def _(grad_rows: Any, grad_weights: Any, handle: Any, buffer_id: Any, layout: Any, align: Any) -> Any:
    topk_idx = handle[HANDLE_TENSORS.index("topk_idx")]
    dtype = core_of(buffer_id).dtype
    return (
        topk_idx.new_empty(0, dtype=dtype)
        if grad_rows is None
        else grad_rows.new_empty(len(topk_idx), grad_rows.shape[1]),
        topk_idx.new_empty(topk_idx.shape if grad_weights is not None else (0,), dtype=torch.float32),
    )


# -- combine -----------------------------------------------------------------------------------------------------


@operator
def combine(
    rows: Tensor,
    row_weights: Tensor | None,
    bias: Tensor | None,
    handle: Sequence[Tensor],
    buffer_id: int,
    layout: str,
    align: int,
    started: int,
) -> Tensor:
    """Lead rows home and sum them per token; `row_weights` is the handle's, given apart for its gradient."""
    core = core_of(buffer_id)
    home = Homecoming(rows=rows.contiguous(), weighted=row_weights is not None, bias=bias)
    planned = _handle(handle, layout, align, buffer_id)
    return _run(core, started, lambda: start_combine(core, home, planned))[0]


@torch.library.register_fake("moecomm::combine")
def _(
    rows: Any, row_weights: Any, bias: Any, handle: Any, buffer_id: Any, layout: Any, align: Any, started: Any
) -> Any:
    return rows.new_empty(handle[HANDLE_TENSORS.index("topk_idx")].shape[0], rows.shape[1])


def _combine_setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, row_weights, bias, handle, ctx.buffer_id, ctx.layout, ctx.align, _ = inputs
    ctx.weighted = row_weights is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The rows are kept for the gradient of the weights only.
    kept = () if row_weights is None else (row_weights, rows) if row_weights.requires_grad else (row_weights,)
    ctx.save_for_backward(*handle, *kept)


def _combine_backward(ctx: Any, grad: Tensor) -> Any:
    needs_rows, needs_weights, needs_bias = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors  # once: checkpointing recomputes at the first access and refuses a second one
    handle, kept = saved[: len(HANDLE_TENSORS)], saved[len(HANDLE_TENSORS) :]
    grad_rows = grad_weights = None
    if needs_rows or needs_weights:
        grad_rows = torch.ops.moecomm.replay(
            grad.contiguous(), None, None, handle, ctx.buffer_id, ctx.layout, ctx.align, -1
        )[0]
    if ctx.weighted and grad_rows is not None:
        grad_rows, grad_weights = torch.ops.moecomm.scale_grad(grad_rows, *kept, *[None] * (2 - len(kept)))
    grad_bias = grad.to(ctx.bias_dtype) if needs_bias else None
    outs = (grad_rows if needs_rows else None, grad_weights if needs_weights else None, grad_bias)
    return (*outs, [None] * len(HANDLE_TENSORS), None, None, None, None)


torch.library.register_autograd("moecomm::combine", _combine_backward, setup_context=_combine_setup)


@operator
def scale_grad(grad: Tensor, weights: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `weights[:, None] * rows`; without rows that of the weights is empty."""
    grad_rows = empty_rows(len(grad), grad.shape[1], grad.dtype, grad.device)
    grad_weights = weights.new_empty(0) if rows is None else torch.empty_like(weights)
    given = grad if rows is None else rows.contiguous()
    scale_rows_grad(grad_rows, None if rows is None else grad_weights, grad, given, weights)
    return grad_rows, grad_weights


@torch.library.register_fake("moecomm::scale_grad")
def _(grad: Any, weights: Any, rows: Any) -> Any:
    return torch.empty_like(grad), weights.new_empty(0) if rows is None else torch.empty_like(weights)


# -- what the operators give, as the caller gets it -----------------------------------------------------------------


def dispatched(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer_id: int,
    layout: str,
    align: int,
    started: int,
) -> Dispatched:
    """Run (or finish) a dispatch and put its tensors where they belong."""
    args = (x, scales, topk_idx, topk_weights, buffer_id, layout, align, started)
    run = dispatch_now if nobody_watches(x, scales, topk_idx, topk_weights) else torch.ops.moecomm.dispatch
    rows, scales_out, weights, offsets, per_expert, *led = run(*args)
    # Copies: the caller may write his next routing into the same memory.
    if topk_weights is None:
        kept = torch.ones(topk_idx.shape, dtype=torch.float32, device=topk_idx.device)
    else:
        kept = topk_weights.detach().clone()
    handle = _handle([topk_idx.clone(), kept, *led[:7], weights, *led[7:]], layout, align, buffer_id)
    return _arrange(rows, None if scales is None else scales_out, offsets, per_expert, handle)


def replayed(
    x: Tensor, scales: Tensor | None, topk_weights: Tensor | None, handle: DispatchHandle, started: int
) -> Dispatched:
    """Run (or finish) a replay; with new weights it gives a handle that has them."""
    args = (x, scales, topk_weights, handle.tensors(), handle.buffer_id, handle.layout, handle.align, started)
    run = replay_now if nobody_watches(x, scales, topk_weights) else torch.ops.moecomm.replay
    rows, scales_out, weights = run(*args)
    if topk_weights is not None:
        handle = replace(handle, topk_weights=topk_weights.detach().clone(), row_weights=weights)
    offsets, per_expert = groups_of(core_of(handle.buffer_id), handle, x.device)
    return _arrange(rows, None if scales is None else scales_out, offsets, per_expert, handle)


def combined(rows: Tensor, home: Homecoming, handle: DispatchHandle, started: int) -> Tensor:
    """Run (or finish) a combine of rows, those of `home`."""
    row_weights, bias = handle.row_weights if home.weighted else None, home.bias
    if home.quant is not None or nobody_watches(rows, row_weights, bias):
        core = core_of(handle.buffer_id)
        return _run(core, started, lambda: start_combine(core, home, handle))[0]
    args = (rows, row_weights, bias, handle.tensors(), handle.buffer_id, handle.layout, handle.align, started)
    return torch.ops.moecomm.combine(*args)


def _arrange(
    rows: Tensor, scales: Tensor | None, offsets: Tensor, per_expert: Tensor, handle: DispatchHandle
) -> Dispatched:
    by_entry = handle.layout == "expert"
    return Dispatched(
        x=rows if scales is None else (rows, scales),
        expert_offsets=offsets if by_entry else None,
        tokens_per_expert=per_expert,
        row_weights=handle.row_weights if by_entry else None,
        topk_idx=None if by_entry else handle.recv_table.to(handle.topk_idx.dtype),
        topk_weights=None if by_entry else handle.row_weights,
        handle=handle,
    )
