"""`ExpertExchange`: tokens to their experts and back, for layers that do not know how many tokens come next.

Legend: T tokens of this rank, H hidden, L experts of this rank, K top-k, N rows received, W ranks, S ranks that share a
batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.buffer import Buffer
from moecomm.errors import ConfigError, StallError, UnsupportedError
from moecomm.group import Group
from moecomm.placement import ExpertPlacement

FROM_THE_MODEL = ("num_experts", "hidden", "top_k", "dtype", "device")
_OPTIONS = tuple(inspect.signature(Buffer).parameters)[1:]  # without the group
_FEWEST_TOKENS = 64

ExpertFunction = Callable[[Tensor, Tensor], Tensor]


@final
class ExpertExchange:
    """Bring tokens to the experts of any number of layers and lead the results home.

    Builds the buffers that the layers need when they need them (all ranks call the same layers in the same order), one
    for all layers of the same hidden size, top-k, placement, dtype and device. Without `max_tokens_per_rank` the ranks
    agree before every exchange on the most tokens that any of them has (a small all-reduce) and build a larger buffer
    when it does not fit; the smaller ones stay for the backward passes that still need them. With it they need not.

    Args:
        group: as of Buffer.
        replicated_over: ranks of the group that have the same tokens in the same order; each of them dispatches an
            equal share of those, so that no expert computes a token twice, and gets the results of all. None: every
            rank has tokens of its own.
        buffer_options: of Buffer, except those that follow from the tokens (num_experts, hidden, top_k, dtype, device),
            and placement, which every exchange gives.

    Raises:
        ConfigError: no option of Buffer, or one that follows from the tokens.
        UnsupportedError: placement.

    >>> exchange = ExpertExchange(reduce="source")
    >>> x, topk_idx, topk_weights = torch.ones(3, 4), torch.tensor([[0], [1], [1]]), torch.full((3, 1), 0.5)
    >>> exchange(x, topk_idx, topk_weights, lambda rows, counts: 2 * rows, ExpertPlacement.uniform(2, 1)).sum()
    tensor(12.)
    """

    def __init__(
        self, group: object = None, *, replicated_over: dist.ProcessGroup | None = None, **buffer_options: Any
    ) -> None:
        self.group = Group.resolve(group)
        check_options(buffer_options, self.group.rank, without=("placement",))
        self._replicated_over = None if replicated_over is None or replicated_over.size() == 1 else replicated_over
        self._most_tokens = buffer_options.get("max_tokens_per_rank")
        self._options = {name: v for name, v in buffer_options.items() if name != "max_tokens_per_rank"}
        self._buffers: dict[Any, list[Buffer]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertExchange:
        return self  # a copied model talks through the same buffers

    @property
    def batches(self) -> int:
        """How many different batches the ranks of the group have: W, or W / S."""
        shared = 1 if self._replicated_over is None else self._replicated_over.size()
        return self.group.size // shared

    @property
    def timeout_s(self) -> float | None:
        """The deadline that was asked for."""
        return self._options.get("timeout_s")

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Those built so far, for `explain()` and `stats()`."""
        return tuple(buffer for grown in self._buffers.values() for buffer in grown)

    def close(self) -> None:
        """Close all buffers; the next exchange builds new ones."""
        for buffer in self.buffers:
            buffer.close()
        self._buffers.clear()

    def __call__(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        experts: ExpertFunction,
        placement: ExpertPlacement,
    ) -> Tensor:
        """Exchange once. Collective; differentiable in x, topk_weights and whatever the experts use.

        Args:
            x: (T, H) float32, float16 or bfloat16.
            topk_idx: (T, K) int32 or int64 global expert ids; -1 and E for none.
            topk_weights: (T, K) floating, what each expert's output is multiplied by; None: 1.
            experts: makes (N, H) of (N, H) rows, grouped by local expert, and (L,) int32 how many each has.
            placement: which rank holds which expert.

        Returns:
            (T, H) in the dtype of x, the weighted sum for each token.
        """
        topk_idx = topk_idx.masked_fill(topk_idx == placement.num_experts, -1)
        share = None if self._replicated_over is None else _Share(self._replicated_over, len(x))
        if share is not None:
            x, topk_idx = _TakeShare.apply(x, share), share.of(topk_idx)
            topk_weights = None if topk_weights is None else _TakeShare.apply(topk_weights, share)
        # Ranks that all have one batch know each other's shares.
        known = share.size if share is not None and self.batches == 1 else None
        buffer = self._buffer(x, topk_idx.shape[1], placement, known)
        out = buffer.dispatch(x, topk_idx, None if topk_weights is None else topk_weights.float())
        rows = experts(out.x, out.tokens_per_expert).to(x.dtype)  # autocast may have chosen another
        y = buffer.combine(rows, out.handle, weighted=topk_weights is not None)
        return y if share is None else _JoinShares.apply(y, share)

    def _buffer(self, x: Tensor, top_k: int, placement: ExpertPlacement, known: int | None) -> Buffer:
        grown = self._buffers.setdefault((x.shape[1], top_k, placement, x.dtype, x.device), [])
        most = self._most_tokens if self._most_tokens is not None else known
        if most is None:
            most = self._agree_on_most(x, grown)
        if not grown or grown[-1].config.max_tokens_per_rank < most:
            if self._most_tokens is None:
                most = 1 << (max(most, _FEWEST_TOKENS) - 1).bit_length()
            group = self.group.process_group if self.group.mpi_comm is None else self.group.mpi_comm
            grown.append(
                Buffer(
                    group,
                    num_experts=placement.num_experts,
                    hidden=x.shape[1],
                    top_k=top_k,
                    max_tokens_per_rank=most,
                    dtype=x.dtype,
                    placement=placement,
                    device=x.device,
                    **self._options,
                )
            )
        return grown[-1]

    def _agree_on_most(self, x: Tensor, grown: list[Buffer]) -> int:
        """The most tokens of any rank. The first time it is asked so that a rank that does not come has a name."""
        if self.group.size == 1:
            return len(x)
        if not grown or self.group.process_group is None:
            told = self.group.all_gather_object(len(x), timeout_s=self.timeout_s, operation="ExpertExchange")
            return max(told)
        timeout_s = grown[-1].config.timeout_s
        most = torch.tensor([len(x)], device=x.device)
        work = dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group.process_group, async_op=True)
        try:
            assert work is not None
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise StallError(
                "the ranks did not agree on the size of the next exchange",
                got=str(error).splitlines()[0],
                expected=f"all ranks within {timeout_s:g} s",
                remedy="call the same layers equally often on every rank",
                rank=self.group.rank,
                operation="ExpertExchange",
            ) from error
        return int(most)


