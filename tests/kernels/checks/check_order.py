"""Race hunting: the programs of every grid in shuffled order, which must not change a bit.

A kernel whose programs depend on each other's order is caught by one of the orders: first to last, last to first,
or one of several shuffles. A kernel with such a fault, kept here, shows that the hunt finds it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from moecomm.kernels import _launch
from moecomm.kernels.permute import unpermute
from moecomm.kernels.quant import dequantize, quantize
from moecomm.kernels.reduce_grad import reduce_grad_rows, reduce_grad_weights

from tests.kernels.checks.worlds import DEVICE, dispatch_and_combine, world_of
from tests.kernels.small import small

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter runs programs in a chosen order")
ORDERS = ("backwards", "shuffle 1", "shuffle 2")


@contextmanager
def ordered(order: str) -> Iterator[None]:
    """Run the programs of each grid in another order."""
    builder = interpreter.interpreter_builder
    plain: Callable[[int, int, int], None] = builder.set_grid_idx
    shuffler, permutation = random.Random(order), [0]

    def set_grid_idx(x: int, y: int, z: int) -> None:
        nonlocal permutation
        _, ny, nz = builder.grid_dim
        at, total = (x * ny + y) * nz + z, builder.grid_dim[0] * ny * nz
        if at == 0:
            permutation = list(range(total))
            if order == "backwards":
                permutation.reverse()
            else:
                shuffler.shuffle(permutation)
        there = permutation[at]
        plain(there // (ny * nz), there // nz % ny, there % nz)

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_idx = plain


@pytest.fixture(autouse=True)
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough programs for an order to matter."""
    monkeypatch.setattr(_launch, "_INTERPRETED_PROGRAMS", 7)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["masked", "odd_align", "quantised_pair"])
def test_exchange_in_any_order(name: str, order: str) -> None:
    """layout, push, receive, push_reduced and reduce: the oracle's bits whatever the order."""
    with ordered(order):
        dispatch_and_combine(small(name), world_of(small(name), 2), 0)


@pytest.mark.parametrize("order", ORDERS)
def test_sums_at_the_source_in_any_order(order: str) -> None:
    with ordered(order):
        dispatch_and_combine(small("masked"), world_of(small("masked"), 2, source_sums=True), 0)


def operations() -> dict[str, Callable[[], Any]]:
    x, rows = torch.randn(9, 600), torch.randn(27, 600)
    table = torch.randperm(27)[:27].view(9, 3).int()
    return {
        "unpermute": lambda: unpermute(rows, table.view(-1)),
        "quantize": lambda: torch.cat([part.float() for part in quantize(x)], 1),
        "dequantize": lambda: dequantize(*quantize(x), torch.bfloat16),
        "reduce_grad_rows": lambda: reduce_grad_rows(x, table, num_rows=27),
        "reduce_grad_weights": lambda: reduce_grad_weights(x, rows, table),
    }


def differs(operation: Callable[[], Any]) -> list[str]:
    """The orders in which an operation gives other bits."""
    wanted, found = operation(), []
    for order in ORDERS:
        with ordered(order):
            found += [] if torch.equal(operation(), wanted) else [order]
    return found


@pytest.mark.parametrize("name", list(operations()))
def test_single_operations_in_any_order(name: str) -> None:
    assert differs(operations()[name]) == []


@triton.jit
def _racing_kernel(out):  # type: ignore[no-untyped-def]
    place = tl.atomic_add(out, 1, sem="relaxed")
    tl.store(out + 1 + place, tl.program_id(0))


def test_the_hunt_finds_slots_by_arrival() -> None:
    def racing() -> torch.Tensor:
        out = torch.zeros(8, dtype=torch.int32)
        _racing_kernel[(7,)](out)
        return out

    assert differs(racing) == list(ORDERS)
