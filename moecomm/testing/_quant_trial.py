"""Quantised rows in the layouts without padding slots: one dispatch, and one combine where rows go home one by one."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from moecomm.errors import CapacityError, UnsupportedError
from moecomm.quant import QuantSpec, quantize
from moecomm.testing._oracle import values
from moecomm.testing._trial import Trial

_SPECS = (
    QuantSpec(),
    QuantSpec(format="int8"),
    QuantSpec(format="logfmt10"),
    QuantSpec(scales="power_of_two", column_major=True),
    QuantSpec(scales="ue8m0"),
)


def try_quantised(trial: Trial, round: int) -> None:
    """Dispatch with `quant=` and compare the bytes; each case, layout and way to reduce has its own format."""
    case, buffer, sheet = trial.case, trial.buffer, trial.sheet(round)
    turn = zlib.crc32(f"{case.name}/{trial.layout}/{trial.reduce}".encode()) + round
    spec = _SPECS[turn % len(_SPECS)]
    what = f"round {round}: dispatch, quant {spec}"
    idx, weights = sheet.topk_idxs[trial.rank], None if sheet.topk_weights is None else sheet.topk_weights[trial.rank]
    given: dict[str, Any] = {"layout": trial.layout, "align": trial.align, "quant": spec}
    args: Any = [None if t is None else t.clone().to(trial.device) for t in (sheet.xs[trial.rank], idx, weights)]
    sizes = [part.shape[1] * part.element_size() for part in quantize(sheet.xs[trial.rank], spec)]
    if sum(sizes) > buffer.config.row_bytes:  # of a few elements: scales take more than was saved
        trial.checks.refused(lambda: buffer.dispatch(*args, **given), CapacityError, what)
        return
    trial.be_late(round)
    out: Any = buffer.dispatch(*args, **given)
    should = sheet.expected[trial.rank]
    is_row = should.source_rank >= 0
    for name, came, wanted in zip(("codes", "scales"), out.x, quantize(should.x, spec), strict=True):
        trial.checks.bitwise(_bytes(came)[is_row], _bytes(wanted)[is_row], f"{what}: {name}")
        trial.checks.equal(int(_bytes(came)[~is_row].count_nonzero()), 0, f"{what}: {name} of padding that are not 0")
    if trial.layout == "expert" and trial.reduce == "source":
        _combine(trial, round, out.handle, spec)


def _combine(trial: Trial, round: int, handle: Any, spec: QuantSpec) -> None:
    """Rows that go home one by one, quantised on the way."""
    sheet, case = trial.sheet(round), trial.case
    what = f"round {round}: combine, quant {spec}"
    mine = values(case, "rows", trial.rank, round, len(sheet.expected[trial.rank].x)).clone().to(trial.device)
    if trial.by_kernels:
        trial.checks.refused(lambda: trial.buffer.combine(mine, handle, quant=spec), UnsupportedError, what)
        return
    y = trial.buffer.combine(mine, handle, quant=spec)
    should = trial.expected("rows", round, round, weighted=None, quant=spec)
    trial.checks.bitwise(y, should, what, origin=lambda row: f"token {row}")


def _bytes(tensor: Tensor) -> Tensor:
    """(N, bytes) of (N, ...) rows; torch has no index operator for some dtypes."""
    rows = tensor.cpu().contiguous()
    return rows.flatten(1).view(torch.uint8) if rows.numel() else torch.empty(len(rows), 0, dtype=torch.uint8)
