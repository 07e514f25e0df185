"""Dispatch and combine between nodes with slow links: bytes and time, hierarchical against flat and the frameworks.

    python bench/bench_internode.py                      # every case; needs root, iproute2 and about ten minutes
    python bench/bench_internode.py --nodes 2 --top-k 8  # one case
    python bench/bench_internode.py --report             # only rewrite the table and the plot from the results

Each node is a network namespace with two ranks, each link so fast in each direction (`moecomm.testing.namespaces`).
Paths: "hierarchical"; "flat", the `collective` transport; "baseline", what frameworks do, see `bench/baseline.py`.
Bytes are read from /sys/class/net before and after every operation. The minimum is one row per (token, node) that must
cross, computed from the routing. Time is the slowest rank's, from a barrier to the return of the whole call.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.internode_rank import OPERATIONS, PATHS
from bench.record import environment
from bench.report import insert
from moecomm.testing.namespaces import Cluster, why_not

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/internode"
PAGE, PLOT = ROOT / "docs/design/hierarchical.md", ROOT / "docs/assets/internode.png"
RANKS_PER_NODE = 2
LINK_MBIT = 1000
START_S, RUN_S = 60.0, 600.0
COLORS = {"hierarchical": "#1b7f5c", "flat": "#4c72b0", "baseline": "#c44e52"}
# (nodes, top-k, nodes that a token may use or 0)
CASES = [(nodes, top_k, 0) for nodes in (2, 4) for top_k in (1, 2, 4, 8)] + [(4, 8, 2)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One path, one operation, one case.

    bytes_max: the most that one node's interface carried in one direction. minimum_max: the most that it had to.
    bytes_over_minimum: the largest quotient of the two over nodes and directions. time_over_wire: p50 over the time
    that bytes_max take at the rate of the link. speedup: baseline p50 / p50. bytes_saved: baseline bytes_max /
    bytes_max.
    hidden_device, hidden_cpu: percent of the dispatch that a compute of equal length hides.
    """

    case: str
    path: str
    operation: str
    nodes: int
    ranks: int
    tokens: int
    hidden: int
    top_k: int
    experts: int
    max_nodes: int
    dtype: str
    link_mbit: int
    iterations: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    bytes_max: int
    minimum_max: int
    bytes_over_minimum: float
    time_over_wire: float
    speedup: float | None
    bytes_saved: float | None
    hidden_device: float | None
    hidden_cpu: float | None
    device: str
    versions: str
    commit: str
    date: str


