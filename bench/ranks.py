"""The processes of a benchmark: started alone, by torchrun or by mpiexec, they time calls together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_LEAD_S = 0.002  # until the ranks begin: time enough for the slowest to hear of it
_LEAD_OF_BURST_S = 0.0002  # the first call is not counted, and the ranks wait for each other in it
_KEPT_BYTES = 31 << 20  # glibc's limit is 32 MiB, header included
_MPI_VARIABLES = frozenset({"PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"})


class Ranks:
    """This process among its peers; a plain `python` start is a world of one.

    torch.distributed is there whenever there are two ranks or more, since the baseline stands on it; under mpiexec
    `comm` is MPI.COMM_WORLD besides. Ranks that share a GPU have no torch baseline there: NCCL refuses them.

    Args:
        device: "auto", "cpu" or "cuda".
        steady: "on": keep each rank, with the threads that it will start, on cores of its own, as many launchers for
            MPI do, and bring malloc where it is in a process that has lived a while. "auto": so where each rank of
            this machine can have a core. "off": as the launcher starts them.

    Raises:
        ValueError: there is no GPU; or steady is "on" and there are fewer cores than ranks, or a GPU is measured.
    """

    def __init__(self, device: str = "auto", *, steady: str = "off") -> None:
        self.comm: Any = None
        environ = os.environ
        if "RANK" not in environ and _MPI_VARIABLES & environ.keys():
            self.comm = _join_mpi()
        self.rank, self.world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        self.local_rank = int(environ.get("LOCAL_RANK", 0))
        self.local_world = int(environ.get("LOCAL_WORLD_SIZE", self.world))
        if "OMP_NUM_THREADS" not in environ:
            torch.set_num_threads(1)  # as under torchrun, so that all launchers measure the same
        self.device = torch.device("cpu")
        self.shares_device = False
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here; give --device cpu")
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            self.shares_device = self.local_world > torch.cuda.device_count()
            self.device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        can = self.device.type == "cpu" and self.local_world <= len(os.sched_getaffinity(os.getppid()))
        if steady == "on" and not can:
            raise ValueError(
                f"--steady on: {self.local_world} ranks need a core each, and --device cpu; give --steady off"
            )
        self.is_steady = can and steady != "off"
        if self.is_steady:
            bind_to_cores(self.local_rank, self.local_world)
            _settle_memory()
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    @property
    def launch(self) -> str:
        """The words before the script in a command that starts the same ranks."""
        if self.world == 1:
            return "python"
        if self.comm is not None:
            return f"mpiexec -n {self.world} python"
        nodes = self.world // self.local_world
        return f"torchrun {f'--nnodes {nodes}' if nodes > 1 else '--standalone'} --nproc-per-node {self.local_world}"

    def group_for(self, transport: str) -> Any:
        """What a `Buffer` with this transport is to stand on.

        Raises:
            ValueError: "mpi" in processes that mpiexec did not start.
        """
        if transport != "mpi":
            return None
        if self.comm is None and self.world > 1:
            raise ValueError("--transport mpi needs mpiexec -n RANKS python SCRIPT; torchrun started these processes")
        if self.comm is None:
            from mpi4py import MPI

            self.comm = MPI.COMM_WORLD
        return self.comm

    def time_us(self, call: Callable[[], object]) -> float:
        """Microseconds of one call, which all ranks begin together."""
        self.begin()
        start = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - start) * 1e6

    def time_burst_us(self, calls: Sequence[Callable[[], object]], burst: int) -> list[list[float]]:
        """Microseconds of each of some calls that follow each other: once, begun together, if burst is 1.

        Else so many times without a pause, as a model calls them layer by layer, after one time that is not counted.
        """
        if burst == 1:
            return [[self.time_us(call)] for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        self.begin(_LEAD_OF_BURST_S)
        for _ in range(burst + 1):
            for number, call in enumerate(calls):
                start = time.perf_counter()
                call()
                self.synchronize()
                times[number].append(1e6 * (time.perf_counter() - start))
        return [of_call[1:] for of_call in times]

    def begin(self, lead_s: float = _LEAD_S) -> None:
        """Agree on a moment and wait for it: out of a barrier the ranks would come one by one.

        The last of four came 0.5 ms after the first on two cores, of two 0.05 ms (gloo, medians).
        """
        self.synchronize()
        if self.world > 1:
            begin = torch.tensor(time.monotonic() + lead_s, dtype=torch.float64)
            dist.all_reduce(begin, dist.ReduceOp.MAX)
            moment = float(begin)
            while time.monotonic() < moment:
                os.sched_yield()

    def all_gather(self, value: Any) -> list[Any]:
        """What every rank says, in rank order."""
        every: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(every, value)
        return every

    def slowest(self, times_us: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Round by round the maximum over ranks."""
        every = self.all_gather(dict(times_us))
        return {name: np.max([one[name] for one in every], 0).tolist() for name in times_us}

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def leave(self) -> None:
        """Wait for the others and end."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


def bind_to_cores(local_rank: int, local_world: int) -> None:
    """Give each rank an equal share of the cores; left alone if the launcher has bound it.

    The threads of gloo wander otherwise, and the time of a call depends on where each of them happens to be.
    """
    cores = sorted(os.sched_getaffinity(0))
    if local_world > 1 and set(cores) == os.sched_getaffinity(os.getppid()):
        first, after = (len(cores) * rank // local_world for rank in (local_rank, local_rank + 1))
        os.sched_setaffinity(0, cores[first:after])


def _settle_memory() -> None:
    """Bring malloc where it is in any process that has lived a while: glibc keeps blocks up to the largest ever freed.

    Until then tensors of megabytes come fresh from the system, or do not, by what was freed before: a factor of two.
    """
    freed = torch.ones(_KEPT_BYTES, dtype=torch.uint8)
    del freed


def _join_mpi() -> Any:
    """Lend torch.distributed the ranks of MPI."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = "127.0.0.1" if host.size == world.size else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        address, port = world.bcast((address, probe.getsockname()[1]))
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    os.environ |= {"LOCAL_RANK": str(host.rank), "LOCAL_WORLD_SIZE": str(host.size)}
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    host.Free()
    return world
