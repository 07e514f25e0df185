"""Symmetric memory for kernels: one area per rank, and its address as every other rank sees it.

On an accelerator it comes from torch's own symmetric memory (NVIDIA, AMD and Intel come with torch). Where Triton's
interpreter plays the accelerator it is host memory that all ranks map.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from moecomm import _env
from moecomm.errors import CapacityError, UnsupportedError
from moecomm.group import Group
from moecomm.memory.host import HostMemory, host_memory_support


@final
@dataclass(frozen=True, eq=False, slots=True)
class DeviceMemory:
    """One rank's area and where all of them are.

    tensor: (bytes,) uint8, zero at first. views: every rank's area as a (bytes,) uint8 tensor. addresses: of those, as
    seen from here. keeps: what must live as long as they are used.
    """

    tensor: Tensor
    views: list[Tensor]
    addresses: list[int]
    keeps: tuple[Any, ...]


def moves_by_kernels(device: torch.device) -> bool:
    """Whether rows on this device are moved by kernels: on an accelerator, or where Triton interprets them."""
    return device.type != "cpu" or _env.interprets_kernels()


def device_memory_support(group: Group, device: torch.device) -> str | None:
    """The reason why kernels cannot reach the memory of the group's ranks here, or None. Not collective."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if not _env.interprets_kernels():
            return "kernels run on the CPU in Triton's interpreter only (TRITON_INTERPRET=1)"
        return host_memory_support()
    if _env.interprets_kernels():
        return f"TRITON_INTERPRET is set: kernels would run on the CPU, rows are on {device.type}"
    if getattr(torch.accelerator.current_accelerator(check_available=True), "type", "none") != device.type:
        return f"torch sees no {device.type} device"
    if group.size > 1 and group.process_group is None:
        return "torch's symmetric memory needs a torch.distributed group"
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return "this torch has no symmetric memory"
    return None


def share_device_memory(group: Group, device: torch.device, nbytes: int, timeout_s: float) -> DeviceMemory:
    """Allocate an area on every rank and tell all ranks where it is; collective.

    Raises:
        UnsupportedError: two ranks cannot reach each other's memory (which, and why).
        CapacityError: there is not enough memory.
    """
    if device.type == "cpu":
        return _share_host(group, nbytes, timeout_s)
    _check_peers(group, device, timeout_s)
    if group.size == 1:
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return DeviceMemory(tensor, [tensor], [tensor.data_ptr()], ())
    import torch.distributed._symmetric_memory as symmetric

    assert group.process_group is not None, "asked before with device_memory_support"
    try:
        tensor = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        tensor.zero_()
        torch.accelerator.synchronize(device)
        handle = symmetric.rendezvous(tensor, group.process_group)
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            "cannot reserve symmetric memory",
            got=f"{nbytes} bytes on {device}",
            remedy="lower max_tokens_per_rank",
            rank=group.rank,
        ) from error
    except RuntimeError as error:
        raise UnsupportedError(
            "the ranks cannot map each other's memory",
            got=str(error).splitlines()[0],
            expected="devices with peer access, and a driver that hands memory between processes",
            remedy='use transport="collective"',
            rank=group.rank,
        ) from error
    group.barrier(timeout_s=timeout_s, operation="symmetric memory")  # nobody writes before everybody's area is zero
    views = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(group.size)]
    return DeviceMemory(tensor, views, list(handle.buffer_ptrs), (handle,))


def _check_peers(group: Group, device: torch.device, timeout_s: float) -> None:
    """Compare what all ranks know of their devices; refuse, on every rank, what cannot work."""
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    known = group.all_gather_object(_identity(device, index), timeout_s=timeout_s, operation="symmetric memory")
    problem = unreachable_peers([name for name, _, _ in known], [reach for _, _, reach in known])
    shared = [rank for rank, (name, _, _) in enumerate(known) if [n for n, _, _ in known].count(name) > 1]
    if problem is None and shared and not all(allowed for _, allowed, _ in known):
        names = ", ".join(f"rank {rank}" for rank in shared)
        problem = f"{names} share a device, which torch allows with TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 only"
    if problem is not None:
        raise UnsupportedError(
            "the ranks cannot reach each other's memory",
            got=problem,
            expected="one device per rank, all with peer access",
            remedy='use transport="collective"',
            rank=group.rank,
        )


def unreachable_peers(names: list[str], reach: list[dict[str, bool]]) -> str | None:
    """Say which two ranks cannot reach each other, or None.

    names: of every rank's device, unique. reach: of every rank, whether its device can reach those that it can see.

    >>> unreachable_peers(["a", "b"], [{"b": True}, {"a": False}])
    'the device of rank 1 (b) has no peer access to that of rank 0 (a)'
    >>> unreachable_peers(["a", "b"], [{}, {}]) is None  # each sees its own device only: found out by mapping
    True
    """
    for here, there in itertools.permutations(range(len(names)), 2):
        if names[here] != names[there] and not reach[here].get(names[there], True):
            return (
                f"the device of rank {here} ({names[here]}) has no peer access to that of rank {there} ({names[there]})"
            )
    return None


def _identity(device: torch.device, index: int) -> tuple[str, bool, dict[str, bool]]:
    """Name of this rank's device, whether it may be shared, and which visible devices it can reach."""
    if device.type != "cuda":
        return f"{os.uname().nodename}:{device.type}:{index}", _env.allows_shared_devices(), {}
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    reach = {
        uuid: torch.cuda.can_device_access_peer(index, other) for other, uuid in enumerate(uuids) if other != index
    }
    return uuids[index], _env.allows_shared_devices(), reach


def _share_host(group: Group, nbytes: int, timeout_s: float) -> DeviceMemory:
    """A memfd of every rank, mapped by all; it vanishes with the last of them."""
    fd = HostMemory.create(nbytes)
    maps: list[HostMemory] = []
    try:
        own = os.getpid(), fd
        told = group.all_gather_object(own, timeout_s=timeout_s, operation="symmetric memory")
        for pid, number in told:
            maps.append(_map_of(pid, number, nbytes, group.rank))
        group.barrier(timeout_s=timeout_s, operation="symmetric memory")  # until then descriptors must stay open
    finally:
        os.close(fd)
    tensors = [memory.tensor for memory in maps]
    return DeviceMemory(tensors[group.rank], tensors, [tensor.data_ptr() for tensor in tensors], tuple(maps))


def _map_of(pid: int, number: int, nbytes: int, rank: int) -> HostMemory:
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    except OSError as error:
        raise UnsupportedError(
            "cannot open the memory of another process",
            got=str(error),
            expected="ranks of one user, in one PID namespace",
            remedy='use transport="collective", or unset TRITON_INTERPRET',
            rank=rank,
        ) from error
    try:
        return HostMemory(fd, nbytes)
    finally:
        os.close(fd)
