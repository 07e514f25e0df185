"""`receive` against its reference: layouts, static sizes, what does not fit, who is late."""

from __future__ import annotations

import pytest
import torch
from moecomm.kernels.push import push
from moecomm.kernels.receive import Received, receive, receive_ref
from moecomm.kernels.rows import RowFormat
from moecomm.kernels.wire import LATE, ROWS_NEEDED, STALLED
from torch import Tensor

from moecomm.placement import ExpertPlacement
from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.conftest import POISON
from tests.kernels.checks.worlds import DEVICE, World

TOKENS, WORLD, TOP_K = (5, 0, 9), 3, 3


def pushed(rows: Tensor, scales: Tensor | None = None, silent: tuple[int, ...] = ()) -> World:
    """A world in which all ranks but the silent ones have pushed."""
    world = World(ExpertPlacement.uniform(7, WORLD), TOP_K, 10, rows.shape[1] * rows.element_size() + 64)
    generator = torch.Generator().manual_seed(3)
    for rank, tokens in enumerate(TOKENS):
        ids = torch.randint(-1, 7, (tokens, TOP_K), generator=generator)
        sent = world.lay_out(rank, ids, torch.rand(tokens, TOP_K, generator=generator))
        beside = None if scales is None else scales[:tokens]
        if rank not in silent:
            push(rows[:tokens].contiguous(), sent, world.links[rank], wire=world.wire, scales=beside)
    return world


def both(world: World, form: RowFormat, rank: int, **options: object) -> tuple[Received, Received]:
    worlds = (receive, world), (receive_ref, world.on_host())
    return tuple(f(w.arriving(rank, form), experts=world.experts(rank), **options) for f, w in worlds)


def compare(got: Received, wanted: Received) -> None:
    """Everything agrees; rows that nobody names are poison on both sides."""
    for name, value, expected in zip(Received._fields, got, wanted, strict=True):
        if expected is not None:
            assert_bitwise(value.view(torch.uint8), expected.view(torch.uint8), name)


ROWS = {
    "aligned": torch.randn(10, 8),
    "odd": torch.randn(10, 7).bfloat16(),
    "bytes": torch.randint(0, 255, (10, 3)).to(torch.uint8),
    "several_chunks": torch.randn(10, 4100),
}


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", list(ROWS))
def test_receive_against_reference(name: str, rank: int) -> None:
    rows = ROWS[name].to(DEVICE)
    form = RowFormat(rows.shape[1], rows.dtype)
    compare(*both(pushed(rows), form, rank, num_pairs=30, num_rows=200, align=1 + 3 * rank))


@pytest.mark.parametrize("layout", ["expert", "padded", "rank"])
@pytest.mark.parametrize("columns", [0, 3, 4])
def test_layouts_with_scales(layout: str, columns: int) -> None:
    rows = torch.randn(10, 8, device=DEVICE)
    scales = torch.rand(10, columns, device=DEVICE) if columns else None
    align = {"expert": 4, "padded": 16, "rank": 1}[layout]
    sizes = {"num_pairs": 30, "num_rows": 30 if layout == "rank" else 48}
    compare(*both(pushed(rows, scales), RowFormat(8, torch.float32, columns), 2, layout=layout, align=align, **sizes))


def test_static_size_leaves_the_rest_marked() -> None:
    """Room for W * M pairs: those beyond the last are -1, and no row is written for them."""
    rows = torch.randn(10, 8, device=DEVICE)
    got, _ = both(pushed(rows), RowFormat(8, torch.float32), 0, num_pairs=30, num_rows=90)
    used = int((got.wire_row >= 0).sum())
    assert 0 < used < 30 and (got.table[used:] == -1).all() and (got.token[used:] == -1).all()
    assert bool((got.x.view(torch.uint8)[int(got.groups[0, -1]) :] == POISON).all()), (
        "rows beyond the last were written"
    )


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_the_rest_becomes_zero(layout: str, align: int) -> None:
    rows, scales = torch.randn(10, 8, device=DEVICE), torch.rand(10, 3, device=DEVICE)
    align = align if layout == "expert" else 1
    sizes = {"num_pairs": 30, "num_rows": 90 if layout == "expert" else 30, "align": align, "layout": layout}
    got, wanted = both(pushed(rows, scales), RowFormat(8, torch.float32, 3), 2, zero_rest=True, **sizes)
    compare(got, wanted)
    used = int(got.groups[0, -1]) if layout == "expert" else int((got.wire_row >= 0).sum())
    assert 0 < used < len(got.x) and got.scales is not None
    for part in (got.x[used:], got.scales[used:], got.weights[used:]):
        assert not part.any()


@pytest.mark.parametrize("layout", ["expert", "padded"])
def test_what_does_not_fit_is_left_out_and_reported(layout: str) -> None:
    rows = torch.randn(10, 8, device=DEVICE)
    world = pushed(rows)
    align, num_rows = (4, 9) if layout == "expert" else (2, 6)
    got, wanted = both(
        world, RowFormat(8, torch.float32), 0, num_pairs=30, num_rows=num_rows, layout=layout, align=align
    )
    compare(got, wanted)
    needed = int(world.links[0].status[int(ROWS_NEEDED)])
    if layout == "expert":  # the groups end where the rows do
        assert needed > num_rows and int(got.groups[0, -1]) == num_rows
    else:
        assert needed == int(got.groups[1].max()) > align
    assert (got.table < num_rows).all()


def test_late_ranks_are_named_and_nothing_is_read() -> None:
    rows = torch.randn(10, 8, device=DEVICE)
    world = pushed(rows, silent=(0, 2))
    world.links[1] = world.links[1]._replace(max_spins=3)
    got = receive(world.arriving(1, RowFormat(8, torch.float32)), experts=world.experts(1), num_pairs=30, num_rows=90)
    status = world.links[1].status
    assert status[int(LATE) : int(LATE) + 3].tolist() == [1, 0, 1] and int(status[int(STALLED)]) == 1
    for name, value in zip(Received._fields, got, strict=True):
        if value is not None:
            assert bool((value.contiguous().view(torch.uint8) == POISON).all()), f"{name} was written"


@pytest.mark.parametrize("max_programs", [1, 3, 50])
def test_any_number_of_programs(max_programs: int) -> None:
    rows = torch.randn(10, 8, device=DEVICE)
    sizes = {"num_pairs": 30, "num_rows": 90, "align": 4, "max_programs": max_programs}
    compare(*both(pushed(rows), RowFormat(8, torch.float32), 2, **sizes))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"layout": "token"}, "layout 'token', expected one of"),
        ({"align": 0}, "align is 0"),
        ({"layout": "rank"}, "90 rows for 30 pairs"),
        ({"experts": (0, 9)}, "9 experts, the wire has room for 3"),
    ],
)
def test_refused(options: dict[str, object], problem: str) -> None:
    world = World(ExpertPlacement.uniform(7, WORLD), TOP_K, 10, 64)
    arguments = {"experts": (0, 3), "num_pairs": 30, "num_rows": 90} | options
    with pytest.raises(AssertionError, match=problem):
        receive(world.arriving(0, RowFormat(8, torch.float32)), **arguments)
