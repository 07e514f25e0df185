"""The low-latency mode: slots, counts, FP8 with every kind of scales, hooks, zero copy, masks, statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moecomm import deep_ep
from moecomm.deep_ep.utils import per_token_cast_back
from moecomm.errors import ConfigError, UnsupportedError
from moecomm.quant import QuantSpec, dequantize, quantize
from moecomm.testing import RankPool, assert_bitwise
from tests.deep_ep._world import World, expert, rows, summed, world
from tests.deep_ep.test_normal import BF16, shared

MAX = 12


def check_received(rank: int, given: World, recv: torch.Tensor, count: torch.Tensor, handle: Any) -> None:
    """Rows, counts and the items of the handle against the loops."""
    info, ranges, num_max, hidden, num_experts = handle
    assert (num_max, hidden, num_experts) == (MAX, given.x[0].shape[1], given.num_experts)
    num_local = len(given.held(rank))
    assert recv.shape == (num_local, 4 * MAX, hidden) and count.dtype == torch.int32
    for e in range(num_local):
        entries = list(given.entries(rank, e))
        assert int(count[e]) == len(entries)
        assert_bitwise(recv[e, : len(entries)], rows(given.x, [(s, t) for s, t, _ in entries], recv[e]), "rows")
        assert info[e, : len(entries)].tolist() == [t for _, t, _ in entries]
        for source in range(4):
            begin, number = int(ranges[e, source]) >> 32, int(ranges[e, source]) & 0xFFFFFFFF
            assert [s for s, _, _ in entries][begin : begin + number] == [source] * number
            assert number == sum(s == source for s, _, _ in entries)


def weighted(rank: int, given: World, seen: Callable[[torch.Tensor], torch.Tensor] = lambda row: row) -> torch.Tensor:
    """What comes home when experts do as `expert` does; seen: what a row becomes on its way."""
    out = torch.zeros_like(given.x[rank])
    for t, x in enumerate(given.x[rank]):
        chosen = [(int(e), w) for e, w in zip(given.idx[rank][t], given.weights[rank][t], strict=True) if e >= 0]
        out[t] = summed([seen(expert(given.owner(e), x)).float() * w for e, w in chosen], x.dtype, x)
    return out


def plain(rank: int, dtype: torch.dtype, hidden: int) -> None:
    given, buffer = world(hidden=hidden, dtype=dtype), shared()
    x, idx, weights = given.x[rank], given.idx[rank], given.weights[rank]
    num_local = len(given.held(rank))
    stats, waited = torch.ones(num_local, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    for hooked in (False, True):
        before = stats.clone()
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            x, idx, MAX, 10, stats, waited, use_fp8=False, return_recv_hook=hooked
        )
        assert event.event is None and (hook is not None) == hooked
        if hook is not None:
            hook()
        check_received(rank, given, recv, count, handle)
        assert_bitwise(stats, before + count, "cumulative_local_expert_recv_stats")
        assert [int(us) > 0 for us in waited] == [peer != rank for peer in range(4)]
        made = expert(rank, recv)
        for e in range(num_local):
            made[e, int(count[e]) :] = torch.nan
        out = torch.empty_like(x)
        home, _, hook = buffer.low_latency_combine(made, idx, weights, handle, return_recv_hook=hooked, out=out)
        if hook is not None:
            hook()
        assert home is out
        assert_bitwise(home, weighted(rank, given), "combined")
    fewer = torch.where(torch.arange(3) == 1, -1, idx)
    home = buffer.low_latency_combine(made, fewer, weights, handle)[0]
    assert_bitwise(home, weighted(rank, World(given.x, [fewer] * 4, given.weights, 10)), "combined without choice 1")
    if dtype == BF16:
        staging = buffer.get_next_low_latency_combine_buffer(handle)
        assert staging.shape == made.shape
        staging.copy_(made)
        home = buffer.low_latency_combine(staging, idx, weights, handle, zero_copy=True)[0]
        assert_bitwise(home, weighted(rank, given), "zero copy")


@pytest.mark.parametrize(("dtype", "hidden"), [(torch.float32, 24), (BF16, 128)], ids=["float32", "bfloat16"])
def test_rows_as_they_are(ranks: RankPool, dtype: torch.dtype, hidden: int) -> None:
    ranks.run(plain, dtype, hidden)


def quantised(rank: int) -> None:
    """FP8 rows decode to what the reference quantiser makes, logarithms too."""
    given, buffer = world(hidden=320, dtype=BF16), shared()
    for round_scale, ue8m0 in ((False, False), (True, False), (True, True)):
        (codes, scales), count, handle, _, _ = buffer.low_latency_dispatch(
            given.x[rank], given.idx[rank], MAX, 10, round_scale=round_scale, use_ue8m0=ue8m0
        )
        kind = "ue8m0" if ue8m0 else "power_of_two" if round_scale else "float32"
        expected = [quantize(x, QuantSpec(scales=kind)) for x in given.x]
        assert codes.dtype == torch.float8_e4m3fn and scales.shape == (len(count), 4 * MAX, 1 if ue8m0 else 3)
        assert scales.stride(1) == 1 and scales.dtype == (torch.int32 if ue8m0 else torch.float32)
        for e in range(len(count)):
            where = [(s, t) for s, t, _ in given.entries(rank, e)]
            got = codes[e, : len(where)].view(torch.uint8)
            assert_bitwise(got, rows([c.view(torch.uint8) for c, _ in expected], where, got), "codes")
            decoded = per_token_cast_back(codes[e, : len(where)], scales[e, : len(where)])
            assert_bitwise(decoded, rows([dequantize(*pair, BF16) for pair in expected], where, decoded), "decoded")
            part = scales[e, : len(where)].clone(memory_format=torch.contiguous_format)
            if ue8m0:
                exponents = part.view(torch.uint8)
                assert bool((exponents[:, 3] == 0).all())
                assert_bitwise(
                    exponents[:, :3], rows([s.view(torch.uint8) for _, s in expected], where, exponents), "scales"
                )
            else:
                assert_bitwise(part, rows([s for _, s in expected], where, part), "scales")
    logarithms(rank, given, buffer, handle)


def logarithms(rank: int, given: World, buffer: Any, handle: Any) -> None:
    """LogFMT: the sum of what the codes mean, and 64 % of the bytes."""

    def combined(use_logfmt: bool) -> tuple[torch.Tensor, int]:
        before = moved(buffer)
        made = expert(rank, slots_of(rank, given))
        home = buffer.low_latency_combine(made, given.idx[rank], given.weights[rank], handle, use_logfmt=use_logfmt)[0]
        return home, moved(buffer) - before

    (plain, all_bytes), (home, num_bytes) = combined(False), combined(True)
    assert_bitwise(plain, weighted(rank, given), "combined")
    assert_bitwise(home, weighted(rank, given, in_logfmt), "combined from logarithms")
    assert not len(home) or not home.equal(plain)
    assert num_bytes * 320 * 2 == all_bytes * QuantSpec(format="logfmt10").row_bytes(320) and num_bytes < all_bytes


def in_logfmt(row: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(row, "logfmt10"), torch.float32, len(row))


def moved(buffer: Any) -> int:
    """Bytes that this rank has sent so far."""
    stats = [each.stats() for each in buffer._wire.buffers()]
    return int(sum(each["bytes_local"] + each["bytes_remote"] for each in stats))


def slots_of(rank: int, given: World) -> torch.Tensor:
    """The rows as they lie in the slots of this rank's experts."""
    made = torch.zeros(len(given.held(rank)), 4 * MAX, given.x[0].shape[1], dtype=given.x[0].dtype)
    for e in range(len(made)):
        where = [(s, t) for s, t, _ in given.entries(rank, e)]
        made[e, : len(where)] = rows(given.x, where, made[e])
    return made


