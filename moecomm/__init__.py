"""moecomm: dispatch and combine for mixture-of-experts models, from a laptop CPU to a GPU node."""

from moecomm._version import __version__
from moecomm.errors import (
    CapacityError,
    ConfigError,
    DesyncError,
    MoECommError,
    PeerLostError,
    RoutingError,
    StaleHandleError,
    StallError,
    UnsupportedError,
)
from moecomm.placement import ExpertPlacement

__all__ = [
    "CapacityError",
    "ConfigError",
    "DesyncError",
    "ExpertPlacement",
    "MoECommError",
    "PeerLostError",
    "RoutingError",
    "StaleHandleError",
    "StallError",
    "UnsupportedError",
    "__version__",
]
