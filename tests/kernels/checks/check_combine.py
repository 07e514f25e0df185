"""`push_reduced` against its reference: the whole memory of all ranks, byte for byte."""

from __future__ import annotations

import pytest
import torch
from moecomm.kernels.combine import push_reduced, push_reduced_ref
from moecomm.kernels.wire import STALLED
from torch import Tensor

from moecomm.placement import ExpertPlacement
from moecomm.testing.asserts import assert_bitwise
from tests.kernels.checks.worlds import DEVICE, World, on_device

WORLD, MAX_TOKENS, TOP_K = 3, 6, 3
ROWS = {
    "aligned": torch.randn(20, 8),
    "odd_bfloat16": torch.randn(20, 7).bfloat16(),
    "odd_float16": torch.randn(20, 1).half(),
    "several_blocks": torch.randn(20, 2300).bfloat16(),
    "misaligned": torch.randn(20 * 8 + 1)[1:].view(20, 8),
    "transposed": torch.randn(8, 20).t(),
}


def home() -> tuple[Tensor, Tensor, Tensor]:
    """Table, places and tokens of six pairs from three sources, one of them missing."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randperm(20, generator=generator)[:18].view(6, TOP_K)
    table[torch.rand(6, TOP_K, generator=generator) < 0.3] = -1
    places = torch.tensor([0, 1, MAX_TOKENS, 2 * MAX_TOKENS + 4, 2 * MAX_TOKENS, -1])
    tokens = torch.tensor([2, 5, 0, 4, 1, -1])
    return table.int().to(DEVICE), places.int().to(DEVICE), tokens.int().to(DEVICE)


def images(rows: Tensor, weights: Tensor | None, each: bool, max_programs: int | None = None) -> None:
    world = World(ExpertPlacement.uniform(6, WORLD), TOP_K, MAX_TOKENS, 2 * rows.shape[1] * 4, source_sums=each)
    world.memory[:, :-256].fill_(0x5A)
    before = world.on_host()
    table, places, tokens = home()
    arguments = rows, table, weights, places, tokens, world.links[1]
    push_reduced(*arguments, wire=world.wire, each=each, max_programs=max_programs)
    got = world.memory.clone()
    assert world.links[1].state.tolist() == [1, 0] and not torch.equal(got.cpu(), before.memory)
    arguments = *(None if given is None else given.cpu() for given in arguments[:-1]), before.links[1]
    push_reduced_ref(*arguments, wire=world.wire, each=each)
    assert_bitwise(got, before.memory, "memory of all ranks")


@pytest.mark.parametrize("mode", ["none", "by_row", "by_entry", "each"])
@pytest.mark.parametrize("name", list(ROWS))
def test_push_reduced_against_reference(name: str, mode: str) -> None:
    weights = {"by_row": torch.randn(20, device=DEVICE), "by_entry": torch.randn(6, TOP_K, device=DEVICE)}.get(mode)
    images(on_device(ROWS[name]), weights, mode == "each")


@pytest.mark.parametrize("max_programs", [1, 2, 9])
def test_any_number_of_programs(max_programs: int) -> None:
    images(ROWS["aligned"].to(DEVICE), None, False, max_programs)


def test_nothing_is_sent_after_a_stall() -> None:
    world = World(ExpertPlacement.uniform(6, WORLD), TOP_K, MAX_TOKENS, 64)
    world.links[1].status[int(STALLED)] = 4
    table, places, tokens = home()
    push_reduced(ROWS["aligned"].to(DEVICE), table, None, places, tokens, world.links[1], wire=world.wire)
    assert not world.memory.any() and world.links[1].state.tolist() == [0, 0]


def test_refused() -> None:
    world = World(ExpertPlacement.uniform(6, WORLD), TOP_K, MAX_TOKENS, 64)
    table, places, tokens = home()
    rows, weights = ROWS["aligned"].to(DEVICE), torch.randn(20, device=DEVICE)
    with pytest.raises(AssertionError, match="weighted at their destination"):
        push_reduced(rows, table, weights, places, tokens, world.links[1], wire=world.wire, each=True)
    with pytest.raises(AssertionError, match="rows of 80 bytes, room for 64"):
        push_reduced(torch.zeros(20, 20), table, None, places, tokens, world.links[1], wire=world.wire)
