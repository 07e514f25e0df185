"""Layout "padded" on a GPU: a whole layer step in one graph, and neither a wait nor memory on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moecomm.errors import StaleHandleError, StallError, UnsupportedError
from moecomm.testing import assert_bitwise, run_ranks
from tests.gpu.test_device import SHARED, E, H, K, T, build, inputs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


class Layer:
    """Router, dispatch, experts as one grouped GEMM on padded rows, combine; tensors that a graph may keep."""

    def __init__(self, quant: str | None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.router = torch.randn(H, E, generator=generator).cuda()
        self.experts = (torch.randn(E, H, H, generator=generator) / H**0.5).cuda()
        self.x, self.alive, self.quant = torch.zeros(T, H).cuda(), torch.ones(T, 1, dtype=torch.bool).cuda(), quant

    def set(self, rank: int, round: int) -> None:
        """Other rows, hence another routing; none at all on rank 0 in round 2, on all in round 3."""
        self.x.copy_(inputs(100 * round + rank)[0])
        self.alive.fill_(not (round == 3 or (round == 2 and rank == 0)))

    def __call__(self, buffer: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, ids = torch.softmax(self.x @ self.router, 1).topk(K)
        ids = torch.where(self.alive, ids, -1)
        out = buffer.dispatch(self.x, ids, scores, layout="padded", quant=self.quant)
        rows = out.x if self.quant is None else out.x[0].float() * out.x[1]  # H is less than a group
        torch.bmm(
            rows, self.experts.unflatten(0, (-1, len(rows)))[buffer.group.rank], out=buffer.combine_input(out.handle)
        )
        buffer.combine(buffer.combine_input(out.handle), out.handle, bias=self.x, out=y, quant=self.quant)
        return ids, scores, out.expert_counts_L, y


def captured_layer(rank: int, quant: str | None) -> int:
    torch.cuda.set_device(0)
    layer, y, z = Layer(quant), torch.zeros(T, H).cuda(), torch.zeros(T, H).cuda()
    with build() as buffer, build() as eager, build(reduce="source") as exact:
        layer.set(rank, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # reserves memory and compiles everything
            for _ in range(2):
                layer(buffer, y)
        torch.cuda.current_stream().wait_stream(side)
        buffer.synchronize()
        torch.distributed.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            ids, scores, counts, _ = layer(buffer, y)
        for round in range(6):
            layer.set(rank, round)
            graph.replay()
            buffer.synchronize()
            _, _, _, wanted = layer(eager, z)
            assert_bitwise(y, wanted, f"sums of replay {round}")
            assert_bitwise(counts, exact.dispatch(layer.x, ids, scores).tokens_per_expert, f"counts of replay {round}")
        mine = [eager.dispatch(layer.x, ids, scores, layout="padded") for _ in range(3)]
        with pytest.raises(StaleHandleError):
            eager.combine(eager.combine_input(mine[0].handle), mine[0].handle)
        for _ in range(2):
            again = buffer.dispatch(layer.x, ids, scores, layout="padded")
            buffer.combine(buffer.combine_input(again.handle), again.handle)
        graph.replay()
        lost = buffer.combine(buffer.combine_input(again.handle), again.handle)
        assert lost.isnan().all()
        with pytest.raises(StaleHandleError, match="replays of graphs counted"):
            buffer.synchronize()
    return rank


@pytest.mark.parametrize("quant", [None, "fp8"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_layer_step_in_one_graph(world_size: int, quant: str | None) -> None:
    assert run_ranks(captured_layer, world_size, quant, env=SHARED, timeout_s=600.0) == list(range(world_size))


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_no_wait_and_no_memory(quant: str | None) -> None:
    """After warm-up an eager pair of operations neither waits for the GPU nor allocates there."""
    x, ids, weights = inputs(0)
    y = torch.empty_like(x)
    with build() as buffer:

        def step() -> None:
            out = buffer.dispatch(x, ids, weights, layout="padded", quant=quant)
            buffer.combine(buffer.combine_input(out.handle), out.handle, out=y, quant=quant)

        for _ in range(3):
            step()
        buffer.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        buffer.synchronize()


def test_the_first_dispatch_cannot_be_captured() -> None:
    x, ids, weights = inputs(0)
    refused = pytest.raises(UnsupportedError, match="reserves memory")
    with build() as buffer, refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        buffer.dispatch(x, ids, weights, layout="padded")


def skipped(rank: int) -> tuple[int, ...]:
    """Rank 1 skips the second step; whom rank 0 hears of."""
    torch.cuda.set_device(0)
    with build(timeout_s=2.0) as buffer:
        for step in range(2 - rank):
            out = buffer.dispatch(*inputs(rank), layout="padded")
            buffer.combine(out.x, out.handle)
            if step == 0:
                buffer.synchronize()
        peers: tuple[int, ...] = ()
        if rank == 0:
            with pytest.raises(StallError) as caught:
                buffer.synchronize()
            peers = caught.value.peers
        torch.distributed.barrier()
        return peers


def test_a_rank_that_skips_a_step_is_named() -> None:
    assert run_ranks(skipped, 2, env=SHARED, timeout_s=120.0) == [(1,), ()]
