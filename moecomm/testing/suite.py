"""The public conformance suite: prove the library on your own machines before trusting it, and get one page about it.

    torchrun --nproc-per-node 4 -m moecomm conformance --minutes 10

Every transport that works there runs all named cases, then random ones until the time is up; each compares copies and
sums bit for bit with the oracle, and gradients against float64. Payloads say where every row comes from.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import moecomm
from moecomm.errors import ConfigError, MoECommError
from moecomm.group import Group
from moecomm.testing.cases import CASES, Case, random_case
from moecomm.testing.conformance import ConformanceResult, run_conformance
from moecomm.transport import TRANSPORTS

__all__ = ["SuiteReport", "run_suite"]

_SHOWN_FAILURES = 10


@dataclass(kw_only=True)
class SuiteReport:
    """What ran on all ranks, and what came of it.

    Attributes:
        results: one per rank, transport, case, layout and reduce.
        not_here: transport -> why it does not work here.
        left_out: named cases for which there was no time, per transport.
        broken: transport -> the case after which it was given up.
        seconds: it took.
        environment: what it ran on.
        seed: of the first random case.

    >>> report = run_suite(minutes=0.001, transports=["local"], rounds=1)
    >>> report.ok, len(report.results) > 0, "0 failed" in report.page()
    (True, True, True)
    """

    results: list[ConformanceResult] = field(default_factory=list)
    not_here: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def failures(self) -> list[ConformanceResult]:
        """The results that are not right, those that say why before those that were not run."""
        return sorted((r for r in self.results if not r.ok), key=lambda r: r.message.startswith("not run"))

    @property
    def ok(self) -> bool:
        """Whether something ran, and all of it was right."""
        return bool(self.results) and not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self) | {"ok": self.ok}

    def page(self) -> str:
        """One page: what ran, what failed and where first, on what."""
        size = max((r.world_size for r in self.results), default=0)
        lines = [f"conformance on {size} rank{'s' * (size != 1)}, {self.seconds:.0f} s, seed {self.seed}"]
        lines += [f"  {name:10} {value}" for name, value in self.environment.items()]
        lines.append("")
        for name in dict.fromkeys(r.transport for r in self.results):
            mine = [r for r in self.results if r.transport == name]
            cases, bad = {r.case for r in mine}, sum(not r.ok for r in mine)
            layouts = "+".join(sorted({r.layout for r in mine}))
            num_random = sum(case.startswith("random_") for case in cases)
            line = f"{name:13} {len(cases)} cases ({num_random} random) x layout {layouts} x reduce rank+source: "
            line += f"{sum(r.num_checks for r in mine)} checks, {bad} failed"
            line += f"; no time for {self.left_out[name]} named cases" if self.left_out.get(name) else ""
            lines.append(line + (f"; given up after {self.broken[name]}" if name in self.broken else ""))
        lines += [f"{name:13} not here: {why}" for name, why in self.not_here.items()]
        if self.failures:
            lines += ["", f"{len(self.failures)} failed; the first wrong place of each:"]
        for result in self.failures[:_SHOWN_FAILURES]:
            where = f"{result.transport}, {result.case}, layout {result.layout}, reduce {result.reduce}"
            lines += [f"  rank {result.rank}, {where}:", f"    {_first_place(result.message)}"]
        lines += ["", "right" if self.ok else "WRONG" if self.results else "NOTHING RAN"]
        return "\n".join(lines)


def _first_place(message: str) -> str:
    """The sentence that names the first wrong coordinate, or the last line of a traceback."""
    lines = message.strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def run_suite(
    group: object = None,
    *,
    minutes: float = 10.0,
    transports: Sequence[str] | None = None,
    cases: Iterable[Case] | None = None,
    rounds: int = 3,
    seed: int = 0,
    check: str | None = None,
    timeout_s: float = 60.0,
) -> SuiteReport:
    """Run the suite; collective, every rank calls it with the same arguments and gets the same report.

    Args:
        group: what `moecomm.Buffer` takes.
        minutes: time for everything, in equal parts for the transports; what has begun is finished.
        transports: names; None: all that work here.
        cases: what to run first; None: all named ones. Random ones follow.
        rounds: routings per case.
        seed: of the first random case.
        check: what `moecomm.Buffer` takes.
        timeout_s: deadline of every wait in seconds.

    Returns:
        SuiteReport; `page()` is for reading, `ok` for scripts.

    Raises:
        ConfigError: minutes, rounds or seed are no such numbers, or a transport is unknown.

    >>> run_suite(minutes=0.001, transports=["local"], cases=[CASES["plain"]], rounds=1).page().splitlines()[-1]
    'right'
    """
    together, start = Group.resolve(group), time.monotonic()
    _demand("minutes", minutes, "a positive number", isinstance(minutes, (int, float)) and 0 < minutes < math.inf)
    _demand("rounds", rounds, "at least 1", isinstance(rounds, int) and rounds > 0)
    _demand("seed", seed, "an integer from 0 to 2**62", isinstance(seed, int) and 0 <= seed <= 1 << 62)
    report = SuiteReport(environment=_environment(together), seed=seed)
    named = list(CASES.values() if cases is None else cases)
    names = list(TRANSPORTS) if transports is None else list(transports)
    if transports is None:
        for name in names:
            if why := _why_not(name, group, timeout_s):
                report.not_here[name] = why
        names = [name for name in names if name not in report.not_here]
    for turn, name in enumerate(names):
        end = start + 60 * minutes * (turn + 1) / len(names)
        num_run = 0
        for case in _cases(named, seed):
            if num_run and not together.broadcast_object(time.monotonic() < end):
                break
            num_run += 1
            mine = run_conformance(group, name, [case], rounds=rounds, check=check, timeout_s=timeout_s)
            told = together.all_gather_object(mine, operation=f"results of {case.name}")
            report.results += [result for of_rank in told for result in of_rank]
            if any("Traceback" in result.message for of_rank in told for result in of_rank):
                report.broken[name] = case.name  # an exception: what follows would tell nothing new
                break
        report.left_out[name] = max(0, len(named) - num_run)
    report.seconds = together.broadcast_object(time.monotonic() - start)
    return report


def _demand(name: str, got: object, expected: str, is_right: bool) -> None:
    """Refuse an argument under which little or nothing would run, or run for ever."""
    if not is_right or isinstance(got, bool):
        remedy = f"correct {name}"
        raise ConfigError(f"{name} does not fit", got=repr(got), expected=expected, remedy=remedy, operation="suite")


def _cases(named: Sequence[Case], seed: int) -> Iterator[Case]:
    """The named ones, then random ones without an end."""
    return itertools.chain(named, (random_case(number) for number in itertools.count(seed)))


def _why_not(name: str, group: object, timeout_s: float) -> str:
    """The reason why a transport does not work here, or nothing; all ranks ask together."""
    shape: dict[str, Any] = {"num_experts": 1, "hidden": 1, "top_k": 1, "max_tokens_per_rank": 1}
    try:
        moecomm.Buffer(group, **shape, transport=name, timeout_s=timeout_s).close()
    except MoECommError as error:
        return f"{error.got or error.what}".removeprefix(f"{name}: ")
    return ""


def _environment(group: Group) -> dict[str, str]:
    hosts = group.all_gather_object(f"{platform.node()} ({os.cpu_count()} cores)")
    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None else f"{accelerator.type} {torch.cuda.get_device_name()}"
    return {
        "moecomm": moecomm.__version__,
        "torch": torch.__version__,
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "device": device,
        "hosts": ", ".join(dict.fromkeys(hosts)),
    }
