"""`HybridEPBuffer`: the third API of that name, as Megatron-Core and torchtitan call it, on `moecomm.Buffer`.

Routings are dense here: a (T, E) map says which experts a token goes to. Rows travel in layout "expert".

Legend: T tokens, H hidden, E experts, R ranks, L experts of this rank, N rows received, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from moecomm import DispatchHandle
from moecomm.deep_ep.parcels import Parcel, at_least
from moecomm.deep_ep.refusals import FLOATS, demand, demand_tensor
from moecomm.deep_ep.wire import Space, Wire, own_weights, per_token, room_for

__all__ = ["HybridEPBuffer", "HybridHandle", "indices_to_map"]


def indices_to_map(
    topk_idx: Tensor, topk_weights: Tensor, num_of_tokens: int, num_of_experts: int
) -> tuple[Tensor, Tensor]:
    """(T, K) choices, -1 for none, and weights as a (T, E) bool map and (T, E) float32 weights.

    >>> indices_to_map(torch.tensor([[2, -1]]), torch.tensor([[0.5, 9.0]]), 1, 3)[1].tolist()
    [[0.0, 0.0, 0.5]]
    """
    demand_tensor("topk_idx", topk_idx, num_of_tokens, None)
    demand_tensor("topk_weights", topk_weights, *topk_idx.shape)
    column = torch.where(topk_idx < 0, num_of_experts, topk_idx).long()
    wide = torch.zeros(num_of_tokens, num_of_experts + 1, dtype=torch.float32, device=topk_idx.device)
    chosen = torch.zeros_like(wide, dtype=torch.bool)
    return (
        chosen.scatter_(1, column, True)[:, :num_of_experts].contiguous(),
        wide.scatter_(1, column, topk_weights.float())[:, :num_of_experts].contiguous(),
    )


@final
@dataclass(frozen=True, eq=False, slots=True)
class HybridHandle:
    """A routing of `HybridEPBuffer`. num_rows: of the tensor that the caller got, at least the N that came."""

    space: Space
    handle: DispatchHandle
    routing_map: Tensor
    tokens_per_expert: Tensor
    num_received: int
    num_rows: int


class HybridEPBuffer:
    """Dispatch with permutation and combine with its inverse.

    Args:
        group: torch.distributed ProcessGroup or mpi4py communicator; None: the default group, or a single rank.
        hidden_dim, max_num_of_tokens_per_rank, num_local_experts: H, most tokens of a rank, L.
        use_fp8: rows may come with scaling factors; they may anyway.
        tuning: num_sms_* and num_blocks_* of kernels that are not there: no effect.

    >>> buffer = HybridEPBuffer(None, 4, 8, 2)
    >>> chosen = torch.tensor([[True, True], [False, True]])
    >>> x, _, _, counts, handle = buffer.dispatch_with_permute(hidden=torch.ones(2, 4), routing_map=chosen)
    >>> counts.tolist(), buffer.combine_with_unpermute(hidden=x, handle=handle)[0][:, 0].tolist()
    ([1, 2], [2.0, 1.0])
    """

    def __init__(
        self,
        group: Any = None,
        hidden_dim: int = 0,
        max_num_of_tokens_per_rank: int = 0,
        num_local_experts: int = 0,
        use_fp8: bool = False,
        **tuning: Any,
    ) -> None:
        sizes = {
            "hidden_dim": hidden_dim,
            "max_num_of_tokens_per_rank": max_num_of_tokens_per_rank,
            "num_local_experts": num_local_experts,
        }
        for name, value in sizes.items():
            demand(isinstance(value, int) and value > 0, f"{name} is no count", got=repr(value), expected="at least 1")
        known = all(name.startswith(("num_sms", "num_blocks")) for name in tuning)
        demand(known, "an argument is unknown", got=sorted(tuning), expected="num_sms_* or num_blocks_*")
        self.group, self.hidden_dim, self.use_fp8 = group, hidden_dim, use_fp8
        self.max_num_of_tokens_per_rank, self.num_local_experts = max_num_of_tokens_per_rank, num_local_experts
        self._wire = Wire(group, 0)
        self.rank, self.group_size = self._wire.group.rank, self._wire.group.size

    @torch.no_grad()
    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        pad_multiple: int | None = None,
        num_permuted_tokens: int | None = None,
        non_blocking: bool = False,
        handle: HybridHandle | None = None,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, HybridHandle]:
        """Send every token to its experts, grouped by expert. Collective.

        Args:
            hidden: (T, H) rows of any dtype.
            routing_map: (T, E) bool; or topk_idx (T, K), -1 for none, with topk_weights (T, K).
            probs: (T, E) float32 weights, to travel along. scaling_factor: (T, S) of 4 bytes likewise.
            num_of_experts_per_rank, num_of_experts: L or E, where routing_map does not say it.
            pad_multiple: what each expert's rows are padded to with zeros.
            num_permuted_tokens: rows of the results; what comes after the last is uninitialised. non_blocking: no
                effect.
            handle: replay an earlier dispatch, with its routing and padding. fuse_permute_dispatch: no effect.

        Returns:
            (N, H) rows sorted by (local expert, source rank, token); (N,) probs or None; (N, S) scaling factors or
            None; (L,) int64 rows of each expert with their padding, the handle.
        """
        demand_tensor("hidden", hidden, None, self.hidden_dim)
        parcel = Parcel.of(hidden if scaling_factor is None else (hidden, scaling_factor))
        if handle is not None:
            return self._replay(parcel, probs, _checked(handle))
        chosen, probs = self._dense(hidden, routing_map, probs, topk_idx, topk_weights, num_of_experts)
        num_experts = chosen.shape[1]
        if probs is not None:
            probs = demand_tensor("probs", probs, len(hidden), num_experts).detach().float().contiguous()
        experts = torch.arange(num_experts, dtype=torch.int32, device=hidden.device)
        space = Space(num_experts=num_experts, top_k=num_experts, num_tokens=room_for(self.max_num_of_tokens_per_rank))
        align = pad_multiple or 1
        idx = torch.where(chosen.bool(), experts, -1)
        out = self._wire.dispatch(space, parcel.x, parcel.beside(), idx, probs, layout="expert", align=align)
        num_rows = max(num_permuted_tokens or 0, 0) or len(out.x[0])
        counts = (out.tokens_per_expert.long() + align - 1) // align * align
        made = HybridHandle(space, out.handle, chosen, counts, len(out.x[0]), num_rows)
        scales = parcel.unpack(out.x[1]).scales
        rows, scales = at_least(out.x[0], num_rows), None if scales is None else at_least(scales, num_rows)
        weights = None if probs is None or out.row_weights is None else at_least(out.row_weights, num_rows)
        return rows, weights, scales, counts, made

    @torch.no_grad()
    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: HybridHandle | None = None,
        pad_multiple: int | None = None,
        num_dispatched_tokens: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Lead (N, H) rows home and sum them as they are; (N,) probs each to their place. Collective.

        Returns:
            (T, H) sums, in float32 inside and rounded once per level; (T, E) probs, 0 where nothing was sent, or None.
        """
        handle = _checked(handle)
        demand_tensor("hidden", hidden, None, None, dtypes=FLOATS)
        fits = len(hidden) in (handle.num_rows, handle.num_received)
        demand(fits, "hidden does not fit the handle", got=f"{len(hidden)} rows", expected=f"{handle.num_rows} rows")
        summed = self._wire.combine(handle.space, hidden[: handle.num_received], handle.handle)
        if probs is None:
            return summed, None
        demand_tensor("probs", probs, len(hidden))
        table = handle.handle.recv_table
        values = torch.nn.functional.pad(probs[: handle.num_received].float(), (0, 1))[table.long()]
        return summed, self._wire.combine(handle.space, values, per_token(handle.handle))

    def _dense(
        self, hidden: Tensor, routing_map: Any, probs: Any, topk_idx: Any, topk_weights: Any, num_experts: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The routing as a map."""
        if routing_map is not None:
            demand_tensor("routing_map", routing_map, len(hidden), None)
            demand(topk_idx is None, "routing_map and topk_idx are given", got="both", expected="one of them")
            return routing_map, probs
        demand(topk_idx is not None, "there is no routing", got="None", expected="routing_map or topk_idx")
        num_experts = num_experts or self.num_local_experts * self.group_size
        weights = torch.ones(topk_idx.shape, device=topk_idx.device) if topk_weights is None else topk_weights
        routing_map, made = indices_to_map(topk_idx, weights, len(hidden), num_experts)
        return routing_map, None if topk_weights is None else made

    def _replay(self, parcel: Parcel, probs: Tensor | None, handle: HybridHandle) -> Any:
        got, expected = f"{len(parcel.x)} tokens", len(handle.routing_map)
        demand(len(parcel.x) == expected, "hidden does not fit the handle", got=got, expected=expected)
        if probs is not None:
            demand_tensor("probs", probs, *handle.routing_map.shape)
        again = Parcel(parcel.x, parcel.scales, None, None if probs is None else probs.detach().float(), 1)
        beside, weights, scales = again.beside_again(), None, None
        came = self._wire.replay(handle.space, parcel.x, beside, handle.handle)
        rows = came if beside is None else came[0]
        if beside is not None:
            wide, scales = again.unpack_again(came[1])
            weights = None if wide is None else at_least(own_weights(wide, handle.handle), handle.num_rows)
        scales = None if scales is None else at_least(scales, handle.num_rows)
        return at_least(rows, handle.num_rows), weights, scales, handle.tokens_per_expert, handle


def _checked(handle: Any) -> HybridHandle:
    what, got = "handle is none of this API", type(handle).__name__
    demand(isinstance(handle, HybridHandle), what, got=got, expected="what dispatch_with_permute gave")
    checked: HybridHandle = handle
    return checked