def check_options(buffer_options: dict[str, Any], rank: int | None = None, *, without: tuple[str, ...] = ()) -> None:
    """Refuse what is no option of Buffer, what follows from the model, and what the caller cannot take.

    >>> check_options({"hidden": 8}, rank=0)
    Traceback (most recent call last):
    ...
    moecomm.errors.ConfigError: rank 0: hidden follows from the model: got hidden=8; leave it out
    """
    for name, value in buffer_options.items():
        got = f"{name}={value!r}"
        if name in FROM_THE_MODEL:
            raise ConfigError(f"{name} follows from the model", got=got, remedy="leave it out", rank=rank)
        if name in without:
            what = f"{name} cannot be chosen here"
            raise UnsupportedError(what, got=got, remedy="leave it out", rank=rank)
        if name not in _OPTIONS:
            known = [option for option in _OPTIONS if option not in (*FROM_THE_MODEL, *without)]
            raise ConfigError("no such option of Buffer", got=got, expected=f"one of {known}", rank=rank)


@dataclass(frozen=True, slots=True)
class _Share:
    """Which of `num_tokens` tokens that all ranks of a group have is this rank's to dispatch."""

    group: dist.ProcessGroup
    num_tokens: int

    def of(self, tokens: Tensor) -> Tensor:
        """This rank's share of (T, ...)."""
        start = self.group.rank() * self.size
        return tokens[start : start + self.size].contiguous()

    def join(self, share: Tensor) -> Tensor:
        """(T, ...) of the shares of all ranks."""
        padded = share.new_zeros(self.size, *share.shape[1:])
        padded[: len(share)] = share
        whole = share.new_empty(self.group.size() * self.size, *share.shape[1:])
        dist.all_gather_into_tensor(whole, padded, group=self.group)
        return whole[: self.num_tokens]

    @property
    def size(self) -> int:
        """Tokens of every share but the last ones, which may have fewer."""
        return -(-self.num_tokens // self.group.size())


class _TakeShare(torch.autograd.Function):
    """A share of what all ranks have. Its gradient is the one of all shares, which all ranks have too."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, share: _Share) -> Tensor:
        ctx.share = share
        return share.of(tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.share.join(grads[0]), None


class _JoinShares(torch.autograd.Function):
    """The shares of all ranks, which all have the same gradient for it."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, of: _Share) -> Tensor:
        ctx.share = of
        return of.join(share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.share.of(grads[0]), None
