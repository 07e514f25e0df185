"""Layout "padded" as operators of torch, for `torch.compile(fullgraph=True)`: static shapes, nothing to ask the host.

An operator's results are the compiler's to use again, so rows are copied out of the memory of the buffer, those that
arrived and no others; everything else is as in `moecomm.padded`. No gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecomm._operator import operator
from moecomm.autograd import core_of
from moecomm.errors import UnsupportedError
from moecomm.handle import Dispatched, PaddedHandle

_TRACED = -2  # number of a handle made while tracing: what it is in truth, its `sequence` says


@operator
def padded_dispatch(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, buffer_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dispatch: rows, rows per expert, ranges, then topk_idx, topk_weights, places and number of the handle."""
    padded = core_of(buffer_id).padded
    with torch.no_grad():
        rows = torch.empty(padded.shape, dtype=x.dtype, device=x.device)
        out = padded.dispatch(x, topk_idx, topk_weights, None, None, rows).wait()
        handle, small = out.handle, [out.tokens_per_expert, out.ranges]
        small += [handle.topk_idx, handle.topk_weights, handle.places]
        return (rows, *(part.clone() for part in small), torch.tensor(handle.number))


@torch.library.register_fake("moecomm::padded_dispatch")
def _(x: Any, topk_idx: Any, topk_weights: Any, buffer_id: Any) -> Any:
    core = core_of(buffer_id)
    local, rows, hidden = core.padded.shape
    return (
        x.new_empty(local, rows, hidden),
        x.new_empty(local, dtype=torch.int32),
        x.new_empty(local, core.tables.placement.num_ranks, 2, dtype=torch.int32),
        x.new_empty(topk_idx.shape, dtype=torch.int64),
        x.new_empty(topk_idx.shape, dtype=torch.float32),
        x.new_empty(topk_idx.shape, dtype=torch.int32),
        torch.empty((), dtype=torch.int64),
    )


@operator
def padded_combine(
    rows: Tensor, handle: Sequence[Tensor], bias: Tensor | None, weighted: bool, buffer_id: int
) -> Tensor:
    """Combine: (T, H)."""
    padded = core_of(buffer_id).padded
    idx, weights, places, number = handle
    led = PaddedHandle(topk_idx=idx, topk_weights=weights, places=places, number=int(number), buffer_id=buffer_id)
    with torch.no_grad():
        return padded.combine(rows, led, weighted, bias, None, None).wait()


@torch.library.register_fake("moecomm::padded_combine")
def _(rows: Any, handle: Any, bias: Any, weighted: Any, buffer_id: Any) -> Any:
    return rows.new_empty(handle[0].shape[0], rows.shape[2])


for _op in ("padded_dispatch", "padded_combine"):  # peers take part: not to be dropped where nobody uses the result
    torch.fx.node.has_side_effect(getattr(torch.ops.moecomm, _op).default)


def dispatched(x: Any, topk_idx: Any, topk_weights: Tensor | None, buffer_id: int, *options: object) -> Dispatched:
    """`Buffer.dispatch` while something traces; the options are those that it then does not have."""
    _refuse(options)
    rows, per_expert, ranges, *led, number = torch.ops.moecomm.padded_dispatch(x, topk_idx, topk_weights, buffer_id)
    handle = PaddedHandle(
        topk_idx=led[0],
        topk_weights=led[1],
        places=led[2],
        number=_TRACED,
        buffer_id=buffer_id,
        sequence=number,
    )
    return Dispatched(
        x=rows,
        expert_offsets=None,
        tokens_per_expert=per_expert,
        row_weights=None,
        topk_idx=None,
        topk_weights=None,
        handle=handle,
        ranges=ranges,
    )


def combined(
    rows: Tensor, handle: PaddedHandle, weighted: bool | None, bias: Tensor | None, *options: object
) -> Tensor:
    """`Buffer.combine` while something traces; the options are those that it then does not have."""
    _refuse(options)
    led = [handle.topk_idx, handle.topk_weights, handle.places, handle.sequence]
    return torch.ops.moecomm.padded_combine(rows, led, bias, weighted is not False, handle.buffer_id)


def _refuse(options: tuple[object, ...]) -> None:
    if any(option is not None for option in options):
        raise UnsupportedError(
            'layout "padded" has no handle=, quant= or out= in a compiled graph',
            remedy="leave them away, or call it outside of torch.compile",
        )
