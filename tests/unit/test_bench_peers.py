"""Other libraries in the benchmarks: left out with a reason, timed where they run, dropped where they are wrong."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from bench.bench_dispatch_combine import parser
from bench.options import Setting, settings
from bench.ranks import Ranks
from moecomm.testing import run_ranks
from tests.unit._bench_ranks import beside_deep_ep, costs_of_deep_ep


def a_setting(*options: str) -> Setting:
    (setting,) = settings(parser().parse_args(["--tokens", "4", *options]))
    return setting


class Gpus(Ranks):
    """Two ranks with a GPU each, as far as a reason is concerned."""

    def __init__(self, world: int = 2) -> None:
        self.device, self.world, self.rank, self.shares_device = torch.device("cuda"), world, 0, False


def test_what_is_not_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    expert, rank = a_setting(), a_setting("--layout", "rank")
    here = Ranks("cpu")
    assert peers.why_no_vdev(expert, here) == "it moves rows between GPUs"
    assert peers.why_no_vdev(rank, Gpus()) == "the frameworks' path has no layout 'rank'"
    assert peers.why_no_vdev(expert, Gpus(1)) == "one rank has nobody to send to"
    assert "NVSHMEM" in peers.why_no_vdev(expert, Gpus()) or torch.cuda.is_available()
    assert peers.why_no_deep_ep(expert, here).endswith("compare it with --layout rank")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.why_no_deep_ep(rank, Gpus()) == "deep_ep is not installed"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    assert peers.why_no_deep_ep(rank, here) == "it moves rows between GPUs"
    assert peers.why_no_deep_ep(rank, Gpus(3)) == "it has no setting for 3 ranks"
    assert "rows of bfloat16" in peers.why_no_deep_ep(a_setting("--layout", "rank", "--quant", "fp8"), Gpus())
    assert peers.why_no_deep_ep(rank, Gpus()) == peers.why_no_low_latency(a_setting("--hidden", "7168"), Gpus()) == ""
    assert peers.why_no_low_latency(a_setting("--hidden", "64"), Gpus()) == "its low-latency mode has no H 64"


@pytest.mark.parametrize(
    ("script", "name", "options"),
    [
        ("dispatch_combine", "DeepEP", ["--tokens", "5", "--hidden", "64", "--layout", "rank"]),
        ("decode", "DeepEP low latency", ["--tokens", "3", "--hidden", "2048"]),
    ],
)
def test_deep_ep_is_timed_through_its_api(script: str, name: str, options: list[str]) -> None:
    told = run_ranks(beside_deep_ep, 2, script, options, False, backend=None)
    rows, notes = told[0]
    assert f"no {name}" not in notes
    of_peer = {operation: (gate, p50) for path, operation, gate, p50 in rows if path == name}
    assert of_peer.keys() == {"dispatch", "combine", "both"}
    assert all(gate == "combine within 4 roundings of float64" and p50 > 0 for gate, p50 in of_peer.values())


def test_one_that_is_wrong_is_left_out_on_all_ranks() -> None:
    options = ["--tokens", "5", "--hidden", "64", "--layout", "rank"]
    told = run_ranks(beside_deep_ep, 2, "dispatch_combine", options, True, backend=None)
    for rows, _ in told:
        assert {path for path, *_ in rows} == {"moecomm", "memcpy", "streamed copy"}
    assert "no DeepEP: AssertionError: DeepEP: combine is off by" in told[0][1]


def test_what_our_deep_ep_costs() -> None:
    rows = run_ranks(costs_of_deep_ep, 2, backend=None)[0]
    by_path = {path: {row.operation: row for row in rows if row.path == path} for path in ("moecomm", "deep_ep")}
    assert by_path["moecomm"].keys() == by_path["deep_ep"].keys() and len(by_path["deep_ep"]) == 10
    for operation, row in by_path["deep_ep"].items():
        native = by_path["moecomm"][operation]
        assert native.ratio == 1.0 and row.ratio == pytest.approx(native.p50_us / row.p50_us, rel=0.01)
        assert row.gate and row.bytes_moved == native.bytes_moved > 0 and row.peak_memory_bytes
