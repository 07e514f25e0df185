"""Join the processes that a launcher started: alone, under torchrun or under mpiexec, with the same call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist

from moecomm import _env
from moecomm.errors import ConfigError, UnsupportedError
from moecomm.group import Group


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What this process was started as.

    launcher: "torchrun", "mpiexec" or "alone". group: what `moecomm.Buffer` takes; None for a single rank.
    rank, size: among all processes. local_rank, local_size: among those of this node. device: where rows live.
    """

    launcher: str
    group: Any
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


def environment_variables() -> dict[str, tuple[str, str, bool]]:
    """Name of every environment variable of moecomm -> value, meaning, whether it is set.

    >>> environment_variables()["MOECOMM_TIMEOUT_S"][1]
    'deadline of every wait in seconds, where the constructor gives none'
    """
    return _env.values()


def omp_threads() -> str:
    """OMP_NUM_THREADS as it is set, or nothing."""
    return _env.threads()


def is_first() -> bool:
    """Whether this process is rank 0, or alone: the one that prints. Known before the others are joined.

    >>> is_first()
    True
    """
    return _env.is_first()


@contextmanager
def joined(device: str = "auto") -> Iterator[Launch]:
    """Join the other processes for the length of a `with` block.

    Under torchrun, the default process group is made, and destroyed at the end, unless there is one already. Under
    mpiexec the group is MPI.COMM_WORLD and torch.distributed is not touched.

    Args:
        device: "cpu", "cuda", or "auto": a GPU if there is one for every process of this node.

    Raises:
        ConfigError: no such device.
        UnsupportedError: mpiexec started this process, and mpi4py is not there.

    >>> with joined("cpu") as launch:
    ...     launch.launcher, launch.rank, launch.size
    ('alone', 0, 1)
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError("device is unknown", got=repr(device), expected="auto, cpu or cuda")
    launcher, rank, size, local_rank, local_size = _env.launched()
    group: Any = None
    if launcher == "mpiexec":
        group, local_rank, local_size = _mpi_world()
        rank, size = group.rank, group.size
    place = _place(device, local_rank, local_size)
    makes_group = launcher == "torchrun" and not dist.is_initialized()
    if makes_group:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    if launcher == "torchrun":
        group = dist.group.WORLD
    try:
        yield Launch(
            launcher=launcher or "alone",
            group=group,
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            device=place,
        )
    finally:
        if makes_group and dist.is_initialized():
            dist.destroy_process_group()


def _mpi_world() -> tuple[Any, int, int]:
    """All processes of the MPI job, the number of this one on its node, and how many are there."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UnsupportedError(
            "mpiexec started this process, but it cannot join the others",
            got=str(error),
            expected="mpi4py",
            remedy="pip install 'moecomm[mpi]', or start with torchrun",
        ) from error
    host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = host.rank, host.size
    host.Free()
    if not _env.threads():
        torch.set_num_threads(1)  # as under torchrun
    return MPI.COMM_WORLD, local_rank, local_size


def _place(device: str, local_rank: int, local_size: int) -> torch.device:
    count = torch.cuda.device_count()
    if device == "cuda" and not count:
        raise ConfigError("torch sees no GPU", got="device cuda", expected="cpu or auto")
    if device == "cpu" or count == 0 or (device == "auto" and count < local_size):
        return torch.device("cpu")
    place = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(place)
    return place


def resolve(launch: Launch) -> Group:
    """The `Group` of a launch.

    >>> with joined("cpu") as launch:
    ...     resolve(launch).size
    1
    """
    return Group.resolve(launch.group)
