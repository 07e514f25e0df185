"""Transport `mpi` where all ranks do as they should."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.group import Group
from moecomm.testing import RankFailure, no_leaks
from moecomm.testing.mpi import mpi_missing, run_mpi
from moecomm.topology import Topology
from moecomm.transport._mpi_exchange import MpiExchange
from moecomm.transport._mpi_post import Kind
from moecomm.transport.mpi import MpiTransport
from tests.under_mpi import run_under_mpi

BIG_ROW_BYTES, NUM_BIG_ROWS = 1 << 20, 2200  # 2.15 GiB to one rank: more than 2**31 bytes, and than 2**31 - 1
BIG_BYTES = 2 * BIG_ROW_BYTES * NUM_BIG_ROWS

needs_mpi = pytest.mark.skipif(bool(mpi_missing()), reason=mpi_missing())
pytestmark = pytest.mark.timeout(180)


# Programs that can follow each other in one job, by its number of ranks.
TOGETHER = {
    2: ("alone_with_mpi", "overlap", "big", "own_traffic", "ends"),
    3: ("many_in_flight", "staged", "farewell"),
}


@functools.cache
def output(size: int) -> str:
    """What the job of so many ranks says; its programs run one after the other until one fails."""
    programs = [name for name in TOGETHER[size] if name != "big" or free_bytes() >= BIG_BYTES]
    try:
        return "".join(run_under_mpi(run_programs, size, programs, timeout_s=170))
    except RankFailure as failure:
        return str(failure)


def demand(size: int, program: str, printed: str) -> None:
    assert printed.count(f"{program}: done") == size, printed


def free_bytes() -> int:
    """What can be had without swapping: the page cache gives way."""
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024


@needs_mpi
@pytest.mark.parametrize(("size", "program"), [(size, name) for size, names in TOGETHER.items() for name in names])
def test_program(size: int, program: str) -> None:
    printed = output(size)
    if program == "big" and f"{program}: done" not in printed and "ends: done" in printed:
        pytest.skip(f"needs {BIG_BYTES / 2**30:.1f} GiB of free memory, there were too few")
    demand(size, program, printed)


@needs_mpi
def test_what_is_dropped_reaches_the_others() -> None:
    """When a program ends: here that is this file, started by mpiexec."""
    done = run_mpi(["-m", "mpi4py", "-m", "tests.unit.test_mpi"], 2, timeout_s=110)
    assert done.returncode == 0
    demand(2, "dropped", done.stdout)


KILLED = """
import os
from mpi4py import MPI
segments = [line for line in open("/proc/self/maps") if "/dev/shm/mpich_shm_" in line]
print(end=f"{MPI.get_vendor()[0]} has {len(segments)}\\n", flush=True)
MPI.COMM_WORLD.Barrier()
os.kill(os.getpid(), 9)
"""


@needs_mpi
def test_ranks_that_are_killed_leave_no_shared_memory() -> None:
    with no_leaks():
        done = run_mpi(["-c", KILLED], 2)
    assert done.returncode != 0
    assert done.stdout.count("MPICH has 1") == 2 or "MPICH" not in done.stdout, done.stdout


def test_groups_without_mpi_are_told_why() -> None:
    answer = MpiTransport.supports(Group.resolve(), Topology((0,)), torch.device("cpu"))
    assert (answer.ok, answer.reason) == (False, "the group is not an mpi4py communicator")
    assert "mpi" in moecomm.transport.TRANSPORTS


# -- what the ranks run ------------------------------------------------------------------------------------------


def make(comm: Any, transport: str = "mpi", **changed: Any) -> moecomm.Buffer:
    sizes = {"num_experts": 2 * comm.size, "hidden": 8, "top_k": 2, "max_tokens_per_rank": 4096}
    return moecomm.Buffer(comm, **(sizes | {"dtype": torch.float32, "timeout_s": 60.0} | changed), transport=transport)


def inputs(buffer: moecomm.Buffer, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + buffer.group.rank)
    x = torch.randint(-64, 64, (num_tokens, buffer.config.hidden), generator=generator).float()
    return x, torch.rand(num_tokens, buffer.config.num_experts, generator=generator).topk(2).indices


def check_step(buffer: moecomm.Buffer, num_tokens: int = 20, seed: int = 0) -> None:
    x, topk_idx = inputs(buffer, num_tokens, seed)
    out: Any = buffer.dispatch(x, topk_idx)
    assert torch.equal(buffer.combine(out.x, out.handle), 2 * x)


def alone_with_mpi(comm: Any) -> None:
    """No torch.distributed, the transport that was asked for, and an explanation."""
    import torch.distributed as dist

    with make(comm) as buffer:
        check_step(buffer)
        assert buffer.transport == "mpi"
        said = buffer.explain()
        assert said.startswith("transport mpi: Ialltoallv of "), said
        assert "not collective: the group is not one of torch.distributed" in said
        assert "not symmetric: would work; comes later in the order" in said
    with make(comm, "auto") as buffer:
        assert buffer.transport == "symmetric", "on one host"
        assert "not mpi: would work; comes later in the order" in buffer.explain()
    assert not dist.is_initialized()
    assert not [name for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE") if name in os.environ]
    half = comm.Split(comm.rank % 2, comm.rank)
    with make(half) as buffer:
        check_step(buffer)
    half.Free()


def overlap(comm: Any) -> None:
    """Rows arrive while nobody calls moecomm: `stats` looks and moves nothing."""
    with make(comm, hidden=4096) as buffer:
        check_step(buffer)
        x, topk_idx = inputs(buffer, 2000)
        pending = buffer.dispatch_async(x, topk_idx)
        deadline = time.monotonic() + 60
        while buffer.stats()["in_flight"]:
            assert time.monotonic() < deadline, "nothing moves unless somebody waits"
            time.sleep(0.001)
        arrived = pending.wait()
        assert torch.equal(buffer.combine(arrived.x, arrived.handle), 2 * x)
        assert buffer.stats()["collectives"] > 0


def own_traffic(comm: Any) -> None:
    """The caller's messages, with any tag and from any rank, never meet those of moecomm."""
    from mpi4py import MPI

    with make(comm) as buffer:
        box = np.zeros(1)
        request = comm.Irecv(box, MPI.ANY_SOURCE, MPI.ANY_TAG)
        for seed in range(5):
            check_step(buffer, seed=seed)
        assert not request.Test()
        comm.Barrier()  # now all have looked
        comm.Send(np.array([comm.rank + 1.0]), (comm.rank + 1) % comm.size, 7)
        request.Wait()
        assert box[0] == (comm.rank - 1) % comm.size + 1


