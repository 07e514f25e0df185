"""Where a script runs: process group, seeds, links; printing by one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moecomm.deep_ep.refusals import demand
from moecomm.deep_ep.sizes import get_logical_domain_size, get_physical_domain_size
from moecomm.group import meeting_point

__all__ = [
    "check_fast_rdma_atomic_support",
    "check_nvlink_connections",
    "check_torch_deterministic",
    "dist_print",
    "get_global_seed",
    "get_local_seed",
    "get_logical_domain_size",
    "get_nvlink_gbs",
    "get_physical_domain_size",
    "get_rdma_gbs",
    "init_dist",
    "init_seed",
]

_seeds = {"local": 0, "global": 0}
_ranks_per_node = [1]


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> tuple[int, int, dist.ProcessGroup]:
    """Join the process group of all nodes and seed this rank.

    `WORLD_SIZE` and `RANK` number the nodes, as in DeepEP's own scripts; `MASTER_ADDR` and `MASTER_PORT` say where they
    meet. NCCL where each process has a device, else gloo.

    Returns:
        rank, number of ranks, and a group of all of them.
    """
    address, port, num_nodes, node = meeting_point()
    rank, size = node * num_local_ranks + local_rank, num_nodes * num_local_ranks
    has_device = torch.cuda.is_available()
    if has_device:
        torch.cuda.set_device(local_rank)
        torch.set_default_device("cuda")
    backend = "nccl" if has_device else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://{address}:{port}", world_size=size, rank=rank)
    _ranks_per_node[0] = num_local_ranks
    init_seed(seed)
    return rank, size, dist.new_group(list(range(size)))


def init_seed(seed: int = 0) -> None:
    """Seed torch on this rank: seed + rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    _seeds.update({"global": seed, "local": seed + rank})
    torch.manual_seed(_seeds["local"])


def get_local_seed() -> int:
    """The seed of this rank."""
    return _seeds["local"]


def get_global_seed() -> int:
    """The seed that all ranks were given."""
    return _seeds["global"]


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Print on every rank, or on the first of each node; all ranks call it, and meet in it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not once_in_node or rank % _ranks_per_node[0] == 0:
        print(s, flush=True)
    if dist.is_initialized():
        dist.barrier()


def get_rdma_gbs() -> float:
    """GB/s of a rank between nodes, where nobody has measured them: 400 Gb/s less a tenth."""
    return 45.0


def get_nvlink_gbs(factor: float = 0.9) -> float:
    """GB/s of a rank inside a node, where nobody has measured them: an H100's links times factor."""
    return 18 * 26.56 * factor


def check_nvlink_connections(group: dist.ProcessGroup) -> None:
    """Nothing has to be connected: rows find another way."""
    demand(group is not None, "group is None", got="None", expected="a process group")


def check_fast_rdma_atomic_support() -> bool:
    """Whether atomic operations of a network card are used: never."""
    return False


def check_torch_deterministic() -> None:
    """Refuse deterministic algorithms that fill new memory: they overwrite rows that are on their way."""
    both = torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    demand(
        not both or not torch.cuda.is_available(),
        "new memory is filled, which costs as much as the rows",
        got="torch.utils.deterministic.fill_uninitialized_memory=True",
        expected="False with torch.use_deterministic_algorithms(True)",
    )
