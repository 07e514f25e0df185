"""One case on one buffer in layout "padded": what conformance does there, operation by operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moecomm import reference
from moecomm.errors import CapacityError, StaleHandleError, UnsupportedError
from moecomm.quant import QuantSpec
from moecomm.testing._oracle import Sheet, quantised, values
from moecomm.testing._trial import Checks, Trial

_OUT_SPECS = (
    None,
    QuantSpec(),
    QuantSpec(format="int8"),
    None,
    QuantSpec(scales="power_of_two", column_major=True),
    QuantSpec(format="logfmt10"),
    QuantSpec(scales="ue8m0"),
)
_HOME_SPECS = (None, "logfmt10", None, "fp8", None, "int8")


@dataclass(frozen=True, slots=True)
class Sent:
    """A dispatch that has been checked. places: (N,) row of each row that this rank received in (L * W * M)."""

    round: int
    handle: Any
    sheet: Sheet
    places: Tensor


class PaddedTrial:
    """Rounds of changing routings: the older of two live handles is used after the newer one, a stale one refused."""

    def __init__(self, trial: Trial, checks: Checks, by_kernels: bool = False) -> None:
        self.by_kernels = by_kernels  # then nobody knows on the host that an expert has no slot left
        self.trial, self.checks, self.case, self.buffer = trial, checks, trial.case, trial.buffer
        self.most = self.case.max_tokens_per_rank
        self.quantises = self.case.dtype == self.case.combine_dtype and not self.case.extreme
        self.previous: Sent | None = None

    def run(self, rounds: int) -> None:
        """Run all rounds."""
        for round in range(rounds):
            sheet = self.trial.sheet(round)
            full = [rank for rank, idx in enumerate(sheet.topk_idxs) if self._most_entries(idx) > self.most]
            if full:  # nobody sends, since everybody knows
                if self.by_kernels:
                    self._leave_out(sheet, round, self.trial.rank in full)
                elif self.trial.rank in full:
                    self._refuse(sheet, round)
                continue
            sent = self.dispatch(round)
            if round % 2:
                again = self.dispatch(round, replayed=sent)
                if self.previous is not None:
                    self._refuse_stale(self.previous)
                self.combine(sent, round)
                self.combine(again, round + 1)
                self.previous = None
            else:
                if self.previous is not None:
                    self.combine(self.previous, round + 1)
                self.combine(sent, round)
                self.previous = sent

    def _most_entries(self, idx: Tensor) -> int:
        named = idx[idx >= 0]
        return int(torch.bincount(named.long()).max()) if len(named) else 0

    def _refuse(self, sheet: Sheet, round: int) -> None:
        x, idx = sheet.xs[self.trial.rank], sheet.topk_idxs[self.trial.rank]
        call = self.buffer.dispatch
        self.checks.refused(
            lambda: call(self._payload(x, sheet), idx, layout="padded"), CapacityError, f"round {round}"
        )

    def _leave_out(self, sheet: Sheet, round: int, is_full: bool) -> None:
        """Send what has a slot; the host is told when it asks."""
        x, idx = (self._on(parts[self.trial.rank]) for parts in (sheet.xs, sheet.topk_idxs))
        self.buffer.dispatch(self._payload(x, sheet), idx, layout="padded")
        self.previous = None
        if is_full:
            self.checks.refused(self.buffer.synchronize, CapacityError, f"round {round}")
        self.buffer.synchronize()

    def _on(self, tensor: Any) -> Any:
        return None if tensor is None else tensor.to(self.trial.device)

    def _refuse_stale(self, sent: Sent) -> None:
        rows = self._on(torch.zeros(self._shape(self.case.hidden), dtype=self.buffer.config.dtype))
        what = f"round {sent.round}: a handle that was overwritten"
        self.checks.refused(lambda: self.buffer.combine(rows, sent.handle), StaleHandleError, what)
        x = self._on(sent.sheet.xs[self.trial.rank])
        again = self._payload(x, sent.sheet)
        self.checks.refused(lambda: self.buffer.dispatch(again, handle=sent.handle), StaleHandleError, what)

    def _shape(self, *row: int) -> tuple[int, ...]:
        local = len(self.trial.placement.experts_of_rank[self.trial.rank])
        return (local, self.trial.world_size * self.most, *row)

    def _payload(self, x: Tensor, sheet: Sheet) -> Any:
        return x if sheet.scales is None else (x, self._on(sheet.scales[self.trial.rank]))

    def dispatch(self, round: int, replayed: Sent | None = None) -> Sent:
        """Dispatch, or replay with another payload, and compare what came."""
        rank = self.trial.rank
        sheet = self.trial.sheet(round, replayed is not None)
        spec = _OUT_SPECS[round % len(_OUT_SPECS)] if self.quantises else None
        what = f"round {round}: padded {'dispatch' if replayed is None else 'replay'}, quant {spec}"
        given: dict[str, Any] = {"quant": spec}
        if replayed is None:
            idx = self._on(sheet.topk_idxs[rank])
            given |= {"layout": "padded", "topk_idx": idx.t().contiguous().t() if round % 3 == 1 else idx}
            weights = None if sheet.topk_weights is None else sheet.topk_weights[rank]
            given |= {"topk_weights": self._on(weights)}
        else:
            given["handle"] = pytree.tree_map(lambda t: t, replayed.handle)
        if round % 4 == 1 and spec is None and sheet.scales is None:
            given["out"] = self._on(torch.empty(self._shape(self.case.hidden), dtype=self.case.dtype))
        self.trial.be_late(round)
        x = self._payload(self._on(sheet.xs[rank].clone()), sheet)
        out: Any = self.buffer.dispatch_async(x, **given).wait() if round % 2 else self.buffer.dispatch(x, **given)
        should = sheet.expected[rank]
        places, ranges = reference.padded_places(should, self.trial.world_size, self.most)
        self.checks.bitwise(out.ranges.cpu(), ranges, f"{what}: ranges")
        self.checks.bitwise(out.expert_counts_L.cpu(), should.tokens_per_expert, f"{what}: expert_counts_L")
        wanted = [should.x] if should.scales is None else [should.x, should.scales]
        if spec is not None:
            wanted = quantised(self.case, self.trial.world_size, rank, round, replayed is not None, spec)
            if spec.column_major and out.x[1].numel():
                self.checks.equal(out.x[1].stride(1), 1, f"{what}: stride of scales from row to row")
        self._compare(out.x, wanted, places, what)
        return Sent(round, out.handle, sheet, places)

    def _compare(self, x: Any, wanted: list[Tensor], places: Tensor, what: str) -> None:
        parts = [x] if isinstance(x, Tensor) else list(x)
        for name, part, rows in zip(("x", "scales")[: len(wanted)], parts, wanted, strict=True):
            came = part.view(torch.uint8) if part.itemsize == 1 else part  # of which torch has no index operator
            rows = rows.view(torch.uint8) if part.itemsize == 1 else rows
            self.checks.bitwise(came.cpu().flatten(0, 1)[places], rows, f"{what}: {name}")

    def combine(self, sent: Sent, variant: int) -> None:
        """Combine made-up expert rows; `variant` chooses weights, bias, memory, format and the kind of call."""
        rank, sheet = self.trial.rank, sent.sheet
        if not self.trial.sums:
            raw = self._on(torch.zeros(self._shape(self.case.hidden), dtype=self.case.dtype))
            self.checks.refused(lambda: self.buffer.combine(raw, sent.handle), UnsupportedError, "sum of bytes")
            return
        spec = _HOME_SPECS[variant % len(_HOME_SPECS)] if self.quantises else None
        what = f"round {sent.round}: padded combine, variant {variant}, quant {spec}"
        tokens, seed = len(sheet.xs[rank]), sent.round + variant
        rows = values(self.case, "rows", rank, seed, len(sheet.expected[rank].x))
        bias = values(self.case, "bias", rank, seed, tokens) if variant % 2 else None
        weighted = (None, True, False)[variant % 3]
        if spec is not None and spec == "logfmt10" and self.by_kernels:
            raw = self._on(torch.zeros(self._shape(self.case.hidden), dtype=self.case.combine_dtype))
            call = self.buffer.combine
            self.checks.refused(lambda: call(raw, sent.handle, quant="logfmt10"), UnsupportedError, what)
            spec = "fp8"
        if variant % 4 == 2:
            mine = self.buffer.combine_input(sent.handle)
        else:
            mine = self._on(torch.empty(self._shape(self.case.hidden), dtype=self.case.combine_dtype))
        mine.fill_(float("nan")).flatten(0, 1)[self._on(sent.places)] = self._on(rows)
        y = self._on(torch.empty(tokens, self.case.hidden, dtype=self.case.combine_dtype)) if variant % 5 == 3 else None
        start = None if bias is None else self._on(bias.clone())
        self.trial.be_late(variant)
        given: dict[str, Any] = {"weighted": weighted, "bias": start, "quant": spec, "out": y}
        if variant % 2:
            came = self.buffer.combine_async(mine, sent.handle, **given).wait()
        else:
            came = self.buffer.combine(mine, sent.handle, **given)
        if y is not None:
            self.checks.equal(came.data_ptr(), y.data_ptr(), f"{what}: where the result lies")
        should = self.trial.expected("rows", sent.round, seed, weighted=weighted, has_bias=bias is not None, quant=spec)
        self.checks.bitwise(came.cpu(), should, what, origin=lambda row: f"token {row}")
