"""Rows that begin past 2^31 elements, and past 2^31 bytes: offsets must be 64 bits wide everywhere.

The tensors are larger than that, but only a few of their rows are ever touched, so they cost address space and hardly
any memory. Integer overflow is an error in these tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton.runtime.interpreter as interpreter
from moecomm.kernels.combine import push_reduced
from moecomm.kernels.layout import SendLayout
from moecomm.kernels.permute import permute, unpermute
from moecomm.kernels.push import push, push_quantized
from moecomm.kernels.quant import dequantize, quantize, quantize_ref
from moecomm.kernels.receive import receive
from moecomm.kernels.reduce import reduce
from moecomm.kernels.reduce_grad import reduce_grad_rows, reduce_grad_weights
from moecomm.kernels.rows import Arriving, RowFormat
from moecomm.kernels.wire import Link, Wire, buffer_bytes, loopback, view_memory
from torch import Tensor

from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.worlds import DEVICE

HIDDEN = 1 << 16
NUM_ROWS = (1 << 15) + 64  # of 2^16 elements each: 2^31 elements and a little more
LAST = NUM_ROWS - 3
WIRE_HIDDEN = 1 << 15  # of bfloat16
MAX_TOKENS = NUM_ROWS // 2

pytestmark = [
    pytest.mark.usefixtures("unguarded", "overflow_checked"),
    pytest.mark.skipif(DEVICE != "cpu", reason="address space is cheap on a CPU only"),
]


def vast(dtype: torch.dtype = torch.int8) -> Tensor:
    """A tensor of more than 2^31 elements, most of it never touched."""
    return torch.empty(NUM_ROWS, HIDDEN, dtype=dtype)


def index(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@contextmanager
def only_program(number: int) -> Iterator[None]:
    """Have kernels that are launched with one program believe that it is this one of NUM_ROWS."""
    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    builder.set_grid_dim = lambda x, y, z: set_dim(NUM_ROWS, y, z)
    builder.set_grid_idx = lambda x, y, z: set_idx(number, y, z)
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_dim, set_idx


def test_vast_is_vast_enough() -> None:
    assert LAST * HIDDEN > 2**31 and (MAX_TOKENS + MAX_TOKENS - 1) * WIRE_HIDDEN * 2 > 2**31


def test_unpermute() -> None:
    rows = vast()
    rows[LAST], rows[2] = 7, 9
    assert unpermute(rows, index(LAST, 2, -1))[:, ::9999].unique(dim=1).flatten().tolist() == [7, 9, 0]
    with only_program(LAST):
        out = unpermute(rows, torch.full((NUM_ROWS,), 2, dtype=torch.int32), max_programs=1)
    assert out[LAST].unique().tolist() == [9]


def test_permute() -> None:
    rows = torch.randint(-9, 9, (2, HIDDEN), dtype=torch.int8)
    groups = torch.tensor([[NUM_ROWS], [NUM_ROWS - 2]], dtype=torch.int32)
    out, _ = permute(rows, index(LAST, 5).view(2, 1), num_rows=NUM_ROWS)
    assert_bitwise(out[LAST], rows[0], "far row")
    assert_bitwise(out[5], rows[1], "near row")
    out[-2:] = 5
    out, _ = permute(rows, index(LAST, 5).view(2, 1), groups, num_rows=NUM_ROWS, align=4)
    assert (out[-2:] == 0).all()


def test_quantize_and_dequantize() -> None:
    x = vast(torch.bfloat16)
    x[LAST] = torch.linspace(-3, 3, HIDDEN)
    wanted, wanted_scales = quantize_ref(x[LAST:][:1])
    with only_program(LAST):
        codes, scales = quantize(x, max_programs=1)
    assert_bitwise(codes[LAST:][:1].view(torch.uint8), wanted.view(torch.uint8), "codes")
    assert_bitwise(scales[LAST:][:1], wanted_scales, "scales")
    with only_program(LAST):
        decoded = dequantize(codes, scales, torch.bfloat16, max_programs=1)
    assert_bitwise(decoded[LAST:][:1], dequantize(wanted, wanted_scales, torch.bfloat16), "values")


def test_reduce_and_its_gradients() -> None:
    rows = vast(torch.bfloat16)
    rows[LAST], rows[1] = 2.0, 3.0
    table, weights = index(LAST, 1).view(1, 2), torch.tensor([[10.0, 1.0]])
    assert reduce(rows, table, weights).unique().tolist() == [23.0]
    grad = torch.full((1, HIDDEN), 0.5, dtype=torch.bfloat16)
    assert reduce_grad_weights(grad, rows, table).tolist() == [[float(HIDDEN), 1.5 * HIDDEN]]
    grads = reduce_grad_rows(grad, table, weights, num_rows=NUM_ROWS)
    assert grads[LAST].unique().tolist() == [5.0] and grads[1].unique().tolist() == [0.5]


def far_world(world_size: int, max_tokens: int) -> tuple[list[Link], Wire]:
    """Ranks whose rows areas are larger than 2^31 bytes, in memory that is never touched as a whole."""
    wire = Wire.of(world_size, 1, 1, 2 * WIRE_HIDDEN)
    memory = torch.empty(world_size, buffer_bytes(wire, max_tokens), dtype=torch.uint8)
    memory[:, -256:] = 0
    links, _ = loopback(wire, max_tokens, memory=memory)
    FAR_MEMORY.append(memory)
    return links, wire


FAR_MEMORY: list[Tensor] = []  # addresses keep nothing alive


@pytest.fixture(autouse=True)
def far_memory() -> Iterator[None]:
    yield
    FAR_MEMORY.clear()


def far_layout(slot: int) -> SendLayout:
    """One token for rank 0, in a slot near the end."""
    meta = torch.tensor([[0, slot, 1065353216, 41]], dtype=torch.int32)  # expert, number, 1.0, token
    return SendLayout(meta, index(slot, -1).view(1, 2), torch.tensor([[1, 1], [0, 0]]).int())


@pytest.mark.parametrize("quantized", [False, True])
def test_push_into_a_far_slot(quantized: bool) -> None:
    links, wire = far_world(2, MAX_TOKENS)
    slot = MAX_TOKENS - 1
    x = torch.linspace(-1, 1, WIRE_HIDDEN).bfloat16()[None]
    (push_quantized if quantized else push)(x, far_layout(slot), links[1], wire=wire)
    place = int(links[0].peers[1, 0, 0]) + (MAX_TOKENS + slot) * wire.row_bytes
    if quantized:
        codes, scales = quantize_ref(x)
        assert_bitwise(view_memory(place, (1, WIRE_HIDDEN), torch.uint8), codes.view(torch.uint8), "codes")
        got = view_memory(place + WIRE_HIDDEN, (1, scales.shape[1]), torch.float32)
        assert_bitwise(got, scales, "scales")
    else:
        assert_bitwise(view_memory(place, (1, WIRE_HIDDEN), torch.bfloat16), x, "row")
    place = int(links[0].peers[1, 1, 0]) + (MAX_TOKENS + slot) * 4 * wire.meta_words
    assert view_memory(place, (4,), torch.int32).tolist() == [0, slot, 1065353216, 41]


def test_push_a_far_token() -> None:
    links, wire = far_world(1, NUM_ROWS)
    x = vast()
    x[LAST] = torch.randint(-9, 9, (HIDDEN,))
    rows = torch.full((NUM_ROWS, 1), -1, dtype=torch.int32)
    rows[LAST] = 3
    sent = SendLayout(torch.empty(NUM_ROWS, 4, dtype=torch.int32), rows, torch.zeros(1, 2, dtype=torch.int32))
    with only_program(LAST):
        push(x, sent, links[0], wire=wire, max_programs=1)
    got = view_memory(int(links[0].peers[1, 0, 0]) + 3 * wire.row_bytes, (HIDDEN,), torch.int8)
    assert_bitwise(got, x[LAST], "row")


def test_rows_come_home_from_far_slots() -> None:
    """push_reduced into a far slot; reduce, permute and reduce_grad_rows out of it."""
    links, wire = far_world(2, MAX_TOKENS)
    rows = torch.linspace(-1, 1, WIRE_HIDDEN).bfloat16()[None]
    slot, nothing = MAX_TOKENS - 1, index()
    push_reduced(rows, index(0).view(1, 1), None, index(slot), index(0), links[1], wire=wire)
    push_reduced(rows, nothing.view(0, 1), None, nothing, nothing, links[0], wire=wire)
    form, places = RowFormat(WIRE_HIDDEN, torch.bfloat16), index(MAX_TOKENS + slot)
    assert_bitwise(reduce(Arriving(links[0], wire, form), places.view(1, 1)), rows, "sum")
    come = Arriving(links[0], wire, form, places)
    assert_bitwise(permute(come, index(1).view(1, 1), num_rows=2)[0][1], rows[0], "permuted row")
    assert_bitwise(reduce_grad_rows(come, index(0).view(1, 1), num_rows=1), rows, "gradient")
    assert reduce_grad_weights(come, torch.ones_like(rows), index(0).view(1, 1)).abs().item() < 1.0
    assert not links[0].status.any() and not links[1].status.any()


def test_receive_writes_far_rows() -> None:
    """One row is sent, and said to be the last of so many that it belongs to the far end of the result."""
    links, wire = far_world(1, 4)
    x = torch.randint(-9, 9, (1, HIDDEN), dtype=torch.int8)
    meta = torch.tensor([[0, LAST, 1065353216, 41]], dtype=torch.int32)
    sent = SendLayout(meta, index(0).view(1, 1), torch.tensor([[1, LAST + 1]]).int())
    push(x, sent, links[0], wire=wire)
    come = Arriving(links[0], wire, RowFormat(HIDDEN, torch.int8))
    got = receive(come, experts=(0, 1), num_pairs=1, num_rows=NUM_ROWS)
    assert got.table.tolist() == [[LAST]] and got.token.tolist() == [41] and not links[0].status.any()
    assert_bitwise(got.x[LAST], x[0], "far row")
