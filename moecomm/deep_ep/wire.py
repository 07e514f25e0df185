"""Rows on their way: which `moecomm.Buffer` carries them, made when it is first needed.

One object of DeepEP's API serves rows of any width and routings of any kind, a `moecomm.Buffer` is for one. A `Wire`
makes them, keyed by what all ranks of a call agree on, so that all ranks make the same one in the same call. The
routing of a handle says nothing of the rows it was planned for: buffers for the same `Space` share handles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

import moecomm
from moecomm import Dispatched, DispatchHandle
from moecomm.deep_ep.refusals import FLOATS, demand
from moecomm.errors import PeerLostError, StaleHandleError, UnsupportedError
from moecomm.group import Group
from moecomm.memory.device import moves_by_kernels
from moecomm.quant import dequantize, quantize

MOST_TOKENS = 65536  # of one rank in one call, where memory is not committed before rows come
_ADDRESS_BYTES = 1 << 44  # of the address space, for one buffer


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The routings that can share handles. num_tokens: most of a rank, None for what the memory allows.

    placement: experts of each rank; None: as they come.
    """

    num_experts: int
    top_k: int
    reduce: str = "rank"
    num_tokens: int | None = None
    placement: tuple[tuple[int, ...], ...] | None = None


@final
class Wire:
    """The buffers of one group. device_bytes: what the caller sized his own buffers to; used where memory is dear.

    members: the ranks that are left, numbered as at first. losses: how often some were lost.
    """

    def __init__(self, group: object, device_bytes: int, timeout_s: float | None = None) -> None:
        self.group = Group.resolve(group)
        self._size = self.group.size  # at first
        self.members, self.losses = tuple(range(self._size)), 0
        self._last: moecomm.Buffer | None = None
        self._given, self._device_bytes, self._timeout_s = group, device_bytes, timeout_s
        self._made: dict[tuple[Any, ...], _Made] = {}
        self._outgrown: list[moecomm.Buffer] = []
        self.closed = False

    def dispatch(
        self, space: Space, x: Tensor, beside: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, **how: Any
    ) -> Dispatched:
        """Send rows x with what lies beside them; `how`: layout and align of `moecomm.Buffer.dispatch`."""
        made = self._buffer(space, x, row_bytes(x) + row_bytes(beside))
        return made.buffer.dispatch((x, beside), topk_idx, topk_weights, **how)

    def dispatch_async(
        self,
        space: Space,
        x: Tensor,
        beside: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        starts: bool,
        **how: Any,
    ) -> moecomm.Pending[Dispatched]:
        """`dispatch` that has been started, or that its `wait` starts: that costs less where it follows at once."""
        made = self._buffer(space, x, row_bytes(x) + row_bytes(beside))
        if starts:
            return made.buffer.dispatch_async((x, beside), topk_idx, topk_weights, **how)
        return moecomm.Pending(lambda: made.buffer.dispatch((x, beside), topk_idx, topk_weights, **how))

    def replay(self, space: Space, x: Tensor, beside: Tensor | None, handle: DispatchHandle) -> Any:
        """Send rows along the route of a handle; the rows that arrived, or the pair."""
        empty = beside is None and x.dtype not in FLOATS  # rows by themselves are of a float dtype
        beside = x.new_empty(len(x), 0) if empty else beside
        made = self._buffer(space, x, row_bytes(x) + (0 if beside is None else row_bytes(beside)))
        got = made.buffer.dispatch(x if beside is None else (x, beside), handle=made.own(handle)).x
        return got[0] if empty else got

    def told(self, numbers: Tensor) -> Tensor:
        """(R, J) the (J,) numbers of every rank."""
        space = Space(num_experts=self.group.size, top_k=self.group.size, num_tokens=1)
        ranks, row = torch.arange(self.group.size, device=numbers.device)[None], numbers[None].contiguous()
        told: Tensor = self.dispatch(space, row, row[:, :1].contiguous(), ranks, None, layout="rank").x[0]
        return told

    def combine(self, space: Space, rows: Tensor, handle: DispatchHandle, *, bias: Tensor | None = None) -> Tensor:
        """Lead rows home and sum them as they are."""
        made = self._buffer(space, rows, row_bytes(rows))
        bias = None if bias is None else bias.detach()
        return made.buffer.combine(rows.detach(), made.own(handle), weighted=False, bias=bias)

    def combine_async(
        self, space: Space, rows: Tensor, handle: DispatchHandle, *, starts: bool, quant: str | None = None
    ) -> moecomm.Pending[Tensor]:
        """Lead rows home and sum them, each times its weight; starts: as `dispatch_async`; quant: how they go."""
        made, rows = self._buffer(space, rows, row_bytes(rows)), rows.detach()
        if quant is not None and moves_by_kernels(rows.device):  # which move rows of the buffer's dtype only
            rows, quant = dequantize(*quantize(rows, quant), rows.dtype, rows.shape[1]), None
        own = made.own(handle)
        if starts:
            return made.buffer.combine_async(rows, own, quant=quant)
        return moecomm.Pending(lambda: made.buffer.combine(rows, own, quant=quant))

    def buffers(self) -> Iterator[moecomm.Buffer]:
        """Those that were made."""
        yield from (made.buffer for made in self._made.values())
        yield from self._outgrown

    def waited_s(self) -> Tensor:
        """(R,) float64 seconds waited for each rank so far; where the transport knows no better, for all alike."""
        total = torch.zeros(self._size, dtype=torch.float64)
        for buffer in self.buffers():
            stats = buffer.stats()
            each = stats.get("waited_s")
            if each is None:
                each = torch.full((self.group.size,), stats["counts_s"] + stats["wait_s"], dtype=torch.float64)
                each[self.group.rank] = 0.0
            total[list(self.members)] += each
        return total

    def shrink(self) -> None:
        """Go on without the ranks that the last operation lost; handles of before are stale. Collective among the rest.

        Raises:
            UnsupportedError: the group or the transport cannot. PeerLostError: the others went on without this rank.
        """
        if self._last is None:
            raise UnsupportedError("nothing was sent yet", remedy="make a new Buffer", rank=self.group.rank)
        left = self._last.shrink()
        self.members = tuple(self.members[rank] for rank in left)
        self._given = self.group = self._last.group
        self.losses += 1
        for buffer in self.buffers():
            buffer.close()
        self._made.clear()
        self._outgrown.clear()
        self._last = None

    @property
    def sums_by_node(self) -> bool:
        """Whether rows are summed on every node before they go home."""
        return any(made.buffer.transport == "hierarchical" for made in self._made.values())

    def close(self) -> None:
        """Free them; idempotent, waits for nobody."""
        self.closed = True
        for buffer in self.buffers():
            buffer.close()

    def _buffer(self, space: Space, rows: Tensor, num_bytes: int) -> _Made:
        """The buffer for rows of that width, with room for num_bytes each."""
        if self.closed:
            raise StaleHandleError("the buffer was destroyed", remedy="make a new one", rank=self.group.rank)
        hidden, dtype = rows.shape[1], torch.bfloat16 if rows.dtype.itemsize == 1 else rows.dtype
        key = space, hidden, dtype, rows.device
        made = self._made.get(key)
        if self.losses and space.placement is None:
            lost = [rank for rank in range(self._size) if rank not in self.members]
            what, remedy = f"ranks {lost} were lost: the low-latency mode goes on, nothing else", "make a new Buffer"
            raise PeerLostError(what, remedy=remedy, rank=self.group.rank, peers=lost)
        if made is None or num_bytes > made.buffer.config.row_bytes:
            demand(hidden > 0, "x has no columns", got=tuple(rows.shape), expected="a hidden size of at least 1")
            beside = max(0, num_bytes - hidden * dtype.itemsize)
            beside = 1 << max(8, (beside - 1).bit_length()) if beside else 0
            if made is not None:
                self._outgrown.append(made.buffer)
            made = self._made[key] = _Made(
                moecomm.Buffer(
                    self._given,
                    num_experts=space.num_experts,
                    hidden=hidden,
                    top_k=space.top_k,
                    max_tokens_per_rank=space.num_tokens
                    or self._tokens(space, hidden * dtype.itemsize + beside, rows.device),
                    dtype=dtype,
                    placement=space.placement,
                    reduce=space.reduce,
                    timeout_s=self._timeout_s,
                    device=rows.device,
                    beside_bytes=beside,
                )
            )
        self._last = made.buffer
        return made

    def _tokens(self, space: Space, num_bytes: int, device: torch.device) -> int:
        """Tokens to make room for: the same number on every rank."""
        size = self.group.size
        if device.type == "cpu":
            each = num_bytes * 8 * size * size * space.top_k  # 8 areas of every rank, mapped in every rank
            room = _ADDRESS_BYTES // each
        else:
            room = self._device_bytes // (2 * size * num_bytes) if self._device_bytes else 4096
        return min(MOST_TOKENS, max(128, 1 << max(room, 1).bit_length() - 1))


