"""`layout` against its reference, and against ids that must never become addresses."""

from __future__ import annotations

import pytest
import torch
from moecomm.kernels.layout import SendLayout, layout, layout_ref
from moecomm.kernels.wire import Wire, decode_bad_id
from torch import Tensor

from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.worlds import DEVICE

# name: tokens, top_k, experts of each rank, M
SHAPES = {
    "no_tokens": (0, 2, (2, 2), 8),
    "one_token": (1, 1, (3,), 1),
    "one_expert": (9, 1, (1, 0), 9),
    "empty_rank": (33, 3, (4, 0, 3), 40),
    "k_is_5": (70, 5, (3, 3, 2), 70),
    "several_blocks": (300, 8, (16, 16), 512),
    "one_rank": (17, 4, (8,), 17),
}


def run(
    ids: Tensor, weights: Tensor | None, held: tuple[int, ...], max_tokens: int, reference: bool = False
) -> tuple[SendLayout, Tensor]:
    wire = Wire.of(len(held), ids.shape[1], max(held), 16)
    order = torch.randperm(sum(held), generator=torch.Generator().manual_seed(len(held))).int()
    begin = torch.tensor([sum(held[:rank]) for rank in range(len(held) + 1)], dtype=torch.int32)
    device = "cpu" if reference else DEVICE
    status = torch.zeros(3 + len(held), dtype=torch.int64, device=device)
    inputs = [None if t is None else t.to(device) for t in (ids, weights, order, begin)]
    found = (layout_ref if reference else layout)(*inputs, wire=wire, max_tokens=max_tokens, status=status)
    return found, status


def compare(ids: Tensor, weights: Tensor | None, held: tuple[int, ...], max_tokens: int) -> Tensor:
    (found, status), (wanted, wanted_status) = (run(ids, weights, held, max_tokens, ref) for ref in (False, True))
    for name, got, expected in zip(SendLayout._fields, found, wanted, strict=True):
        assert_bitwise(got, expected, name)
    assert_bitwise(status, wanted_status, "status")
    return status


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_layout_against_reference(name: str, dtype: torch.dtype) -> None:
    tokens, top_k, held, max_tokens = SHAPES[name]
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, sum(held), (tokens, top_k), generator=generator).to(dtype)
    weights = torch.randn(tokens, top_k, generator=generator) if dtype == torch.int64 else None
    status = compare(ids, weights, held, max_tokens)
    assert not status.any()


def test_non_contiguous_ids() -> None:
    ids = torch.randint(-1, 4, (5, 12))[:, ::4]
    compare(ids, torch.rand(3, 5).t(), (2, 2), 5)


@pytest.mark.parametrize("bad", [4, 5, 2**31 - 1, 2**31, 2**40, -2, -(2**31), -(2**40)])
def test_bad_id_is_reported_and_not_used(bad: int) -> None:
    """Two bad ids: the first in (token, k) order is named, both are treated as no expert."""
    ids = torch.tensor([[0, 1], [3, bad], [bad, 2]])
    status = compare(ids, None, (2, 2), 8)
    assert decode_bad_id(int(status[0]), 2) == (1, 1, max(-(2**31), min(bad, 2**31 - 1)))
    found, _ = run(ids, None, (2, 2), 8)
    assert found.meta[1, 1] == found.meta[2, 0] == -1
    clean = torch.where(ids == bad, -1, ids)
    for got, expected in zip(found, run(clean, None, (2, 2), 8)[0], strict=True):
        assert_bitwise(got, expected, "as if there were no expert")


def test_bad_id_never_becomes_an_address() -> None:
    """The expert table sits among values that would be seen: any look-up outside it changes the result."""
    around = torch.full((64,), 1, dtype=torch.int32, device=DEVICE)
    around[30:34] = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    wire, begin = Wire.of(2, 1, 2, 16), torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([[n] for n in (-30, -2, -1, 4, 20, 33)], device=DEVICE)
    status = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    found = layout(ids, None, around[30:34], begin, wire=wire, max_tokens=8, status=status)
    assert not found.counts.any() and (found.pair_row == -1).all() and (found.meta[:, 0] == -1).all()
    assert decode_bad_id(int(status[0]), 1) == (0, 0, -30)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (torch.zeros(3, 3, dtype=torch.int64), r"topk_idx has shape \(3, 3\), expected \(T, 2\)"),
        (torch.zeros(3, 2), "topk_idx is torch.float32, expected int32 or int64"),
        (torch.zeros(9, 2, dtype=torch.int64), "9 tokens, at most 8 fit"),
    ],
)
def test_refused(ids: Tensor, problem: str) -> None:
    wire, tables = Wire.of(2, 2, 2, 16), (torch.arange(4, dtype=torch.int32), torch.tensor([0, 2, 4]).int())
    with pytest.raises(AssertionError, match=problem):
        layout(ids, None, *tables, wire=wire, max_tokens=8, status=torch.zeros(5, dtype=torch.int64))
