"""Sizes that DeepEP's callers ask for: bytes, multiprocessors, domains."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb
from typing import Any, final

import torch
from torch import Tensor

from moecomm.group import Group
from moecomm.topology import Topology

_BUFFER_ALIGN = 2 << 20
_DEFAULT_TOP_K = 32
_DEVICE_SMS = 132  # where there is no device to ask


def size_of(group: Any) -> int:
    """R."""
    return Group.resolve(group).size


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """Nodes, and ranks of a node.

    >>> get_physical_domain_size(None)
    (1, 1)
    """
    resolved = Group.resolve(group)
    num_nodes = Topology.detect(resolved).num_nodes
    return num_nodes, -(-resolved.size // num_nodes)


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """Nodes, and ranks of a node; all ranks in one without allow_hybrid_mode.

    >>> get_logical_domain_size(None, allow_hybrid_mode=False)
    (1, 1)
    """
    return get_physical_domain_size(group) if allow_hybrid_mode else (1, size_of(group))


def elastic_bytes(num_ranks: int, num_max: int, hidden: int, num_topk: int, *, use_fp8_dispatch: bool = False) -> int:
    """Bytes of DeepEP's second buffer where all ranks are in one domain.

    >>> elastic_bytes(8, 128, 7168, 8), elastic_bytes(8, 8192, 7168, 8) // 10**5
    (16777216, 9479)
    """
    top_k = num_topk or _DEFAULT_TOP_K
    data = _align(hidden if use_fp8_dispatch else 2 * hidden, 32)
    scales = _align(4 * ceil(hidden / 128), 32) if use_fp8_dispatch else 0
    dispatch = num_ranks * num_max * (data + scales + _align(12 * top_k + 4, 32))
    combine = min(num_ranks, top_k) * num_max * (_align(2 * hidden, 32) + _align(4 * top_k + 4, 32))
    return _align(max(dispatch, combine), _BUFFER_ALIGN)


@final
@dataclass(frozen=True, slots=True)
class Links:
    """GB/s of a rank between nodes and inside, and of a multiprocessor reading and writing."""

    rdma_gbs: float
    nvlink_gbs: float
    read_gbs: float
    write_gbs: float


def num_sms(domain: tuple[int, int, int], num_experts: int, num_topk: int, links: Links, *, least: int) -> int:
    """Multiprocessors that keep up with the links; domain: ranks, nodes (or 1), ranks of a node.

    >>> h100 = Links(45, 0.9 * 18 * 26.56, 200, 50)
    >>> [num_sms((ranks, 1, ranks), 256, 8, h100, least=4) for ranks in (8, 4, 2)]
    [14, 16, 22]
    """
    num_ranks, num_nodes, per_node = domain
    most = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else _DEVICE_SMS
    if num_ranks == 1:
        return most // 2 * 2
    to_ranks = _groups_hit(num_experts, num_topk, num_ranks)
    if num_nodes == 1:
        read, write = 1 / to_ranks, per_node / num_ranks
        nvlink, rdma = per_node / num_ranks * (1 - 1 / per_node), 0.0
    else:
        to_nodes = _groups_hit(num_experts, num_topk, num_nodes)
        read = 1 / to_ranks + to_nodes / to_ranks
        write = 1 / to_ranks + to_nodes / (to_ranks * num_nodes) + 1
        nvlink, rdma = 1 - 1 / per_node, to_nodes * (1 - 1 / num_nodes) / to_ranks
    seconds = max(rdma / links.rdma_gbs, nvlink / links.nvlink_gbs)
    wanted = max(read / links.read_gbs, write / links.write_gbs) / seconds
    return min(_align(max(least, ceil(1.25 * wanted)), 2), most // 2 * 2)


def _groups_hit(num_experts: int, num_topk: int, groups: int) -> float:
    """How many of so many groups of experts a token's choices hit on average."""
    return groups * (1 - comb(num_experts - num_experts // groups, num_topk) / comb(num_experts, num_topk))


def by_padded_columns(scales: Tensor) -> Tensor:
    """(N, S) scales column-major, each column padded to 16 bytes.

    >>> by_padded_columns(torch.zeros(5, 3)).stride()
    (1, 8)
    """
    num_rows, num_scales = scales.shape
    columns = scales.new_zeros(num_scales, _align(num_rows, 16 // scales.element_size()))
    columns[:, :num_rows] = scales.t()
    return columns[:, :num_rows].t()


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