def test_quantised_rows(ranks: RankPool) -> None:
    ranks.run(quantised)


def masked(rank: int) -> None:
    """A rank that is left out gets nothing and gives nothing."""
    given = world()
    buffer = deep_ep.Buffer(torch.distributed.group.WORLD, low_latency_mode=True, enable_shrink=True)
    status = torch.full((4,), 7, dtype=torch.int32)
    buffer.low_latency_update_mask_buffer(2, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 1, 0]
    recv, count, handle, _, _ = buffer.low_latency_dispatch(given.x[rank], given.idx[rank], MAX, 10, use_fp8=False)
    held = [e for e in range(10) if given.owner(e) == 2]
    idx = [torch.where(torch.isin(i, torch.tensor(held)), -1, i) for i in given.idx]
    idx[2] = torch.full_like(idx[2], -1)
    left = World(given.x, idx, given.weights, 10)
    check_received(rank, left, recv, count, handle)
    if rank != 2:
        home = buffer.low_latency_combine(expert(rank, recv), given.idx[rank], given.weights[rank], handle)[0]
        assert_bitwise(home, weighted(rank, left), "combined")
    else:
        buffer.low_latency_combine(recv, given.idx[rank], given.weights[rank], handle)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * 4
    with pytest.raises(ConfigError, match="Shrink mode must be enabled"):
        shared().low_latency_query_mask_buffer(status)


def test_ranks_that_are_left_out(ranks: RankPool) -> None:
    ranks.run(masked)


