"""One case on one buffer in one layout: what conformance does, operation by operation."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import moecomm
from moecomm.errors import MoECommError, UnsupportedError
from moecomm.memory.device import moves_by_kernels
from moecomm.testing._oracle import (
    Sheet,
    Sum,
    expected_sum,
    expert_fn,
    gradients_in_one_process,
    leaf,
    rows_at,
    sheet_of,
    values,
)
from moecomm.testing.asserts import assert_bitwise, assert_error_bounded
from moecomm.testing.cases import Case

_DELAY_S = 0.0005  # longer than a signal takes, shorter than an operation
_POISON_BYTE = 255  # NaN in every floating dtype
_ROUNDINGS = 5  # of a term of a gradient: times its weight, the three of `expert_fn`, one where it goes home


class Checks:
    """Collects failures instead of raising them: a rank that stops in the middle would leave the others waiting."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[str] = []

    def bitwise(self, actual: Tensor, expected: Tensor, what: str, origin: Callable[[int], str] | None = None) -> None:
        self._take(lambda: assert_bitwise(actual, expected, what, origin))

    def bounded(self, actual: Tensor, baseline: Tensor, exact: Tensor, what: str, **given: Any) -> None:
        self._take(lambda: assert_error_bounded(actual, baseline, exact, what, **given))

    def equal(self, actual: object, expected: object, what: str) -> None:
        self.count += 1
        if actual != expected:
            self.failures.append(f"{what}: expected {expected}, got {actual}")

    def refused(self, call: Callable[[], object], kind: type[MoECommError], what: str) -> None:
        self.count += 1
        try:
            call()
        except kind:
            return
        except MoECommError as error:
            self.failures.append(f"{what}: expected {kind.__name__}, got {error!r}")
            return
        self.failures.append(f"{what}: expected {kind.__name__}, but nothing was raised")

    def _take(self, check: Callable[[], None]) -> None:
        self.count += 1
        try:
            check()
        except AssertionError as error:
            self.failures.append(str(error))


@dataclass(frozen=True, slots=True)
class Sent:
    """A dispatch that has been checked, to be combined now or later."""

    round: int
    out: moecomm.Dispatched
    sheet: Sheet


