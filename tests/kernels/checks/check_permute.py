"""`permute` and `unpermute` against their references, and as each other's inverse."""

from __future__ import annotations

import pytest
import torch
from moecomm.kernels.permute import padding_rows, permute, permute_ref, unpermute, unpermute_ref
from moecomm.kernels.push import push
from moecomm.kernels.rows import Arriving, RowFormat
from torch import Tensor

from moecomm.placement import ExpertPlacement
from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.worlds import DEVICE, World, on_device

ROWS = {
    "aligned": torch.randn(7, 8),
    "odd": torch.randn(7, 5).half(),
    "bytes": torch.randint(0, 255, (7, 3)).to(torch.uint8),
    "several_chunks": torch.randn(7, 4100),
    "misaligned": torch.randn(7 * 8 + 1)[1:].view(7, 8),
    "transposed": torch.randn(8, 7).t(),
}


def table_of(pairs: int, columns: int, num_rows: int) -> Tensor:
    """A table that names rows at random, none twice, and some entries not at all."""
    generator = torch.Generator().manual_seed(pairs)
    rows = torch.randperm(num_rows, generator=generator)[: pairs * columns].view(pairs, columns)
    rows[torch.rand(pairs, columns, generator=generator) < 0.3] = -1
    return rows.int().to(DEVICE)


@pytest.mark.parametrize("name", list(ROWS))
def test_permute_against_reference(name: str) -> None:
    rows, table = on_device(ROWS[name]), table_of(7, 3, 40)
    got, scales = permute(rows, table, num_rows=40)
    wanted, _ = permute_ref(rows, table, num_rows=40)
    assert scales is None
    assert_bitwise(got.view(torch.uint8), wanted.view(torch.uint8), "rows, poison included")


@pytest.mark.parametrize("align", [1, 3, 4])
def test_padding_is_zero(align: int) -> None:
    tokens = torch.tensor([2, 0, 5, 3])
    ends = (-(-tokens // align) * align).cumsum(0)
    groups = torch.stack([ends, tokens]).int().to(DEVICE)
    begins = ends - -(-tokens // align) * align
    rows = torch.cat([torch.arange(int(b), int(b + t)) for b, t in zip(begins, tokens, strict=True)])
    table = rows.view(5, 2).int().to(DEVICE)
    x = torch.randn(5, 6, device=DEVICE)
    got, _ = permute(x, table, groups, num_rows=int(ends[-1]), align=align)
    assert (got[padding_rows(groups, align)] == 0).all()
    assert_bitwise(got, permute_ref(x, table, groups, num_rows=int(ends[-1]), align=align)[0], "rows")
    assert len(padding_rows(groups, align)) == int(ends[-1]) - 10


@pytest.mark.parametrize("columns", [0, 2])
def test_replayed_rows_from_the_wire(columns: int) -> None:
    """Rows that arrive are found by their places, and permuted by a table that was kept."""
    world = World(ExpertPlacement.uniform(4, 1), 2, 6, 64)
    sent = world.lay_out(0, torch.tensor([[0, 1]] * 5), None)
    x = torch.randn(5, 8, device=DEVICE)
    scales = torch.rand(5, columns, device=DEVICE) if columns else None
    push(x, sent, world.links[0], wire=world.wire, scales=scales, replay=True)
    places = torch.tensor([3, 0, 4, -1, 1], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[0, 3], [1, -1], [-1, 2], [-1, -1], [5, 4]], dtype=torch.int32, device=DEVICE)
    groups = torch.tensor([[4, 8], [4, 2]], dtype=torch.int32, device=DEVICE)
    arriving = Arriving(world.links[0], world.wire, RowFormat(8, torch.float32, columns), places)
    zero = torch.zeros_like(x[0])
    got, got_scales = permute(arriving, table, groups, num_rows=8, align=4)
    assert_bitwise(got, torch.stack([x[3], x[0], x[4], x[3], x[1], x[1], zero, zero]), "rows")
    if scales is not None:
        assert_bitwise(got_scales[:6], scales[[3, 0, 4, 3, 1, 1]], "scales")
        assert (got_scales[6:] == 0).all()
    there = world.on_host()
    arriving = arriving._replace(link=there.links[0], wire_row=places.cpu())
    wanted, wanted_scales = permute_ref(arriving, table.cpu(), groups.cpu(), num_rows=8, align=4)
    assert_bitwise(got, wanted, "rows, against the reference")
    if columns:
        assert_bitwise(got_scales, wanted_scales, "scales, against the reference")
    world.check_status()


@pytest.mark.parametrize("name", list(ROWS))
def test_unpermute_against_reference(name: str) -> None:
    rows = on_device(ROWS[name])
    index = torch.tensor([6, -1, 0, 0, 3, -1, 5, 2, 1], dtype=torch.int32, device=DEVICE)
    assert_bitwise(unpermute(rows, index), unpermute_ref(rows, index), "rows")


def test_unpermute_undoes_permute() -> None:
    rows, table = torch.randn(7, 8, device=DEVICE), table_of(7, 3, 40)
    there, _ = permute(rows, table, num_rows=40)
    back = unpermute(there, table.view(-1)).view(7, 3, 8)
    assert_bitwise(back, torch.where((table >= 0)[..., None], rows[:, None], 0.0), "rows")


def test_nothing_to_do() -> None:
    empty = torch.empty(0, 3, dtype=torch.int32, device=DEVICE)
    assert permute(torch.zeros(0, 8, device=DEVICE), empty, num_rows=0)[0].shape == (0, 8)
    assert unpermute(torch.zeros(0, 8, device=DEVICE), empty[:, 0]).shape == (0, 8)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (torch.zeros(7, 2, dtype=torch.int64), "not \\(P, J\\) int32"),
        (torch.zeros(6, 2, dtype=torch.int32), "table of 6 pairs for 7 rows"),
    ],
)
def test_refused(table: Tensor, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        permute(torch.zeros(7, 8), table, num_rows=40)
