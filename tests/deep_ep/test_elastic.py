"""`ElasticBuffer`: compact and expanded rows, exact and worst-case sizes, its handle, the order of its sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moecomm import deep_ep
from moecomm.errors import ConfigError, UnsupportedError
from moecomm.testing import RankPool, assert_bitwise
from tests.deep_ep._world import World, expert, rows, summed, world
from tests.deep_ep.test_normal import BF16

MAX, E, K = 12, 10, 3
MADE: dict[bool, Any] = {}


def shared(multiple: bool = True) -> Any:
    """One buffer of each kind for all tests of a process."""
    if multiple not in MADE:
        MADE[multiple] = deep_ep.ElasticBuffer(
            torch.distributed.group.WORLD,
            num_max_tokens_per_rank=MAX,
            hidden=256,
            num_topk=K,
            allow_multiple_reduction=multiple,
        )
    return MADE[multiple]


def biases(rank: int, given: World) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(rank)
    one, two = torch.randn(2, *given.x[rank].shape, generator=random).to(given.x[0].dtype)
    return one, two


def compact(rank: int, dtype: torch.dtype, exact: bool) -> None:
    given, buffer = world(hidden=256, dtype=dtype), shared()
    x, idx, weights = given.x[rank], given.idx[rank], given.weights[rank]
    stats = torch.zeros(len(given.held(rank)), dtype=torch.int32)
    recv, recv_idx, recv_weights, handle, event = buffer.dispatch(
        x, idx, weights, stats, num_experts=E, expert_alignment=4, do_cpu_sync=exact, num_sms=6
    )
    where = list(given.pairs(rank))
    count, room = len(where), len(where) if exact else 4 * MAX
    assert (len(recv), len(recv_idx), len(recv_weights), event.event) == (room, room, room, None)
    assert_bitwise(recv[:count], rows(given.x, where, recv), "rows")
    local = torch.tensor([given.local(rank, *pair) for pair in where]).view(count, K)
    assert_bitwise(recv_idx[:count], local, "local ids")
    assert_bitwise(recv_weights[:count], rows(given.weights, where, recv_weights), "weights as they were sent")
    counts = [len(list(given.entries(rank, e))) for e in range(len(given.held(rank)))]
    padded = [-(-n // 4) * 4 for n in counts]
    assert stats.tolist() == counts == handle.num_unaligned_recv_tokens_per_expert.tolist()
    assert handle.num_recv_tokens_per_expert_list == (padded if exact else [])
    assert handle.psum_num_recv_tokens_per_expert.tolist() == [sum(padded[: i + 1]) for i in range(len(padded))]
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == [sum(s <= r for s, _ in where) for r in range(4)]
    assert (handle.num_recv_tokens, handle.num_sms, handle.do_expand) == (count, 6, False)
    meta = handle.recv_src_metadata
    assert meta.shape == (count, K + 2) and meta[:, 0].tolist() == [s * MAX + t for s, t in where]
    lanes = [max(k for k in range(K) if given.local(rank, s, t)[k] >= 0) for s, t in where]
    assert meta[:, 1].tolist() == [s * K + lane for (s, _), lane in zip(where, lanes, strict=True)]
    sent_to = [[(s, t) for s, t in given.pairs(r) if s == rank] for r in range(4)]
    slots = torch.full_like(idx, -1)
    for t in range(len(x)):
        for r in given.ranks_of(rank, t):
            lane = max(k for k in range(K) if int(idx[t, k]) in given.held(r))
            slots[t, lane] = r * MAX + sent_to[r].index((rank, t))
    assert_bitwise(handle.dst_buffer_slot_idx, slots.int(), "dst_buffer_slot_idx")

    made = expert(rank, recv)
    made[count:] = torch.nan
    bias = biases(rank, given)
    for added in (None, bias):
        home, home_weights, _ = buffer.combine(made, handle, topk_weights=recv_weights, bias=added)
        parts = [[p[t] for p in added or ()] for t in range(len(x))]
        expected = [
            summed([*parts[t], *(expert(r, x[t]) for r in given.ranks_of(rank, t))], dtype, x[t]) for t in range(len(x))
        ]
        assert_bitwise(home, torch.stack(expected) if expected else x, "combined")
        assert_bitwise(home_weights, weights * (idx >= 0), "weights of the ranks that have the choices")
    again, again_idx, again_weights, same, _ = buffer.dispatch(-x, handle=handle, topk_weights=weights + 1)
    assert same is handle and len(again) == room
    assert_bitwise(again[:count], -rows(given.x, where, recv), "replayed rows")
    assert_bitwise(again_idx, recv_idx, "replayed ids")
    assert_bitwise(again_weights[:count], recv_weights[:count] + 1, "replayed weights")


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (BF16, False)], ids=["exact", "worst_case"])
def test_compact(ranks: RankPool, dtype: torch.dtype, exact: bool) -> None:
    ranks.run(compact, dtype, exact)


def expanded(rank: int, align: int, exact: bool, multiple: bool) -> None:
    given, buffer = world(hidden=256, dtype=BF16), shared(multiple)
    x, idx, weights = given.x[rank], given.idx[rank], given.weights[rank]
    scales = [part[:, :2].float() for part in given.x]
    (recv, sf), none, recv_weights, handle, event = buffer.dispatch(
        (x, scales[rank]),
        idx,
        weights,
        num_experts=E,
        expert_alignment=align,
        do_cpu_sync=exact,
        do_expand=True,
        use_tma_aligned_col_major_sf=True,
        async_with_compute_stream=True,
    )
    event.current_stream_wait()
    num_local = len(given.held(rank))
    entries = [list(given.entries(rank, e)) for e in range(num_local)]
    padded = [-(-len(part) // align) * align for part in entries]
    most = 4 * MAX * min(K, num_local) + (align - 1) * num_local
    assert none is None and len(recv) == (sum(padded) if exact else -(-most // align) * align)
    assert handle.num_recv_tokens_per_expert_list == (padded if exact else []) and sf.stride(0) == 1
    where = list(given.pairs(rank))
    place: dict[tuple[int, int, int], int] = {}
    for e, part in enumerate(entries):
        start = sum(padded[:e])
        assert int(handle.psum_num_recv_tokens_per_expert[e]) == start + len(part)
        here = slice(start, start + len(part))
        assert_bitwise(recv[here], rows(given.x, [(s, t) for s, t, _ in part], recv), "rows")
        assert_bitwise(sf[here].contiguous(), rows(scales, [(s, t) for s, t, _ in part], scales[0]), "scales")
        assert recv_weights[here].tolist() == [given.weights[s][t, k].item() for s, t, k in part]
        assert not recv[here.stop : start + padded[e]].any()
        place |= {(s, t, k): start + i for i, (s, t, k) in enumerate(part)}
    table = [[place.get((s, t, k), -1) for k in range(K)] for s, t in where]
    assert handle.recv_src_metadata[:, 2:].tolist() == table
    assert handle.recv_src_metadata[:, 0].tolist() == [s * MAX + t for s, t in where]

    made = torch.zeros_like(recv)
    for e, part in enumerate(entries):  # another factor for every expert
        here = slice(sum(padded[:e]), sum(padded[:e]) + len(part))
        made[here] = expert(given.held(rank)[e], recv[here])
    bias = biases(rank, given)
    home, home_weights, _ = buffer.combine(made, handle, topk_weights=recv_weights if multiple else None, bias=bias)
    expected = []
    for t, row in enumerate(x):
        chosen = [int(e) for e in idx[t] if e >= 0]
        terms = [expert(e, row) for e in chosen]
        if multiple:
            at = {r: [expert(e, row) for e in chosen if e in given.held(r)] for r in given.ranks_of(rank, t)}
            terms = [summed(part, BF16, row) for part in at.values()]
        expected.append(summed([bias[0][t], bias[1][t], *terms], BF16, row))
    assert_bitwise(home, torch.stack(expected) if expected else x, "combined")
    if multiple:
        assert_bitwise(home_weights, weights * (idx >= 0), "combined weights")
    (again, _), _, again_weights, _, _ = buffer.dispatch((x, scales[rank]), handle=handle, topk_weights=2 * weights)
    total = sum(padded)
    assert_bitwise(again[:total], recv[:total], "replayed rows")
    assert_bitwise(again_weights[:total], 2 * recv_weights[:total], "replayed weights")


@pytest.mark.parametrize(("align", "exact", "multiple"), [(8, True, True), (1, False, False)], ids=["exact", "single"])
def test_expanded(ranks: RankPool, align: int, exact: bool, multiple: bool) -> None:
    ranks.run(expanded, align, exact, multiple)


def test_sizes_and_domains() -> None:
    buffer = deep_ep.ElasticBuffer(num_max_tokens_per_rank=128, hidden=7168, num_topk=8, explicitly_destroy=True)
    assert buffer.num_bytes == deep_ep.ElasticBuffer.get_buffer_size_hint(None, 128, 7168, 8)
    assert buffer.num_bytes % (2 << 20) == 0
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, 1)
    assert buffer.get_theoretical_num_sms(256, 8) % 2 == 0 and buffer.get_theoretical_num_qps(20) == 9
    assert (buffer.rank_idx, buffer.num_ranks, buffer.scaleup_rank_idx) == (0, 1, 0)
    buffer.barrier()
    buffer.capture().current_stream_wait()
    buffer.destroy()
    for name in ("engram_fetch", "pp_send", "all_gather", "create_agrs_session"):
        with pytest.raises(UnsupportedError, match=f"{name} is not supported"):
            getattr(buffer, name)(torch.zeros(1))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="the buffer has no size"):
        deep_ep.ElasticBuffer(hidden=4)
    buffer = deep_ep.ElasticBuffer(num_max_tokens_per_rank=2, hidden=4)
    x, idx = torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64)
    handle = buffer.dispatch(x, idx, num_experts=2)[3]
    usual: dict[str, Any] = {"x": x, "topk_idx": idx, "num_experts": 2}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_experts": 0}, "num_experts is no count: got 0"),
        ({"expert_alignment": 0}, "expert_alignment is no count: got 0"),
        ({"topk_idx": idx + 2}, r"topk_idx\[0, 0\] names no expert: got 2; expected -1 to 1"),
        ({"x": torch.zeros(3, 4), "topk_idx": torch.zeros(3, 1, dtype=torch.int64)}, "too many tokens: got 3"),
        ({"handle": handle}, "a handle replays its routing"),
        ({"handle": handle, "topk_idx": None, "do_cpu_sync": True}, "a handle replays its routing"),
        ({"previous_event": deep_ep.EventHandle()}, "previous_event needs allocate_on_comm_stream"),
    ]
    for how, message in wrong:
        with pytest.raises(ConfigError, match=message):
            buffer.dispatch(**(usual | how))
    with pytest.raises(ConfigError, match="x does not fit the handle: got 3 rows; expected 2 rows"):
        buffer.combine(torch.zeros(3, 4), handle)
    with pytest.raises(ConfigError, match="destroy"):
        buffer.destroy()
