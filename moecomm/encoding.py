"""Quantising what is dispatched, before it is sent, and what goes with it after it arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moecomm.checks import FLOAT_DTYPES, Checker
from moecomm.core import Core
from moecomm.errors import ConfigError, UnsupportedError
from moecomm.handle import Dispatched
from moecomm.quant import QuantSpec, by_columns, quantize


def spec_of(quant: Any, check: Checker) -> QuantSpec | None:
    """What the argument `quant` asks for."""
    try:
        return None if quant is None else QuantSpec.of(quant)
    except ConfigError as error:
        raise check.error(
            ConfigError, error.what, got=error.got, expected=error.expected, remedy="correct quant"
        ) from None


def encoded(payloads: Sequence[Tensor], spec: QuantSpec | None, check: Checker) -> tuple[Tensor, ...]:
    """The pair (codes, scales) of rows; what was already a pair stays as it is."""
    if spec is None or len(payloads) == 2:
        return tuple(payloads)
    refuse_encoding(payloads, check)
    return quantize(payloads[0], spec)


def refuse_encoding(payloads: Sequence[Tensor], check: Checker) -> None:
    """Refuse rows that cannot be quantised, unless they are already."""
    if len(payloads) == 2:
        return
    rows = payloads[0]
    if rows.dtype not in FLOAT_DTYPES:
        what, expected = "rows of this dtype cannot be quantised", "float32, float16 or bfloat16"
        remedy = "leave quant out, or build the buffer with one of those"
        raise check.error(UnsupportedError, what, got=rows.dtype, expected=expected, remedy=remedy)
    refuse_gradient("quantised rows have no gradient", check, rows)


def refuse_gradient(what: str, check: Checker, *tensors: Tensor) -> None:
    """Refuse tensors whose gradient would get lost."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        remedy = "detach the tensor, use torch.no_grad(), or another layout without quant"
        raise check.error(UnsupportedError, what, got="one that requires grad", expected="none", remedy=remedy)


def only_padded(check: Checker, **given: Any) -> None:
    """Refuse options that only layout "padded" has."""
    for name, value in given.items():
        if value is not None:
            what, remedy = f'{name} is for layout "padded" here', f"leave {name} away, or dispatch in that layout"
            raise check.error(UnsupportedError, what, got=f"a {type(value).__name__}", expected="None", remedy=remedy)


def home_spec(quant: Any, core: Core, check: Checker, layout: str) -> QuantSpec | None:
    """What `quant` of a combine asks for; refused where rows are summed before they go home."""
    by_entry = layout == "expert" and core.reduce == "source" and core.fused is None
    if not by_entry:
        what = "quant is for rows that go home one by one"
        got = f"layout {layout!r}, reduce={core.reduce!r}" + ("" if core.fused is None else ", rows moved by kernels")
        expected = 'layout "padded", or "expert" with reduce="source" where no kernels move rows'
        raise check.error(UnsupportedError, what, got=got, expected=expected, remedy="leave quant away")
    return spec_of(quant, check)


def refuse_tracing_or_gradient(check: Checker, can_start: bool, *tensors: Tensor | None) -> None:
    """Refuse quantised rows where something would want to look inside."""
    if not can_start:
        what, remedy = "quantised rows cannot be traced", "leave quant away, or run this outside of torch.compile"
        raise check.error(UnsupportedError, what, got="a traced combine", expected="plain tensors", remedy=remedy)
    refuse_gradient("quantised rows have no gradient", check, *(t for t in tensors if t is not None))


def arranged(out: Dispatched, spec: QuantSpec | None) -> Dispatched:
    """Put scales in the order in memory that was asked for."""
    if spec is None or not spec.column_major:
        return out
    codes, scales = out.x
    return replace(out, x=(codes, by_columns(scales)))
