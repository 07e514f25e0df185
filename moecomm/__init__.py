"""moecomm: dispatch and combine for mixture-of-experts models, from a laptop CPU to a GPU node."""

from moecomm._version import __version__
from moecomm.buffer import Buffer
from moecomm.errors import (
    AbortedError,
    CapacityError,
    ConfigError,
    CorruptionError,
    DesyncError,
    MoECommError,
    PeerLostError,
    RoutingError,
    StaleHandleError,
    StallError,
    UnsupportedError,
)
from moecomm.footprint import MemoryPlan
from moecomm.handle import Dispatched, DispatchHandle, Pending
from moecomm.placement import ExpertPlacement
from moecomm.quant import QuantSpec
from moecomm.topology import Topology

__all__ = [
    "AbortedError",
    "Buffer",
    "CapacityError",
    "ConfigError",
    "CorruptionError",
    "DesyncError",
    "DispatchHandle",
    "Dispatched",
    "ExpertPlacement",
    "MemoryPlan",
    "MoECommError",
    "PeerLostError",
    "Pending",
    "QuantSpec",
    "RoutingError",
    "StaleHandleError",
    "StallError",
    "Topology",
    "UnsupportedError",
    "__version__",
]