class Trial:
    """One case on one buffer in one layout."""

    def __init__(self, case: Case, buffer: moecomm.Buffer, layout: str, reduce: str, checks: Checks) -> None:
        self.case, self.buffer, self.layout, self.reduce, self.checks = case, buffer, layout, reduce, checks
        self.rank, self.world_size = buffer.group.rank, buffer.group.size
        self.device = buffer.config.device
        self.placement = case.placement(self.world_size)
        self.align = case.align if layout == "expert" else 1
        self.sums = buffer.config.dtype == case.combine_dtype
        self.has_gradients = case.dtype == case.combine_dtype and not case.extreme
        self.by_kernels = buffer.transport == "symmetric" and moves_by_kernels(buffer.config.device)
        self.node_of_rank: tuple[int, ...] | None = None
        if buffer.transport == "hierarchical":
            nodes = range(buffer.topology.num_nodes)
            self.node_of_rank = tuple(
                n for r in range(self.world_size) for n in nodes if r in buffer.topology.ranks_of_node(n)
            )
        self.kept: list[tuple[str, Tensor, Tensor]] = []
        self.num_compared = 0

    def sheet(self, round: int, replayed: bool = False) -> Sheet:
        """Inputs and expected outputs of a round, with its own payload or with that of a replay."""
        layout = "expert" if self.layout == "padded" else self.layout  # the same rows, at other places
        return sheet_of(self.case, self.world_size, layout, self.align, round, replayed)

    def dispatch(self, round: int) -> Sent:
        sheet = self.sheet(round)
        storage, x = _embed(sheet.xs[self.rank], round)
        before = storage.clone()
        idx, weights = self._routing(sheet)
        if round % 3 == 1:  # routers may give transposed tensors
            idx, weights = _transposed(idx), None if weights is None else _transposed(weights)
        self.be_late(round)
        args = (self._payload(x, sheet), self._on(idx), self._on(weights))
        if round % 2:
            out = self.buffer.dispatch_async(*args, layout=self.layout, align=self.align).wait()
        else:
            out = self.buffer.dispatch(*args, layout=self.layout, align=self.align)
        self._compare(out, sheet, f"round {round}: dispatch")
        # Only now: what was received may have been written to, and must not be what was sent.
        self.checks.bitwise(storage, before, f"round {round}: memory around and under the dispatched rows")
        return Sent(round, out, sheet)

    def replay(self, sent: Sent) -> None:
        sheet = self.sheet(sent.round, replayed=True)
        self.be_late(sent.round + 1)
        x = sheet.xs[self.rank].clone()
        out = self.buffer.dispatch(self._payload(x, sheet), handle=sent.out.handle)
        self._compare(out, sheet, f"round {sent.round}: replay")

    def combine(self, sent: Sent, variant: int) -> None:
        """Combine made-up expert rows; `variant` chooses weights, bias, and the synchronous or asynchronous call."""
        expected, tokens = sent.sheet.expected, len(sent.sheet.xs[self.rank])
        if not self.sums:
            raw = self._on(torch.zeros(len(expected[self.rank].x), self.case.hidden, dtype=self.case.dtype))
            self.checks.refused(lambda: self.buffer.combine(raw, sent.out.handle), UnsupportedError, "sum of bytes")
            return
        what = f"round {sent.round}: combine, variant {variant}"
        weighted = (None, True, False)[variant % 3]
        seed = sent.round + variant
        bias = values(self.case, "bias", self.rank, seed, tokens) if variant % 2 else None
        table = expected[self.rank]
        mine = _poisoned(values(self.case, "rows", self.rank, seed, len(table.x)), table.source_rank == -1)
        before = mine.clone()
        if self.layout == "rank" and weighted:
            call = self.buffer.combine
            self.checks.refused(lambda: call(self._on(mine), sent.out.handle, weighted=True), UnsupportedError, what)
            weighted = None
        handle = sent.out.handle if variant % 4 else pytree.tree_map(lambda t: t.clone(), sent.out.handle)
        start = None if bias is None else self._on(bias.clone())
        self.be_late(variant)
        if variant % 2:
            y = self.buffer.combine_async(self._on(mine), handle, weighted=weighted, bias=start).wait()
        else:
            y = self.buffer.combine(self._on(mine), handle, weighted=weighted, bias=start)
        self.checks.bitwise(mine, before, f"{what}: the rows given to combine")
        if bias is not None and start is not None:
            self.checks.bitwise(start, bias, f"{what}: the bias given to combine")
        should = self.expected("rows", sent.round, seed, weighted=weighted, has_bias=bias is not None)
        self.checks.bitwise(y, should, what, origin=lambda row: f"token {row}")
        self.kept.append((what, y, should))

    def backward(self, sent: Sent) -> None:
        """Compare the gradients of x, topk_weights, bias and of the expert rows."""
        if not self.has_gradients:
            return
        sheet, round, what = sent.sheet, sent.round, f"round {sent.round}: gradient"
        num_tokens = len(sheet.xs[self.rank])
        x = values(self.case, "x", self.rank, round, num_tokens, 0)
        idx, weights = self._routing(sheet)
        dys = [values(self.case, "dy", r, round, len(sheet.xs[r]), 0) for r in range(self.world_size)]
        bias = values(self.case, "bias", self.rank, round, num_tokens, 0)
        leaf_x, leaf_bias, leaf_weights = leaf(self._on(x)), leaf(self._on(bias)), leaf(self._on(weights))

        out = self.buffer.dispatch(leaf_x, self._on(idx), leaf_weights, layout=self.layout, align=self.align)
        self._backward_of_dispatch(out.x, leaf_x, round, sheet)
        rows = self._experts(out)
        y = self.buffer.combine(rows, out.handle, bias=leaf_bias)
        wanted = [t for t in (leaf_x, leaf_bias, rows, leaf_weights) if t is not None]
        d_x, d_bias, d_rows, *d_weights = torch.autograd.grad(y, wanted, self._on(dys[self.rank].clone()))

        self.checks.bitwise(d_bias, dys[self.rank], f"{what} of bias")
        self.checks.bitwise(d_rows, self._gradient_of_rows(dys, sheet), f"{what} of the expert rows")
        names = ("x", "topk_weights") if weights is not None else ("x",)
        alone = functools.partial(gradients_in_one_process, self.case, self.world_size, self.rank, round)
        exact, magnitude, plain = alone(torch.float64), alone(torch.float64, True), alone(self.case.dtype)
        roundings = _ROUNDINGS + (self.case.top_k if self.case.dtype == torch.float32 else 1)  # where it is added
        for i, (name, actual) in enumerate(zip(names, (d_x, *d_weights), strict=True)):
            given = {"magnitude": magnitude[i], "roundings": roundings}
            self.checks.bounded(actual, plain[i], exact[i], f"{what} of {name}", **given)

    def _backward_of_dispatch(self, received: Any, leaf_x: Tensor, round: int, sheet: Sheet) -> None:
        """The backward of dispatch alone is an unweighted combine, bit for bit; its graph stays for the whole layer."""
        table = sheet.expected[self.rank]
        mine = _poisoned(values(self.case, "grad", self.rank, round, len(table.x)), table.source_rank == -1)
        (d_x,) = torch.autograd.grad(received, leaf_x, self._on(mine), retain_graph=True)
        should = self.expected("grad", round, round, weighted=False)
        self.checks.bitwise(d_x, should, f"round {round}: gradient of dispatch alone", lambda row: f"token {row}")

    def _gradient_of_rows(self, dys: list[Tensor], sheet: Sheet) -> Tensor:
        """Gradient of expert rows: the token's, times the weight, rounded once."""
        table = sheet.expected[self.rank]
        rows = rows_at(table, dys)
        if table.row_weights is None:
            return rows
        return (rows.float() * table.row_weights[:, None]).to(rows.dtype)

    def _experts(self, out: moecomm.Dispatched) -> Tensor:
        """What the experts of this rank make of their rows."""
        assert isinstance(out.x, Tensor)
        held = self.placement.experts_of_rank[self.rank]
        if out.expert_offsets is not None:
            ends = [0, *out.expert_offsets.tolist()]
            groups = [expert_fn(out.x[a:b], e) for e, a, b in zip(held, ends, ends[1:], strict=False)]
            return torch.cat([out.x[:0], *groups])
        assert out.topk_idx is not None and out.topk_weights is not None
        rows = out.x.float()  # one rounding per row, as in a kernel: the sum over local experts is not under test
        total = rows * 0
        for local, expert in enumerate(held):
            weight = (out.topk_weights * (out.topk_idx == local)).sum(dim=1, keepdim=True)
            total = total + weight * expert_fn(rows, expert)
        return total.to(out.x.dtype)

    def _compare(self, out: moecomm.Dispatched, sheet: Sheet, what: str) -> None:
        should = sheet.expected[self.rank]
        rows, scales = (out.x, None) if isinstance(out.x, Tensor) else out.x

        def origin(row: int) -> str:
            if int(should.source_rank[row]) == -1:
                return "padding"
            parts = zip(("rank", "token", "k"), (should.source_rank, should.source_token, should.source_k), strict=True)
            return ", ".join(f"{name} {int(values[row])}" for name, values in parts)

        for name, actual, expected in (
            ("x", rows, should.x),
            ("scales", scales, should.scales),
            ("expert_offsets", out.expert_offsets, should.expert_offsets),
            ("tokens_per_expert", out.tokens_per_expert, should.tokens_per_expert),
            ("row_weights", out.row_weights, should.row_weights),
            ("topk_idx", out.topk_idx, should.topk_idx),
            ("topk_weights", out.topk_weights, should.topk_weights),
        ):
            if (actual is None) != (expected is None):
                self.checks.failures.append(f"{what}: {name}: expected {_kind(expected)}, got {_kind(actual)}")
            elif actual is not None and expected is not None:
                if name == "topk_idx" and actual.dtype == torch.int64:  # either integer will do
                    expected = expected.to(torch.int64)
                per_row = name not in ("expert_offsets", "tokens_per_expert")
                self.checks.bitwise(actual, expected, f"{what}: {name}", origin if per_row else None)
        if self.num_compared % 3:
            self.kept.append((what, rows, should.x))
        else:
            rows.view(torch.uint8).fill_(_POISON_BYTE)  # the caller may write into what is his; nobody else may notice
        self.num_compared += 1

    def check_kept(self) -> None:
        """Results belong to the caller: no later call has changed them."""
        for what, actual, expected in self.kept:
            self.checks.bitwise(actual, expected, f"{what}, looked at again after the last round")

    def expected(self, purpose: str, round: int, seed: int, **given: Any) -> Tensor:
        """What a combine must give to this rank's tokens, see `Sum`."""
        in_slots = self.layout == "padded"  # the rows of layout "expert", which go home one by one
        reduce = "source" if in_slots else self.reduce
        of = Sum(
            case=self.case,
            world_size=self.world_size,
            rank=self.rank,
            layout="expert" if in_slots else self.layout,
            align=self.align,
            round=round,
            purpose=purpose,
            seed=seed,
            reduce=reduce,
            node_of_rank=self.node_of_rank if reduce == "rank" else None,
            **given,
        )
        return expected_sum(of)

    def _routing(self, sheet: Sheet) -> tuple[Tensor, Tensor | None]:
        """Copies, so that whatever is done to them does not reach the oracle's."""
        weights = None if sheet.topk_weights is None else sheet.topk_weights[self.rank].clone()
        return sheet.topk_idxs[self.rank].clone(), weights

    def _payload(self, x: Tensor, sheet: Sheet) -> Any:
        return self._on(x) if sheet.scales is None else (self._on(x), self._on(sheet.scales[self.rank].clone()))

    def _on(self, tensor: Any) -> Any:
        return None if tensor is None else tensor.to(self.device)

    def be_late(self, round: int) -> None:
        """Another rank is late each time: peers must wait for it, and must not be disturbed by it."""
        if self.rank == round % self.world_size and self.world_size > 1:
            time.sleep(_DELAY_S)


def _embed(x: Tensor, round: int) -> tuple[Tensor, Tensor]:
    """Put rows into the middle of poisoned memory: in even rounds as whole rows, in odd ones with gaps between them."""
    margin = 2 if round % 2 else 0
    shape = (x.shape[0] + 2, (x.shape[1] + 2 * margin) * x.dtype.itemsize)
    storage = torch.full(shape, _POISON_BYTE, dtype=torch.uint8).view(x.dtype)
    view = storage[1:-1, margin : margin + x.shape[1]]
    view.copy_(x)
    return storage, view


def _poisoned(rows: Tensor, where: Tensor) -> Tensor:
    rows = rows.clone()
    rows[where] = float("nan")
    return rows


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def _kind(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"a {tuple(tensor.shape)} {tensor.dtype} tensor"