def ends(comm: Any) -> None:
    """Closing waits for nobody and frees the communicator, the thread and the descriptors."""
    import threading

    def settled() -> tuple[list[str], int]:
        """Threads and number of descriptors once the thread of moecomm has ended."""
        deadline = time.monotonic() + 30
        while "moecomm mpi progress" in (names := sorted(thread.name for thread in threading.enumerate())):
            assert time.monotonic() < deadline, names
            time.sleep(0.01)
        return names, len(os.listdir("/proc/self/fd"))

    with make(comm) as buffer:
        check_step(buffer)
    before = settled()
    for seed in range(3):
        buffer = make(comm)
        check_step(buffer, seed=seed)
        transport: Any = buffer._core.transport
        comm.Barrier()
        if comm.rank == 0:
            buffer.close()
            assert transport.comm.handle == type(comm)().handle, "freed"
        comm.Barrier()  # only now the others close
        buffer.close()
        buffer.close()
    assert settled() == before


def farewell(comm: Any) -> None:
    """Who closes says goodbye. Who gave up has said so, and says no more: MPI may crash where it meets a dead rank."""
    for gives_up in (False, True):
        buffer = make(comm)
        check_step(buffer)
        comm.Barrier()
        post = buffer._core.transport.post  # type: ignore[attr-defined]
        with mock.patch.object(post, "send_all", wraps=post.send_all) as said:
            if gives_up:
                buffer.abort("enough")
            buffer.close()
        assert [call.args[1] for call in said.call_args_list] == [Kind.ABORT if gives_up else Kind.BYE]


def dropped(comm: Any) -> None:
    """What is never waited for still reaches the others, also when its buffer is gone; then MPI ends as usual."""
    buffer = make(comm, hidden=4096)
    x, topk_idx = inputs(buffer, 2000)
    if comm.rank == 0:
        atexit.register(comm.Send, b"", 1, 7)  # called just before moecomm lets MPI end
        first: Any = buffer.dispatch(x, topk_idx)
        buffer.dispatch_async(x, topk_idx)
        buffer.combine_async(first.x, first.handle)
        del buffer, first
        gc.collect()
    else:
        out: Any = buffer.dispatch(x, topk_idx)
        with mock.patch.object(MpiExchange, "launch", after_end_of_rank_0(comm)):
            buffer.dispatch(x, topk_idx)
        assert torch.equal(buffer.combine(out.x, out.handle), 2 * x)
        # and `buffer` is left open: it says goodbye when the process ends


def after_end_of_rank_0(comm: Any) -> Any:
    """A launch that comes when the program of rank 0 is over, and a little later still."""
    launch = MpiExchange.launch

    def late(exchange: MpiExchange) -> int:
        comm.Recv(bytearray(0), 0, 7)
        time.sleep(0.3)
        return launch(exchange)

    return late


