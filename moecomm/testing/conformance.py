"""Conformance: drive a `Buffer` through the named cases and compare everything it gives with the oracle.

Runs inside every rank of a group. Each rank makes the inputs of all ranks for itself, so nothing is communicated but
what is under test. Copies and sums are compared bit for bit, gradients against float64 and a same-dtype baseline.
"""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moecomm
from moecomm.errors import MoECommError, UnsupportedError
from moecomm.group import Group
from moecomm.testing._padded_trial import PaddedTrial
from moecomm.testing._quant_trial import try_quantised
from moecomm.testing._trial import Checks, Sent, Trial
from moecomm.testing.cases import Case

__all__ = ["ConformanceResult", "run_conformance", "run_in_turn"]

_SHOWN_FAILURES = 3
# Layout and way to reduce of each round in turn; what is refused, and layout "padded", have no rounds among them.
_IN_TURN = (("expert", "rank"), ("rank", "rank"), ("expert", "source"), ("rank", "source"), ("padded", "rank"))
_NOT_RUN = "not run: an earlier case broke the group"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConformanceResult:
    """What came of one case in one layout on one rank."""

    case: str
    transport: str
    layout: str
    reduce: str
    world_size: int
    rank: int
    ok: bool
    num_checks: int
    message: str


def run_conformance(
    group: object,
    transport: str,
    cases: Iterable[Case],
    *,
    rounds: int = 6,
    layouts: Sequence[str] = ("expert", "rank", "padded"),
    reduces: Sequence[str] = ("rank", "source"),
    timeout_s: float = 60.0,
    check: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[ConformanceResult]:
    """Run cases on a buffer of this transport; collective, every rank calls it with the same arguments.

    Every round has another routing and, where the case says so, other token counts. In each: dispatch, a replay of its
    handle with another payload, combine of the handle before last while the newer one lives, combine with and without
    weights and bias, all gradients. One rank is late each time. Inputs lie inside poisoned memory that must stay as it
    is, padding rows come back poisoned and must not matter, results are kept and must not change later. Once per layout
    and way to reduce rows are quantised, in another format for each case. Layout "padded" has rounds of its own: every
    way to quantise, the older of two live handles, overwritten ones refused. Copy engines must refuse it.

    Args:
        group: what `moecomm.Buffer` takes.
        transport: what `moecomm.Buffer` takes.
        cases: see `moecomm.testing.CASES`.
        rounds: calls with changing routings per case.
        layouts: of dispatch.
        reduces: of the buffer.
        timeout_s: deadline of every wait in seconds.
        check: what `moecomm.Buffer` takes.
        options: more of what `moecomm.Buffer` takes, which must not change results.

    Returns:
        One row per case, layout and reduce; ok is False if a check failed or an operation raised.

    Raises:
        MoECommError: the first buffer could not be built, for example because the transport does not work here.

    >>> from moecomm.testing import CASES
    >>> results = run_conformance(None, "local", [CASES["one_token"]], rounds=2, layouts=["rank"], reduces=["rank"])
    >>> [(result.case, result.transport, result.ok, result.message) for result in results]
    [('one_token', 'local', True, '')]
    """
    combinations = [
        [(layout, reduce)]
        for reduce, layout in itertools.product(reduces, layouts)
        if layout != "padded" or reduce == reduces[0]  # which always sums at the source
    ]
    given = {"check": check, **(options or {})}
    build = functools.partial(_build, group=group, transport=transport, timeout_s=timeout_s, options=given)
    return _run_all(cases, combinations, build, transport, rounds)


def run_in_turn(
    group: object,
    transport: str,
    cases: Iterable[Case],
    *,
    rounds: int = 6,
    layouts: Sequence[str] = ("expert", "rank", "padded"),
    timeout_s: float = 60.0,
) -> list[ConformanceResult]:
    """Run cases as `run_conformance` does, but let layouts and ways to reduce take turns: a third of the time.

    Two buffers live side by side, and each round is of the next of: layout "expert" with both ways to reduce, layout
    "rank". The handle before last, which is combined after a newer dispatch, is so of another layout or another buffer.
    Layout "padded" has all its rounds before.

    Args:
        group: what `moecomm.Buffer` takes.
        transport: what `moecomm.Buffer` takes.
        cases: see `moecomm.testing.CASES`.
        rounds: calls with changing routings per case.
        layouts: of dispatch.
        timeout_s: deadline of every wait in seconds.

    Returns:
        One row per case, in which layout and reduce are "in turn".

    Raises:
        MoECommError: the first buffer could not be built, for example because the transport does not work here.

    >>> from moecomm.testing import CASES
    >>> [(result.case, result.layout, result.ok) for result in run_in_turn(None, "local", [CASES["one_token"]])]
    [('one_token', 'in turn', True)]
    """
    combination = [(layout, reduce) for layout, reduce in _IN_TURN if layout in layouts]
    build = functools.partial(_build, group=group, transport=transport, timeout_s=timeout_s, options={})
    return _run_all(cases, [combination], build, transport, rounds)


def _run_all(
    cases: Iterable[Case],
    combinations: Sequence[Sequence[tuple[str, str]]],
    build: Callable[[Case, str], moecomm.Buffer],
    transport: str,
    rounds: int,
) -> list[ConformanceResult]:
    results: list[ConformanceResult] = []
    broken = False
    for case, combination in itertools.product(cases, combinations):
        checks = Checks()
        buffers: dict[str, moecomm.Buffer] = {}
        if broken:
            checks.failures.append(_NOT_RUN)
        else:
            try:
                for _, reduce in combination:
                    if reduce not in buffers:
                        buffers[reduce] = build(case, reduce)
                _run(case, [(layout, buffers[reduce]) for layout, reduce in combination], rounds, checks)
            except Exception as error:
                if not buffers and not results and isinstance(error, MoECommError):
                    raise  # no case has begun: what was asked for does not exist here
                checks.failures.append(traceback.format_exc())
                broken = True
            finally:
                for buffer in buffers.values():
                    buffer.close()
        layout, reduce = combination[0] if len(combination) == 1 else ("in turn", "in turn")
        group = next((buffer.group for buffer in buffers.values()), None)
        results.append(
            ConformanceResult(
                case=case.name,
                transport=transport,
                layout=layout,
                reduce=reduce,
                world_size=-1 if group is None else group.size,
                rank=-1 if group is None else group.rank,
                ok=not checks.failures,
                num_checks=checks.count,
                message="\n".join(checks.failures[:_SHOWN_FAILURES]),
            )
        )
    return results


def _build(
    case: Case, reduce: str, *, group: object, transport: str, timeout_s: float, options: Mapping[str, Any]
) -> moecomm.Buffer:
    world_size = Group.resolve(group).size
    return moecomm.Buffer(
        group,
        num_experts=case.num_experts,
        hidden=case.hidden,
        top_k=case.top_k,
        max_tokens_per_rank=case.max_tokens_per_rank,
        dtype=case.combine_dtype if case.scale_columns else case.dtype,
        transport=transport,
        placement=case.placement(world_size),
        reduce=reduce,
        timeout_s=timeout_s,
        **options,
    )


def _run(case: Case, combination: Sequence[tuple[str, moecomm.Buffer]], rounds: int, checks: Checks) -> None:
    trials = []
    for layout, buffer in combination:
        trial = Trial(case, buffer, layout, buffer.config.reduce, checks)
        by_copies = trial.by_kernels and buffer.config.engine == "copy"
        if (layout, trial.reduce) == ("rank", "source") or (layout == "padded" and by_copies):
            _refuse(trial, buffer, checks)
        elif layout == "padded":
            PaddedTrial(trial, checks, trial.by_kernels).run(rounds)
        else:
            trials.append(trial)
    earlier: tuple[Trial, Sent] | None = None
    for round in range(rounds if trials else 0):
        trial = trials[round % len(trials)]
        now = trial.dispatch(round)
        trial.replay(now)
        if earlier is not None:
            earlier[0].combine(earlier[1], variant=round + 1)
        trial.combine(now, variant=round)
        trial.backward(now)
        is_interpreted = trial.by_kernels and trial.device.type == "cpu"  # slow, and tested by itself
        if round < len(trials) and trial.has_gradients and not is_interpreted:
            try_quantised(trial, round)
        earlier = trial, now
    for trial in trials:
        trial.check_kept()


def _refuse(trial: Trial, buffer: moecomm.Buffer, checks: Checks) -> None:
    sheet = trial.sheet(0)
    x, idx = (tensors[trial.rank].to(trial.device) for tensors in (sheet.xs, sheet.topk_idxs))
    payload = x if sheet.scales is None else (x, sheet.scales[trial.rank].to(trial.device))
    what = f'layout "{trial.layout}", reduce "{trial.reduce}"'
    checks.refused(lambda: buffer.dispatch(payload, idx, layout=trial.layout), UnsupportedError, what)
