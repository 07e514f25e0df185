"""What needs a GPU: kernels against references on it, ranks that share one, graphs, streams. One GPU is enough."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.errors import PeerLostError, RoutingError, StallError, UnsupportedError
from moecomm.testing import CASES, assert_bitwise, run_ranks
from moecomm.testing.conformance import run_conformance

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "OMP_NUM_THREADS": "1"}
T, K, H, E, ROOM = 12, 2, 64, 8, 64
CASE_NAMES = ("plain", "masked", "odd_hidden", "ragged_tokens", "duplicate_expert", "quantised_pair", "odd_align")


def test_kernels_against_references_on_the_device() -> None:
    """The checks of single kernels, without the interpreter; what reads CPU memory is skipped there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    files = sorted(str(path) for path in (ROOT / "tests/kernels/checks").glob("check_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]


def conform(rank: int, options: dict[str, Any]) -> list[str]:
    torch.cuda.set_device(0)
    results = run_conformance(
        None, "symmetric", [CASES[name] for name in CASE_NAMES], rounds=6, timeout_s=120.0, options=options
    )
    return [f"{result.case} {result.layout} {result.reduce}: {result.message}" for result in results if not result.ok]


@pytest.mark.parametrize("options", [{}, {"engine": "copy"}, {"num_sms": 2}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_that_share_a_gpu_against_the_oracle(world_size: int, options: dict[str, Any]) -> None:
    results = run_ranks(conform, world_size, options, env=SHARED, timeout_s=800.0)
    failed = {message for of_rank in results for message in of_rank}
    assert not failed, "\n".join(sorted(failed))


def build(**options: Any) -> moecomm.Buffer:
    given: dict[str, Any] = {"num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": T}
    return moecomm.Buffer(**(given | {"dtype": torch.float32, "device": "cuda:0", "transport": "symmetric"} | options))


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, ids = torch.randn(T, H, generator=generator), torch.randint(-1, E, (T, K), generator=generator)
    return x.cuda(), ids.cuda(), torch.rand(T, K, generator=generator).cuda()


def captured_step(rank: int) -> int:
    """Capture dispatch, replay and combine in one graph (three operations: the generations alternate in it)."""
    torch.cuda.set_device(0)
    with build(max_recv_tokens=ROOM) as static, build() as exact:
        x, ids, weights = inputs(rank)

        def step() -> tuple[Tensor, Tensor, Tensor]:
            out = static.dispatch(x, ids, weights)
            again = static.dispatch(x * 2, handle=out.handle)
            return out.x, again.x, static.combine(out.x * 3, out.handle)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles everything
            step()
        torch.cuda.current_stream().wait_stream(side)
        static.synchronize()
        torch.distributed.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            got = step()
        for round in range(5):
            for kept, fresh in zip((x, ids, weights), inputs(100 * round + rank), strict=True):
                kept.copy_(fresh)
            graph.replay()
            static.synchronize()
            out = exact.dispatch(x, ids, weights)
            wanted = out.x, out.x * 2, exact.combine(out.x * 3, out.handle)
            for value, right in zip(got[:2], wanted[:2], strict=True):
                assert_bitwise(value[: len(right)], right, f"rows of round {round}")
                assert not value[len(right) :].any()
            assert_bitwise(got[2], wanted[2], f"sums of round {round}")
        with pytest.raises(UnsupportedError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            exact.dispatch(x, ids, weights)
    return rank


@pytest.mark.parametrize("world_size", [1, 2])
def test_static_operations_in_a_captured_graph(world_size: int) -> None:
    assert run_ranks(captured_step, world_size, env=SHARED, timeout_s=600.0) == list(range(world_size))


def stalled(rank: int) -> tuple[str, float]:
    """Rank 1 is late in the second dispatch: what rank 0 is told, and after how many seconds."""
    torch.cuda.set_device(0)
    with build(max_recv_tokens=ROOM, timeout_s=2.0) as buffer:
        buffer.dispatch(*inputs(rank))
        buffer.synchronize()
        torch.distributed.barrier()
        if rank == 1:
            time.sleep(15.0)
            return "", 0.0
        start = time.monotonic()
        with pytest.raises(StallError) as caught:
            buffer.dispatch(*inputs(rank))
            buffer.synchronize()
        assert caught.value.peers == (1,)
        return str(caught.value), time.monotonic() - start


def test_a_kernel_that_waits_gives_up_and_names_the_late_rank() -> None:
    (message, waited), _ = run_ranks(stalled, 2, env=SHARED, timeout_s=120.0)
    print(f"gave up after {waited:.2f} s, asked for 2 s")
    assert "rank 1" in message and 1.5 < waited < 14.0


def left_alone(rank: int) -> str:
    torch.cuda.set_device(0)
    with build(max_recv_tokens=ROOM, timeout_s=60.0) as buffer:
        buffer.dispatch(*inputs(rank))
        buffer.synchronize()
        torch.distributed.barrier()
        if rank == 1:
            return ""
        start = time.monotonic()
        with pytest.raises(PeerLostError) as caught:
            buffer.dispatch(*inputs(rank))
            buffer.synchronize()
        assert time.monotonic() - start < 30.0, "the kernel went on waiting"
        return str(caught.value)


def test_a_kernel_that_waits_stops_when_its_peer_ends() -> None:
    assert "rank 1" in run_ranks(left_alone, 2, env=SHARED, timeout_s=120.0)[0]


@pytest.mark.parametrize("options", [{}, {"max_recv_tokens": ROOM}, {"engine": "copy"}], ids=str)
def test_tensors_of_a_delayed_stream(options: dict[str, Any]) -> None:
    """Inputs are written late on the caller's stream, outputs are read at once there, and memory is used again."""
    x, ids, weights = inputs(0)
    with build(**options) as buffer:
        wanted = [tensor.clone() for tensor in operate(buffer, x, ids, weights)]
        for round in range(6):
            torch.cuda._sleep(20_000_000)
            late = [torch.empty_like(tensor).copy_(tensor) for tensor in (x, ids, weights)]
            got = [tensor.clone() for tensor in operate(buffer, *late)]
            del late
            torch.full((4 * T * H,), float("nan"), device="cuda")  # in the memory of the inputs, if that is free now
            for name, value, right in zip(("rows", "sums"), got, wanted, strict=True):
                assert_bitwise(value, right, f"{name} of round {round}")


def operate(buffer: moecomm.Buffer, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    out = buffer.dispatch(x, ids, weights)
    return out.x, buffer.combine(out.x * 3, out.handle)


def test_an_async_operation_leaves_the_host_free() -> None:
    """`wait` has the current stream wait, not the host: a combine behind a long sleep returns before it ends."""
    x, ids, weights = inputs(0)
    with build() as buffer:
        out = buffer.dispatch(x, ids, weights)
        end = torch.cuda.Event()
        torch.cuda._sleep(400_000_000)
        pending = buffer.combine_async(out.x * 3, out.handle)
        y = pending.wait()
        end.record()
        assert not end.query(), "the host waited"
        end.synchronize()
        assert_bitwise(y, buffer.combine(out.x * 3, out.handle), "sums")


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x, ids, w: b.dispatch(x.cpu(), ids, w),
        lambda b, x, ids, w: b.dispatch(x, ids.cpu(), w),
        lambda b, x, ids, w: b.dispatch(x, ids, w.cpu()),
        lambda b, x, ids, w: b.combine(b.dispatch(x, ids, w).x.cpu(), b.dispatch(x, ids, w).handle),
    ],
)
def test_tensors_elsewhere_are_refused_by_name(call: Callable[..., Any]) -> None:
    with build() as buffer, pytest.raises(moecomm.MoECommError, match=r"is in the wrong place.*on cpu.*cuda"):
        call(buffer, *inputs(0))


def test_programs_queue_only_where_all_multiprocessors_may_be_used() -> None:
    from moecomm.kernels._launch import num_programs, on_multiprocessors

    like, most = torch.zeros(1, device="cuda"), torch.cuda.get_device_properties(0).max_threads_per_multi_processor
    assert num_programs(10**6, like, warps=8, queued=True) == 10**6
    with on_multiprocessors(2):
        assert num_programs(10**6, like, warps=8, queued=True) == 2 * most // 256


def test_ids_out_of_range() -> None:
    x, ids, weights = inputs(0)
    ids[3, 1] = E
    with build() as exact, build(max_recv_tokens=ROOM) as static:
        with pytest.raises(RoutingError, match=rf"topk_idx\[3, 1\] names no expert: got {E}"):
            exact.dispatch(x, ids, weights)
        static.dispatch(x, ids, weights)
        with pytest.raises(RoutingError, match=r"topk_idx\[3, 1\] names no expert"):
            static.synchronize()
