"""The normal mode of `Buffer`: what arrives, in which order, what the handle holds, what comes home."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moecomm import deep_ep
from moecomm.errors import ConfigError
from moecomm.testing import RankPool, assert_bitwise
from tests.deep_ep._world import World, expert, rows, summed, world

BF16 = torch.bfloat16


def sent(buffer: Any, given: World, rank: int, x: Any = None, **how: Any) -> Any:
    """Layout, then dispatch of this rank's tokens."""
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(given.idx[rank], given.num_experts)
    assert event.event is None
    layout = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }
    choices = {"topk_idx": given.idx[rank], "topk_weights": given.weights[rank]}
    return buffer.dispatch(given.x[rank] if x is None else x, **(layout | choices | how))


def check_layout(rank: int, given: World) -> None:
    layout = deep_ep.Buffer().get_dispatch_layout if given.size == 1 else BUFFERS["shared"].get_dispatch_layout
    per_rank, per_node, per_expert, in_rank, _ = layout(given.idx[rank], given.num_experts)
    owners = [[given.owner(e) for e in choices if e >= 0] for choices in given.idx[rank].tolist()]
    expected = torch.tensor([[r in mine for r in range(given.size)] for mine in owners], dtype=torch.bool)
    assert_bitwise(in_rank, expected.view(len(owners), given.size), "is_token_in_rank")
    assert_bitwise(per_rank, in_rank.sum(0, dtype=torch.int32), "num_tokens_per_rank")
    flat = given.idx[rank].flatten()
    assert_bitwise(per_expert, torch.bincount(flat[flat >= 0], minlength=given.num_experts).int(), "per expert")
    assert per_node is None


BUFFERS: dict[str, Any] = {}


def shared() -> Any:
    """One buffer for all tests of a process."""
    if "shared" not in BUFFERS:
        BUFFERS["shared"] = deep_ep.Buffer(torch.distributed.group.WORLD, explicitly_destroy=True)
    return BUFFERS["shared"]


