"""The plots of the report, as PNG and SVG: latency and bandwidth over tokens, roofline, ranks, skew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import Measurement

OPERATIONS = ("dispatch", "combine", "both")
COLORS = {"baseline": "#c44e52", "memcpy": "#4c72b0", "streamed copy": "#8c8c8c", "baseline mpi": "#dd8452"}
OURS = ("#1b7f5c", "#6fae3c", "#8172b3", "#937860", "#da8bc3", "#64b5cd")


@dataclass(frozen=True, kw_only=True)
class View:
    """One plot: what is drawn over what; varies: the field that may differ inside a panel."""

    name: str
    varies: str
    x: Callable[[Measurement], float | None]
    y: Callable[[Measurement], float | None]
    x_label: str
    y_label: str
    band: bool = False


VIEWS = (
    View(
        name="latency_over_tokens",
        varies="tokens",
        x=lambda row: row.tokens,
        y=lambda row: row.p50_us,
        x_label="tokens per rank",
        y_label="us (p50; band p20 to p80)",
        band=True,
    ),
    View(
        name="bandwidth_over_tokens",
        varies="tokens",
        x=lambda row: row.tokens,
        y=lambda row: row.gb_per_s,
        x_label="tokens per rank",
        y_label="GB/s of the bytes that must move",
    ),
    View(
        name="roofline",
        varies="tokens",
        x=lambda row: row.bytes_moved,
        y=lambda row: row.gb_per_s,
        x_label="bytes moved",
        y_label="GB/s",
    ),
    View(
        name="scaling_over_ranks",
        varies="world",
        x=lambda row: row.world,
        y=lambda row: row.p50_us,
        x_label="ranks",
        y_label="us (p50; band p20 to p80)",
        band=True,
    ),
    View(
        name="skew",
        varies="skew",
        x=lambda row: row.max_over_mean,
        y=lambda row: row.p50_us,
        x_label="busiest expert over the mean",
        y_label="us (p50; band p20 to p80)",
        band=True,
    ),
)
VIEW_NAMES = [view.name for view in VIEWS]


def draw(
    rows: Sequence[Measurement],
    folder: Path,
    formats: Sequence[str] = ("png", "svg"),
    names: Sequence[str] = VIEW_NAMES,
) -> list[Path]:
    """Draw the views of those names that have two values on their axis; the files.

    A view shows the group of rows, equal in all but what varies, that has the most values on its axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "moecomm"  # the same rows give the same file
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for view in VIEWS:
        group = widest_group(rows, view) if view.name in names else []
        if group:
            written += _draw_view(view, group, folder, formats)
    return written


def widest_group(rows: Sequence[Measurement], view: View) -> list[Measurement]:
    """The rows that differ in nothing but path, operation and what the view varies, in the group with most values."""

    def group_of(row: Measurement) -> tuple[Any, ...]:
        fields = ("benchmark", "world", "tokens", "skew", "hidden", "experts", "top_k", "layout", "reduce", "quant")
        return tuple(getattr(row, name) for name in fields if name != view.varies)

    usable = [row for row in rows if view.x(row) and view.y(row)]
    values = {(group_of(row), getattr(row, view.varies)) for row in usable}
    counts = Counter(group for group, _ in values)
    if not counts or max(counts.values()) < 2:
        return []
    best = max(counts, key=lambda group: (counts[group], "uniform" in group, str(group)))
    return [row for row in usable if group_of(row) == best]


def _label(row: Measurement) -> str:
    return f"{row.path} {row.transport}".rstrip()


def _draw_view(view: View, rows: Sequence[Measurement], folder: Path, formats: Sequence[str]) -> list[Path]:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    operations = sorted({row.operation for row in rows}, key=lambda name: (*OPERATIONS, name).index(name))
    figure, axes = plt.subplots(
        1, len(operations), figsize=(1.2 + 3.7 * len(operations), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    labels = list(dict.fromkeys(map(_label, rows)))
    ours = [label for label in labels if label not in COLORS]
    for axis, operation in zip(axes[0], operations, strict=True):
        for label in labels:
            line = [
                row for row in rows if (f"{row.path} {row.transport}".rstrip(), row.operation) == (label, operation)
            ]
            line.sort(key=lambda row: view.x(row) or 0.0)
            color = COLORS.get(label) or OURS[ours.index(label) % len(OURS)]
            xs = [view.x(row) for row in line]
            style = "--" if label in ("memcpy", "streamed copy", "experts alone") else "-"
            axis.plot(xs, [view.y(row) for row in line], style, marker="o", markersize=3, color=color, label=label)
            if view.band:
                low, high = [row.p20_us for row in line], [row.p80_us for row in line]
                axis.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=view.x_label, title=operation)
        axis.xaxis.set_minor_formatter(NullFormatter())
        if view.varies in ("tokens", "world") and view.name != "roofline":
            axis.set_xticks(values := sorted({getattr(row, view.varies) for row in rows}), values)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0][0].set_ylabel(view.y_label)
    axes[0][0].legend(fontsize=8)
    first = rows[0]
    shape = f"H {first.hidden}, E {first.experts}, K {first.top_k}, {first.dtype}"
    fixed = {"world": f"{first.world} ranks", "tokens": f"{first.tokens} tokens", "skew": f"{first.skew} routing"}
    figure.suptitle(", ".join([shape, *(text for name, text in fixed.items() if name != view.varies)]), fontsize=9)
    paths = [folder / f"{view.name}.{suffix}" for suffix in formats]
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths
