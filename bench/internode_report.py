"""The table and the plot of `bench_internode.py`, from committed rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.internode_rank import OPERATIONS
from bench.record import Measurement, read
from bench.report import insert

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/internode"
PAGE, PLOT = ROOT / "docs/design/hierarchical.md", ROOT / "docs/assets/internode.png"
LINK_MBIT = 1000
COLORS = {"moecomm hierarchical": "#1b7f5c", "moecomm collective": "#4c72b0", "baseline": "#c44e52"}


def _label(row: Measurement) -> str:
    return f"{row.path} {row.transport}".rstrip()


def _number(row: Measurement, name: str) -> Any:
    return row.extras.get(name)


def table(rows: Sequence[Measurement]) -> str:
    """Markdown: one line per case and operation."""
    lines = [
        "| case | operation | MB at the interface (of the minimum) | p50 (p20, p80) ms | of the wire time "
        "| baseline MB | baseline ms | fewer bytes | faster | flat ms | hidden: device, cpu |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_path = {(row.case, row.operation, _label(row)): row for row in rows}
    for row in sorted((row for row in rows if row.transport == "hierarchical"), key=_order):
        base, flat = (by_path.get((row.case, row.operation, path)) for path in ("baseline", "moecomm collective"))
        hidden = [f"{row.extras[name]:.0f} %" for name in ("hidden_device", "hidden_cpu") if name in row.extras]
        limit = f", at most {_number(row, 'max_nodes')} nodes" if _number(row, "max_nodes") else ""
        speed = f", {_number(row, 'link_mbit')} Mbit/s" if _number(row, "link_mbit") != LINK_MBIT else ""
        cells = [
            f"{row.nodes} nodes, K = {row.top_k}{limit}{speed}",
            row.operation,
            f"{_number(row, 'wire_bytes') / 1e6:.2f} ({_number(row, 'bytes_over_minimum'):.3f}x)",
            f"**{row.p50_us / 1e3:.0f}** ({row.p20_us / 1e3:.0f}, {row.p80_us / 1e3:.0f})",
            f"{_number(row, 'time_over_wire'):.2f}x",
            f"{_number(base, 'wire_bytes') / 1e6:.1f}" if base else "",
            f"{base.p50_us / 1e3:.0f}" if base else "",
            f"{_number(row, 'bytes_saved'):.2f}x" if base else "",
            f"{row.ratio:.2f}x" if row.ratio else "",
            f"{flat.p50_us / 1e3:.0f}" if flat else "",
            ", ".join(hidden),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shapes = sorted({f"T = {r.tokens}, H = {r.hidden}, E = {r.experts}, {r.dtype}" for r in rows})
    runs = sorted({f"{r.device}; {r.versions}; {r.date[:10]}, commit {r.commit}" for r in rows})
    ranks = sorted({row.world // row.nodes for row in rows})
    where = f"{'; '.join(shapes)}; {ranks[0]} ranks per node; {LINK_MBIT} Mbit/s unless said. {'; '.join(runs)}."
    return "\n".join([*lines, "", where])


def _order(row: Measurement) -> tuple[Any, ...]:
    speed, limit = _number(row, "link_mbit"), _number(row, "max_nodes")
    return row.nodes, -speed, limit, row.top_k, OPERATIONS.index(row.operation)


def plot(rows: Sequence[Measurement], path: Path) -> None:
    """Megabytes and milliseconds over K, one column per operation and number of nodes."""
    from matplotlib import pyplot as plt

    rows = [row for row in rows if not row.extras["max_nodes"] and row.extras["link_mbit"] == LINK_MBIT]
    columns = sorted({(row.nodes, row.operation) for row in rows}, key=lambda c: (OPERATIONS.index(c[1]), c[0]))
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.4 * len(columns), 5.6), squeeze=False, sharex=True, layout="constrained"
    )
    for column, (nodes, operation) in enumerate(columns):
        here = [row for row in rows if (row.nodes, row.operation) == (nodes, operation)]
        for name, color in COLORS.items():
            line = sorted((row for row in here if _label(row) == name), key=lambda row: row.top_k)
            ks = [row.top_k for row in line]
            style: dict[str, Any] = {"color": color, "label": name, "marker": "o", "markersize": 3}
            axes[0][column].plot(ks, [_number(row, "wire_bytes") / 1e6 for row in line], **style)
            axes[1][column].plot(ks, [row.p50_us / 1e3 for row in line], **style)
            band = [row.p20_us / 1e3 for row in line], [row.p80_us / 1e3 for row in line]
            axes[1][column].fill_between(ks, *band, color=color, alpha=0.2, linewidth=0)
        least = sorted({(row.top_k, _number(row, "wire_minimum") / 1e6) for row in here})
        axes[0][column].plot(*zip(*least, strict=True), color="black", linestyle=":", label="minimum")
        axes[0][column].set_title(f"{operation}, {nodes} nodes x {here[0].world // nodes}")
        axes[1][column].set_xlabel("top-k")
    axes[0][0].set_ylabel("MB, busiest node and direction")
    axes[1][0].set_ylabel("ms (p50; band p20 to p80)")
    axes[0][0].legend(fontsize=8)
    for axis in axes.flat:
        axis.set(ylim=(0, None))
        axis.grid(alpha=0.3, linewidth=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report() -> None:
    """Write the table and the plot from the results."""
    rows = read([RESULTS.with_suffix(".json")])
    PAGE.write_text(insert(PAGE.read_text(), table(rows), PAGE))
    plot(rows, PLOT)
    print("wrote", PAGE, PLOT)
