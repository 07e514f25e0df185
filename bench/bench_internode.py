"""Dispatch and combine between nodes with slow links: bytes and time, hierarchical against flat and the frameworks.

    python bench/bench_internode.py --out bench/results/internode        # K = 1, 2, 4, 8; root, iproute2, ten minutes
    python bench/bench_internode.py --nodes 4 --top-k 8 --max-nodes 2    # a token uses at most two nodes
    python bench/bench_internode.py --report     # only rewrite the table and the plot from the committed results

Each node is a network namespace with two ranks, each link so fast in each direction (`moecomm.testing.namespaces`).
Paths: ours over "hierarchical" and "collective" (flat); "baseline", what frameworks do, see `bench/baseline.py`. Bytes
are read from /sys/class/net before and after every operation. Time is the slowest rank's, from a common start to the
return of the whole call.

Extras of a row: wire_bytes, the most that one node's interface carried in one direction; wire_minimum, the most that it
had to (one row per token and node that must cross, from the routing); bytes_over_minimum, the largest quotient of the
two over nodes and directions; time_over_wire, p50 over the time that wire_bytes take at the rate of the link;
bytes_saved, wire_bytes of the baseline over ours; hidden_device, hidden_cpu: percent of the dispatch that a compute of
equal length hides. `percent_of_roof` is the time that wire_minimum takes at the rate of the link, over p50.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.bench_dispatch_combine import needed_bytes as exchange_bytes
from bench.harness import Benchmark, Recorder, compared, main
from bench.internode_rank import OPERATIONS, TRANSPORTS
from bench.internode_report import LINK_MBIT, RESULTS, report
from bench.options import Setting, make_parser
from bench.ranks import Ranks
from bench.record import Measurement
from bench.show import note
from bench.traffic import traffic
from moecomm import ExpertPlacement
from moecomm.testing.namespaces import Cluster, why_not

ROOT = Path(__file__).resolve().parents[1]
RANKS_PER_NODE = 2
START_S, RUN_S = 60.0, 600.0


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


def run_case(setting: Setting, ranks: Ranks) -> list[Measurement]:
    """Measure one setting on every number of nodes that was asked for."""
    if ranks.world > 1:
        raise ValueError("this benchmark starts its ranks itself, inside network namespaces: start it with python")
    if reason := why_not():
        raise ValueError(f"no cluster of namespaces here: {reason}")
    options, rows = setting.options, []
    for nodes in options.nodes:
        for max_nodes in options.max_nodes:
            if max_nodes >= nodes:
                raise ValueError(f"--max-nodes {max_nodes}: a token cannot use so many of {nodes} nodes and be limited")
            note(0, f"{nodes} nodes x {RANKS_PER_NODE}, {options.link_mbit} Mbit/s, K {setting.top_k}")
            with Cluster(nodes, rate=f"{options.link_mbit}mbit") as cluster:
                told = run_ranks(cluster, setting, max_nodes)
            rows += rows_of(told, setting, ranks, nodes, max_nodes)
    return rows


def run_ranks(cluster: Cluster, setting: Setting, max_nodes: int) -> Any:
    """Run every rank in its namespace; what rank 0 told."""
    world = cluster.num_nodes * RANKS_PER_NODE
    given: dict[str, Any] = {"max-nodes": max_nodes, "ranks-per-node": RANKS_PER_NODE, "dtype": setting.dtype_name}
    given |= {"hidden": setting.hidden, "experts": setting.experts, "top-k": setting.top_k, "tokens": setting.tokens}
    given |= {"skew": str(setting.skew), "seed": setting.seed, "transport": ",".join(setting.transports)}
    given |= {"repeats": setting.repeats, "warmup": setting.warmup, "overlap": setting.options.overlap}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "told.json")
        command = [sys.executable, str(ROOT / "bench/internode_rank.py"), "--told", str(out)]
        for name, value in given.items():
            command += [f"--{name}", str(value)]
        processes = []
        for rank in range(world):
            env = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": cluster.name(0), "MASTER_PORT": "29500"}
            processes.append(cluster.start(rank // RANKS_PER_NODE, command, env | {"OMP_NUM_THREADS": "1"}))
        codes = [process.wait(START_S + RUN_S) for process in processes]
        if any(codes):
            outputs = [process.output for process in processes if process.popen.returncode]
            raise RuntimeError("a rank failed; what the failed ones printed:\n" + "\n".join(outputs))
        return json.loads(out.read_text())


def rows_of(told: Any, setting: Setting, ranks: Ranks, nodes: int, max_nodes: int) -> list[Measurement]:
    """Turn what the ranks told into rows."""
    mbit, world = setting.options.link_mbit, nodes * RANKS_PER_NODE
    ids = [np.array(of_rank, np.int64).reshape(-1, setting.top_k) for of_rank in told["topk_idx"]]
    least = least_rows(told["topk_idx"], nodes, setting.experts) * setting.row_bytes
    sent_least = {"dispatch": least.sum(1), "combine": least.sum(0)}
    placement = ExpertPlacement.uniform(setting.experts, world)
    bytes_of = traffic(ids, placement, layout="expert", reduce="rank", row_bytes=setting.row_bytes)
    limit = f" at most {max_nodes}" * bool(max_nodes)
    case = f"{setting.case_name(world)} {nodes} nodes{limit} {mbit} Mbit/s"
    recorder = Recorder("internode", setting, ranks, ids, case=case, world=world, nodes=nodes)
    most_of_baseline = {t["operation"]: _most(t) for t in told["timings"] if t["path"] == "baseline"}
    hidden = {f"hidden_{overlap['compute']}": _hidden(overlap) for overlap in told["overlaps"]}
    rows = []
    for timing in told["timings"]:
        operation, carried = timing["operation"], np.array([timing["tx_bytes"], timing["rx_bytes"]])
        minimum = np.array([sent_least[operation], sent_least[_other(operation)]])
        p50_us = 1e3 * float(np.median(timing["times_ms"]))
        wire_us = {name: most * 8 / mbit for name, most in (("carried", carried.max()), ("least", minimum.max()))}
        extras: dict[str, Any] = {
            "link_mbit": mbit,
            "max_nodes": max_nodes,
            "wire_bytes": round(carried.max()),
            "wire_minimum": int(minimum.max()),
            "bytes_over_minimum": round(float((carried / np.maximum(minimum, 1)).max()), 4),
            "time_over_wire": round(p50_us / max(wire_us["carried"], 1e-9), 3),
            "bytes_saved": round(most_of_baseline[operation] / max(float(carried.max()), 1.0), 2),
        }
        if timing["transport"] == "hierarchical" and operation == "dispatch":
            extras |= hidden
        facts = {name: timing[name] for name in ("transport", "gate", "peak_memory_bytes")} | {"extras": extras}
        times_us = [1e3 * ms for ms in timing["times_ms"]]
        row = recorder.row(timing["path"], operation, times_us, bytes_of[operation], **facts)
        rows.append((row, round(100 * wire_us["least"] / p50_us, 1)))
    done = compared([row for row, _ in rows])
    return [replace(row, percent_of_roof=percent) for row, (_, percent) in zip(done, rows, strict=True)]


def _most(timing: dict[str, Any]) -> float:
    return float(max(*timing["tx_bytes"], *timing["rx_bytes"]))


def _other(operation: str) -> str:
    return OPERATIONS[1 - OPERATIONS.index(operation)]


def _hidden(overlap: dict[str, Any]) -> float:
    """Percent of the dispatch that disappears behind the compute."""
    dispatch, compute, both = (float(np.median(overlap[f"{name}_ms"])) for name in ("dispatch", "compute", "both"))
    return round(100 * (dispatch + compute - both) / dispatch, 1)


def needed_bytes(setting: Setting, world: int) -> int:
    """Bytes of all ranks together: they all run on this machine."""
    here = RANKS_PER_NODE * max(setting.options.nodes)
    return here * exchange_bytes(setting, here)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The options of the family, and those of the cluster."""
    shape = {"hidden": [4096], "experts": [64], "top_k": [1, 2, 4, 8]}
    made = make_parser(__doc__, shape, tokens=[512], repeats=10, warmup=2, transport=list(TRANSPORTS))
    made.add_argument("--nodes", type=_numbers, default=[2, 4], help="a comma list (default: 2,4)")
    made.add_argument("--max-nodes", type=_numbers, default=[0], help="that a token may use, a comma list; 0: any")
    made.add_argument("--link-mbit", type=int, default=LINK_MBIT, help="of every link in each direction")
    made.add_argument("--overlap", type=int, default=8, help="rounds that measure overlap")
    made.add_argument("--report", action="store_true", help="measure nothing: write table and plot from the results")
    return made


BENCHMARK = Benchmark(
    name="internode",
    run_case=run_case,
    needed_bytes=needed_bytes,
    takes={  # its ranks are processes of their own, which nobody binds
        "transport": TRANSPORTS,
        "layout": ("expert",),
        "reduce": ("rank",),
        "quant": ("none",),
        "steady": ("auto", "off"),
    },
)


def run() -> int:
    """Measure, or report; the exit status."""
    given = parser().parse_args()
    status = 0 if given.report else main(BENCHMARK, parser())
    if given.report or given.out == RESULTS:
        report()
    return status


if __name__ == "__main__":
    sys.exit(run())
