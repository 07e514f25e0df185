"""DeepEP's Python API on moecomm: change the import, keep the code.

`import moecomm.deep_ep as deep_ep`, or `install()` it under that name for code that is not yours, or run a script with
`python -m moecomm.deep_ep script.py`. docs/deep_ep.md lists every name, and what is not supported.
"""

import torch

from moecomm.deep_ep import utils
from moecomm.deep_ep.buffer import Buffer
from moecomm.deep_ep.config import Config
from moecomm.deep_ep.elastic import ElasticBuffer
from moecomm.deep_ep.elastic_handle import EPHandle
from moecomm.deep_ep.events import EventHandle, EventOverlap
from moecomm.deep_ep.hybrid_ep_buffer import HybridEPBuffer
from moecomm.deep_ep.installation import install
from moecomm.deep_ep.sizes import get_logical_domain_size, get_physical_domain_size

topk_idx_t = torch.int64

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "HybridEPBuffer",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "install",
    "topk_idx_t",
    "utils",
]
