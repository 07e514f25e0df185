"""`push` and `push_quantized` against their references: the whole memory of all ranks, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moecomm.kernels.layout import SendLayout
from moecomm.kernels.push import push, push_quantized, push_quantized_ref, push_ref
from moecomm.kernels.rows import RowFormat
from moecomm.kernels.wire import STALLED
from torch import Tensor

from moecomm.placement import ExpertPlacement
from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.worlds import DEVICE, World, on_device

POISON = 0x5A


def poisoned(world: World) -> World:
    """The world with poison in all areas but the signals."""
    world.memory[:, : -(-8 * world.wire.world // 256) * -256].fill_(POISON)
    return world


def routed(num_tokens: int, world_size: int = 3, top_k: int = 3, row_bytes: int = 64) -> tuple[World, SendLayout]:
    world = World(ExpertPlacement.uniform(7, world_size), top_k, num_tokens + 3, row_bytes)
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(-1, 7, (num_tokens, top_k), generator=generator)
    return poisoned(world), world.lay_out(1, ids, torch.rand(num_tokens, top_k, generator=generator))


def images(
    operation: Callable[..., None], reference: Callable[..., None], x: Tensor, num_tokens: int, **options: Any
) -> None:
    """Run kernel and reference from the same poisoned memory and compare every byte, twice (both generations)."""
    row_bytes = 4 * x.shape[1] + 512
    world, sent = routed(num_tokens, row_bytes=row_bytes)
    for round in range(2):
        before = world.on_host()
        operation(x, sent, world.links[1], wire=world.wire, **options)
        got = world.memory.clone()
        assert world.links[1].state.tolist() == [round + 1, 0]
        scales = options.get("scales")
        given = options if scales is None else options | {"scales": scales.cpu()}
        reference(x.cpu(), SendLayout(*(table.cpu() for table in sent)), before.links[1], wire=world.wire, **given)
        assert_bitwise(got, before.memory, f"memory of all ranks, round {round}")


ROWS = {
    "aligned": torch.randn(11, 16),
    "odd_bfloat16": torch.randn(11, 7).bfloat16(),
    "bytes": torch.randint(0, 255, (11, 5)).to(torch.uint8),
    "one_word": torch.randn(11, 1),
    "several_chunks": torch.randn(3, 4100),
    "float64": torch.randn(5, 6).double(),
    "fp8": torch.randn(4, 96).to(torch.float8_e4m3fn),
    "misaligned": torch.randn(11 * 16 + 1)[1:].view(11, 16),
    "misaligned_bfloat16": torch.randn(11 * 16 + 1).bfloat16()[1:].view(11, 16),
    "transposed": torch.randn(16, 11).t(),
    "every_other": torch.randn(22, 32)[::2, ::2],
    "no_tokens": torch.randn(0, 16),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_push_against_reference(name: str) -> None:
    x = on_device(ROWS[name])
    images(push, push_ref, x, x.shape[0])


@pytest.mark.parametrize("columns", [1, 3, 4])
def test_push_with_scales(columns: int) -> None:
    x, scales = torch.randn(6, 9), torch.randn(6, columns)
    images(push, push_ref, x.to(DEVICE), 6, scales=scales.to(DEVICE))


def test_replay_sends_rows_only() -> None:
    images(push, push_ref, torch.randn(6, 16, device=DEVICE), 6, replay=True)


@pytest.mark.parametrize("max_programs", [1, 2, 7])
def test_any_number_of_programs(max_programs: int) -> None:
    images(push, push_ref, torch.randn(6, 16, device=DEVICE), 6, max_programs=max_programs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [128, 256, 130, 1])
def test_push_quantized_against_reference(dtype: torch.dtype, hidden: int) -> None:
    x = (torch.randn(5, hidden) * torch.exp2(torch.randint(-8, 8, (5, 1)))).to(dtype)
    images(push_quantized, push_quantized_ref, x.to(DEVICE), 5, power_of_two=dtype == torch.float16)


def test_quantized_replay() -> None:
    images(push_quantized, push_quantized_ref, torch.randn(5, 144, device=DEVICE), 5, replay=True)


def test_poison_outside_the_slots_stays() -> None:
    """Only the slots that the routing names change, in one generation."""
    world, sent = routed(6, row_bytes=64)
    push(torch.randn(6, 16, device=DEVICE), sent, world.links[1], wire=world.wire)
    rows_per_rank, row_bytes = world.wire.world * world.max_tokens, world.wire.row_bytes
    for rank in range(3):
        begin = int(world.links[1].peers[1, 0, rank]) - world.memory[rank].data_ptr()
        area = world.memory[rank, begin : begin + rows_per_rank * row_bytes].view(rows_per_rank, row_bytes)
        pairs = sent.pair_row[:, rank]
        written = (pairs[pairs >= 0] + (1 - rank) * world.max_tokens).long()
        untouched = torch.ones(rows_per_rank, dtype=torch.bool)
        untouched[written.cpu()] = False
        assert (area[untouched.to(DEVICE)] == POISON).all(), f"rank {rank}: a row was written that nobody sent"
        assert (area[written] != POISON).any(1).all(), f"rank {rank}: a row is missing"
        assert (world.memory[rank, :begin] == POISON).all(), "the other generation changed"


@pytest.mark.parametrize("operation", [push, push_quantized])
def test_nothing_is_sent_after_a_stall(operation: Callable[..., None]) -> None:
    """Peers that were late may still be reading."""
    world, sent = routed(6, row_bytes=64)
    before = world.memory.clone()
    world.links[1].status[int(STALLED)] = 5
    operation(torch.randn(6, 16, device=DEVICE), sent, world.links[1], wire=world.wire)
    assert_bitwise(world.memory, before, "memory")
    assert world.links[1].state.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (torch.zeros(6, 100), f"rows of {RowFormat(100, torch.float32).wire_bytes} bytes, the wire has room for 64"),
        (torch.zeros(5, 4), "5 rows, but the layout has shape"),
        (torch.zeros(6), "x has shape"),
        (torch.zeros(6, 0), "rows without elements"),
    ],
)
def test_refused(x: Tensor, problem: str) -> None:
    world, sent = routed(6, row_bytes=64)
    with pytest.raises(AssertionError, match=problem):
        push(x.to(DEVICE), sent, world.links[1], wire=world.wire)