def each_in_its_way(rank: int) -> None:
    """Hooks on some ranks only, called twice and not in turn; a mask on one rank only; handles used again."""
    given = world(hidden=128, dtype=BF16)
    mine = given.idx[rank], given.weights[rank]
    buffer: Any = deep_ep.Buffer(torch.distributed.group.WORLD, low_latency_mode=True, enable_shrink=True)
    sent = [
        buffer.low_latency_dispatch(
            given.x[rank] * factor, mine[0], MAX, 10, use_fp8=False, return_recv_hook=rank % 2 == number
        )
        for number, factor in enumerate((1, 2))
    ]
    for *_, hook in reversed(sent):
        for _ in range(2 * (hook is not None)):
            hook()
    for factor, (recv, count, handle, _, _) in enumerate(sent, start=1):
        check_received(rank, World([x * factor for x in given.x], given.idx, given.weights, 10), recv, count, handle)
        for _ in range(3):
            home, _, hook = buffer.low_latency_combine(sent[0][0], *mine, handle, return_recv_hook=rank % 2 == 1)
            for _ in range(2 * (hook is not None)):
                hook()
            assert_bitwise(home, plain_sum(given, rank), "combined")
    if rank == 0:
        buffer.low_latency_update_mask_buffer(2, True)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(given.x[rank], mine[0], MAX, 10, use_fp8=False)
    left = [idx.clone() for idx in given.idx]
    if rank == 0:
        left[2].fill_(-1)  # rank 0 sees nothing of rank 2
    held_by_2 = torch.tensor(list(given.held(2)))
    left[0] = torch.where(torch.isin(left[0], held_by_2), -1, left[0])  # and sends it nothing
    check_received(rank, World(given.x, left, given.weights, 10), recv, count, handle)
    buffer.low_latency_combine(recv, *mine, handle)
    zeros = torch.zeros(1, 128, dtype=BF16), torch.zeros(1, 1, dtype=torch.int64)
    (_, scales), count, *_ = buffer.low_latency_dispatch(*zeros, MAX, 10)
    assert rank != 0 or scales[0, : int(count[0])].unique().tolist() == [float(torch.tensor(1e-4) / 448)]


def plain_sum(given: World, rank: int) -> torch.Tensor:
    """What comes home when experts give rows back as they are."""
    total = torch.zeros_like(given.x[rank], dtype=torch.float32)
    for k in range(3):
        total += given.x[rank].float() * (given.weights[rank][:, k] * (given.idx[rank][:, k] >= 0))[:, None]
    return total.to(BF16)


def test_ranks_may_differ_in_what_concerns_them_only(ranks: RankPool) -> None:
    ranks.run(each_in_its_way)


def waits(rank: int) -> None:
    """Rank 1 is late: the others waited that long for it, and for at least one other not so long."""
    given, buffer = world(tokens=(5, 4, 9, 3)), shared()
    stats = torch.zeros(2, 4, dtype=torch.int64)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(given.x[rank], given.idx[rank], MAX, 10, use_fp8=False)
    for operation in range(2):
        torch.distributed.barrier()
        if rank == 1:
            time.sleep(0.4)
        if operation == 0:
            recv, _, handle, _, _ = buffer.low_latency_dispatch(
                given.x[rank], given.idx[rank], MAX, 10, None, stats[0], use_fp8=False
            )
        else:
            buffer.low_latency_combine(
                recv, given.idx[rank], given.weights[rank], handle, combine_wait_recv_cost_stats=stats[1]
            )
        assert stats[operation, rank] == 0
        if rank != 1:
            others = stats[operation, [peer for peer in range(4) if peer not in (1, rank)]]
            assert stats[operation, 1] >= 200_000 + int(others.min()), stats


def test_waits_are_told_apart(ranks: RankPool) -> None:
    ranks.run(waits)


def refusals(rank: int) -> None:
    given, buffer = world(), shared()
    x, idx = given.x[2], given.idx[2]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_max_dispatch_tokens_per_rank": 8}, "too many tokens: got 9; expected at most 8"),
        ({"num_experts": 0}, "num_experts is no count: got 0"),
        ({"async_finish": True, "return_recv_hook": True}, "exclude each other"),
        ({"topk_idx": idx[1:]}, r"topk_idx has the wrong shape: got \(8, 3\); expected \(9, any\)"),
        ({"x": x.double()}, "x has the wrong dtype: got torch.float64"),
        (
            {"cumulative_local_expert_recv_stats": torch.zeros(9)},
            "cumulative_local_expert_recv_stats has the wrong shape",
        ),
    ]
    for how, message in wrong:
        given_args = {"x": x, "topk_idx": idx, "num_max_dispatch_tokens_per_rank": MAX, "num_experts": 10} | how
        with pytest.raises(ConfigError, match=message):
            buffer.low_latency_dispatch(**given_args)
    with pytest.raises(UnsupportedError, match="use_nvfp4 is not supported"):
        buffer.low_latency_dispatch(x, idx, MAX, 10, use_nvfp4=True)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(given.x[rank], given.idx[rank], MAX, 10, use_fp8=False)
    mine = given.idx[rank], given.weights[rank]
    with pytest.raises(ConfigError, match="zero_copy without a buffer"):
        buffer.low_latency_combine(recv, *mine, handle, zero_copy=True)
    with pytest.raises(ConfigError, match="zero_copy and use_logfmt exclude each other"):
        buffer.low_latency_combine(recv, *mine, handle, zero_copy=True, use_logfmt=True)
    with pytest.raises(ConfigError, match="handle is none of a low-latency dispatch"):
        buffer.low_latency_combine(recv, *mine, (1, 2, 3, 4, 5))
    buffer.low_latency_combine(recv, *mine, handle)


def test_bad_input(ranks: RankPool) -> None:
    ranks.run(refusals)
