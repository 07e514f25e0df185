"""Say what changed between two result files, and fail where something got slower than noise explains.

    python bench/compare.py before.json after.json
    python bench/compare.py before.json after.json --absolute   # times instead of ratios: for one quiet machine only

Compared is `ratio`, time over that of the baseline in the same run, so that a slower machine is no regression; where a
path has no ratio, its time. How sure a number is, its sittings say: their standard deviation over the root of how many
there were, so that what drifts by seconds, and what each buffer brings along, counts (`bench/sittings.py`). A row of
one sitting has only the spread of its rounds, which knows nothing of that: for a normal distribution p20 and p80 are
1.683 standard deviations s apart, and the median of n has a standard error of 1.253 s / sqrt(n). The bound on a change
is --noise standard errors of both numbers (more where few sittings told them, as in Student's t), and --floor, for what
differs between processes, as the legs of a right triangle. A path whose noise is wider than --widest is called noisy:
repeat it longer, or leave the machine alone meanwhile.

Exit status: 0 nothing got slower; 1 something did; 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import hypot, inf, sqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import Measurement, ResultsError, read
from bench.show import print_table

_SPREAD = 1.683  # standard deviations between p20 and p80 of a normal distribution
_MEDIAN = 1.2533  # standard error of a median over that of a mean
_ROOFS = ("memcpy", "streamed copy", "experts alone", "baseline")  # what ours is held against


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One path in both files. change: time after over time before, minus 1. bound: what noise explains.

    verdict: "same", "faster", "slower" or "noisy".
    """

    case: str
    path: str
    operation: str
    metric: str
    before: float
    after: float
    change: float
    bound: float
    verdict: str


def relative_noise(row: Measurement) -> float:
    """Standard error of the median over the median.

    >>> from bench.record import example
    >>> round(relative_noise(example(p20_us=90.0, p50_us=100.0, p80_us=110.0, iterations=25)), 4)
    0.0298
    """
    return _MEDIAN * (row.p80_us - row.p20_us) / _SPREAD / sqrt(row.iterations) / row.p50_us if row.p50_us else 0.0


def _noises(row: Measurement, base: Measurement | None, is_ratio: bool) -> list[float]:
    """Relative standard errors of what makes the number that is compared."""
    told = row.ratio_noise if is_ratio else row.p50_noise
    if told is not None:
        return [told]
    return [relative_noise(one) for one in (row, base if is_ratio else None) if one is not None]


def compare(
    before: Sequence[Measurement],
    after: Sequence[Measurement],
    *,
    floor: float = 0.1,
    noise: float = 3.0,
    widest: float = 0.5,
    absolute: bool = False,
) -> list[Change]:
    """Compare the rows that both have, by benchmark, case, path, operation and transport.

    Raises:
        ResultsError: there are none, or a case has another routing in the other file, or is steady in one only.

    >>> from bench.record import example
    >>> compare([example(p50_us=100.0)], [example(p50_us=125.0)])[0].verdict
    'slower'
    """
    was, now = ({row.key: row for row in rows} for rows in (before, after))
    common = [key for key in was if key in now]
    if not common:
        cases = [sorted({f"{row.benchmark}: {row.case}" for row in rows})[:3] for rows in (before, after)]
        raise ResultsError(f"the files have no case in common: {cases[0]} and {cases[1]}; compare runs of one command")
    bases = [{row.key[:2] + row.key[3:4]: row for row in rows if row.path == "baseline"} for rows in (before, after)]
    changes = []
    for key in common:
        old, new = was[key], now[key]
        if old.routing_hash and new.routing_hash and old.routing_hash != new.routing_hash:
            raise ResultsError(
                f"{old.case}: routing {old.routing_hash} in one file, {new.routing_hash} in the other; "
                "use the same --seed and --skew"
            )
        if old.steady != new.steady:
            raise ResultsError(f"{old.case}: one file was measured with --steady on, the other with off; use the same")
        if old.path in _ROOFS and not absolute:
            continue
        metric, values, change = "p50 us", (old.p50_us, new.p50_us), new.p50_us / old.p50_us - 1
        is_ratio = False
        if old.ratio and new.ratio and not absolute:
            is_ratio = True
            metric, values, change = "ratio", (old.ratio, new.ratio), old.ratio / new.ratio - 1
        errors = [
            error
            for row, base in zip((old, new), bases, strict=True)
            for error in _noises(row, base.get(key[:2] + key[3:4]), is_ratio)
        ]
        freedom = old.sittings + new.sittings - 2 or inf
        spread = noise * (1 + (noise**2 + 1) / (4 * freedom)) * sqrt(sum(error**2 for error in errors))  # Student's t
        bound = hypot(floor, spread)
        changes.append(
            Change(
                case=old.case,
                path=f"{old.path} {old.transport}".rstrip(),
                operation=old.operation,
                metric=metric,
                before=values[0],
                after=values[1],
                change=round(change, 4),
                bound=round(bound, 4),
                verdict=_verdict(change, bound, spread > widest),
            )
        )
    return changes


def _verdict(change: float, bound: float, is_noisy: bool) -> str:
    if abs(change) <= bound:
        return "noisy" if is_noisy else "same"
    return "slower" if change > 0 else "faster"


def show(changes: Sequence[Change], missing: int) -> None:
    """Print a table, and what it comes to."""
    header = ("case", "path", "operation", "metric", "before", "after", "time", "bound", "verdict")
    lines = [
        (
            change.case,
            change.path,
            change.operation,
            change.metric,
            f"{change.before:.3g}",
            f"{change.after:.3g}",
            f"{100 * change.change:+.1f} %",
            f"{100 * change.bound:.1f} %",
            change.verdict,
        )
        for change in changes
    ]
    print_table("time after over time before", header, lines, left=4)
    counts = {word: sum(change.verdict == word for change in changes) for word in ("slower", "faster", "same", "noisy")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()) + f"; {missing} rows are in one file only")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--floor", type=float, default=0.1, help="bound of a change without noise (default: 0.1)")
    parser.add_argument("--noise", type=float, default=3.0, help="standard errors in a bound (default: 3)")
    parser.add_argument("--widest", type=float, default=0.5, help="noise beyond which a path is noisy (default: 0.5)")
    parser.add_argument("--absolute", action="store_true", help="compare times, not ratios")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        before, after = read([args.before]), read([args.after])
        options = {name: getattr(args, name) for name in ("floor", "noise", "widest", "absolute")}
        changes = compare(before, after, **options)
    except ResultsError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([asdict(change) for change in changes], indent=1))
    else:
        show(changes, len({row.key for row in before} ^ {row.key for row in after}))
    return int(any(change.verdict == "slower" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
