"""What dispatch gives back: the rows, the handle that leads them home, and the promise of either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

import torch.utils._pytree as pytree
from torch import Tensor

T = TypeVar("T")

_STATIC = ("layout", "align", "buffer_id")
_PADDED_STATIC = ("number", "buffer_id")


class Deferred:
    """Base of a frozen dataclass of tensors that need not be made before somebody asks for the first of them.

    Most of what a dispatch knows is asked for by gradients and replays only, and a tensor takes as long to make as a
    row to copy.
    """

    __slots__ = ("_maker",)

    @classmethod
    def later(cls, maker: Any, **known: Any) -> Any:
        """An instance with some fields; `maker.fields_of(cls)` gives the others by name."""
        made = object.__new__(cls)
        object.__setattr__(made, "_maker", maker)
        for name, value in known.items():
            object.__setattr__(made, name, value)
        return made

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            fields_of = getattr(self, "_maker", None)
            missing = {} if fields_of is None else fields_of.fields_of(type(self))
            if name not in missing:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            for field_name, value in missing.items():
                object.__setattr__(self, field_name, value)
            return missing[name]


@final
@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class DispatchHandle(Deferred):
    """A routing that has been planned: lead rows home with it, or replay it on other rows.

    A pytree of tensors; it may be stored, moved through a custom op and used any number of times. S: entries sent,
    Q: pairs (token, destination rank) sent, P: pairs received, N: rows received; E counts experts in flat order,
    sorted by (rank, local id). Where rows are moved by kernels, what leads them home is numbered as said in
    `moecomm.fused`.

    topk_idx: (T, K) int32 or int64 global expert ids, -1 for none.
    topk_weights: (T, K) float32, all 1 if dispatch got none.
    send_order: (S,) int64 entries `t * K + k` sorted by (destination rank, local expert, token, k).
    send_slots: (S,) int32 row of each entry at its destination (layout "expert"; empty in layout "rank").
    send_pos: (T, K) int32 position of each entry in `send_order`, -1 for none.
    pair_tokens: (Q,) int64 token of each pair sent, sorted by (destination rank, token).
    pair_pos: (T, W) int32 position of pair (t, w) in `pair_tokens`, -1 for none.
    recv_table: (P, K) int32 row of each entry received (layout "expert") or its local expert id (layout "rank"),
        -1 elsewhere; pairs sorted by (source rank, token).
    recv_keys: (P,) int32 place of each pair's token among those that its source sends to this node; empty where the
        transport does not sum per node.
    row_weights: (N,) float32 in layout "expert", 0 in padding rows; (N, K) in layout "rank", 0 for experts elsewhere.
    expert_counts: (W, E) int32 on the host, entries from each source rank to each expert.
    pair_counts: (W, W) int32 on the host, pairs from each source rank to each destination rank.

    >>> import torch, moecomm
    >>> with moecomm.Buffer(num_experts=2, hidden=4, top_k=1, max_tokens_per_rank=8, dtype=torch.float32) as buffer:
    ...     out = buffer.dispatch(torch.ones(2, 4), torch.tensor([[1], [0]]))
    >>> out.handle.send_order.tolist(), out.handle.num_tokens
    ([1, 0], 2)
    """

    topk_idx: Tensor
    topk_weights: Tensor
    send_order: Tensor
    send_slots: Tensor
    send_pos: Tensor
    pair_tokens: Tensor
    pair_pos: Tensor
    recv_table: Tensor
    recv_keys: Tensor
    row_weights: Tensor
    expert_counts: Tensor
    pair_counts: Tensor
    layout: str
    align: int
    buffer_id: int

    @property
    def num_tokens(self) -> int:
        """T, tokens of this rank."""
        return self.topk_idx.shape[0]

    def tensors(self) -> list[Tensor]:
        """The tensors in field order."""
        return [getattr(self, name) for name in HANDLE_TENSORS]


HANDLE_TENSORS = tuple(f.name for f in fields(DispatchHandle) if f.name not in _STATIC)


@final
@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class PaddedHandle:
    """A dispatch in layout "padded": lead its rows home, or replay its routing, until the second one after it.

    A pytree. Its tensors lie in memory of the buffer, which that second dispatch writes to: a handle that is used then
    raises StaleHandleError.

    topk_idx: (T, K) int64 global expert ids, -1 for none.
    topk_weights: (T, K) float32, all 1 if dispatch got none.
    places: (T, K) int32 row `local expert * W * M + this rank * M + slot` of each entry at its expert, -1 for none.
    number: of the dispatch on its buffer; below 0 in a compiled graph, where `sequence`, () int64, says it.

    >>> import torch, moecomm
    >>> with moecomm.Buffer(num_experts=2, hidden=4, top_k=1, max_tokens_per_rank=8, dtype=torch.float32) as buffer:
    ...     out = buffer.dispatch(torch.ones(2, 4), torch.tensor([[1], [0]]), layout="padded")
    >>> out.handle.places.tolist(), out.handle.num_tokens
    ([[8], [0]], 2)
    """

    topk_idx: Tensor
    topk_weights: Tensor
    places: Tensor
    number: int
    buffer_id: int
    sequence: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, tokens of this rank."""
        return self.topk_idx.shape[0]

    @property
    def layout(self) -> str:
        """Always "padded"."""
        return "padded"


