"""`reduce` and its gradients, bit for bit against their references and against the CPU library's row functions."""

from __future__ import annotations

import pytest
import torch
from moecomm.kernels.push import push
from moecomm.kernels.reduce import reduce, reduce_ref
from moecomm.kernels.reduce_grad import (
    reduce_grad_rows,
    reduce_grad_rows_ref,
    reduce_grad_weights,
    reduce_grad_weights_ref,
)
from moecomm.kernels.rows import Arriving, RowFormat
from torch import Tensor

from moecomm.placement import ExpertPlacement
from moecomm.rows import reduce_rows, scale_rows_grad
from moecomm.testing.asserts import assert_bitwise, assert_error_bounded
from tests.kernels.checks.conftest import POISON
from tests.kernels.checks.worlds import DEVICE, World

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-41, 6e-8, 65504.0, 3.3e38])


def numbers(*shape: int, dtype: torch.dtype = torch.float32, extreme: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-9, 9, shape, generator=generator))
    if extreme:
        chosen = torch.rand(shape, generator=generator) < 0.4
        special = SPECIAL[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        values = torch.where(chosen, special, values)
    return values.to(dtype).to(DEVICE)


def table_of(sums: int, columns: int, num_rows: int, distinct: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sums + columns)
    table = torch.randint(0, num_rows, (sums, columns), generator=generator)
    if distinct:
        table = torch.randperm(num_rows, generator=generator)[: sums * columns].view(sums, columns)
    table[torch.rand(sums, columns, generator=generator) < 0.25] = -1
    return table.int().to(DEVICE)


def weights_of(mode: str, table: Tensor, num_rows: int, extreme: bool = False) -> Tensor | None:
    shape = {"none": None, "by_row": (num_rows,), "by_entry": tuple(table.shape)}[mode]
    return None if shape is None else numbers(*shape, extreme=extreme, seed=7)


MODES = ("none", "by_row", "by_entry")


@pytest.mark.parametrize("extreme", [False, True], ids=["ordinary", "extreme"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_against_reference(dtype: torch.dtype, mode: str, extreme: bool) -> None:
    rows, table = numbers(9, 21, dtype=dtype, extreme=extreme), table_of(6, 4, 9)
    weights, bias = weights_of(mode, table, 9, extreme), numbers(6, 21, dtype=torch.bfloat16, extreme=extreme)
    for given in (None, bias):
        got = reduce(rows, table, weights, given)
        assert_bitwise(got, reduce_ref(rows, table, weights, given), "sum")
        library = torch.zeros(6, 21, dtype=dtype)
        reduce_rows(
            library,
            rows.cpu(),
            table.cpu(),
            None if weights is None else weights.cpu(),
            given if given is None else given.cpu(),
        )
        assert_bitwise(got.cpu(), library, "sum, against moecomm.rows")


@pytest.mark.parametrize("result", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 8, 1024, 2880, 4100])
def test_widths_and_result_dtypes(hidden: int, result: torch.dtype) -> None:
    rows, table = numbers(5, hidden, dtype=torch.bfloat16), table_of(3, 3, 5)
    weights = weights_of("by_entry", table, 5)
    got = reduce(rows, table, weights, dtype=result)
    assert_bitwise(got, reduce_ref(rows, table, weights, dtype=result), "sum")


def test_products_are_rounded_before_they_are_added() -> None:
    """1 + 2^-12 squared, minus its rounded square: zero, but 2^-24 where product and sum are fused."""
    value = 1 + 2.0**-12
    rounded = float(torch.tensor(value) * torch.tensor(value))
    rows = torch.tensor([[value], [rounded]], device=DEVICE)
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE)
    assert reduce(rows, table, torch.tensor([[-1.0, value]], device=DEVICE)).item() == 0.0


def test_order_is_that_of_the_columns() -> None:
    rows = torch.tensor([[1.0], [2.0**24], [-(2.0**24)]], device=DEVICE)
    for order, expected in (((0, 1, 2), 0.0), ((1, 2, 0), 1.0), ((1, 0, 2), 0.0)):
        table = torch.tensor([order], dtype=torch.int32, device=DEVICE)
        assert reduce(rows, table).item() == expected


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=["no_sums", "no_columns"])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    bias = numbers(shape[0], 8)
    got = reduce(numbers(5, 8), torch.empty(shape, dtype=torch.int32, device=DEVICE), None, bias)
    assert_bitwise(got, bias, "sum")


