"""How vLLM and SGLang serve on these APIs: their arguments, what they read, one object for both modes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from moecomm import deep_ep
from moecomm.deep_ep.utils import per_token_cast_back, per_token_cast_to_fp8
from moecomm.testing import RankPool, assert_bitwise
from tests.deep_ep._world import World, rows, world
from tests.deep_ep.test_normal import BF16

MAX, E, H, K = 12, 10, 128, 3
FLAGS: dict[str, Any] = {"allow_mnnvl": False, "num_qps_per_rank": 3}


def mixed(given: World, rank: int) -> Tensor:
    """What comes home when every row is led home as it is: as many copies as ranks that a token goes to, in float32."""
    counts = torch.tensor([len(given.ranks_of(rank, t)) for t in range(len(given.x[rank]))]).view(-1, 1)
    return (given.x[rank].float() * counts).to(given.x[rank].dtype)


def weighted(given: World, rank: int) -> Tensor:
    """What comes home when every expert gives back its row, and the source weights them."""
    x, w = given.x[rank].float(), given.weights[rank] * (given.idx[rank] >= 0)
    total = torch.zeros_like(x)
    for k in range(K):
        total = total + x * w[:, k : k + 1]
    return total.to(given.x[rank].dtype)


def vllm_high_throughput(rank: int) -> None:
    given = world(hidden=H, dtype=BF16)
    group = torch.distributed.group.WORLD
    config = deep_ep.Buffer.get_dispatch_config(4)
    buffer: Any = deep_ep.Buffer(
        group=group,
        num_nvl_bytes=config.get_nvl_buffer_size_hint(2 * H, 4),
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
    )
    buffer.set_num_sms(20)
    previous = buffer.capture
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx=given.idx[rank],
        num_experts=E,
        previous_event=previous(),
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    codes, scales = per_token_cast_to_fp8(given.x[rank])
    recv, idx, _weights, counts, handle, event = buffer.dispatch(
        x=(codes, scales),
        handle=None,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=given.idx[rank],
        topk_weights=given.weights[rank],
        expert_alignment=1,
        config=config,
        previous_event=previous(),
        async_finish=True,
        allocate_on_comm_stream=False,
    )
    assert event.event is not None
    event.current_stream_wait()
    decoded = per_token_cast_back(*recv)
    sent = [per_token_cast_back(*per_token_cast_to_fp8(x)) for x in given.x]
    assert_bitwise(decoded, rows(sent, list(given.pairs(rank)), decoded), "decoded rows")
    assert isinstance(counts, list) and sum(counts) == int((idx >= 0).sum())
    out, none, event = buffer.combine(
        x=decoded,
        handle=handle,
        topk_weights=None,
        config=deep_ep.Buffer.get_combine_config(4),
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    assert none is None and event.event is None
    assert_bitwise(out, mixed(World(sent, given.idx, given.weights, E), rank), "sums")
    buffer.destroy()


def test_vllm_prefill(ranks: RankPool) -> None:
    ranks.run(vllm_high_throughput)


def vllm_low_latency(rank: int) -> None:
    given = world(hidden=H, dtype=BF16)
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MAX, hidden=H, num_ranks=4, num_experts=E
    )
    buffer: Any = deep_ep.Buffer(
        group=torch.distributed.group.WORLD,
        num_nvl_bytes=0,
        num_rdma_bytes=size,
        low_latency_mode=True,
        num_qps_per_rank=2,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    for use_fp8 in (False, True):
        expert_x, counts, handle, _, hook = buffer.low_latency_dispatch(
            given.x[rank],
            given.idx[rank],
            MAX,
            E,
            use_fp8=use_fp8,
            round_scale=False,
            use_ue8m0=False,
            async_finish=False,
            return_recv_hook=True,
        )
        hook()
        if use_fp8:
            made = per_token_cast_back(*(part.reshape(-1, part.shape[-1]) for part in expert_x)).view(
                len(counts), -1, H
            )
        else:
            made = expert_x
        out = torch.empty_like(given.x[rank])
        _, _event, hook = buffer.low_latency_combine(
            made,
            given.idx[rank],
            given.weights[rank],
            handle,
            async_finish=False,
            zero_copy=False,
            return_recv_hook=True,
            out=out,
        )
        hook()
        seen = given.x if not use_fp8 else [per_token_cast_back(*per_token_cast_to_fp8(x)) for x in given.x]
        assert_bitwise(out, weighted(World(seen, given.idx, given.weights, E), rank), "sums")
    status = torch.ones(4, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    raw = buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True)
    assert status.tolist() == [0] * 4 and raw.numel() == size
    buffer.low_latency_clean_mask_buffer()
    buffer.destroy()


def test_vllm_decode(ranks: RankPool) -> None:
    ranks.run(vllm_low_latency)


def vllm_elastic(rank: int) -> None:
    given = world(hidden=H, dtype=BF16)
    buffer: Any = deep_ep.ElasticBuffer(
        group=torch.distributed.group.WORLD,
        num_max_tokens_per_rank=MAX,
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=False,
        allow_hybrid_mode=False,
        prefer_overlap_with_compute=False,
        allow_multiple_reduction=True,
        explicitly_destroy=True,
        num_cpu_timeout_secs=120,
        num_gpu_timeout_secs=60,
    )
    assert buffer.get_theoretical_num_sms(num_experts=E, num_topk=K) >= 4
    for prefill in (True, False):
        recv, idx, weights, handle, event = buffer.dispatch(
            x=given.x[rank],
            topk_idx=given.idx[rank],
            topk_weights=given.weights[rank],
            num_experts=E,
            num_max_tokens_per_rank=MAX,
            do_expand=prefill,
            do_cpu_sync=prefill,
            async_with_compute_stream=False,
        )
        assert (idx is None) == prefill and event.event is None
        assert bool(handle.num_recv_tokens_per_expert_list) == prefill
        count = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        assert count == len(list(given.pairs(rank)))
        if not prefill:
            assert len(recv) == 4 * MAX
            local = torch.tensor([given.local(rank, *pair) for pair in given.pairs(rank)]).view(count, K)
            assert_bitwise(idx[:count], local, "local ids")
            factor = torch.where(idx >= 0, weights, 0).sum(1, keepdim=True)
        else:
            factor = weights[:, None]
        out, none, _ = buffer.combine(
            x=(recv.float() * factor).to(BF16),
            handle=handle,
            topk_weights=None,
            async_with_compute_stream=False,
            allocate_on_comm_stream=False,
        )
        error = (out.float() - weighted(given, rank).float()).abs()
        assert none is None and bool((error <= 2.0**-6 * given.x[rank].float().abs() * K).all())
    buffer.destroy()


def test_vllm_second_api(ranks: RankPool) -> None:
    ranks.run(vllm_elastic)


def sglang_normal(buffer: Any, given: World, rank: int, config: Any) -> None:
    previous = deep_ep.Buffer.capture()
    layout = buffer.get_dispatch_layout(
        given.idx[rank], E, previous_event=previous, async_finish=True, allocate_on_comm_stream=previous is not None
    )
    per_rank, per_node, per_expert, in_rank, previous = layout
    recv, idx, _, counts, handle, event = buffer.dispatch(
        given.x[rank],
        topk_idx=given.idx[rank],
        topk_weights=given.weights[rank],
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=True,
        expert_alignment=128,
        config=config,
    )
    event.current_stream_wait()
    assert all(count % 128 == 0 for count in counts) and len(recv) == len(idx)
    previous = deep_ep.Buffer.capture()
    out, _, event = buffer.combine(
        recv, handle, async_finish=True, previous_event=previous, allocate_on_comm_stream=True, config=config
    )
    event.current_stream_wait()
    assert_bitwise(out, mixed(given, rank), "sums")


def sglang_low_latency(buffer: Any, given: World, rank: int) -> None:
    buffer.clean_low_latency_buffer(MAX, H, E)
    recv, _counts, handle, event, hook = buffer.low_latency_dispatch(
        given.x[rank], given.idx[rank], MAX, E, use_fp8=False, async_finish=True, return_recv_hook=False
    )
    assert hook is None
    event.current_stream_wait()
    out, event, hook = buffer.low_latency_combine(
        x=recv,
        topk_idx=given.idx[rank],
        topk_weights=given.weights[rank],
        handle=handle,
        async_finish=True,
        return_recv_hook=False,
    )
    assert hook is None
    event.current_stream_wait()
    assert_bitwise(out, weighted(given, rank), "sums")


def sglang(rank: int) -> None:
    """One object serves both modes in turn, with other numbers of tokens each time."""
    config = deep_ep.Config(**json.loads('{"num_sms": 24, "num_max_nvl_chunked_send_tokens": 8}'))
    nvl = max(config.get_nvl_buffer_size_hint(2 * H, 4), 128)
    rdma = max(config.get_rdma_buffer_size_hint(2 * H, 4), deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX, H, 4, E))
    buffer: Any = deep_ep.Buffer(
        torch.distributed.group.WORLD, nvl, rdma, low_latency_mode=True, use_fabric=True, **FLAGS
    )
    assert (buffer.low_latency_mode, buffer.group_size, deep_ep.Buffer.num_sms % 2) == (True, 4, 0)
    for turn, tokens in enumerate([(5, 0, 9, 3), (0, 12, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0)]):
        given = world(tokens=tokens, hidden=H, dtype=BF16, seed=turn)
        sglang_normal(buffer, given, rank, config)
        sglang_low_latency(buffer, given, rank)


def test_sglang_changes_modes(ranks: RankPool) -> None:
    ranks.run(sglang)


def sglang_elastic(rank: int) -> None:
    given = world(hidden=H, dtype=BF16)
    buffer: Any = deep_ep.ElasticBuffer(
        torch.distributed.group.WORLD,
        num_max_tokens_per_rank=MAX,
        hidden=H,
        num_topk=K,
        use_fp8_dispatch=True,
        allow_hybrid_mode=True,
        sl_idx=0,
        prefer_overlap_with_compute=False,
    )
    assert buffer.num_bytes > 0
    sent = per_token_cast_to_fp8(given.x[rank])
    for expand, alignment in ((True, 128), (False, 1)):
        (codes, scales), _idx, weights, handle, _ = buffer.dispatch(
            sent,
            topk_idx=given.idx[rank],
            topk_weights=given.weights[rank],
            num_experts=E,
            num_max_tokens_per_rank=MAX,
            expert_alignment=alignment,
            num_sms=20,
            use_tma_aligned_col_major_sf=expand,
            do_cpu_sync=False,
            do_expand=expand,
        )
        ends = handle.psum_num_recv_tokens_per_expert.tolist()
        assert len(ends) == len(given.held(rank)) and int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]) >= 0
        assert weights.shape == ((len(codes),) if expand else (len(codes), K))
        out, _, _ = buffer.combine(per_token_cast_back(codes, scales.contiguous()), handle=handle, topk_weights=None)
        assert out.shape == given.x[rank].shape and out.isfinite().all()


def test_sglang_second_api(ranks: RankPool) -> None:
    ranks.run(sglang_elastic)