@final
@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Dispatched(Deferred):
    """What this rank received. N rows; a pytree of tensors.

    x: (N, H) rows, bit-identical to the sent ones; a pair (rows, scales) if a pair was dispatched. Padding rows are 0.
        (Typed Any, since the caller knows which of the two he sent.)
    expert_offsets: (L,) int32 end of each local expert's padded group, ready for `grouped_mm(offs=)`; layout "expert".
    tokens_per_expert: (L,) int32 rows of each local expert without padding.
    row_weights: (N,) float32 weight of each row, 0 in padding; layout "expert".
    topk_idx: (N, K) int32 local expert ids, -1 for experts elsewhere; layout "rank".
    topk_weights: (N, K) float32, 0 for experts elsewhere; layout "rank".
    handle: leads rows home.
    ranges: (L, W, 2) int32 first row and end of what each rank sent to each local expert; layout "padded", where x is
        (L, W * M, H), rows outside of the ranges hold anything, and all of it is memory of the buffer: x until its
        combine, the counts until the second dispatch after this one.

    >>> import torch, moecomm
    >>> with moecomm.Buffer(num_experts=2, hidden=1, top_k=1, max_tokens_per_rank=8, dtype=torch.float32) as buffer:
    ...     out = buffer.dispatch(torch.tensor([[5.0], [7.0]]), torch.tensor([[1], [0]]))
    >>> out.x.tolist(), out.expert_offsets.tolist()
    ([[7.0], [5.0]], [1, 2])
    """

    x: Any
    expert_offsets: Tensor | None
    tokens_per_expert: Tensor
    row_weights: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    handle: Any  # DispatchHandle, or PaddedHandle in layout "padded"
    ranges: Tensor | None = None

    @property
    def expert_counts_L(self) -> Tensor:
        """`tokens_per_expert` under the name that decode kernels give it: (L,) int32 on the device."""
        return self.tokens_per_expert


def _register(cls: type[Any], static: tuple[str, ...]) -> None:
    names = tuple(f.name for f in fields(cls) if f.name not in static)

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, name) for name in names], tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in names], flatten(value)[1]

    def unflatten(children: Any, context: tuple[Any, ...]) -> Any:
        return cls(**dict(zip(names, children, strict=True)), **dict(zip(static, context, strict=True)))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"moecomm.{cls.__name__}",
    )


_register(DispatchHandle, _STATIC)
_register(PaddedHandle, _PADDED_STATIC)
_register(Dispatched, ())


@final
class Pending(Generic[T]):
    """The result of an operation that has been started.

    Exchanges complete in the order in which they were started on every rank, whatever the order of the waits.

    >>> import torch, moecomm
    >>> with moecomm.Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=8, dtype=torch.float32) as buffer:
    ...     pending = buffer.dispatch_async(torch.tensor([[5.0]]), torch.tensor([[0]]))
    ...     pending.wait().x.tolist()
    [[5.0]]
    """

    __slots__ = ("_error", "_finish", "_result")

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._result: T | None = None
        self._error: BaseException | None = None

    def wait(self) -> T:
        """Wait for the result; later calls give the same one (or the same error) again."""
        finish, self._finish = self._finish, None
        if finish is not None:
            try:
                self._result = finish()
            except BaseException as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]
