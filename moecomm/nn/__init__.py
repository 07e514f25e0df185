"""Modules on `moecomm.Buffer`: a complete mixture-of-experts layer, and expert parallelism for layers of your own.

Import it as `moecomm.nn`; `import moecomm` alone does not load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moecomm.nn.exchange import ExpertExchange
from moecomm.nn.layer import (
    GroupedExperts,
    MoELayer,
    Routing,
    TopKRouter,
    group_limited_topk,
    load_balancing_loss,
    topk_routing,
)

if TYPE_CHECKING:
    from moecomm.nn.parallel import ExpertParallel

__all__ = [
    "ExpertExchange",
    "ExpertParallel",
    "GroupedExperts",
    "MoELayer",
    "Routing",
    "TopKRouter",
    "group_limited_topk",
    "load_balancing_loss",
    "topk_routing",
]


def __getattr__(name: str) -> Any:
    """Load `ExpertParallel` when it is asked for: importing torch.distributed.tensor takes longer than moecomm."""
    if name != "ExpertParallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moecomm.nn.parallel import ExpertParallel

    return ExpertParallel
