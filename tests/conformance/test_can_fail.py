"""Break a buffer in one way at a time, and see that conformance notices and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.testing import CASES
from moecomm.testing.conformance import ConformanceResult, run_conformance

Call = Callable[..., Any]
Sabotage = Callable[[Call], Call]


def after(change: Callable[[Any], Any]) -> Sabotage:
    """Change what the call returns."""
    return lambda call: lambda *args, **options: change(call(*args, **options))


def with_rows(change: Callable[[Tensor], Tensor]) -> Sabotage:
    """Change the rows that a dispatch returns, but for quantised ones."""
    return after(lambda out: replace(out, x=change(out.x)) if isinstance(out.x, Tensor) else out)


def swap_rows(rows: Tensor) -> Tensor:
    return torch.cat([rows[1:2], rows[:1], rows[2:]]) if len(rows) > 1 else rows


def next_number(y: Tensor) -> Tensor:
    changed = y.clone()
    changed.view(torch.int16)[-1:, -1:] += 1
    return changed


def without_option(name: str) -> Sabotage:
    return lambda call: lambda *args, **options: call(*args, **{**options, name: None})


def one_area_for_all() -> Sabotage:
    """Hand out the same memory in every dispatch."""
    area = torch.empty(4096)

    def into_area(rows: Tensor) -> Tensor:
        if rows.requires_grad:
            return rows
        shared = area.view(rows.dtype)[: rows.numel()].view(rows.shape)
        return shared.copy_(rows)

    return with_rows(into_area)


def write_to_input(call: Call) -> Call:
    def broken(buffer: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        out = call(buffer, x, *args, **options)
        if not x.requires_grad:
            x[-1:] = 0
        return out

    return broken


def forget_new_payload(call: Call) -> Call:
    last: dict[str, Tensor] = {}

    def broken(*args: Any, **options: Any) -> Any:
        out = call(*args, **options)
        if options.get("handle") is not None:
            return replace(out, x=last["rows"])
        last["rows"] = out.x
        return out

    return broken


def scale_gradient(position: int, factor: float) -> Sabotage:
    """Make the gradient of a positional argument of dispatch a little wrong."""

    def sabotage(call: Call) -> Call:
        def broken(*args: Any, **options: Any) -> Any:
            if len(args) > position and isinstance(args[position], Tensor) and args[position].requires_grad:
                wrong = args[position].clone()
                wrong.register_hook(lambda gradient: gradient * factor)
                args = (*args[:position], wrong, *args[position + 1 :])
            return call(*args, **options)

        return broken

    return sabotage


def poison_padding(out: moecomm.Dispatched) -> moecomm.Dispatched:
    if not isinstance(out.x, Tensor):
        return out
    assert out.expert_offsets is not None
    rows, starts = out.x.clone(), [0, *out.expert_offsets.tolist()]
    for start, count, end in zip(starts, out.tokens_per_expert.tolist(), starts[1:], strict=False):
        rows[start + count : end] = 1
    return replace(out, x=rows)


def refuse_nothing(call: Call) -> Call:
    def broken(buffer: Any, rows: Tensor, handle: Any, **options: Any) -> Any:
        return call(buffer, rows, handle, **{**options, "weighted": None if handle.layout == "rank" else True})

    return broken


def run(case: str, layouts: tuple[str, ...] = ("expert",), rounds: int = 3) -> list[ConformanceResult]:
    return run_conformance(None, "local", [CASES[case]], rounds=rounds, layouts=layouts, reduces=["rank"])


SABOTAGES: dict[str, tuple[str, Sabotage, str, str]] = {
    "two rows change places": ("dispatch", with_rows(swap_rows), "no_weights", "dispatch: x: row 0"),
    "one sum is one unit off": ("combine", after(next_number), "plain", "combine, variant 0: row"),
    "the bias is dropped": ("combine_async", without_option("bias"), "plain", "combine, variant 1: row 0"),
    "weights are always applied": ("combine", refuse_nothing, "plain", "combine, variant 2: row"),
    "every dispatch returns the same memory": (
        "dispatch",
        one_area_for_all(),
        "plain",
        "looked at again after the last",
    ),
    "the input is written to": ("dispatch", write_to_input, "plain", "memory around and under the dispatched rows"),
    "a replay sends the old payload": ("dispatch", forget_new_payload, "plain", "replay: x: row 0"),
    "the gradient of x is 3 % off": ("dispatch", scale_gradient(1, 1.03), "top_1", "gradient of x: "),
    "the gradient of the weights is 0.1 % off": (
        "dispatch",
        scale_gradient(3, 1.001),
        "top_1",
        "gradient of topk_weights",
    ),
    "padding is not zero": ("dispatch", after(poison_padding), "aligned", "this row should be padding"),
    "counts include padding": (
        "dispatch",
        after(lambda out: replace(out, tokens_per_expert=out.expert_offsets.diff(prepend=torch.zeros(1).int()))),
        "aligned",
        "dispatch: tokens_per_expert: row 0",
    ),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, sabotage, case, message = SABOTAGES[name]
    assert [(result.ok, result.message) for result in run(case)] == [(True, "")]
    monkeypatch.setattr(moecomm.Buffer, method, sabotage(getattr(moecomm.Buffer, method)))
    (result,) = run(case)
    assert not result.ok and message in result.message


def test_an_option_that_should_be_refused_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moecomm.Buffer, "combine", refuse_nothing(moecomm.Buffer.combine))
    (result,) = run("plain", layouts=("rank",))
    assert "expected UnsupportedError, but nothing was raised" in result.message


def test_an_exception_is_a_result_and_later_cases_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of paper")

    monkeypatch.setattr(moecomm.Buffer, "combine", broken)
    first, second = run("plain", layouts=("expert", "rank"))
    assert "out of paper" in first.message and not first.ok
    assert second.message == "not run: an earlier case broke the group" and not second.ok


def test_a_transport_that_does_not_exist_is_refused() -> None:
    with pytest.raises(moecomm.ConfigError, match="transport is unknown: got 'pigeon'"):
        run_conformance(None, "pigeon", [CASES["plain"]])
