"""Faults planted on purpose, to see that conformance finds them: a suite that cannot fail proves nothing.

Each is what a real implementation got wrong once, put between the buffer and its transport, or into a sum. They apply
to every transport on a CPU; `find_planted` runs a suite under each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from moecomm import operations
from moecomm.errors import StallError
from moecomm.testing.conformance import ConformanceResult
from moecomm.transport.base import Exchange, Lane, Transport

__all__ = ["PLANTED", "Planted", "find_planted"]


@dataclass(frozen=True, slots=True)
class Planted:
    """A fault: its name, what it does, and a context in which it is there."""

    name: str
    why: str
    patch: Callable[[], Any]


def find_planted(
    run: Callable[[], Sequence[ConformanceResult]], planted_ones: Sequence[Planted] | None = None
) -> dict[str, str]:
    """Run a suite under every planted fault and say how each was noticed.

    Args:
        run: gives the results of a suite, all of which must be right without a fault.
        planted_ones: the faults; None: PLANTED.

    Returns:
        Name of the fault -> the first message about it; empty for one that nobody noticed.

    Raises:
        AssertionError: the suite finds something wrong where nothing is.

    >>> from moecomm.testing import CASES
    >>> from moecomm.testing.conformance import run_conformance
    >>> cases = [CASES["masked"], CASES["float32_payload"]]  # float32, as other dtypes round away the order of a sum
    >>> found = find_planted(lambda: run_conformance(None, "local", cases, rounds=2, reduces=["rank"]))
    >>> [name for name, message in found.items() if not message]
    []
    """
    wrong = [result.message for result in run() if not result.ok]
    assert not wrong, f"wrong without any fault: {wrong[0]}"
    found = {}
    for planted in PLANTED if planted_ones is None else planted_ones:
        with planted.patch():
            messages = [result.message for result in run() if not result.ok]
        found[planted.name] = next(iter(messages), "")
    return found


class _Saboteur(Exchange):
    """An exchange between a buffer and the real one."""

    def __init__(self, inner: Exchange, lanes: Sequence[Lane], rank: int) -> None:
        self.inner, self.lanes, self.rank = inner, lanes, rank
        self._out: list[Tensor] | None = None

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        self.inner.put(lane, dst, src, index)

    def target(self, lane: int, dst: int) -> Tensor:
        return self.inner.target(lane, dst)

    def commit(self) -> None:
        self.inner.commit()

    def wait(self) -> list[Tensor]:
        if self._out is None:
            self._out = [rows.clone() for rows in self.inner.wait()]
            if len(self._out[0]):
                self.spoil(self._out[0])
        return self._out

    def own(self, lane: int) -> Tensor:
        return self.wait()[lane]

    def release(self) -> None:
        self.inner.release()

    def spoil(self, rows: Tensor) -> None:
        """Do what the fault does to the (N, row_bytes) rows that arrived."""


class _Swapped(_Saboteur):
    def spoil(self, rows: Tensor) -> None:
        rows[[0, -1]] = rows[[-1, 0]]


class _Stale(_Saboteur):
    before: ClassVar[dict[tuple[int, int], Tensor]] = {}

    def spoil(self, rows: Tensor) -> None:
        key = self.rank, rows.shape[1]
        old, _Stale.before[key] = self.before.get(key), rows.clone()
        if old is not None:
            rows[0] = old[0]


class _OffByOne(_Saboteur):
    def spoil(self, rows: Tensor) -> None:
        rows.copy_(rows.roll(1, 0))


class _NoLastByte(_Saboteur):
    def spoil(self, rows: Tensor) -> None:
        rows[-1, -1:] ^= 0xFF


class _Torn(_Saboteur):
    def spoil(self, rows: Tensor) -> None:
        half = rows.shape[1] // 2
        rows[0, half:] = rows[-1, half:] if len(rows) > 1 else 0


class _Early(_Saboteur):
    """Looks before the last rank has written."""

    def spoil(self, rows: Tensor) -> None:
        lane = self.lanes[0]
        count = int(lane.recv_counts[-1])
        total = int(lane.recv_counts.sum())
        slots = np.arange(total) if lane.recv_slots is None else lane.recv_slots()
        rows[torch.from_numpy(slots[total - count :])] = 255


class _NeverSent(_Saboteur):
    """Rank 0 never says that it is done; where there are no others, its own wait is the one that fails."""

    def commit(self) -> None:
        if self.rank:
            self.inner.commit()

    def wait(self) -> list[Tensor]:
        if len(self.lanes[0].recv_counts) == 1:
            raise StallError("gave up waiting for a signal that was lost", rank=self.rank, operation="dispatch")
        return super().wait()


class _WrongLane(_Saboteur):
    """The tables that lead rows home are those of another token."""

    def wait(self) -> list[Tensor]:
        out = super().wait()
        if len(out) > 1 and len(out[-1]) > 1:
            out[-1].copy_(out[-1].roll(1, 0))
        return out

    def spoil(self, rows: Tensor) -> None: ...


def _through(kind: type[_Saboteur]) -> Callable[[], Any]:
    """Put a saboteur into every transport."""

    @contextmanager
    def patch() -> Iterator[None]:
        with ExitStack() as stack:
            for cls in _transports(Transport):
                stack.enter_context(mock.patch.object(cls, "open", _opener(cls.open, kind)))
            yield

    return patch


def _opener(real: Any, kind: type[_Saboteur]) -> Any:
    def open(self: Transport, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        return kind(real(self, tag, lanes, agreed=agreed), lanes, self.group.rank)

    return open


def _transports(base: Any) -> Iterator[type[Transport]]:
    for cls in base.__subclasses__():
        yield from _transports(cls)
        if "open" in vars(cls):
            yield cls


Sum = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Any]


def _in_sums(change: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> Callable[[], Any]:
    """Change what goes into every sum: rows, table, weights, bias."""
    real = operations.reduce_rows

    def broken(out: Tensor, rows: Tensor, table: Tensor, weights: Any = None, bias: Any = None) -> None:
        real(out, *change(rows, table, weights, bias))

    @contextmanager
    def patch() -> Iterator[None]:
        with (
            mock.patch.object(operations, "reduce_rows", broken),
            mock.patch.object(operations, "can_scatter", lambda *_: False),
        ):
            yield

    return patch


def _cast(rows: Tensor) -> Tensor:
    return rows.to(torch.float8_e5m2).to(rows.dtype)


def _rolled(weights: Tensor | None) -> Tensor | None:
    return None if weights is None or not weights.numel() else weights.roll(1)


PLANTED: tuple[Planted, ...] = (
    Planted("swapped rows", "two rows of one output change places", _through(_Swapped)),
    Planted("stale generation", "a row of the operation before is still there", _through(_Stale)),
    Planted("lost signal", "a rank waits for what was never announced", _through(_NeverSent)),
    Planted("off-by-one slot", "every row lies one place too far", _through(_OffByOne)),
    Planted("dropped last byte", "the end of the last row is missing", _through(_NoLastByte)),
    Planted("torn row", "half of a row is of another one", _through(_Torn)),
    Planted("early signal", "rows are read before the last rank has written them", _through(_Early)),
    Planted("wrong table", "what leads rows home belongs to the next token", _through(_WrongLane)),
    Planted(
        "wrong reduce order", "sums run from the last to the first", _in_sums(lambda r, t, w, b: (r, t.flip(1), w, b))
    ),
    Planted("double add", "a row counts twice", _in_sums(lambda r, t, w, b: (r, torch.cat([t, t[:, :1]], 1), w, b))),
    Planted("wrong weight", "weights belong to the neighbour", _in_sums(lambda r, t, w, b: (r, t, _rolled(w), b))),
    Planted("ignored -1", "no expert is taken for expert 0", _in_sums(lambda r, t, w, b: (r, t.clamp(min=0), w, b))),
    Planted("wrong dtype cast", "rows pass through a narrower dtype", _in_sums(lambda r, t, w, b: (_cast(r), t, w, b))),
    Planted("lost bias", "sums do not begin with the bias", _in_sums(lambda r, t, w, b: (r, t, w, None))),
)
