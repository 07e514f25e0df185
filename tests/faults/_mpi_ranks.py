"""What every rank of the MPI fault tests runs.

Scenarios after which all ranks live follow each other in one job. What came of a rank is a file in a folder. mpiexec
ends the processes that it knows as soon as one of them dies, and what survivors do is to be seen here: it does not know
ranks that are forked (`tests.under_mpi`).
"""

from __future__ import annotations

import faulthandler
import functools
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import moecomm
from moecomm.errors import MoECommError
from tests.faults import _table
from tests.faults._scenes import VICTIM, happen, play

TIMEOUT_S = 2.0


class World:
    """One rank, and files by which ranks tell each other apart from MPI."""

    def __init__(self, folder: Path, scenario: str, comm: Any) -> None:
        self.comm, self.folder, self.scenario = comm, folder, scenario
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()

    def buffer(self, timeout_s: float = TIMEOUT_S, hidden: int = 16) -> moecomm.Buffer:
        """Two experts per rank."""
        sizes: dict[str, Any] = {"num_experts": 2 * self.size, "hidden": hidden, "top_k": 2, "max_tokens_per_rank": 64}
        return moecomm.Buffer(self.comm, **sizes, dtype=torch.float32, transport="mpi", timeout_s=timeout_s)

    def inputs(self, buffer: moecomm.Buffer, num_tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that say who sent them, to two experts each, all ranks reached."""
        x = torch.full((num_tokens, buffer.config.hidden), float(self.rank + 1))
        first = torch.arange(num_tokens) % buffer.config.num_experts
        return x, torch.stack([first, (first + 3) % buffer.config.num_experts], dim=1)

    def step(self, buffer: moecomm.Buffer) -> None:
        """A dispatch and a combine, checked."""
        x, topk_idx = self.inputs(buffer)
        out: Any = buffer.dispatch(x, topk_idx)
        senders = (out.x[:, 0] - 1).long()
        assert torch.equal(out.x, (senders + 1.0)[:, None].expand_as(out.x))
        assert torch.equal(torch.bincount(senders, minlength=self.size).sum(), torch.tensor(len(out.x)))
        assert torch.equal(buffer.combine(out.x, out.handle), 2 * x)

    def mark(self, name: str) -> None:
        """Say that this rank has come to that point, and which process it is."""
        self.leave(f"{self.scenario}.{name}.{self.rank}", str(os.getpid()).encode())

    def leave(self, name: str, content: bytes) -> None:
        """Leave a file, whole or not at all."""
        part = self.folder / f".{name}"
        part.write_bytes(content)
        part.rename(self.folder / name)

    def wait_for(self, name: str, *ranks: int) -> list[int]:
        """Wait until those ranks, or all, are there; their process ids."""
        paths = [self.folder / f"{self.scenario}.{name}.{rank}" for rank in ranks or range(self.size)]
        while not all(path.exists() for path in paths):
            time.sleep(0.005)
        return [int(path.read_text()) for path in paths]

    def meet(self, name: str) -> None:
        """Wait for all ranks."""
        self.mark(name)
        self.wait_for(name)

    def meet_survivors(self) -> None:
        """Wait for all ranks but rank 1: whoever ends earlier is rightly named by the others as gone, too."""
        self.mark("survived")
        self.wait_for("survived", *(rank for rank in range(self.size) if rank != 1))


def caught(operation: Callable[[], object]) -> tuple[str, tuple[int, ...], str, float]:
    """Run it, which must fail: class, peers and message of the error, and the seconds it took."""
    start = time.monotonic()
    try:
        operation()
    except MoECommError as error:
        return type(error).__name__, error.peers, str(error), time.monotonic() - start
    raise AssertionError("nothing was raised")


def absent(world: World) -> Any:
    """The last rank sleeps instead of taking part; afterwards a new buffer works."""
    buffer = world.buffer()
    world.step(buffer)
    last = world.size - 1
    if world.rank == last:
        world.wait_for("gave_up", *range(last))
    error = caught(lambda: world.step(buffer))
    world.mark("gave_up")
    again = caught(lambda: world.step(buffer))
    buffer.close()
    world.meet("closed")
    with world.buffer() as fresh:
        world.step(fresh)
    return error, again


def absent_from_combine(world: World) -> Any:
    """Rank 0 does not combine; the others wait for it in a call that never waits for headers."""
    with world.buffer() as buffer:
        x, topk_idx = world.inputs(buffer)
        out: Any = buffer.dispatch(x, topk_idx)
        if world.rank == 0:
            world.wait_for("gave_up", *range(1, world.size))
            error = caught(lambda: buffer.combine(out.x, out.handle))
        else:
            pending = buffer.combine_async(out.x, out.handle)
            error = caught(pending.wait)
            world.mark("gave_up")
        return error


def stopped(world: World) -> Any:
    """Rank 1 is stopped after it has said what it sends, and before its rows have gone."""
    buffer = world.buffer(hidden=65536)
    world.step(buffer)
    x, topk_idx = world.inputs(buffer)
    from moecomm.transport.mpi import MpiExchange

    launch = MpiExchange.launch

    def stop(exchange: Any) -> int:
        if world.rank == 1:
            world.mark("stopped")
            os.kill(os.getpid(), signal.SIGSTOP)
        return launch(exchange)

    with mock.patch.object(MpiExchange, "launch", stop):
        error = caught(lambda: buffer.dispatch(x, topk_idx))
    if world.rank != 1:
        world.mark("gave_up")
        world.wait_for("gave_up", *(rank for rank in range(world.size) if rank != 1))
    if world.rank == 0:
        os.kill(world.wait_for("stopped", 1)[0], signal.SIGCONT)
    world.meet("named")  # what was said to rank 1 may wait behind rows, and leaves only while its sender lives
    return error


def killed_with_rows(world: World, before: bool) -> Any:
    """Rank 1 dies when all have agreed on what is sent: before its rows go, or while they do."""
    from moecomm.transport import mpi

    buffer = world.buffer(timeout_s=60.0, hidden=65536)
    world.step(buffer)
    launch = mpi.MpiExchange.launch

    def die(exchange: Any) -> int:
        launched = 0 if before else launch(exchange)
        world.wait_for("launched", *(rank for rank in range(world.size) if rank != 1))
        os.kill(os.getpid(), signal.SIGKILL)
        return launched

    def tell(exchange: Any) -> int:
        launched = launch(exchange)
        world.mark("launched")
        return launched

    mpi.MpiExchange.launch = die if world.rank == 1 else tell  # type: ignore[method-assign, assignment]
    x, topk_idx = world.inputs(buffer)

    def operations() -> None:
        buffer.dispatch(x, topk_idx)  # what rank 1 sent before it died may have come
        assert not before, "rows of a rank that never sent any have come"
        world.step(buffer)

    error = caught(operations)
    start = time.monotonic()
    buffer.close()
    closing_s = time.monotonic() - start
    world.meet_survivors()
    return error, closing_s


def killed_before_rows(world: World) -> Any:
    """Rank 1 dies and has sent nothing."""
    return killed_with_rows(world, True)


def killed_among_rows(world: World) -> Any:
    """Rank 1 dies while it sends."""
    return killed_with_rows(world, False)


def mismatch(world: World) -> Any:
    """Rank 1 dispatches with other arguments, then calls another operation, then uses another handle."""
    errors = []
    buffer = world.buffer(timeout_s=60.0)
    x, topk_idx = world.inputs(buffer)
    errors.append(caught(lambda: buffer.dispatch(x, topk_idx, align=1 + (world.rank == 1))))
    buffer.close()
    buffer = world.buffer(timeout_s=60.0)
    out: Any = buffer.dispatch(x, topk_idx)
    if world.rank == 1:
        errors.append(caught(lambda: buffer.dispatch(x, topk_idx)))
    else:
        errors.append(caught(lambda: buffer.combine(out.x, out.handle)))
    buffer.close()
    buffer = world.buffer(timeout_s=60.0)
    first: Any = buffer.dispatch(x, topk_idx)
    second: Any = buffer.dispatch(x[:10], topk_idx[:10])
    if world.rank == 1:
        errors.append(caught(lambda: buffer.combine(second.x, second.handle)))
    else:
        errors.append(caught(lambda: buffer.combine(first.x, first.handle)))
    buffer.close()
    with world.buffer() as fresh:
        world.step(fresh)
    return errors


def closes_early(world: World) -> Any:
    """Rank 1 closes its buffer; the others hear of it at once, and closing waits for nobody."""
    buffer = world.buffer(timeout_s=60.0)
    world.step(buffer)
    if world.rank == 1:
        start = time.monotonic()
        buffer.close()
        return time.monotonic() - start
    return caught(lambda: world.step(buffer))


def breaks_off(world: World) -> Any:
    """MPI itself reports an error on rank 1, in the middle of an operation."""
    from mpi4py import MPI

    buffer = world.buffer(timeout_s=60.0)
    world.step(buffer)
    transport: Any = buffer._core.transport
    if world.rank == 1:
        transport._types[buffer.config.row_bytes] = MPI.DATATYPE_NULL
    return caught(lambda: world.step(buffer))


# -- the failure table -------------------------------------------------------------------------------------------------


class Slept(Exception):
    """What ends a rank that hung until the others had given up."""


def act(world: World, event: str, buffer: moecomm.Buffer) -> None:
    """What rank 1 does in the middle of round 3."""
    world.leave(f"{world.scenario}.happened", repr(time.monotonic()).encode())
    if event == "hung":
        world.wait_for("over", *(rank for rank in range(world.size) if rank != VICTIM))
        raise Slept
    if event == "cut":
        from mpi4py import MPI

        transport: Any = buffer._core.transport
        transport._types[buffer.config.row_bytes] = MPI.DATATYPE_NULL
    if event == "memory":
        mock.patch("moecomm.operations.out_parcels", side_effect=MemoryError("out of memory")).start()
    happen(event, buffer)


def cell(event: str, world: World) -> tuple[str, float, str, str]:
    """As `tests.faults.test_table.scene`, over MPI."""
    buffer = world.buffer(_table.timeout_s(event))
    world.step(buffer)
    world.meet("ready")
    kind, ended, after, printed = play(buffer, event, lambda: act(world, event, buffer))
    seconds = ended - float((world.folder / f"{world.scenario}.happened").read_text())
    world.mark("over")
    if event == "killed":
        world.wait_for("over", *(rank for rank in range(world.size) if rank != VICTIM))
    return kind, seconds, after, printed


def play_all(comm: Any, scenarios: tuple[str, ...], folder: Path) -> None:
    """Play one rank in each of them; what came of it is left in files."""
    for name in scenarios:
        what, _, event = name.partition(":")
        scenario = functools.partial(cell, event) if what == "cell" else globals()[name]
        world = World(folder, name, comm)
        try:
            outcome = scenario(world)
        except BaseException as error:
            faulthandler.dump_traceback()
            outcome = error
        world.leave(f"outcome.{name}.{world.rank}", pickle.dumps(outcome))
        if name != scenarios[-1]:
            world.meet("end")
