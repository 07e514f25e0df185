"""Planning, as properties over random routings: what every rank plans fits together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moecomm
from moecomm import plan as planning
from moecomm.placement import ExpertPlacement
from moecomm.plan import Counts, PlacementTables, SendPlan, pair_table, plan_send, plan_send_ref, send_slots, settle


@dataclass
class World:
    """The routings and plans of all ranks."""

    routings: list[torch.Tensor]
    tables: PlacementTables
    plans: list[SendPlan]
    counts: list[Counts]

    @property
    def size(self) -> int:
        return len(self.routings)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    top_k, align = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 7]))
    owner = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_experts, max_size=num_experts))
    order = draw(st.permutations(range(num_experts)))
    held = tuple(tuple(e for e in order if owner[e] == rank) for rank in range(num_ranks))
    tables = PlacementTables(ExpertPlacement(held), torch.device("cpu"))
    ids = st.integers(-1, num_experts - 1)
    routings = [
        torch.tensor(draw(st.lists(st.lists(ids, min_size=top_k, max_size=top_k), max_size=6)), dtype=torch.int64)
        .reshape(-1, top_k)
        .to(draw(st.sampled_from([torch.int32, torch.int64])))
        for _ in range(num_ranks)
    ]
    plans = [plan_send(routing, tables) for routing in routings]
    gathered = np.stack([plan.counts for plan in plans])
    return World(routings, tables, plans, [Counts.of(gathered, tables, rank, align) for rank in range(num_ranks)])


def entries(world: World, source: int) -> list[tuple[int, int, int, int, int]]:
    """(destination rank, local expert, token, k, entry) of every entry of a rank, sorted: by loops."""
    placement, routing = world.tables.placement, world.routings[source]
    found = []
    for token, row in enumerate(routing.tolist()):
        for k, expert in enumerate(row):
            if expert >= 0:
                rank = placement.rank_of_expert[expert]
                found.append((rank, placement.local_of_expert[expert], token, k, token * len(row) + k))
    return sorted(found)


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_entries_are_sorted_by_destination_expert_token_and_k(world: World) -> None:
    for source, plan in enumerate(world.plans):
        expected = [entry for *_, entry in entries(world, source)]
        assert plan.order_S.tolist() == expected
        positions = plan.pos_TK.view(-1)
        assert positions[plan.order_S].tolist() == list(range(len(expected)))
        assert int((positions < 0).sum()) == positions.numel() - len(expected)


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_pairs_are_each_token_and_rank_once(world: World) -> None:
    for source, plan in enumerate(world.plans):
        expected = sorted({(rank, token) for rank, _, token, _, _ in entries(world, source)})
        assert list(zip(plan.pair_ranks_Q.tolist(), plan.pair_tokens_Q.tolist(), strict=True)) == expected
        for position, (rank, token) in enumerate(expected):
            assert int(plan.pair_pos_TW[token, rank]) == position
        assert int((plan.pair_pos_TW >= 0).sum()) == len(expected)


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_every_row_has_one_writer_and_the_rest_is_padding(world: World) -> None:
    for rank in range(world.size):
        counts = world.counts[rank]
        writers = [0] * int(counts.rows_of_rank[rank])
        order = []
        for source, plan in enumerate(world.plans):
            slots = send_slots(plan, world.counts[source])
            mine = [(local, source, token, k) for to, local, token, k, _ in entries(world, source) if to == rank]
            start = sum(1 for to, *_ in entries(world, source) if to < rank)
            got = slots[start : start + len(mine)].tolist()
            order += list(zip(got, mine, strict=True))
            for slot in got:
                writers[slot] += 1
        padding = counts.padding_rows().tolist()
        assert [row for row, count in enumerate(writers) if count == 0] == padding
        assert max(writers, default=1) == 1 or not order
        assert [key for _, key in sorted(order)] == sorted(key for _, key in order)
        assert all(end % counts.align == 0 for end in counts.expert_offsets)
        per_expert = [sum(1 for _, key in order if key[0] == local) for local in range(len(counts.expert_offsets))]
        assert counts.tokens_per_expert.tolist() == per_expert
        assert (counts.expert_offsets[-1] if per_expert else 0) == counts.rows_of_rank[rank]
        arrival = [slot for slot, key in sorted(order, key=lambda item: (item[1][1], item[1][0], item[1][2:]))]
        assert counts.recv_slots().tolist() == arrival


@given(worlds())
@settings(max_examples=100, deadline=None)
def test_tables_tell_the_receiver_every_choice_of_a_pair(world: World) -> None:
    placement = world.tables.placement
    for source, plan in enumerate(world.plans):
        table = pair_table(plan, world.tables.local_of_flat[plan.flat_TK], -1)
        for row, rank, token in zip(
            table.tolist(), plan.pair_ranks_Q.tolist(), plan.pair_tokens_Q.tolist(), strict=True
        ):
            chosen = world.routings[source][token].tolist()
            here = [e if e >= 0 and placement.rank_of_expert[e] == rank else None for e in chosen]
            assert row == [-1 if e is None else placement.local_of_expert[e] for e in here]


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_ranks_agree_on_what_moves(world: World) -> None:
    for counts in world.counts[1:]:
        assert (counts.entries == world.counts[0].entries).all()
        assert (counts.rows_of_rank == world.counts[0].rows_of_rank).all()
    for source, plan in enumerate(world.plans):
        assert int(world.counts[0].entries[source].sum()) == len(plan.order_S)
        assert world.counts[0].pair_counts[source].sum() == len(plan.pair_tokens_Q)


@given(worlds(), st.booleans())
@settings(deadline=None, max_examples=50)
def test_machine_code_and_torch_plan_the_same(world: World, by_slot: bool) -> None:
    gathered = np.stack([plan.counts for plan in world.plans])
    for rank, (routing, plan) in enumerate(zip(world.routings, world.plans, strict=True)):
        expected = plan_send_ref(routing, world.tables)
        for name in (field.name for field in fields(SendPlan)):
            got, want = (torch.as_tensor(getattr(one, name)) for one in (plan, expected))
            assert got.dtype == want.dtype and torch.equal(got, want), name
        align = world.counts[rank].align if rank % 2 else -120
        settled: tuple[Any, ...] = settle(plan, gathered, world.tables, rank, align, by_slot=by_slot)
        with mock.patch.object(planning, "_jit", lambda: None):
            reference: tuple[Any, ...] = settle(plan, gathered, world.tables, rank, align, by_slot=by_slot)
        for got, want in zip(settled[1:], reference[1:], strict=True):
            assert (got is None) == (want is None)
            assert got is None or (got.dtype == want.dtype and torch.equal(got, want))
        for name in ("entries", "rows_of_rank", "expert_offsets", "tokens_per_expert"):
            got, want = getattr(settled[0], name), getattr(reference[0], name)
            assert got.dtype == want.dtype and np.array_equal(got, want), name


def test_groups_of_a_fixed_size() -> None:
    with moecomm.Buffer(num_experts=3, hidden=2, top_k=2, max_tokens_per_rank=8, dtype=torch.float32) as buffer:
        x, idx = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2, 0], [2, -1]])
        out = buffer.dispatch(x, idx, align=-4)
        assert out.expert_offsets is not None and out.expert_offsets.tolist() == [4, 8, 12]
        assert out.x[[0, 8, 9], 0].tolist() == [1.0, 1.0, 3.0] and out.tokens_per_expert.tolist() == [1, 0, 2]
        assert buffer.combine(out.x, out.handle, weighted=False).tolist() == [[2.0, 4.0], [3.0, 4.0]]
        with pytest.raises(moecomm.CapacityError, match="more rows came for an expert than its group takes: got 2"):
            buffer.dispatch(x, idx, align=-1)
