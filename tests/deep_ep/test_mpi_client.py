"""How TensorRT-LLM calls the first API: over an MPI communicator, without torch.distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moecomm import deep_ep
from moecomm.testing import assert_bitwise
from moecomm.testing.mpi import mpi_missing
from tests.deep_ep._world import rows, world
from tests.deep_ep.test_serving import mixed, weighted
from tests.under_mpi import run_under_mpi

MAX, E, H = 12, 10, 128


@pytest.mark.skipif(bool(mpi_missing()), reason=mpi_missing())
@pytest.mark.timeout(180)
def test_tensorrt_llm_over_mpi() -> None:
    assert run_under_mpi(serve, 4, timeout_s=170) == ["served"] * 4


def prefill(comm: object, rank: int) -> None:
    given = world(hidden=H, dtype=torch.bfloat16)
    nvl = max(
        config.get_nvl_buffer_size_hint(2 * H, 4)
        for config in (deep_ep.Buffer.get_dispatch_config(4), deep_ep.Buffer.get_combine_config(4))
    )
    buffer: Any = deep_ep.Buffer(None, nvl, 0, num_nvl_peers=4, comm=comm)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(given.idx[rank], E)
    assert event.event is None
    recv, _idx, _weights, counts, handle, event = buffer.dispatch(
        given.x[rank],
        topk_idx=given.idx[rank],
        topk_weights=given.weights[rank],
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        config=deep_ep.Buffer.get_dispatch_config(4),
    )
    assert event.event is None and len(counts) == len(given.held(rank))
    assert_bitwise(recv, rows(given.x, list(given.pairs(rank)), recv), "rows")
    out, _, event = buffer.combine(recv, handle, config=deep_ep.Buffer.get_combine_config(4))
    assert event.event is None
    assert_bitwise(out, mixed(given, rank), "sums")


def decode(comm: object, rank: int) -> None:
    given = world(hidden=H, dtype=torch.bfloat16)
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX, H, 4, E)
    buffer: Any = deep_ep.Buffer(None, 0, size, low_latency_mode=True, num_qps_per_rank=2, comm=comm)
    recv, _, handle, event, hook = buffer.low_latency_dispatch(given.x[rank], given.idx[rank], MAX, E, use_fp8=False)
    assert event.event is None and hook is None
    out, event, hook = buffer.low_latency_combine(recv, given.idx[rank], given.weights[rank], handle)
    assert event.event is None and hook is None
    assert_bitwise(out, weighted(given, rank), "sums")


def serve(comm: Any) -> str:
    """What each rank does, and says when it was right."""
    prefill(comm, comm.rank)
    decode(comm, comm.rank)
    assert not torch.distributed.is_initialized()
    return "served"
