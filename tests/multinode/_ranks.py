"""What every rank of the multinode tests runs: `python -m tests.multinode._ranks {torch,mpi} FOLDER`.

One start, because starting costs most: conformance on what `auto` takes, arguments that differ, a cable pulled in the
middle of a dispatch, a new buffer once it is back, the death of a rank. What came of a rank is a file in FOLDER.

Under MPI each rank forks first, and the child, in a session of its own, plays the rank: mpiexec ends the processes it
knows of as soon as one dies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moecomm
from moecomm.errors import MoECommError
from moecomm.testing import CASES
from moecomm.testing.conformance import run_conformance
from moecomm.topology import Topology

CONFORMANCE = ("plain", "quantised_pair")
TIMEOUT_S = 4.0
PATIENCE_S = 100.0
TOKENS, HIDDEN, TOP_K = 1024, 1024, 4
DYING = 3


class Scene:
    """One rank, and files by which ranks and the test tell each other how far they are."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        if kind == "mpi":
            from mpi4py import MPI

            self.group: Any = MPI.COMM_WORLD
            self.rank, self.size = self.group.Get_rank(), self.group.Get_size()
        else:
            torch.distributed.init_process_group("gloo")
            self.group = None
            self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def buffer(self, **options: Any) -> moecomm.Buffer:
        """Two experts per rank; rows that take the link a good second."""
        sizes: dict[str, Any] = {"hidden": HIDDEN, "top_k": TOP_K, "max_tokens_per_rank": TOKENS}
        sizes |= {"dtype": torch.float32, "timeout_s": TIMEOUT_S, "num_segments": 3}
        return moecomm.Buffer(self.group, num_experts=2 * self.size, **(sizes | options))

    def step(self, buffer: moecomm.Buffer, tokens: int) -> None:
        """A dispatch and a combine, checked: every row says who sent it."""
        x = torch.full((tokens, HIDDEN), self.rank + 1.0)
        topk_idx = (torch.arange(tokens)[:, None] + torch.arange(TOP_K) * (self.size // 2 + 1)) % (2 * self.size)
        out: Any = buffer.dispatch(x, topk_idx)
        assert torch.equal(out.x, out.x[:, :1].expand_as(out.x)), "a row is mixed"
        assert torch.equal(buffer.combine(out.x, out.handle), TOP_K * x), "a sum is wrong"

    def mark(self, name: str) -> None:
        """Say that this rank has come to that point."""
        part = self.folder / f".{name}.{self.rank}"
        part.touch()
        part.rename(self.folder / f"{name}.{self.rank}")

    def wait_for(self, name: str, *ranks: int) -> None:
        """Wait until those ranks, or all, or the test (rank -1) have come to it."""
        paths = [self.folder / f"{name}.{rank}" for rank in ranks or range(self.size)]
        deadline = time.monotonic() + PATIENCE_S
        while missing := [path.name for path in paths if not path.exists()]:
            assert time.monotonic() < deadline, f"nobody came: {missing}"
            time.sleep(0.01)

    def meet(self, name: str) -> None:
        """Wait for all ranks."""
        self.mark(name)
        self.wait_for(name)


def caught(operation: Callable[[], object]) -> dict[str, Any]:
    """Run it, which must fail."""
    start = time.monotonic()
    try:
        operation()
    except MoECommError as error:
        took_s = time.monotonic() - start
        told = {"kind": type(error).__name__, "operation": error.operation, "peers": error.peers}
        return told | {"message": str(error), "took_s": took_s, "at": time.time()}
    raise AssertionError("nothing was raised")


def play(scene: Scene) -> dict[str, Any]:
    """All of it, one after the other."""
    told: dict[str, Any] = {}
    cases = [CASES[name] for name in CONFORMANCE]
    results = run_conformance(scene.group, "hierarchical", cases, rounds=2, reduces=["rank"], timeout_s=30.0)
    told["failed"] = [result.message for result in results if not result.ok]
    told["checks"] = sum(result.num_checks for result in results)
    odd = {"topology": Topology((0, 1, 2, 3))} if scene.rank == 1 else {}
    told["disagree"] = caught(lambda: scene.buffer(**odd))

    buffer = scene.buffer(timeout_s=30.0)
    told["transport"], told["nodes"] = buffer.transport, list(buffer.topology.node_of_rank)
    scene.step(buffer, 64)
    buffer.close()
    scene.meet("ready")
    buffer = scene.buffer()
    scene.mark("under_way")
    told["cut"] = caught(lambda: steps_without_end(scene, buffer))
    buffer.close()
    scene.mark("gave_up")
    scene.wait_for("mended", -1)
    scene.meet("again")
    with scene.buffer(timeout_s=30.0) as buffer:
        scene.step(buffer, 64)
        told["again"] = True
        told["killed"] = lose_one(scene, buffer)
    return told


def steps_without_end(scene: Scene, buffer: moecomm.Buffer) -> None:
    while True:
        scene.step(buffer, TOKENS)


def lose_one(scene: Scene, buffer: moecomm.Buffer) -> dict[str, Any]:
    """A rank is killed while the others wait for it."""
    others = [rank for rank in range(scene.size) if rank != DYING]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the mates of a dead rank; they are to be seen
    if scene.rank == DYING:
        scene.wait_for("waiting", *others)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    scene.mark("waiting")
    error = caught(lambda: scene.step(buffer, 64))
    scene.mark("survived")
    scene.wait_for("survived", *others)
    return error


def main() -> None:
    """Play one rank; the file tells the test."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "mpi":
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            print(f"a rank ended: {os.waitstatus_to_exitcode(status)}", flush=True)
            os._exit(0)
        os.setsid()
    faulthandler.dump_traceback_later(2 * PATIENCE_S, exit=True)
    faulthandler.enable()
    torch.set_num_threads(1)
    scene = Scene(kind, folder)
    told: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt):
        try:
            told = play(scene)
        except BaseException as error:
            faulthandler.dump_traceback()
            told = {"raised": repr(error)}
    part = folder / f".told.{scene.rank}"
    part.write_text(json.dumps(told))
    part.rename(folder / f"told.{scene.rank}")
    os._exit(0)


if __name__ == "__main__":
    main()