def round_trip(rank: int, dtype: torch.dtype, hidden: int, alignment: int, worst: int) -> None:
    """Dispatch, look at everything, combine with weights and biases, replay."""
    given, buffer = world(hidden=hidden, dtype=dtype), shared()
    check_layout(rank, given)
    recv_x, idx, weights, counts, handle, event = sent(
        buffer, given, rank, expert_alignment=alignment, num_worst_tokens=worst
    )
    where = list(given.pairs(rank))
    count = len(where)
    assert event.event is None and len(recv_x) == (worst or count)
    assert_bitwise(recv_x[:count], rows(given.x, where, given.x[0]), "rows")
    local = torch.tensor([given.local(rank, *pair) for pair in where]).view(count, 3)
    assert idx.dtype == torch.int64 and bool((idx[count:] == -1).all())
    assert_bitwise(idx[:count], local, "local ids")
    assert_bitwise(weights[:count], rows(given.weights, where, weights) * (local >= 0), "weights")
    num_local = len(given.held(rank))
    here = torch.bincount(local[local >= 0], minlength=num_local).tolist()
    assert counts == ([] if worst else [-(-n // alignment) * alignment for n in here])

    bias = [torch.randn(given.x[rank].shape, generator=torch.Generator().manual_seed(rank)).to(dtype) for _ in "ab"]
    made = expert(rank, recv_x)
    made[count:] = torch.nan  # what nobody sent must not come home
    for added in (None, bias[0], (bias[0], bias[1])):
        home, home_weights, _ = buffer.combine(made, handle, topk_weights=weights, bias=added)
        parts = [] if added is None else [added] if isinstance(added, Tensor) else list(added)
        expected = [
            summed([*(p[t] for p in parts), *(expert(r, x) for r in sorted(given.ranks_of(rank, t)))], dtype, x)
            for t, x in enumerate(given.x[rank])
        ]
        assert_bitwise(home, torch.stack(expected) if expected else given.x[rank], "combined")
        assert_bitwise(home_weights, given.weights[rank] * (given.idx[rank] >= 0), "combined weights")
    replayed = buffer.dispatch(given.x[rank] * 2, handle=handle)
    assert replayed[1:5] == (None, None, None, None) and len(replayed[0]) == len(recv_x)
    assert_bitwise(replayed[0][:count], rows(given.x, where, given.x[0]) * 2, "replayed rows")


@pytest.mark.parametrize(
    ("dtype", "hidden", "alignment", "worst"),
    [(torch.float32, 24, 1, 0), (BF16, 7, 16, 0), (BF16, 256, 1, 40)],
    ids=["float32", "odd_hidden", "worst_tokens"],
)
def test_round_trip(ranks: RankPool, dtype: torch.dtype, hidden: int, alignment: int, worst: int) -> None:
    ranks.run(round_trip, dtype, hidden, alignment, worst)


def handle_items(rank: int) -> None:
    given, buffer = world(), shared()
    in_rank = buffer.get_dispatch_layout(given.idx[rank], 10)[3]
    *_, handle, _ = sent(buffer, given, rank, is_token_in_rank=in_rank)
    assert handle[4] is in_rank
    kept = in_rank.clone()
    in_rank.zero_()  # the caller's own: the others are what was dispatched
    prefix, channels, recv_channels, src, _, head = handle
    in_rank = kept
    where = list(given.pairs(rank))
    assert isinstance(handle, tuple) and len(handle) == 6
    assert prefix[:, rank].tolist() == [sum(s <= i for s, _ in where) for i in range(4)]
    assert src.tolist() == [token for _, token in where] and src.dtype == torch.int32
    num_channels = deep_ep.Buffer.num_sms // 2
    each = [max(1, -(-len(x) // num_channels)) for x in given.x]
    assert channels.shape == recv_channels.shape == (4, num_channels)
    for peer in range(4):
        upto = [int(in_rank[: (c + 1) * each[rank], peer].sum()) for c in range(num_channels)]
        assert channels[peer].tolist() == upto
        before = [sum(s == peer and t < c * each[peer] for s, t in where) for c in range(num_channels)]
        assert recv_channels[peer].tolist() == before
    tokens = range(len(in_rank))
    place = [[int(in_rank[t // each[rank] * each[rank] : t, r].sum()) for r in range(4)] for t in tokens]
    assert_bitwise(head, torch.where(in_rank, torch.tensor(place).view(-1, 4), -1).int(), "send_head")
    buffer.combine(torch.zeros(len(where), 24), handle)
    after = torch.where(in_rank, torch.tensor(place).view(-1, 4), -torch.tensor(place).view(-1, 4) - 1)
    assert_bitwise(handle[5], after.int(), "send_head after a combine")
    assert handle[5] is head and [item is not None for item in handle[1:3]] == [True, True]


def test_items_of_a_handle(ranks: RankPool) -> None:
    ranks.run(handle_items)


def pairs_and_bare(rank: int) -> None:
    """(FP8, scales) with any strides; no choices at all; float32 outputs of FP8 rows; rows of integers, replayed."""
    given, buffer = world(hidden=256, dtype=BF16), shared()
    codes = [x.to(torch.float8_e4m3fn) for x in given.x]
    scales = [x[:, :4].float().t().contiguous().t() for x in given.x]
    (recv, recv_scales), _, _, _, handle, _ = sent(buffer, given, rank, (codes[rank], scales[rank]))
    where = list(given.pairs(rank))
    assert_bitwise(
        recv.view(torch.uint8), rows([c.view(torch.uint8) for c in codes], where, recv.view(torch.uint8)), "codes"
    )
    assert_bitwise(recv_scales, rows(scales, where, recv_scales), "scales")
    for dtype in (BF16, torch.float32):
        home, none, event = buffer.combine(torch.ones(len(recv), 256, dtype=dtype), handle, async_finish=True)
        assert none is None and event.event is not None and home.dtype == dtype
        assert home[:, 0].tolist() == [len(given.ranks_of(rank, t)) for t in range(len(home))]
    whole, *nothing, event = buffer.dispatch((codes[rank], scales[rank]), handle=handle, async_finish=True)
    event.current_stream_wait()
    assert nothing == [None] * 4
    assert_bitwise(whole[1], recv_scales, "replayed scales")
    numbers = torch.arange(len(given.x[rank]), dtype=torch.int64)[:, None] + 100 * rank
    assert buffer.dispatch(numbers, handle=handle)[0].flatten().tolist() == [100 * s + t for s, t in where]

    recv, idx, weights, counts, bare, _ = sent(buffer, given, rank, topk_idx=None, topk_weights=None)
    chosen = torch.cat([idx.flatten() for idx in given.idx])
    assert (idx, weights, counts) == (None, None, [int((chosen == e).sum()) for e in given.held(rank)])
    assert_bitwise(recv, rows(given.x, where, recv), "rows without choices")
    assert_bitwise(buffer.combine(recv, bare)[0], buffer.combine(recv, handle)[0], "combined without choices")


def test_pairs_and_bare_rows(ranks: RankPool) -> None:
    ranks.run(pairs_and_bare)


def several_nodes(rank: int) -> None:
    """Two ranks per node: ten items, counts per node, and the same rows."""
    given = world()
    buffer = deep_ep.Buffer(torch.distributed.group.WORLD, explicitly_destroy=True, num_nvl_peers=2)
    _, per_node, _, in_rank, _ = buffer.get_dispatch_layout(given.idx[rank], given.num_experts)
    assert per_node is not None
    nodes = in_rank.view(len(in_rank), 2, 2).any(2)
    assert_bitwise(per_node, nodes.sum(0, dtype=torch.int32), "num_tokens_per_rdma_rank")
    recv, _, _, _, handle, _ = sent(buffer, given, rank)
    where = list(given.pairs(rank))
    assert_bitwise(recv, rows(given.x, where, recv), "rows")
    assert len(handle) == 10 and handle[0] is not None
    assert handle[-4].tolist() == [sum(s <= i for s, _ in where) for i in range(4)]
    assert handle[7].view(torch.int32)[:, 0].tolist() == [s // 2 for s, _ in where]
    here = [
        [given.owner(e) for e in given.idx[s][t].tolist() if e >= 0 and given.owner(e) // 2 == rank // 2]
        for s, t in where
    ]
    bits = [sum(1 << owner % 2 for owner in set(owners)) for owners in here]
    assert handle[7].view(torch.int32)[:, 1].tolist() == bits and handle[7].shape == (len(where), 8)
    assert handle[8].shape == (len(in_rank), 2) and handle[1].shape == (2, 10)
    assert_bitwise(
        buffer.internode_combine(recv, handle)[0], shared().combine(recv, sent(shared(), given, rank)[4])[0], "sums"
    )
    buffer.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.combine(recv, handle)


def test_several_nodes(ranks: RankPool) -> None:
    ranks.run(several_nodes)


def refusals(rank: int) -> None:
    """Nothing of this communicates: ranks 1 to 3 do not take part. Then the buffer still works."""
    given, buffer = world(), shared()
    if rank == 0:
        x, idx, weights = given.x[0], given.idx[0], given.weights[0]
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 10)
        layout: dict[str, Any] = {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
        }
        chosen: dict[str, Any] = {"topk_idx": idx, "topk_weights": weights}
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"topk_idx": idx}, "topk_idx and topk_weights belong together: got one of them; expected both or neither"),
            ({"num_worst_tokens": 4}, "num_worst_tokens needs topk_idx"),
            (chosen | {"expert_alignment": 0}, "expert_alignment is no count: got 0"),
            (chosen | {"is_token_in_rank": in_rank[1:]}, r"is_token_in_rank has the wrong shape: got \(4, 4\)"),
            (chosen | {"topk_weights": weights.double()}, "topk_weights has the wrong dtype: got torch.float64"),
            (chosen | {"num_tokens_per_expert": None}, "num_tokens_per_expert is no tensor: got NoneType"),
            (
                chosen | {"allocate_on_comm_stream": True},
                "allocate_on_comm_stream needs previous_event and async_finish",
            ),
        ]
        for how, message in wrong:
            with pytest.raises(ConfigError, match=message):
                buffer.dispatch(x, **(layout | how))
        with pytest.raises(ConfigError, match=r"x is no \(rows, scales\) pair: got 3 items"):
            buffer.dispatch((x, x, x), **layout)
        with pytest.raises(ConfigError, match=r"topk_idx\[0, 1\] names no expert: got 10; expected -1 to 9"):
            buffer.get_dispatch_layout(torch.tensor([[0, 10]]), 10)
        with pytest.raises(ConfigError, match="handle is none of a normal dispatch: got int"):
            buffer.combine(x, 3)
        with pytest.raises(ConfigError, match="num_nvl_bytes is wrong: got 100; expected a multiple of 128"):
            deep_ep.Buffer(torch.distributed.group.WORLD, 100)
        with pytest.raises(ConfigError, match="num_sms is wrong: got 3"):
            deep_ep.Buffer.set_num_sms(3)
    handle = sent(buffer, given, rank)[4]
    if rank == 0:
        with pytest.raises(ConfigError, match="x does not fit the handle: got 1 tokens; expected 5"):
            buffer.dispatch(given.x[0][:1], handle=handle)
        with pytest.raises(ConfigError, match=r"x does not fit the handle: got \(1, 24\)"):
            buffer.combine(given.x[0][:1], handle)
        with pytest.raises(ConfigError, match="bias has the wrong shape"):
            buffer.combine(torch.zeros(len(handle.route.origin), 24), handle, bias=torch.zeros(1, 24))
    assert len(buffer.combine(torch.zeros(len(handle.route.origin), 24), handle)[0]) == len(given.x[rank])


def test_bad_input_is_refused_before_anything_is_sent(ranks: RankPool) -> None:
    ranks.run(refusals)
