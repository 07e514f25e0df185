"""Write the tables and plots of README and docs from `bench/results/`; nothing in them is typed by hand.

    python bench/report.py            # rewrite them
    python bench/report.py --check    # fail if a table is not what the results say

A table goes between the lines `<!-- bench:begin -->` and `<!-- bench:end -->` of a file.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import Measurement, read

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OPERATIONS = ("dispatch", "combine", "both")
COLORS = {"moecomm": "#1b7f5c", "baseline": "#c44e52", "memcpy": "#4c72b0", "streamed copy": "#8c8c8c"}


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
    shapes = sorted({f"H = {r.hidden}, K = {r.top_k}, E = {r.experts}, {r.dtype}" for r in rows})
    layouts = sorted({f'layout "{r.layout}", reduce "{r.reduce}"' for r in rows})
    runs = sorted({f"{r.date[:10]}, commit {r.commit}" for r in rows})
    machines = sorted({f"{r.device}; {r.threads} thread per rank; {r.versions}" for r in rows})
    return (
        f"{'; '.join(shapes)}; {'; '.join(layouts)}; uniform routing. {'; '.join(machines)}; {'; '.join(runs)}. "
        "Time is the slowest rank's, from a common start to the return of the whole call; up to 256 tokens in bursts "
        "of 16 calls without a pause, so dispatch + combine, in turn, is not the sum of both. The roof is a memcpy of "
        "the bytes that must move, by all ranks at once in the same run; ours can pass it: it writes past the caches. "
        "How bytes are counted: `bench/traffic.py`."
    )


def insert(text: str, generated: str, where: Path) -> str:
    """Replace what stands between the markers.

    >>> insert("a\\n<!-- bench:begin -->\\nold\\n<!-- bench:end -->\\n", "new", Path("x.md"))
    'a\\n<!-- bench:begin -->\\nnew\\n<!-- bench:end -->\\n'
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{where}: no line {BEGIN} with a line {END} after it")
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"


def plot_scaling(rows: Sequence[Measurement], path: Path) -> None:
    """Milliseconds over tokens, both logarithmic, one panel per world and operation."""
    from matplotlib import pyplot as plt

    panels = [
        (world, operation)
        for world in sorted({row.world for row in rows})
        for operation in OPERATIONS[:2]
        if len({row.tokens for row in rows if (row.world, row.operation) == (world, operation)}) > 1
    ]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (world, operation) in zip(axes[0], panels, strict=True):
        for name, color in COLORS.items():
            of_path = [r for r in rows if (r.path, r.world, r.operation) == (name, world, operation)]
            of_path.sort(key=lambda row: row.tokens)
            if of_path:
                tokens = [row.tokens for row in of_path]
                axis.plot(tokens, [row.p50_us / 1e3 for row in of_path], "o-", color=color, label=name, markersize=3)
                low, high = ([getattr(row, p) / 1e3 for row in of_path] for p in ("p20_us", "p80_us"))
                axis.fill_between(tokens, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel="tokens per rank", title=f"{operation}, {world} ranks")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0][0].set_ylabel("ms (p50; band p20 to p80)")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_roof(rows: Sequence[Measurement], path: Path) -> None:
    """GB/s of every path, one group of bars per case and operation."""
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((r.world, r.tokens, r.operation) for r in rows if r.operation != "both"))
    groups.sort(key=lambda group: (-group[0], group[1], OPERATIONS.index(group[2])))
    figure, axis = plt.subplots(figsize=(max(5.0, 1.1 * len(groups)), 3.6), layout="constrained")
    for n, (name, color) in enumerate(COLORS.items()):
        speed = {(r.world, r.tokens, r.operation): r.gb_per_s for r in rows if r.path == name}
        places = [at + (n - 1.5) * 0.2 for at in range(len(groups))]
        axis.bar(places, [speed.get(group, 0.0) for group in groups], 0.2, color=color, label=name)
    names = [f"{operation}\nW={world}, T={tokens}" for world, tokens, operation in groups]
    axis.set_xticks(range(len(groups)), names, fontsize=7)
    axis.set_ylabel("GB/s of the bytes that must move")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, axis="y", linewidth=0.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or check, the tables; draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/dispatch_combine.json")
    parser.add_argument("--scaling", type=Path, default=ROOT / "bench/results/scaling.json", help="many T, for a plot")
    parser.add_argument("--into", type=Path, nargs="+", default=[ROOT / "README.md"])
    parser.add_argument("--plots", type=Path, default=ROOT / "docs/assets")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is stale")
    args = parser.parse_args(argv)
    rows = read([args.results])
    stale = []
    for path in args.into:
        text = path.read_text()
        new = insert(text, table(rows), path)
        if new != text:
            stale.append(path)
        if not args.check:
            path.write_text(new)
    if args.check:
        print("stale:" if stale else "up to date", *stale)
        return bool(stale)
    args.plots.mkdir(parents=True, exist_ok=True)
    plot_roof(rows, args.plots / "bench_roof.png")
    if args.scaling.exists():
        plot_scaling(read([args.scaling]), args.plots / "bench_scaling.png")
    print("wrote", *args.into, args.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
