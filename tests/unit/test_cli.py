"""The command line: alone, under torchrun and mpiexec, with parts missing and with wrong options."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moecomm import errors
from moecomm.cli import main
from moecomm.diagnostics import Cluster, Finding, forecast, probes
from moecomm.group import Group
from moecomm.launch import Launch, joined
from moecomm.presets import PRESETS
from tests.scripts import run_forked

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {"versions", "launch", "devices", "links", "memory", "mpi", "symmetric_memory", "transports", "environment"}
# Some parts of an installation, taken away before anything is imported.
CRIPPLED = """
import sys
for name in ("mpi4py", "triton", "llvmlite", "rich", "matplotlib", "torch.distributed._symmetric_memory"):
    sys.modules[name] = None
import torch._C
del torch._C._c10d_init
import torch
assert not torch.distributed.is_available()
from moecomm import rows
from moecomm.cli import main
out = torch.empty(1, 2)
rows.reduce_rows(out, torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[0, 1]]))
assert out.tolist() == [[4., 6.]]
assert rows.backend().startswith("torch (llvmlite is not usable: "), rows.backend()
sys.exit(main(["info", "--json"]))
"""


def test_info_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == SECTIONS and facts["versions"]["torch"].startswith(torch.__version__)
    assert facts["transports"]["chosen"] == "local"
    assert all(answer["reason"] for answer in facts["transports"]["answers"].values())
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "local          chosen  the group has one rank" in text and "MOECOMM_TIMEOUT_S" in text


def test_info_survives_broken_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("no driver")

    monkeypatch.setattr("moecomm.diagnostics.facts.devices", broken)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == {"error": "RuntimeError: no driver"}


def test_info_survives_missing_parts() -> None:
    """So do rows: without the compiler torch does the work and says so."""
    done = subprocess.run([sys.executable, "-c", CRIPPLED], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["transports"]["chosen"] == "local", facts["transports"]
    assert "mpi4py" in facts["mpi"]["reason"] or "mpi4py" in facts["mpi"]["error"]


def test_doctor_alone_finds_nothing_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    findings = {found["probe"]: found for found in json.loads(capsys.readouterr().out)}
    assert {"versions", "shared memory", "file limit", "threads", "free memory", "clocks", "links"} <= set(findings)
    assert findings["transport"]["text"].startswith("local, 1 rank")


def test_doctor_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("moecomm.diagnostics.probes.host_memory_support", lambda: "no memfd here")
    monkeypatch.setattr("moecomm.diagnostics.probes.resource.getrlimit", lambda which: (10, 4096))
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "problem  shared memory: rank 0: no memfd here" in out
    assert "2. file limit: ulimit -n 72 before the launcher (the hard limit is 4096)" in out


def test_a_clock_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Skewed:
        rank, size = 0, 2

        def all_gather_object(self, here: float, operation: str) -> list[float]:
            return [here, here + 7.0]

    with joined("cpu") as launch:
        finding = probes._clocks(launch, Skewed())  # type: ignore[arg-type]
    assert finding.level == "warning" and "clock of rank 1 differs by +7" in finding.text and finding.remedy


def test_a_slow_pair_is_found() -> None:
    from moecomm.topology import Topology

    table = [{1: (1e-5, 9e9)}, {0: (1e-5, 1e9)}]
    with joined("cpu") as launch:
        finding = probes._judge_pairs(table, Topology((0, 0)), 10e9, launch)
    assert finding.level == "warning" and "below 25% of what the hardware should give: 0 -> 1" in finding.remedy
    assert "1.00 (0 -> 1) to 9.00 GB/s" in finding.text


def test_a_probe_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken(launch: Launch, group: Group) -> Finding:
        raise errors.StallError("dispatch did not end", peers=[1])

    monkeypatch.setattr("moecomm.diagnostics.probes._free_memory", _broken)
    with joined("cpu") as launch:
        (bad,) = [finding for finding in probes.examine(launch) if finding.level == "problem"]
    assert bad.probe == "broken" and bad.text.startswith("StallError: dispatch did not end")


def test_plan_counts_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """Four experts, top-2, on 2 nodes x 2 ranks: a rank holds one expert; P(token needs it) is 1/2, a node's 5/6."""
    preset = PRESETS["tiny"]
    small = type(preset)(hidden=10, experts=4, top_k=2, intermediate=1, layers=3)
    plan = forecast(small, Cluster(nodes=2, ranks_per_node=2, link_gbit_per_s=8e-6), tokens=600)
    row = 20
    assert plan.local == (300 * row, 300 * row) and plan.same_node == (300 * row, 300 * row)
    assert plan.other_nodes == (600 * row, 600 * row) and plan.once_per_node_bytes == 500 * row
    assert plan.layer_bytes == (2 * 300 + 2 * 500 + 600) * row and plan.model_bytes == 3 * plan.layer_bytes
    assert plan.wire_ms == pytest.approx(1e3 * 2 * 2 * 500 * row / 1e3)
    assert main(["plan", "--preset", "kimi-k2", "--nodes", "2", "--ranks-per-node", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["transport"] == "hierarchical" and told["reserved_bytes"] > 0 and told["why"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plan", "--preset", "gpt-5"], "Invalid value for '--preset': 'gpt-5' is not one of"),
        (["plan"], "Missing option '--preset'"),
        (["plan", "--preset", "tiny", "--nodes", "0"], "0 is not in the range x>=1"),
        (["bench", "nothing"], "no benchmark 'nothing': there are check"),
        (["inf"], "No such command 'inf'"),
        (["conformance", "--minutes", "0"], "Invalid value for '--minutes'"),
    ],
)
def test_wrong_options(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert says.replace(" ", "") in capsys.readouterr().err.replace("\n", "").replace(" ", "")


def test_conformance_runs_and_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--minutes", "0.01", "--rounds", "1", "--device", "cpu"]) == 0
    assert " 0 failed" in capsys.readouterr().out


def test_a_transport_that_does_not_work_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--transport", "mpi", "--device", "cpu"]) == 1
    assert "moecomm: error: rank 0: transport 'mpi' does not work here" in capsys.readouterr().err


def test_bench_lists_the_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert "  dispatch_combine" in capsys.readouterr().out.splitlines()


def test_ranks_of_torchrun_print_once() -> None:
    done, other = run_forked("moecomm", "doctor", "--json")
    assert done.returncode == other.returncode == 0, done.stderr
    assert other.stdout == ""
    findings = {found["probe"]: found for found in json.loads(done.stdout)}
    assert len(findings["links"]["data"]["pairs"]) == 2
    assert findings["transport"]["text"] == "symmetric, 2 ranks on 1 node; rows come home bit for bit"


def test_mpiexec_prints_once() -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists() and not shutil.which("mpiexec"):
        pytest.skip("no mpiexec here")
    command = [str(mpiexec if mpiexec.exists() else "mpiexec"), "-n", "2", sys.executable, "-m", "moecomm", "info"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["launch"]["launcher"] == "mpiexec" and facts["launch"]["ranks"] == 2
    assert facts["transports"]["chosen"] == "symmetric" and facts["transports"]["answers"]["mpi"]["ok"]
