"""Dispatch and combine, kernel after kernel on all ranks of one process, against the oracle: bit for bit."""

from __future__ import annotations

import pytest

from tests.kernels.checks.worlds import dispatch_and_combine, world_of
from tests.kernels.small import small

# All cases run on processes of their own in test_conformance.py.
TWO = ("k_equals_e", "masked", "odd_hidden", "odd_align", "more_choices_than_experts", "extreme_values", "wide")
SOURCE_SUMS = ("plain", "masked", "k_equals_e", "duplicate_expert", "odd_hidden", "extreme_values", "ragged_tokens")
ALONE = ("plain", "masked", "odd_align", "odd_hidden", "quantised_pair")
FOUR = ("plain", "empty_rank", "uneven_experts", "rank_without_experts", "lone_token", "all_empty")
ROUNDS = ("plain", "ragged_tokens", "empty_rank", "tiny_hidden")
BY_PAIR = ("plain", "masked", "duplicate_expert", "quantised_pair", "opaque_bytes", "empty_rank", "all_masked")


@pytest.mark.parametrize("name", TWO)
def test_two_ranks(name: str) -> None:
    dispatch_and_combine(small(name), world_of(small(name), 2), 0)


@pytest.mark.parametrize("name", SOURCE_SUMS)
def test_sums_at_the_source(name: str) -> None:
    dispatch_and_combine(small(name), world_of(small(name), 2, source_sums=True), 0)


@pytest.mark.parametrize("name", BY_PAIR)
def test_rows_by_pair(name: str) -> None:
    dispatch_and_combine(small(name), world_of(small(name), 2), 0, layout_name="rank")


@pytest.mark.parametrize("name", ALONE)
def test_one_rank(name: str) -> None:
    dispatch_and_combine(small(name), world_of(small(name), 1), 0)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name: str) -> None:
    dispatch_and_combine(small(name), world_of(small(name), 4), 0)


@pytest.mark.parametrize("name", ROUNDS)
def test_round_after_round(name: str) -> None:
    """Buffers are used again with other routings: the generations alternate twice and more."""
    world = world_of(small(name), 2)
    for round in range(6 if name == "tiny_hidden" else 3):
        dispatch_and_combine(small(name), world, round)
    assert [int(link.state[0]) for link in world.links] == [12 if name == "tiny_hidden" else 6] * 2


def test_without_overflow(overflow_checked: None) -> None:
    dispatch_and_combine(small("masked"), world_of(small("masked"), 2), 0)
