"""Modules on `moecomm.Buffer`: a complete mixture-of-experts layer, and expert parallelism for layers of your own.

Import it as `moecomm.nn`; `import moecomm` alone does not load it.
"""

from moecomm.nn.layer import (
    GroupedExperts,
    MoELayer,
    Routing,
    TopKRouter,
    group_limited_topk,
    load_balancing_loss,
    topk_routing,
)

__all__ = [
    "GroupedExperts",
    "MoELayer",
    "Routing",
    "TopKRouter",
    "group_limited_topk",
    "load_balancing_loss",
    "topk_routing",
]
