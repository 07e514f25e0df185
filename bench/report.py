"""Make plots, an interactive page and tables of result files; nothing in them is typed by hand.

    python bench/report.py out/run.json                       # out/run.html and out/plots/*.{png,svg}
    python bench/report.py RESULTS... --html page.html --plots plots --into README.md
    python bench/report.py RESULTS... --into README.md --check   # fail if the table is not what the results say

A table goes between the lines `<!-- bench:begin -->` and `<!-- bench:end -->` of a Markdown file; --kind scaling writes
cost per token between `<!-- scaling:begin -->` and `<!-- scaling:end -->`. The page is one file that needs no network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.plots import OPERATIONS, VIEW_NAMES, draw
from bench.record import Measurement, ResultsError, read

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("page.html")
RESULTS = [ROOT / "bench/results/dispatch_combine.json"]


def table(rows: Sequence[Measurement]) -> str:
    """Markdown: one line per case and operation, ours beside baseline and roof of the same run."""
    lines = [
        "| ranks | tokens | operation | moecomm p50 (p20, p80) ms | framework path ms | faster | memcpy ms "
        "| of the roof | GB/s | MB local | MB remote (deduplicated) |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_case: defaultdict[tuple[str, str], dict[str, Measurement]] = defaultdict(dict)
    for row in rows:
        by_case[row.case, row.operation][row.path] = row
    order = {operation: n for n, operation in enumerate(OPERATIONS)}
    kept = [paths for paths in by_case.values() if "moecomm" in paths]
    kept.sort(key=lambda paths: (-paths["moecomm"].world, paths["moecomm"].tokens, order[paths["moecomm"].operation]))
    for paths in kept:
        ours, base, roof = paths["moecomm"], paths.get("baseline"), paths.get("memcpy")
        name = "dispatch + combine" if ours.operation == "both" else ours.operation
        cells = [
            f"{ours.world}",
            f"{ours.tokens}",
            name,
            f"**{_ms(ours.p50_us)}** ({_ms(ours.p20_us)}, {_ms(ours.p80_us)})",
            _ms(base.p50_us) if base else "",
            f"{ours.ratio:.1f}x" if ours.ratio else "",
            _ms(roof.p50_us) if roof else "",
            f"{ours.percent_of_roof:.0f} %" if ours.percent_of_roof else "",
            f"{ours.gb_per_s:.1f}",
            f"{ours.bytes_local / 1e6:.1f}",
            f"{ours.bytes_remote / 1e6:.1f} ({ours.dedup_remote_bytes / 1e6:.1f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _footnote(rows)])


def _ms(us: float) -> str:
    return f"{us / 1e3:.2f}" if us < 1e5 else f"{us / 1e3:.0f}"


def _footnote(rows: Sequence[Measurement]) -> str:
    if not rows:
        return "No results yet."
    return (
        f"{_where(rows)}. "
        "Time is the slowest rank's, from a common start to the return of the whole call; up to 256 tokens in bursts "
        "of 16 calls without a pause, so dispatch + combine, in turn, is not the sum of both. The roof is a memcpy of "
        "the bytes that must move, by all ranks at once in the same run; ours can pass it: it writes past the caches. "
        "How bytes are counted: `bench/traffic.py`."
    )


def _where(rows: Sequence[Measurement]) -> str:
    shapes = sorted({f"H = {r.hidden}, K = {r.top_k}, E = {r.experts}, {r.dtype}" for r in rows})
    layouts = sorted({f'layout "{r.layout}", reduce "{r.reduce}"' for r in rows})
    runs = sorted({f"{r.date[:10]}, commit {r.commit}" for r in rows})
    machines = sorted({f"{r.device}; {r.threads} thread per rank; {r.versions}" for r in rows})
    return f"{'; '.join(shapes)}; {'; '.join(layouts)}; uniform routing. {'; '.join(machines)}; {'; '.join(runs)}"


def scaling_table(rows: Sequence[Measurement]) -> str:
    """Markdown: microseconds per token over the number of tokens, and the share of planning."""
    of_ours = [row for row in rows if row.path == "moecomm" and row.tokens]
    by_tokens = {(row.tokens, row.operation): row for row in of_ours}
    lines = [
        "| tokens | dispatch ms | us per token | combine ms | us per token | planning, of a dispatch |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for tokens in sorted({row.tokens for row in of_ours}):
        out, home = (by_tokens[tokens, operation] for operation in ("dispatch", "combine"))
        each = (cell for row in (out, home) for cell in (_ms(row.p50_us), f"{row.p50_us / tokens:.2f}"))
        percent = out.extras.get("plan_percent")
        planning = f"{percent:.1f} %" if isinstance(percent, float) else ""
        lines.append(f"| {' | '.join([str(tokens), *each, planning])} |")
    return "\n".join([*lines, "", f"{_where(rows)}."])


def insert(text: str, generated: str, where: Path, kind: str = "bench") -> str:
    """Replace what stands between the markers of this kind.

    >>> insert("a\\n<!-- bench:begin -->\\nold\\n<!-- bench:end -->\\n", "new", Path("x.md"))
    'a\\n<!-- bench:begin -->\\nnew\\n<!-- bench:end -->\\n'
    """
    first, last = f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"{where}: no line {first} with a line {last} after it")
    return f"{before}{first}\n{generated}\n{last}{after}"


TABLES = {"bench": table, "scaling": scaling_table}


def page(rows: Sequence[Measurement]) -> str:
    """The interactive page: template, rows and script in one file that needs nothing else.

    >>> page([]).count("[]</script>")
    1
    """
    data = json.dumps([asdict(row) for row in rows]).replace("</", "<\\/")
    return PAGE.read_text(encoding="utf-8").replace("/*DATA*/", data)


def tables(paths: Sequence[Path], rows: Sequence[Measurement], kind: str, *, check: bool) -> list[Path]:
    """Rewrite the tables of these files, unless only to check; those that were not what the results say."""
    stale = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        new = insert(text, TABLES[kind](rows), path, kind)
        if new != text:
            stale.append(path)
        if not check:
            path.write_text(new, encoding="utf-8")
    return stale


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or check, what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", default=RESULTS, help="files that --out of a benchmark wrote")
    parser.add_argument("--html", type=Path, help="write the interactive page here")
    parser.add_argument("--plots", type=Path, help="write PNG and SVG plots into this folder")
    parser.add_argument("--views", help="plots to make, a comma list of the names of their files (default: all)")
    parser.add_argument("--ranks", type=int, help="leave out rows of another number of ranks")
    parser.add_argument("--formats", default="png,svg", help="of the plots, a comma list (default: png,svg)")
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="Markdown files with a table to rewrite")
    parser.add_argument("--kind", choices=TABLES, default="bench", help="of the table (default: bench)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is stale")
    args = parser.parse_args(argv)
    views = args.views.split(",") if args.views else VIEW_NAMES
    if unknown := sorted(set(views) - set(VIEW_NAMES)):
        parser.error(f"--views {', '.join(unknown)}: there are {', '.join(VIEW_NAMES)}")
    try:
        rows = [row for row in read(args.results) if args.ranks in (None, row.world)]
    except ResultsError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    if not rows:
        print("report.py: error: these files hold no rows; run a benchmark with --out first", file=sys.stderr)
        return 2
    if not (args.html or args.plots or args.into):
        args.html, args.plots = args.results[0].with_suffix(".html"), args.results[0].parent / "plots"
    shown = [row for row in rows if row.benchmark == "dispatch_combine"]
    stale = tables(args.into, shown, args.kind, check=args.check)
    if args.check:
        print("stale:" if stale else "up to date", *stale)
        return int(bool(stale))
    written = list(args.into)
    try:
        if args.html:
            args.html.parent.mkdir(parents=True, exist_ok=True)
            args.html.write_text(page(rows), encoding="utf-8")
            written.append(args.html)
        if args.plots:
            written += draw(rows, args.plots, args.formats.split(","), views)
    except OSError as error:
        print(f"report.py: error: nothing can be written there ({error}); give another place", file=sys.stderr)
        return 2
    print("wrote", *written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