@final
@dataclass(slots=True)
class _Made:
    """A buffer, and what its handles are known by, once that is known."""

    buffer: moecomm.Buffer
    buffer_id: int | None = None

    def own(self, handle: DispatchHandle) -> DispatchHandle:
        """The handle as this buffer takes it for its own; collective the first time."""
        if self.buffer_id is None:
            config = self.buffer.config
            none = torch.empty(0, config.hidden, dtype=config.dtype, device=config.device)
            idx = torch.empty(0, config.top_k, dtype=torch.int64, device=config.device)
            self.buffer_id = self.buffer.dispatch(none, idx).handle.buffer_id
        return handle if handle.buffer_id == self.buffer_id else replace(handle, buffer_id=self.buffer_id)


def row_bytes(rows: Tensor) -> int:
    """Bytes of one row."""
    return rows.element_size() * math.prod(rows.shape[1:])


def room_for(num_tokens: int) -> int:
    """Tokens to make room for: few different numbers, so that few buffers are made.

    >>> room_for(1), room_for(129)
    (128, 256)
    """
    return 1 << max(7, (num_tokens - 1).bit_length())


def per_token(handle: DispatchHandle) -> DispatchHandle:
    """The handle of a layout "expert" as one of layout "rank": one row per token and rank."""
    weights = torch.empty(handle.recv_table.shape, device=handle.row_weights.device)
    return replace(handle, layout="rank", align=1, send_slots=handle.send_slots[:0], row_weights=weights)


def own_weights(weights_NK: Tensor, handle: DispatchHandle) -> Tensor:
    """(N,) weight of each row of layout "expert", whose token's weights came with it; 0 in padding."""
    table = handle.recv_table.long()
    pair, lane = (table >= 0).nonzero(as_tuple=True)
    row = table[pair, lane]
    weights = weights_NK.new_zeros(len(weights_NK))
    weights[row] = weights_NK[row, lane]
    return weights
