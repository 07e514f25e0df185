"""What scripts import from `deep_ep.utils`."""

from moecomm.deep_ep.events import EventHandle, EventOverlap
from moecomm.deep_ep.utils.envs import (
    check_fast_rdma_atomic_support,
    check_nvlink_connections,
    check_torch_deterministic,
    dist_print,
    get_global_seed,
    get_local_seed,
    get_logical_domain_size,
    get_nvlink_gbs,
    get_physical_domain_size,
    get_rdma_gbs,
    init_dist,
    init_seed,
)
from moecomm.deep_ep.utils.gate import get_unbalanced_scores
from moecomm.deep_ep.utils.math import (
    align,
    calc_diff,
    ceil_div,
    count_bytes,
    create_grouped_scores,
    hash_tensor,
    hash_tensors,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
    safe_div,
)
from moecomm.deep_ep.utils.testing import bench, bench_kineto

__all__ = [
    "EventHandle",
    "EventOverlap",
    "align",
    "bench",
    "bench_kineto",
    "calc_diff",
    "ceil_div",
    "check_fast_rdma_atomic_support",
    "check_nvlink_connections",
    "check_torch_deterministic",
    "count_bytes",
    "create_grouped_scores",
    "dist_print",
    "get_global_seed",
    "get_local_seed",
    "get_logical_domain_size",
    "get_nvlink_gbs",
    "get_physical_domain_size",
    "get_rdma_gbs",
    "get_unbalanced_scores",
    "hash_tensor",
    "hash_tensors",
    "init_dist",
    "init_seed",
    "inplace_unique",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
    "safe_div",
]
