"""Two batches at once: while the rows of one travel, the other computes.

A batch is a generator that yields what it has started, and is sent the result when it is needed:

    def layer(buffer, x, router, experts):
        out = yield "dispatch", buffer.dispatch_async(x, *router(x))
        return (yield "combine", buffer.combine_async(experts(out), out.handle))

`interleave` runs each batch up to its next yield, in turns, and waits for a result only when it is needed. It knows
nothing of layouts, so it serves decoding, prefill and the forward pass of training alike. Batches take their turns in
the same order on every rank, so operations start in the same order everywhere. In layout "padded" two batches may be
under way, one for each generation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from moecomm.handle import Pending

T = TypeVar("T")

Batch = Generator[tuple[str, Pending[Any]], Any, T]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stretch of a batch. kind: "compute", "wait" (for a result), or "travel" (started, and not yet asked for).

    begin_s, end_s: on the clock of `time.monotonic`, the same for all processes of a host.
    """

    batch: int
    name: str
    kind: str
    begin_s: float
    end_s: float


@final
class Timeline:
    """What happened when, and what it says of overlap.

    >>> timeline = Timeline()
    >>> timeline.add(batch=0, name="dispatch", kind="travel", begin_s=0.0, end_s=3.0)
    >>> timeline.add(batch=0, name="dispatch", kind="wait", begin_s=3.0, end_s=4.0)
    >>> timeline.hidden_share
    0.75
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, **span: Any) -> None:
        """Note a span; its fields by name."""
        self.spans.append(Span(**span))

    def total_s(self, kind: str) -> float:
        """Seconds of all spans of a kind."""
        return sum(span.end_s - span.begin_s for span in self.spans if span.kind == kind)

    @property
    def hidden_share(self) -> float:
        """Of the time from the start of an exchange to its result, the part in which this rank did something else."""
        travelled, waited = self.total_s("travel"), self.total_s("wait")
        return travelled / (travelled + waited) if travelled + waited else 0.0

    def write_trace(self, path: Path, rank: int = 0) -> None:
        """Write a trace that https://ui.perfetto.dev opens: one track per batch and one for what travels."""
        first = min((span.begin_s for span in self.spans), default=0.0)
        events = [
            {
                "name": span.name,
                "cat": span.kind,
                "ph": "X",
                "ts": 1e6 * (span.begin_s - first),
                "dur": 1e6 * (span.end_s - span.begin_s),
                "pid": rank,
                "tid": f"batch {span.batch}{' travels' if span.kind == 'travel' else ''}",
                "args": asdict(span),
            }
            for span in self.spans
        ]
        path.write_text(json.dumps({"traceEvents": events}))


def interleave(batches: Iterable[Batch[T]], timeline: Timeline | None = None, *, in_turns: bool = True) -> list[T]:
    """Run batches in turns until all have ended.

    Args:
        batches: generators as in the module's text, in the same order on every rank.
        timeline: what to note times in.
        in_turns: False runs one after the other instead, to compare.

    Returns:
        What each batch returned.

    >>> def batch(name):
    ...     number = yield "exchange", Pending(lambda: len(name))
    ...     return name, number
    >>> interleave([batch("a"), batch("bb")])
    [('a', 1), ('bb', 2)]
    """
    runs = [_Run(number, batch, timeline) for number, batch in enumerate(batches)]
    waiting = list(runs)
    while waiting:
        if not in_turns:
            while waiting[0].advance():
                pass
            waiting.pop(0)
            continue
        waiting = [run for run in waiting if run.advance()]
    return [run.result for run in runs]


class _Run:
    """One batch, and where it stands."""

    def __init__(self, number: int, batch: Batch[Any], timeline: Timeline | None) -> None:
        self._number, self._batch, self._timeline = number, batch, timeline
        self._pending: Pending[Any] | None = None
        self._name, self._since = "", 0.0
        self.result: Any = None

    def advance(self) -> bool:
        """Take the result that was started last, and go on to the next one; False at the end."""
        value, asked = None, time.monotonic()
        if self._pending is not None:
            value = self._pending.wait()
            self._note(self._name, "travel", self._since, asked)
            self._note(self._name, "wait", asked, time.monotonic())
        begin, after = time.monotonic(), self._name
        try:
            self._name, self._pending = self._batch.send(value)
        except StopIteration as end:
            self.result = end.value
            return False
        finally:
            self._note(f"after {after}" if after else "start", "compute", begin, time.monotonic())
        self._since = time.monotonic()
        return True

    def _note(self, name: str, kind: str, begin_s: float, end_s: float) -> None:
        if self._timeline is not None:
            self._timeline.add(batch=self._number, name=name, kind=kind, begin_s=begin_s, end_s=end_s)


def split(batch: Sequence[Any], step: Callable[[Any], Batch[T]], timeline: Timeline | None = None) -> list[T]:
    """Run one step on each part of a batch, two parts at a time.

    >>> def step(part):
    ...     doubled = yield "exchange", Pending(lambda: 2 * part)
    ...     return doubled
    >>> split([1, 2, 3], step)
    [2, 4, 6]
    """
    results: list[T] = []
    for at in range(0, len(batch), 2):
        results += interleave([step(part) for part in batch[at : at + 2]], timeline)
    return results
