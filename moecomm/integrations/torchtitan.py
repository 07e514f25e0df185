"""A token dispatcher for torchtitan's mixture-of-experts layers: all that a framework needs of moecomm.

Give a layer `MoecommTokenDispatcher.Config(...)` where its routed experts take the configuration of their dispatcher.
Nothing of torchtitan is imported: a dispatcher is what has `wire_meshes`, `dispatch` and `combine`.

Legend: T tokens, D hidden, K top-k, E experts, L experts of this rank, R rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

import moecomm
from moecomm import DispatchHandle


@final
class MoecommTokenDispatcher:
    """Move tokens to their experts and back; differentiable in tokens and scores, which apply to expert outputs.

    Config:
        num_experts, top_k: E and K.
        max_tokens_per_rank: most tokens of a rank in one call.
        align: what each expert's rows are padded to a multiple of, with zeros.
        reduce: see `moecomm.Buffer`.

    >>> dispatcher = MoecommTokenDispatcher.Config(num_experts=2, top_k=1, max_tokens_per_rank=8).build()
    >>> x_TD, scores_TK, ids_TK = torch.ones(3, 4), torch.full((3, 1), 0.5), torch.tensor([[1], [0], [1]])
    >>> rows_RD, counts_e, metadata = dispatcher.dispatch(x_TD, scores_TK, ids_TK, torch.tensor([1, 2]))
    >>> counts_e.tolist(), dispatcher.combine(rows_RD, metadata, x_TD)[:, 0].tolist()
    ([1, 2], [0.5, 0.5, 0.5])
    """

    @final
    @dataclass(kw_only=True, slots=True)
    class Config:
        """What `build` makes a dispatcher of."""

        num_experts: int
        top_k: int
        max_tokens_per_rank: int
        align: int = 1
        reduce: str = "rank"

        def build(self) -> MoecommTokenDispatcher:
            """Make the dispatcher."""
            return MoecommTokenDispatcher(self)

    def __init__(self, config: MoecommTokenDispatcher.Config) -> None:
        self.config = config
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self._group: Any = None
        self._buffers: dict[tuple[Any, ...], moecomm.Buffer] = {}

    def wire_meshes(self, *, ep_mesh: Any, **others: Any) -> None:
        """Take the mesh whose ranks share the experts; None for one rank."""
        self._group = None if ep_mesh is None else ep_mesh.get_group()

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, DispatchHandle]:
        """Send tokens to their experts. Collective.

        Returns:
            (R, D) rows grouped by local expert, (L,) int64 rows of each with their padding, what `combine` needs.
        """
        buffer = self._buffer(x_TD)
        scores = topk_scores_TK.float()
        out = buffer.dispatch(x_TD, topk_expert_ids_TK, scores, align=self.config.align)
        assert out.expert_offsets is not None
        counts = torch.diff(out.expert_offsets, prepend=out.expert_offsets.new_zeros(1)).long()
        return out.x, counts, out.handle

    def combine(self, routed_output_RD: Tensor, metadata: DispatchHandle, x_TD: Tensor) -> Tensor:
        """(T, D) expert outputs, multiplied by their scores and summed per token. Collective."""
        return self._buffer(x_TD).combine(routed_output_RD, metadata)

    def _buffer(self, x_TD: Tensor) -> moecomm.Buffer:
        key = x_TD.shape[1], x_TD.dtype, x_TD.device
        if key not in self._buffers:
            self._buffers[key] = moecomm.Buffer(
                self._group,
                num_experts=self.num_experts,
                hidden=x_TD.shape[1],
                top_k=self.top_k,
                max_tokens_per_rank=self.config.max_tokens_per_rank,
                dtype=x_TD.dtype,
                reduce=self.config.reduce,
                device=x_TD.device,
            )
        return self._buffers[key]
