"""Conformance: drive a `Buffer` through the named cases and compare everything it gives with the oracle.

Runs inside every rank of a group. Each rank makes the inputs of all ranks for itself, so nothing is communicated but
what is under test. Copies and sums are compared bit for bit, gradients against float64 and a same-dtype baseline.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moecomm
from moecomm.errors import MoECommError, UnsupportedError
from moecomm.group import Group
from moecomm.testing._padded_trial import PaddedTrial
from moecomm.testing._trial import Checks, Sent, Trial
from moecomm.testing.cases import Case

__all__ = ["ConformanceResult", "run_conformance"]

_SHOWN_FAILURES = 3
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
    is, padding rows come back poisoned and must not matter, results are kept and must not change later. Layout "padded"
    has rounds of its own: every way to quantise, the older of two live handles, overwritten ones refused.

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
    results: list[ConformanceResult] = []
    broken = False
    for case, reduce, layout in itertools.product(cases, reduces, layouts):
        if layout == "padded" and reduce != reduces[0]:
            continue  # which always sums at the source
        checks = Checks()
        world_size = rank = -1
        if broken:
            checks.failures.append(_NOT_RUN)
        else:
            buffer = None
            try:
                buffer = _build(case, group, transport, reduce, timeout_s, {"check": check, **(options or {})})
                world_size, rank = buffer.group.size, buffer.group.rank
                _run(case, buffer, layout, reduce, rounds, checks)
            except Exception as error:
                if buffer is None and not results and isinstance(error, MoECommError):
                    raise  # no case has begun: what was asked for does not exist here
                checks.failures.append(traceback.format_exc())
                broken = True
            finally:
                if buffer is not None:
                    buffer.close()
        results.append(
            ConformanceResult(
                case=case.name,
                transport=transport,
                layout=layout,
                reduce=reduce,
                world_size=world_size,
                rank=rank,
                ok=not checks.failures,
                num_checks=checks.count,
                message="\n".join(checks.failures[:_SHOWN_FAILURES]),
            )
        )
    return results


def _build(
    case: Case, group: object, transport: str, reduce: str, timeout_s: float, options: Mapping[str, Any]
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


def _run(case: Case, buffer: moecomm.Buffer, layout: str, reduce: str, rounds: int, checks: Checks) -> None:
    trial = Trial(case, buffer, layout, reduce, checks)
    if layout == "rank" and reduce == "source":
        sheet = trial.sheet(0)
        x, idx = sheet.xs[trial.rank], sheet.topk_idxs[trial.rank]
        checks.refused(
            lambda: buffer.dispatch(x, idx, layout=layout), UnsupportedError, 'layout "rank", reduce "source"'
        )
        return
    if layout == "padded":
        PaddedTrial(trial, checks).run(rounds)
        return
    earlier: Sent | None = None
    for round in range(rounds):
        now = trial.dispatch(round)
        trial.replay(now)
        if earlier is not None:
            trial.combine(earlier, variant=round + 1)
        trial.combine(now, variant=round)
        trial.backward(now)
        earlier = now
    trial.check_kept()
