"""Several sittings of one case, each with buffers of its own, spread over the run and put together as one.

The machine drifts by seconds and a buffer lies where it lies: rounds that follow each other have both in common, so
many of them in one go say little more than few. What differs between sittings is also the only honest measure of what
will differ between two runs; `compare.py` stands on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from bench.record import Measurement

ROUNDS = 8  # of one sitting, unless --sittings says how many there are
_MIDDLES = ("p20_us", "p50_us", "p80_us", "p99_us", "gb_per_s", "percent_of_roof", "ratio")
_DIGITS = {"gb_per_s": 3, "percent_of_roof": 1, "ratio": 3}


def split(repeats: int, sittings: int) -> list[int]:
    """How many rounds each sitting has; sittings = 0: one for every eight rounds.

    Raises:
        ValueError: more sittings than rounds.

    >>> split(33, 0), split(7, 0), split(7, 3)
    ([9, 8, 8, 8], [7], [3, 2, 2])
    """
    sittings = sittings or max(1, repeats // ROUNDS)
    if sittings > repeats:
        raise ValueError(f"--sittings {sittings} of {repeats} rounds: give as many --repeats at least")
    return [repeats // sittings + (number < repeats % sittings) for number in range(sittings)]


def merged(sittings: Sequence[Measurement]) -> Measurement:
    """One row of the rows that sittings have for the same path and operation: their middle, and how sure it is.

    So one sitting that something disturbed moves no number; it shows in how sure they are.

    >>> from bench.record import example
    >>> row = merged([example(p50_us=us, ratio=200 / us) for us in (95.0, 100.0, 105.0)])
    >>> row.p50_us, row.ratio, row.iterations, row.sittings, row.p50_noise
    (100.0, 2.003, 75, 3, 0.0289)
    """
    first = sittings[0]
    if len(sittings) == 1:
        return first
    of_all = {name: [getattr(row, name) for row in sittings] for name in _MIDDLES}
    known = [name for name in _MIDDLES if None not in of_all[name]]
    middles: dict[str, Any] = {name: round(middle(of_all[name]), _DIGITS.get(name, 2)) for name in known}
    peaks = [row.peak_memory_bytes for row in sittings if row.peak_memory_bytes is not None]
    return replace(
        first,
        **middles,
        iterations=sum(row.iterations for row in sittings),
        sittings=len(sittings),
        p50_noise=_noise(of_all["p50_us"]),
        ratio_noise=_noise(of_all["ratio"]) if "ratio" in middles else None,
        peak_memory_bytes=max(peaks, default=None),
        extras={name: _mean([row.extras.get(name) for row in sittings]) for name in first.extras},
    )


def middle(values: Sequence[float]) -> float:
    """The mean without the highest and the lowest quarter.

    >>> middle([1.0, 2.0, 3.0, 99.0])
    2.5
    """
    dropped = len(values) // 4
    return fmean(sorted(values)[dropped : len(values) - dropped])


def _noise(values: Sequence[float]) -> float:
    """Standard error of the mean of all, over their middle."""
    return round(stdev(values) / sqrt(len(values)) / middle(values), 4)


def _mean(values: Sequence[float | str | None]) -> float | str | None:
    """The mean of numbers; what is none stays as the first sitting has it."""
    numbers = [value for value in values if isinstance(value, int | float)]
    return round(fmean(numbers), 2) if len(numbers) == len(values) else values[0]
