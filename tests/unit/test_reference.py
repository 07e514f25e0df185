"""The oracle against results worked out by hand, and against itself where two ways must agree."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moecomm import reference
from moecomm.errors import ConfigError, RoutingError, UnsupportedError
from moecomm.placement import ExpertPlacement
from moecomm.reference import combine, dispatch, moe
from moecomm.testing import CASES, assert_bitwise, provenance_rows
from moecomm.testing.cases import PLACEMENTS

TWO_RANKS = ExpertPlacement.explicit([[2, 0], [3, 1]])
XS = [torch.tensor([[10.0], [11.0], [12.0]]), torch.tensor([[20.0], [21.0]])]
IDXS = [torch.tensor([[0, 3], [2, 0], [-1, 1]]), torch.tensor([[2, 2], [-1, -1]])]
WEIGHTS = [torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), torch.tensor([[0.7, 0.8], [0.9, 1.0]])]


def flat(tensor: Tensor | None) -> Any:
    assert tensor is not None
    return pytest.approx(tensor.flatten().tolist(), rel=1e-6)


def origins(out: reference.ReferenceDispatched) -> list[tuple[int, ...]]:
    table = torch.stack([out.source_rank, out.source_token, out.source_k], dim=1)
    return [tuple(row) for row in table.tolist()]


# -- dispatch ----------------------------------------------------------------------------------------------------


def test_expert_layout_by_hand() -> None:
    first, second = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS)
    # Rank 0 holds experts 2 and 0, in this order: 2 gets (0, 1, 0), (1, 0, 0), (1, 0, 1); 0 gets (0, 0, 0), (0, 1, 1).
    assert origins(first) == [(0, 1, 0), (1, 0, 0), (1, 0, 1), (0, 0, 0), (0, 1, 1)]
    assert flat(first.x) == [11, 20, 20, 10, 11]
    assert flat(first.row_weights) == [0.3, 0.7, 0.8, 0.1, 0.4]
    assert flat(first.expert_offsets) == [3, 5] and flat(first.tokens_per_expert) == [3, 2]
    assert origins(second) == [(0, 0, 1), (0, 2, 1)]
    assert flat(second.x) == [10, 12] and flat(second.row_weights) == [0.2, 0.6]
    assert first.topk_idx is None and first.topk_weights is None and first.tokens_of_rank == (3, 2)


def test_padding_by_hand() -> None:
    first, second = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS, align=4)
    assert flat(first.x) == [11, 20, 20, 0, 10, 11, 0, 0] and flat(first.expert_offsets) == [4, 8]
    assert flat(first.row_weights) == [0.3, 0.7, 0.8, 0, 0.1, 0.4, 0, 0] and flat(first.tokens_per_expert) == [3, 2]
    assert flat(second.x) == [10, 0, 0, 0, 12, 0, 0, 0] and flat(second.source_rank) == [0, -1, -1, -1, 0, -1, -1, -1]


def test_an_empty_group_is_not_padded() -> None:
    (out,) = dispatch([XS[1]], [torch.tensor([[1], [1]])], placement=ExpertPlacement.uniform(3, 1), align=8)
    assert flat(out.expert_offsets) == [0, 8, 8] and len(out.x) == 8


def test_rank_layout_by_hand() -> None:
    first, second = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS, layout="rank")
    assert origins(first) == [(0, 0, -1), (0, 1, -1), (1, 0, -1)]
    assert flat(first.x) == [10, 11, 20]
    assert first.topk_idx is not None and first.topk_idx.tolist() == [[1, -1], [0, 1], [0, 0]]
    assert flat(first.topk_weights) == [0.1, 0, 0.3, 0.4, 0.7, 0.8]
    assert flat(first.tokens_per_expert) == [3, 2], "entries are counted, not rows"
    assert second.topk_idx is not None and second.topk_idx.tolist() == [[-1, 0], [-1, 1]]
    assert first.expert_offsets is None and first.row_weights is None


def test_without_weights_all_are_one_but_in_padding() -> None:
    first, _ = dispatch(XS, IDXS, placement=TWO_RANKS, align=4)
    assert flat(first.row_weights) == [1, 1, 1, 0, 1, 1, 0, 0]
    by_rank, _ = dispatch(XS, IDXS, placement=TWO_RANKS, layout="rank")
    assert flat(by_rank.topk_weights) == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_a_rank_without_experts_and_a_world_without_tokens(layout: str) -> None:
    placement = ExpertPlacement.explicit([[], [0]])
    empty, full = dispatch(XS, [torch.zeros(3, 1).long(), torch.zeros(2, 1).long()], placement=placement, layout=layout)
    assert empty.x.shape == (0, 1) and len(empty.tokens_per_expert) == 0 and len(full.x) == 5
    nobody = [torch.empty(0, 4), torch.empty(0, 4)]
    for out in dispatch(nobody, [torch.empty(0, 3).long()] * 2, placement=placement, layout=layout):
        assert out.x.shape == (0, 4)
        assert out.topk_idx is None or out.topk_idx.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64, torch.bfloat16], ids=str)
def test_rows_and_scales_are_copied_as_bits(dtype: torch.dtype) -> None:
    xs = [provenance_rows(rank, 5, 6, dtype) for rank in range(2)]
    scales = [provenance_rows(rank, 5, 2, torch.float32, round=3) for rank in range(2)]
    idxs = [torch.tensor([[t % 4, (t + rank + 1) % 4] for t in range(5)]) for rank in range(2)]
    for layout in ("expert", "rank"):
        for out in dispatch(xs, idxs, placement=TWO_RANKS, layout=layout, scales=scales):
            sent = [(int(r), int(t)) for r, t in zip(out.source_rank, out.source_token, strict=True)]
            assert_bitwise(out.x, torch.stack([xs[r][t] for r, t in sent]), layout)
            assert out.scales is not None
            assert_bitwise(out.scales, torch.stack([scales[r][t] for r, t in sent]), layout)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_dispatch_is_a_sorted_permutation(name: str, world_size: int) -> None:
    case = CASES[name]
    placement = case.placement(world_size)
    routings = [case.routing(rank, 1, world_size)[0] for rank in range(world_size)]
    outs = dispatch([case.payload(r, 1) for r in range(world_size)], routings, placement=placement, align=case.align)
    seen = []
    for experts, out in zip(placement.experts_of_rank, outs, strict=True):
        assert out.expert_offsets is not None and all(end % case.align == 0 for end in out.expert_offsets.tolist())
        starts = [0, *out.expert_offsets.tolist()]
        for expert, start, count in zip(experts, starts, out.tokens_per_expert.tolist(), strict=False):
            group = origins(out)[start : start + count]
            assert group == sorted(group)
            seen += [(*origin, expert) for origin in group]
    sent = [
        (rank, token, k, expert)
        for rank, idx in enumerate(routings)
        for token, chosen in enumerate(idx.tolist())
        for k, expert in enumerate(chosen)
        if expert != -1
    ]
    assert sorted(seen) == sent


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_idxs": [IDXS[0] + 5, IDXS[1]]}, RoutingError, "rank 0: expert id out of range"),
        ({"topk_idxs": [IDXS[0], IDXS[1] - 1]}, RoutingError, "rank 1: expert id out of range"),
        ({"topk_idxs": [IDXS[0][:2], IDXS[1]]}, RoutingError, "rank 0: x is no"),
        ({"topk_idxs": IDXS[:1]}, RoutingError, "topk_idxs needs one entry per rank: got 1; expected 2"),
        ({"topk_weights": [WEIGHTS[0], WEIGHTS[0]]}, RoutingError, r"rank 1: weights are not \(T, K\)"),
        ({"layout": "diagonal"}, ConfigError, "unknown layout: got 'diagonal'"),
        ({"align": 0}, ConfigError, "align is no row count: got 0"),
        ({"layout": "rank", "align": 2}, UnsupportedError, "no groups to align"),
    ],
)
def test_dispatch_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"xs": XS, "topk_idxs": IDXS, "topk_weights": WEIGHTS, "placement": TWO_RANKS, **change}
    with pytest.raises(error, match=message):
        dispatch(**arguments)  # type: ignore[arg-type]


# -- combine -----------------------------------------------------------------------------------------------------


def test_combine_by_hand() -> None:
    out = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS)
    rows = [torch.arange(1.0, 6.0)[:, None], torch.tensor([[100.0], [200.0]])]
    for reduce in ("rank", "source"):
        first, second = combine(rows, out, reduce=reduce)
        assert flat(first) == [0.1 * 4 + 0.2 * 100, 0.3 * 1 + 0.4 * 5, 0.6 * 200]
        assert flat(second) == [0.7 * 2 + 0.8 * 3, 0]
        first, second = combine(rows, out, reduce=reduce, weighted=False, biases=[100 * x for x in XS])
        assert flat(first) == [1000 + 4 + 100, 1100 + 1 + 5, 1200 + 200]
        assert flat(second) == [2000 + 2 + 3, 2100]


def test_combine_of_rank_layout_adds_rows_as_they_are() -> None:
    out = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS, layout="rank")
    rows = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0]])]
    for weighted in (None, False):
        first, second = combine(rows, out, weighted=weighted)
        assert flat(first) == [11, 2, 20] and flat(second) == [3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_rounding_is_where_it_belongs(dtype: torch.dtype) -> None:
    # One token, experts 0 and 1 on rank 0, expert 2 on rank 1; `tiny` is lost wherever it meets 1 in the payload dtype.
    tiny = torch.finfo(dtype).eps / 4
    placement = ExpertPlacement.explicit([[0, 1], [2]])
    idxs = [torch.tensor([[0, 1, 2]]), torch.empty(0, 3).long()]
    out = dispatch([torch.ones(1, 1), torch.empty(0, 1)], idxs, placement=placement)
    rows = [torch.tensor([[1.0], [tiny]], dtype=dtype), torch.tensor([[-1.0]], dtype=dtype)]
    assert combine(rows, out, reduce="rank")[0].item() == 0.0, "rank 0 rounds 1 + tiny to 1 before it leaves"
    assert combine(rows, out, reduce="source")[0].item() == tiny, "nothing is rounded before the end"


def test_products_are_rounded_before_they_are_added() -> None:
    # In float32, w * y is inexact; a fused multiply-add would keep the lost part, which the sum then lays bare.
    w, y = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    product = np.float32(w * y)
    assert float(w) * float(y) != float(product)
    placement = ExpertPlacement.uniform(2, 1)
    weights = torch.tensor([[1.0, float(w)]])
    out = dispatch([torch.ones(1, 1)], [torch.tensor([[0, 1]])], [weights], placement=placement)
    rows = [torch.tensor([[-float(product)], [float(y)]])]
    for reduce in ("rank", "source"):
        assert combine(rows, out, reduce=reduce)[0].item() == 0.0


def test_sums_run_in_ascending_k_and_rank() -> None:
    big = 2.0**24  # in float32 big + 1 is big
    placement = ExpertPlacement.explicit([[2], [1, 0]])
    idxs = [torch.tensor([[1, 2, 0]]), torch.empty(0, 3).long()]
    xs = [torch.ones(1, 1), torch.empty(0, 1)]
    out = dispatch(xs, idxs, placement=placement)
    # k = 0 is `big` on rank 1, k = 1 is 1 on rank 0, k = 2 is `-big` on rank 1.
    rows = [torch.tensor([[1.0]]), torch.tensor([[big], [-big]])]
    assert combine(rows, out, reduce="source")[0].item() == 0.0, "(big + 1) - big"
    assert combine(rows, out, reduce="rank")[0].item() == 1.0, "1 + (big - big)"
    bias = [torch.tensor([[1.0]]), torch.empty(0, 1)]
    rows = [torch.tensor([[big]]), torch.tensor([[0.0], [-big]])]
    assert combine(rows, out, reduce="rank", biases=bias)[0].item() == 0.0, "the bias comes first: (1 + big) - big"


def test_nodes_add_one_level_of_rounding() -> None:
    # One token with an expert on each of four ranks; `tiny` is lost wherever it meets 1 in bfloat16.
    tiny = torch.finfo(torch.bfloat16).eps / 4
    placement = ExpertPlacement.uniform(4, 4)
    xs, idxs = (
        [torch.ones(1, 1)] + [torch.empty(0, 1)] * 3,
        [torch.tensor([[0, 1, 2, 3]])] + [torch.empty(0, 4).long()] * 3,
    )
    for layout in ("expert", "rank"):
        out = dispatch(xs, idxs, placement=placement, layout=layout)
        rows = [torch.tensor([[value]]).bfloat16() for value in (1.0, tiny, -1.0, tiny)]
        assert combine(rows, out)[0].item() == 2 * tiny, "no nodes: nothing is rounded before the end"
        assert combine(rows, out, node_of_rank=[0, 0, 1, 1])[0].item() == 0.0, "1 + tiny is 1, and -1 + tiny is -1"
        assert combine(rows, out, node_of_rank=[0, 1, 0, 1])[0].item() == 2 * tiny, "(1 - 1) + (tiny + tiny)"
        assert combine(rows, out, node_of_rank=[0, 1, 2, 3])[0].item() == 2 * tiny, "each rank its own node"


def test_signed_zeros() -> None:
    placement = ExpertPlacement.uniform(2, 2)
    xs, idxs = [torch.ones(2, 1), torch.empty(0, 1)], [torch.tensor([[0], [-1]]), torch.empty(0, 1).long()]
    minus = [torch.full((2, 1), -0.0), torch.empty(0, 1)]
    for layout, reduce in (("expert", "rank"), ("expert", "source"), ("rank", "rank")):
        out = dispatch(xs, idxs, placement=placement, layout=layout)
        rows = [torch.tensor([[-0.0]]), torch.empty(0, 1)]
        assert_bitwise(combine(rows, out, reduce=reduce)[0], torch.zeros(2, 1), "sums start at +0")
        signs = combine(rows, out, reduce=reduce, biases=minus)[0].signbit().flatten().tolist()
        assert signs[1], "a bias that meets no row stays as it is"
        assert signs[0] == (layout == "rank" or reduce == "source"), "a partial sum is +0, a row may be -0"


def test_padding_is_not_read() -> None:
    out = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS, align=4)
    clean = [torch.where(o.source_rank[:, None] == -1, 0.0, 3.0) for o in out]
    poisoned = [torch.where(o.source_rank[:, None] == -1, float("nan"), 3.0) for o in out]
    for a, b in zip(combine(clean, out), combine(poisoned, out), strict=True):
        assert_bitwise(a, b, "combine")


@pytest.mark.parametrize("name", ["plain", "masked", "duplicate_expert", "uneven_experts", "wide", "extreme_values"])
def test_reduce_source_does_not_depend_on_ranks_or_placement(name: str) -> None:
    case = CASES[name]
    x, (idx, weights) = case.payload(0, 0), case.routing(0, 0, 1)
    results = []
    for world_size, placed in ((1, "uniform"), (2, "uniform"), (3, "uniform"), (3, "interleaved")):
        placement = PLACEMENTS[placed](case.num_experts, world_size)
        others = [torch.empty(0, case.hidden, dtype=case.dtype)] * (world_size - 1)
        no_idx, no_weights = [idx[:0]] * (world_size - 1), [torch.empty(0, case.top_k)] * (world_size - 1)
        assert weights is not None
        out = dispatch([x, *others], [idx, *no_idx], [weights, *no_weights], placement=placement)
        values = case.values("rows", 0, 0, len(x) * case.top_k).view(len(x), case.top_k, case.hidden)
        rows = [values[o.source_token, o.source_k] for o in out]
        results.append(combine(rows, out, reduce="source")[0])
    for result in results[1:]:
        assert_bitwise(result, results[0], name)


def test_combine_refuses() -> None:
    out = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS)
    rows = [torch.zeros(5, 1), torch.zeros(2, 1)]
    by_rank = dispatch(XS, IDXS, WEIGHTS, placement=TWO_RANKS, layout="rank")
    with pytest.raises(ConfigError, match="unknown reduce: got 'sum'"):
        combine(rows, out, reduce="sum")
    with pytest.raises(RoutingError, match="rank 0: rows do not match: got 2; expected 5"):
        combine([rows[1], rows[1]], out)
    with pytest.raises(UnsupportedError, match=r"not summed: got torch\.int8"):
        combine([r.to(torch.int8) for r in rows], out)
    for options in ({"weighted": True}, {"reduce": "source"}):
        with pytest.raises(UnsupportedError, match="adds one finished row per rank"):
            combine([torch.zeros(3, 1), torch.zeros(2, 1)], by_rank, **options)


# -- moe ---------------------------------------------------------------------------------------------------------


def expert(rows: Tensor, index: int) -> Tensor:
    return torch.tanh(rows * (index + 1))


@pytest.mark.parametrize("weighted", [True, False])
def test_moe_is_dispatch_experts_combine(weighted: bool) -> None:
    xs = [x / 30 for x in XS]
    weights = WEIGHTS if weighted else None
    out = dispatch(xs, IDXS, weights, placement=TWO_RANKS)
    rows = []
    for experts, o in zip(TWO_RANKS.experts_of_rank, out, strict=True):
        assert o.expert_offsets is not None
        ends = [0, *o.expert_offsets.tolist()]
        rows.append(torch.cat([expert(o.x[a:b], e) for e, a, b in zip(experts, ends, ends[1:], strict=False)]))
    there_and_back = combine(rows, out, reduce="source")
    for ours, theirs in zip(moe(xs, IDXS, weights, expert), there_and_back, strict=True):
        assert_bitwise(ours, theirs, "moe")


def test_gradients_of_moe_are_those_of_finite_differences() -> None:
    inputs = [t.double().requires_grad_() for t in (XS[0] / 30, XS[1] / 30, WEIGHTS[0], WEIGHTS[1], XS[0])]

    def both(x0: Tensor, x1: Tensor, w0: Tensor, w1: Tensor, bias: Tensor) -> Tensor:
        return torch.cat(moe([x0, x1], IDXS, [w0, w1], expert, biases=[bias, torch.zeros_like(x1)]))

    assert torch.autograd.gradcheck(both, inputs)


def test_moe_takes_the_wider_dtype_and_rounds_once() -> None:
    tiny = torch.finfo(torch.bfloat16).eps / 4
    x, idx, weights = torch.ones(1, 1).bfloat16(), torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, tiny, -1.0]])
    (y,) = moe([x], [idx], [weights], lambda rows, e: rows)
    assert y.dtype == torch.bfloat16 and y.item() == tiny
    (empty,) = moe([x[:0]], [idx[:0]], [weights[:0]], lambda rows, e: rows)
    assert empty.shape == (0, 1)


def test_the_oracle_is_independent() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {m for m in modules if m and m.startswith("moecomm")} == {"moecomm.errors", "moecomm.placement"}
