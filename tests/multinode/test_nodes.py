"""Two nodes of two ranks over a real network: launchers, a pulled cable, a killed rank, and life after it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moecomm.testing.mpi import mpi_missing, mpiexec_path
from moecomm.testing.namespaces import Cluster, Process
from tests.faults._scenes import patience
from tests.multinode._ranks import DYING, TIMEOUT_S

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
NODES = [[0, 1], [2, 3]]
START_S = 200.0
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# MPICH from PyPI talks through UCX, which would find shared memory between nodes that are one machine.
ENV |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0"}


def start_torchrun(cluster: Cluster, folder: Path) -> list[Process]:
    """One launcher on each node; they find each other at the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--rdzv-id", "moe", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{cluster.name(0)}:29500"]
    command += ["-m", "tests.multinode._ranks", "torch", str(folder)]
    return [cluster.start(node, command, ENV) for node in range(2)]


def start_mpiexec(cluster: Cluster, folder: Path) -> list[Process]:
    """One launcher on the first node; where it would use ssh it says what to start, and that is done here."""
    hosts = ",".join(f"{cluster.name(node)}:2" for node in range(2))
    mpiexec = mpiexec_path()
    assert mpiexec is not None
    command = [mpiexec, "-launcher", "manual", "-hosts", hosts, "-n", "4", sys.executable]
    command += ["-m", "tests.multinode._ranks", "mpi", str(folder)]
    launcher = cluster.start(0, command, ENV)
    launcher.wait_for("HYDRA_LAUNCH_END", START_S)
    wanted = [line for line in launcher.output.splitlines() if line.startswith("HYDRA_LAUNCH: ")]
    assert len(wanted) == 2, launcher.output
    proxies = [cluster.start(node, shlex.split(line.split(" ", 1)[1]), ENV) for node, line in enumerate(wanted)]
    return [launcher, *proxies]


def wait_for(folder: Path, name: str, ranks: list[int], processes: list[Process], timeout_s: float) -> None:
    """Wait until those ranks have come to a point."""
    deadline = time.monotonic() + timeout_s
    while missing := [rank for rank in ranks if not (folder / f"{name}.{rank}").exists()]:
        if time.monotonic() > deadline or all(process.popen.poll() is not None for process in processes):
            said = "\n".join(process.output for process in processes)
            raise AssertionError(f"ranks {missing} never came to {name!r}\n{said[-8000:]}")
        time.sleep(0.02)


def play(cluster: Cluster, folder: Path, processes: list[Process]) -> dict[int, dict[str, Any]]:
    """Pull the cable while rows travel, put it back when all have given up; what the survivors told."""
    ranks = [0, 1, 2, 3]
    wait_for(folder, "under_way", ranks, processes, START_S)
    before = cluster.counters(1)["tx_bytes"]
    while cluster.counters(1)["tx_bytes"] < before + 2_000_000:  # a dispatch sends about 8 MB
        assert not (folder / "gave_up.0").exists(), "gave up before the cable was pulled"
    cluster.cut(1)
    cut_at = time.time()
    wait_for(folder, "gave_up", ranks, processes, 60.0)
    cluster.mend(1)
    (folder / "mended.-1").touch()
    survivors = [rank for rank in ranks if rank != DYING]
    wait_for(folder, "told", survivors, processes, START_S)
    told = {rank: json.loads((folder / f"told.{rank}").read_text()) for rank in survivors}
    assert not any("raised" in of_rank for of_rank in told.values()), (told, [p.output[-6000:] for p in processes])
    for of_rank in told.values():
        of_rank["cut"]["after_s"] = of_rank["cut"]["at"] - cut_at
    return told


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_launcher(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    if launcher == "mpiexec" and mpi_missing():
        pytest.skip(mpi_missing())
    start = {"torchrun": start_torchrun, "mpiexec": start_mpiexec}[launcher]
    told = play(cluster, tmp_path, start(cluster, tmp_path))
    for rank, of_rank in told.items():
        away = NODES[1] if rank in NODES[0] else NODES[0]
        assert of_rank["failed"] == [] and of_rank["checks"] > 100
        assert (of_rank["transport"], of_rank["nodes"]) == ("hierarchical", [0, 0, 1, 1])

        disagree = of_rank["disagree"]
        assert disagree["kind"] == "ConfigError" and "topology" in disagree["message"], disagree
        assert disagree["peers"] == ([0, 2, 3] if rank == 1 else [1]), disagree

        cut = of_rank["cut"]
        assert cut["kind"] in ("StallError", "PeerLostError"), cut
        assert cut["operation"] in ("dispatch", "combine") and cut["message"].startswith(f"rank {rank}: "), cut
        assert sorted(cut["peers"]) == away, cut
        assert of_rank["again"]

        killed = of_rank["killed"]
        assert killed["peers"] == [DYING] and killed["kind"] in ("StallError", "PeerLostError"), killed
        assert killed["took_s"] < 30.0 + 10.0, killed
    after_s = {rank: of_rank["cut"]["after_s"] for rank, of_rank in told.items()}
    # A wait that was under way has so long from its own start, and one that begins after the cut from there.
    assert max(after_s.values()) < patience(TIMEOUT_S + 1.0), after_s


def interfaces() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


def test_four_nodes_that_leave_nothing_behind() -> None:
    before, mounts = interfaces(), Path("/proc/self/mounts").read_text()
    with Cluster(4, rate="50mbit") as cluster:
        pids = list(cluster._pids)
        for node in range(4):
            peer = cluster.name((node + 1) % 4)
            assert reaches(cluster, node, peer), f"{node} does not reach {peer}"
        cluster.cut(3)
        assert not reaches(cluster, 0, cluster.name(3)) and reaches(cluster, 0, cluster.name(2))
        cluster.mend(3)
        assert reaches(cluster, 0, cluster.name(3))
        sleeper = cluster.start(2, ["sleep", "1000"])
        assert interfaces() == before, "nothing appears in the network of the machine"
    assert sleeper.popen.returncode not in (None, 0)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert (interfaces(), Path("/proc/self/mounts").read_text()) == (before, mounts)


def reaches(cluster: Cluster, node: int, peer: str) -> bool:
    """Whether a TCP connection is refused by that host (nobody listens there), rather than never answered."""
    program = (
        "import socket, sys\n"
        f"try: socket.create_connection(({peer!r}, 9), timeout=1.5)\n"
        "except ConnectionRefusedError: sys.exit(0)\n"
        "sys.exit(1)"
    )
    return (
        subprocess.run(cluster.command(node, [sys.executable, "-S", "-c", program]), capture_output=True).returncode
        == 0
    )