@pytest.mark.parametrize("seed", range(3))
def test_error_is_that_of_one_rounding(seed: int) -> None:
    rows, table = numbers(40, 64, dtype=torch.bfloat16, seed=seed), table_of(16, 8, 40)
    weights = weights_of("by_entry", table, 40)
    assert weights is not None
    kept = torch.where(table >= 0, weights, 0.0)
    exact = torch.einsum("pj,pjh->ph", kept.double(), rows.double()[table.clamp(min=0).long()])
    plain = torch.einsum("pj,pjh->ph", kept, rows.float()[table.clamp(min=0).long()]).bfloat16()
    assert_error_bounded(reduce(rows, table, weights), plain, exact.cpu(), "sum")


@pytest.mark.parametrize("extreme", [False, True], ids=["ordinary", "extreme"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_grad_rows_against_reference(dtype: torch.dtype, mode: str, extreme: bool) -> None:
    grad, table = numbers(6, 21, dtype=dtype, extreme=extreme), table_of(6, 3, 24, distinct=True)
    weights = weights_of(mode, table, 24, extreme)
    got = reduce_grad_rows(grad, table, weights, num_rows=24)
    wanted = reduce_grad_rows_ref(grad, table, weights, num_rows=24)
    assert_bitwise(got, wanted, "gradient, poison included")


@pytest.mark.parametrize("extreme", [False, True], ids=["ordinary", "extreme"])
@pytest.mark.parametrize("hidden", [1, 21, 512, 1300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_grad_weights_against_reference(dtype: torch.dtype, hidden: int, extreme: bool) -> None:
    grad, rows = numbers(4, hidden, dtype=dtype, extreme=extreme), numbers(12, hidden, dtype=dtype, seed=5)
    table = table_of(4, 3, 12, distinct=True)
    for by_row in (False, True):
        got = reduce_grad_weights(grad, rows, table, by_row=by_row)
        assert_bitwise(got, reduce_grad_weights_ref(grad, rows, table, by_row=by_row), f"gradient, by_row={by_row}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_the_library(dtype: torch.dtype) -> None:
    """moecomm.rows differentiates row by row: the same bits for the same products."""
    grad, rows = numbers(6, 700, dtype=dtype), numbers(6, 700, dtype=dtype, seed=3)
    table = torch.arange(6, dtype=torch.int32, device=DEVICE)[:, None]
    weights = numbers(6, seed=9)
    grad_rows, grad_weights = torch.zeros(6, 700, dtype=dtype), torch.zeros(6)
    scale_rows_grad(grad_rows, grad_weights, grad.cpu(), rows.cpu(), weights.cpu())
    assert_bitwise(reduce_grad_rows(grad, table, weights, num_rows=6), grad_rows, "grad_rows")
    assert_bitwise(reduce_grad_weights(grad, rows, table, by_row=True), grad_weights, "grad_weights")


def test_gradients_against_autograd() -> None:
    rows, weights = numbers(12, 9).requires_grad_(), numbers(4, 3, seed=2).requires_grad_()
    table, grad = table_of(4, 3, 12, distinct=True), numbers(4, 9, seed=4)
    reduce_ref(rows, table, weights).backward(grad)
    assert rows.grad is not None and weights.grad is not None
    plain = torch.where((table >= 0)[..., None], rows.detach()[table.clamp(min=0).long()], 0.0)
    exact = torch.einsum("ph,pjh->pj", grad.double(), plain.double())
    got = reduce_grad_weights(grad, rows.detach(), table)
    assert_error_bounded(got, weights.grad, exact.cpu(), "gradient of the weights")
    named = table[table >= 0].long()
    got = reduce_grad_rows(grad, table, weights.detach(), num_rows=12)
    assert_bitwise(got[named], rows.grad[named], "gradient of the rows")


def test_from_the_wire() -> None:
    """Sums and gradients of rows that are arriving equal those of the same rows at hand."""
    world = World(ExpertPlacement.uniform(4, 1), 2, 6, 64)
    sent = world.lay_out(0, torch.tensor([[0, 1]] * 5), None)
    x, rows = numbers(5, 8, dtype=torch.bfloat16), numbers(12, 8, dtype=torch.bfloat16, seed=1)
    push(x, sent, world.links[0], wire=world.wire, replay=True)
    form, places = RowFormat(8, torch.bfloat16), torch.tensor([3, 0, 4], dtype=torch.int32, device=DEVICE)
    come, by_place = Arriving(world.links[0], world.wire, form), Arriving(world.links[0], world.wire, form, places)
    table, weights = table_of(4, 2, 5), numbers(4, 2)
    assert_bitwise(reduce(come, table, weights), reduce(x, table, weights), "sum")
    table = table_of(3, 3, 9, distinct=True)
    weights, grad = numbers(12), x[places.long()]
    groups = torch.tensor([[12], [9]], dtype=torch.int32, device=DEVICE)
    got = reduce_grad_rows(by_place, table, weights, groups, num_rows=12, align=4)
    wanted = reduce_grad_rows(grad, table, weights, groups, num_rows=12, align=4)
    assert_bitwise(got, wanted, "gradient of the rows")
    assert (got[9:] == 0).all()
    assert_bitwise(reduce_grad_weights(by_place, rows, table), reduce_grad_weights(grad, rows, table), "weights")
    there = world.on_host()
    come, by_place = (arriving._replace(link=there.links[0]) for arriving in (come, by_place))
    by_place = by_place._replace(wire_row=places.cpu())
    named = table_of(4, 2, 5)
    assert_bitwise(reduce_ref(come, named.cpu()), reduce(x, named), "reference from the wire")
    on_host = table.cpu(), weights.cpu(), groups.cpu()
    from_reference = reduce_grad_rows_ref(by_place, *on_host, num_rows=12, align=4)
    assert_bitwise(got, from_reference, "gradient of the rows, against the reference from the wire")
    world.check_status()


def test_a_stall_leaves_the_sum_alone() -> None:
    world = World(ExpertPlacement.uniform(4, 2), 2, 6, 64)
    sent = world.lay_out(0, torch.tensor([[0, 1]] * 5), None)
    push(numbers(5, 8), sent, world.links[0], wire=world.wire, replay=True)
    come = Arriving(world.links[0]._replace(max_spins=2), world.wire, RowFormat(8, torch.float32))
    got = reduce(come, table_of(4, 2, 5))
    assert bool((got.view(torch.uint8) == POISON).all()) and world.links[0].status.tolist() == [
        0,
        0,
        1,
        0,
        1,
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((torch.zeros(3, 4, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)), "expected float32, float16 or"),
        ((torch.zeros(3, 4), torch.zeros(1, 1, dtype=torch.int64)), "not \\(P, J\\) int32"),
        ((torch.zeros(3, 4), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(4)), "weights \\(4,\\) torch.float32"),
        ((torch.zeros(3, 4), torch.zeros(1, 1, dtype=torch.int32), None, torch.zeros(1, 3)), "bias has shape"),
        ((torch.zeros(3, 0), torch.zeros(1, 1, dtype=torch.int32)), "rows without elements"),
    ],
)
def test_refused(arguments: tuple[Tensor | None, ...], problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        reduce(*arguments)
