"""DeepEP's Python API on moecomm: change the import, keep the code."""

from moecomm.deep_ep.buffer import Buffer
from moecomm.deep_ep.config import Config
from moecomm.deep_ep.elastic import ElasticBuffer
from moecomm.deep_ep.elastic_handle import EPHandle
from moecomm.deep_ep.events import EventHandle, EventOverlap
from moecomm.deep_ep.sizes import get_logical_domain_size, get_physical_domain_size

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "get_logical_domain_size",
    "get_physical_domain_size",
]