def many_in_flight(comm: Any) -> None:
    """Several operations at once, waited for in another order, through two buffers in turn."""
    with make(comm) as one, make(comm, hidden=5) as two:
        sent = []
        for seed in range(6):
            buffer = two if seed % 2 else one
            x, topk_idx = inputs(buffer, 10 + seed, seed)
            sent.append((buffer, x, buffer.dispatch_async(x, topk_idx)))
        pending = []
        for buffer, x, dispatch in reversed(sent):
            out = dispatch.wait()
            pending.append((x, buffer.combine_async(out.x, out.handle)))
        for x, combine in pending:
            assert torch.equal(combine.wait(), 2 * x)


def big(comm: Any) -> None:
    """More than 2 GiB in one message: counts are in rows. What was not written is zero: its pages take no memory."""
    from moecomm.transport.base import Lane

    with make(comm) as buffer:
        transport: Any = buffer._core.transport
        counts = np.array([[0, NUM_BIG_ROWS], [3, 0]])
        lane = Lane(
            row_bytes=BIG_ROW_BYTES,
            out_rows=counts.sum(0),
            send_counts=counts[comm.rank],
            send_starts=np.zeros(2, np.int64),
            recv_counts=counts[:, comm.rank],
        )
        exchange = transport.open("big", [lane], agreed=False)
        marks = [0, 1, 2047, 2048, NUM_BIG_ROWS - 1]  # around 2**31 bytes, and the ends
        rows = exchange.target(0, 1 - comm.rank)
        for row in marks if comm.rank == 0 else range(3):
            rows[row] = 1 + row % 250
        exchange.commit()
        (out,) = exchange.wait()
        assert out.shape == (NUM_BIG_ROWS if comm.rank else 3, BIG_ROW_BYTES)
        for row in marks if comm.rank == 1 else range(3):
            assert (out[row] == 1 + row % 250).all(), f"row {row}"
        if comm.rank == 1:
            assert out.numel() > 2**31
            assert not out[[2, 1000, 2046, 2049, NUM_BIG_ROWS - 2]].any()


class PretendedDevice:
    """A device whose copies take three looks, and are made at the last one: whoever is early sends rubbish."""

    def __init__(self) -> None:
        self.most_at_once = self.num_marks = self.under_way = 0

    def host(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def mark(self) -> Any:
        self.num_marks += 1
        return self._after(lambda: None)

    def start(self, dst: Tensor, src: Tensor) -> Any:
        assert dst.shape == src.shape
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)

        def copy() -> None:
            dst.copy_(src)
            self.under_way -= 1

        return self._after(copy)

    def _after(self, action: Any) -> Any:
        looks = iter(range(3))

        def done() -> bool:
            look = next(looks, None)
            if look == 2:
                action()
            return look is None or look == 2

        return done


def staged(comm: Any) -> None:
    """All cases of the conformance suite that differ in shape, through chunks of 100 bytes and two slots."""
    from moecomm.testing import CASES
    from moecomm.testing.conformance import run_in_turn
    from moecomm.transport import mpi

    device = PretendedDevice()
    mpi.copy_engine = lambda _: device  # type: ignore[assignment]
    mpi.device_awareness = lambda *_: (False, "pretended")
    mpi.Slots = functools.partial(mpi.Slots, chunk_bytes=100, num_slots=2)  # type: ignore[misc,assignment]
    cases = ("plain", "empty_rank", "all_to_one", "tiny_hidden", "ragged_tokens", "quantised_pair", "all_empty")
    results = run_in_turn(comm, "mpi", [CASES[name] for name in cases], rounds=2)
    assert len(results) == len(cases)
    for result in results:
        assert result.ok, result.message
    assert device.most_at_once == 4, "two slots in each direction, all in use"
    assert device.num_marks > 0 and device.under_way == 0
    with make(comm, hidden=300) as buffer:
        check_step(buffer)
        assert buffer.stats()["collectives"] == 0
        assert buffer.stats()["staged_chunks"] > 0
        assert buffer._core.transport.allocated_bytes > 0


def run_programs(comm: Any, names: list[str]) -> str:
    """What each rank runs, and what it has done, which a rank that fails has printed."""
    said = ""
    for name in names:
        globals()[name](comm)
        said += f"{name}: done\n"
        print(f"{name}: done\n", end="", flush=True)
    return said


if __name__ == "__main__":
    from mpi4py import MPI

    torch.set_num_threads(1)
    run_programs(MPI.COMM_WORLD, ["dropped"])