def least_rows(topk_idx: Sequence[Sequence[Sequence[int]]], num_nodes: int, experts: int) -> np.ndarray:
    """(nodes, nodes) rows that must cross from each node to each other one in a dispatch: one per (token, node).

    >>> least_rows([[[0, 1], [3, -1]], [[0, 0], [2, 3]]], num_nodes=2, experts=4).tolist()
    [[0, 1], [1, 0]]
    """
    ranks_per_node = len(topk_idx) // num_nodes
    rows = np.zeros((num_nodes, num_nodes), np.int64)
    for rank, of_rank in enumerate(topk_idx):
        for chosen in of_rank:
            for node in {expert * num_nodes // experts for expert in chosen if expert >= 0}:
                rows[rank // ranks_per_node, node] += node != rank // ranks_per_node
    return rows


def run_case(cluster: Cluster, args: argparse.Namespace, top_k: int, max_nodes: int) -> list[Row]:
    """Measure one case on a cluster."""
    world = cluster.num_nodes * RANKS_PER_NODE
    options = {"top-k": top_k, "max-nodes": max_nodes, "ranks-per-node": RANKS_PER_NODE, "repeats": args.repeats}
    options |= {"tokens": args.tokens, "hidden": args.hidden, "experts": args.experts, "overlap": args.overlap}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "told.json")
        command = [sys.executable, str(ROOT / "bench/internode_rank.py"), "--out", str(out)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        processes = []
        for rank in range(world):
            env = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": cluster.name(0), "MASTER_PORT": "29500"}
            processes.append(cluster.start(rank // RANKS_PER_NODE, command, env | {"OMP_NUM_THREADS": "1"}))
        codes = [process.wait(START_S + RUN_S) for process in processes]
        if any(codes):
            raise SystemExit("\n".join(process.output for process in processes if process.popen.returncode))
        return rows_of(json.loads(out.read_text()), args, cluster.num_nodes, top_k, max_nodes)


def rows_of(told: dict[str, Any], args: argparse.Namespace, num_nodes: int, top_k: int, max_nodes: int) -> list[Row]:
    """Turn what the ranks told into results."""
    least = least_rows(told["topk_idx"], num_nodes, args.experts) * args.hidden * 2
    sent_least = {"dispatch": least.sum(1), "combine": least.sum(0)}
    timings = {(timing["path"], timing["operation"]): timing for timing in told["timings"]}
    hidden = {overlap["compute"]: _hidden(overlap) for overlap in told["overlaps"]}
    limit = f", at most {max_nodes} nodes" if max_nodes else ""
    if args.link_mbit != LINK_MBIT:
        limit += f", {args.link_mbit} Mbit/s"
    rows = []
    for (path, operation), timing in timings.items():
        carried = np.array([timing["tx_bytes"], timing["rx_bytes"]])
        minimum = np.array([sent_least[operation], sent_least[_other(operation)]])
        base = timings.get(("baseline", operation))
        base_bytes = None if base is None else max(*base["tx_bytes"], *base["rx_bytes"])
        p20, p50, p80 = (float(np.percentile(timing["times_ms"], p)) for p in (20, 50, 80))
        is_ours = path == "hierarchical" and operation == "dispatch"
        rows.append(
            Row(
                case=f"{num_nodes} nodes, K = {top_k}{limit}",
                path=path,
                operation=operation,
                nodes=num_nodes,
                ranks=num_nodes * RANKS_PER_NODE,
                tokens=args.tokens,
                hidden=args.hidden,
                top_k=top_k,
                experts=args.experts,
                max_nodes=max_nodes,
                dtype="bfloat16",
                link_mbit=args.link_mbit,
                iterations=len(timing["times_ms"]),
                p20_ms=round(p20, 2),
                p50_ms=round(p50, 2),
                p80_ms=round(p80, 2),
                bytes_max=round(carried.max()),
                minimum_max=int(minimum.max()),
                bytes_over_minimum=round(float((carried / np.maximum(minimum, 1)).max()), 4),
                time_over_wire=round(p50 * 1e-3 / (carried.max() * 8 / (args.link_mbit * 1e6)), 3),
                speedup=round(float(np.median(base["times_ms"])) / p50, 2) if base else None,
                bytes_saved=round(base_bytes / float(carried.max()), 2) if base_bytes else None,
                hidden_device=hidden.get("device") if is_ours else None,
                hidden_cpu=hidden.get("cpu") if is_ours else None,
                **environment(),
            )
        )
    return rows


def _other(operation: str) -> str:
    return OPERATIONS[1 - OPERATIONS.index(operation)]


def _hidden(overlap: dict[str, Any]) -> float:
    """Percent of the dispatch that disappears behind the compute."""
    dispatch, compute, both = (float(np.median(overlap[f"{name}_ms"])) for name in ("dispatch", "compute", "both"))
    return round(100 * (dispatch + compute - both) / dispatch, 1)


# -- results -------------------------------------------------------------------------------------------------------


def write(rows: Sequence[Row], stem: Path) -> None:
    """Write `stem`.csv and `stem`.json; rows of the same case that are there already are replaced."""
    cases = {row.case for row in rows}
    rows = [row for row in read(stem) if row.case not in cases] + list(rows)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(stem: Path) -> list[Row]:
    """Read what `write` wrote."""
    path = stem.with_suffix(".json")
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per case and operation."""
    lines = [
        "| case | operation | MB at the interface (of the minimum) | p50 (p20, p80) ms | of the wire time "
        "| baseline MB | baseline ms | fewer bytes | faster | flat ms | hidden: device, cpu |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_path = {(row.case, row.operation, row.path): row for row in rows}
    ours = [row for row in rows if row.path == "hierarchical"]
    for row in sorted(
        ours, key=lambda row: (row.nodes, -row.link_mbit, row.max_nodes, row.top_k, OPERATIONS.index(row.operation))
    ):
        base, flat = (by_path.get((row.case, row.operation, path)) for path in ("baseline", "flat"))
        hidden = [f"{percent:.0f} %" for percent in (row.hidden_device, row.hidden_cpu) if percent is not None]
        cells = [
            row.case,
            row.operation,
            f"{row.bytes_max / 1e6:.2f} ({row.bytes_over_minimum:.3f}x)",
            f"**{row.p50_ms:.0f}** ({row.p20_ms:.0f}, {row.p80_ms:.0f})",
            f"{row.time_over_wire:.2f}x",
            f"{base.bytes_max / 1e6:.1f}" if base else "",
            f"{base.p50_ms:.0f}" if base else "",
            f"{row.bytes_saved:.2f}x" if row.bytes_saved else "",
            f"{row.speedup:.2f}x" if row.speedup else "",
            f"{flat.p50_ms:.0f}" if flat else "",
            ", ".join(hidden),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shapes = sorted({f"T = {r.tokens}, H = {r.hidden}, E = {r.experts}, {r.dtype}" for r in rows})
    runs = sorted({f"{r.device}; {r.versions}; {r.date[:10]}, commit {r.commit}" for r in rows})
    return "\n".join(
        [
            *lines,
            "",
            f"{'; '.join(shapes)}; {RANKS_PER_NODE} ranks per node; {LINK_MBIT} Mbit/s unless said. {'; '.join(runs)}.",
        ]
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Megabytes and milliseconds over K, one column per operation and number of nodes."""
    from matplotlib import pyplot as plt

    rows = [row for row in rows if not row.max_nodes and row.link_mbit == LINK_MBIT]
    columns = sorted({(row.nodes, row.operation) for row in rows}, key=lambda c: (OPERATIONS.index(c[1]), c[0]))
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.4 * len(columns), 5.6), squeeze=False, sharex=True, layout="constrained"
    )
    for column, (nodes, operation) in enumerate(columns):
        for name in PATHS:
            line = [row for row in rows if (row.nodes, row.operation, row.path) == (nodes, operation, name)]
            line.sort(key=lambda row: row.top_k)
            ks = [row.top_k for row in line]
            style = {"color": COLORS[name], "label": name, "marker": "o", "markersize": 3}
            axes[0][column].plot(ks, [row.bytes_max / 1e6 for row in line], **style)
            axes[1][column].plot(ks, [row.p50_ms for row in line], **style)
            axes[1][column].fill_between(
                ks, [r.p20_ms for r in line], [r.p80_ms for r in line], color=COLORS[name], alpha=0.2, linewidth=0
            )
        least = sorted(
            {(row.top_k, row.minimum_max / 1e6) for row in rows if (row.nodes, row.operation) == columns[column]}
        )
        axes[0][column].plot(*zip(*least, strict=True), color="black", linestyle=":", label="minimum")
        axes[0][column].set_title(f"{operation}, {nodes} nodes x {RANKS_PER_NODE}")
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
    rows = read(RESULTS)
    text = PAGE.read_text()
    PAGE.write_text(insert(text, table(rows), PAGE))
    plot(rows, PLOT)
    print("wrote", PAGE, PLOT)


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, help="only this number of nodes")
    parser.add_argument("--top-k", type=int, help="only this K")
    parser.add_argument("--link-mbit", type=int, default=LINK_MBIT, help="speed of every link in each direction")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--overlap", type=int, default=8, help="rounds that measure overlap")
    parser.add_argument("--out", type=Path, default=RESULTS, help="stem of the result files")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.report:
        if reason := why_not():
            raise SystemExit(f"no cluster of namespaces here: {reason}")
        for nodes, top_k, max_nodes in CASES:
            if nodes == (args.nodes or nodes) and top_k == (args.top_k or top_k):
                with Cluster(nodes, rate=f"{args.link_mbit}mbit") as cluster:
                    rows = run_case(cluster, args, top_k, max_nodes)
                write(rows, args.out)
                print(table(rows), flush=True)
    if args.out == RESULTS:
        report()


if __name__ == "__main__":
    main()
