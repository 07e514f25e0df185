"""`shrink`: survivors agree whatever happens in whatever order, and go on with the right sums; every order is tried."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import moecomm
from moecomm.errors import AbortedError, PeerLostError, UnsupportedError
from moecomm.rendezvous import rendezvous, survive
from moecomm.testing import assert_bitwise
from moecomm.testing.simulated import Faults, results_of, simulate
from tests.faults._ranks import Nursery, World
from tests.faults._ranks import results_of as process_results
from tests.simulated._explorer import explore

# -- the protocol: every order of requests, every death, every deadline -------------------------------------------


def explore_survivors(
    size: int, suspects: tuple[int, ...], can_crash: int, steps: Any = rendezvous, can_give_up: tuple[int, ...] = ()
) -> tuple[int, int]:
    """Ranks that shrink. Agreement: all that decide decide the same. Validity: the members had come."""

    def demand(store: Mapping[str, str], decided: Mapping[int, Any]) -> None:
        sure = {number: found for number, found in decided.items() if found is not None}
        assert len(set(sure.values())) <= 1, f"two memberships: {decided}"
        for members in sure.values():
            if isinstance(members, str):
                assert json.loads(store["members"])["rank"] in can_give_up
            else:
                assert members and all(f"here/{member}" in store for member in members), f"{members} of {store}"
                assert json.loads(store["members"]) == list(members)

    people = [functools.partial(steps, rank, size, suspects) for rank in range(size)]
    return explore(people, can_crash, demand, can_give_up)


@pytest.mark.parametrize(
    ("size", "suspects", "can_crash", "can_give_up"),
    [
        (1, (), 1, ()),
        (2, (), 2, (0, 1)),
        (2, (1,), 2, ()),
        (3, (), 3, ()),
        (3, (2,), 3, (1,)),
        (3, (), 1, (0, 1, 2)),
        (4, (), 4, ()),
        (4, (3,), 4, ()),
        (4, (), 0, (2,)),
    ],
)
def test_every_order_every_death_every_deadline(
    size: int, suspects: tuple[int, ...], can_crash: int, can_give_up: tuple[int, ...]
) -> None:
    num_moments, num_ends = explore_survivors(size, suspects, can_crash, can_give_up=can_give_up)
    what = f"W={size}, suspects {suspects}, up to {can_crash} deaths, {can_give_up} may give up"
    print(f"{what}: {num_moments} moments, {num_ends} ends, all agree")
    assert num_ends >= 1 and num_moments >= size


def test_after_a_meeting_that_was_broken_off_all_meet_at_the_next_one() -> None:
    def again(rank: int) -> Any:
        try:
            return (yield from survive("", rank, 3, (), "1"))
        except AbortedError:
            return (yield from survive("", rank, 3, (), "1"))

    def demand(store: Mapping[str, str], decided: Mapping[int, Any]) -> None:
        found = {members for members in decided.values() if isinstance(members, tuple)}
        assert len(found) <= 1, f"two memberships: {found}"
        for place, members in found:
            assert all(f"{place}here/{member}" in store for member in members)
            assert place == "shrink/0/" or '"rank": 1' in store["shrink/0/members"], "nobody broke off the first one"

    num_moments, num_ends = explore([functools.partial(again, rank) for rank in range(3)], 0, demand, can_give_up=(1,))
    assert num_moments > 3000 and num_ends > 10, (num_moments, num_ends)


def test_a_death_shows_nothing_that_slowness_does_not() -> None:
    seen: dict[int, set[str]] = {}
    for can_crash in (0, 3):
        told = seen.setdefault(can_crash, set())

        def demand(store: Mapping[str, str], decided: Mapping[int, Any], told: set[str] = told) -> None:
            told.add(f"{store} {sorted(decided.items())}")

        explore([functools.partial(rendezvous, rank, 3, ()) for rank in range(3)], can_crash, demand)
    assert seen[0] == seen[3] and len(seen[0]) > 50


def test_the_explorer_sees_who_never_ends() -> None:
    def patient(rank: int) -> Any:
        yield "write", f"here/{rank}", "1"
        while not (yield "wait", [f"here/{1 - rank}"]):
            pass

    with pytest.raises(AssertionError, match="waits for ever"):
        explore([functools.partial(patient, rank) for rank in range(2)], 0, lambda store, decided: None)


def test_the_explorer_sees_a_protocol_that_is_wrong() -> None:
    def hasty(rank: int, size: int, suspects: tuple[int, ...]) -> Any:
        yield "write", f"here/{rank}", "1"
        here = yield "look", [f"here/{peer}" for peer in range(size)]
        members = json.dumps(sorted(int(key[5:]) for key in here))
        yield "write", "members", members  # the last one counts, and each believes its own
        return tuple(json.loads(members))

    with pytest.raises(AssertionError, match="two memberships"):
        explore_survivors(2, (), 0, hasty)


# -- the buffer --------------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"num_experts": 8, "hidden": 4, "top_k": 2, "max_tokens_per_rank": 6, "timeout_s": 20.0}


def step(buffer: moecomm.Buffer, seed: int, dead: set[int], renormalise: bool = False) -> None:
    """A dispatch and combine whose sums are known: x times the weights of the experts that live."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 50, (6, 4), generator=generator).float()
    topk_idx = torch.rand(6, 8, generator=generator).topk(2).indices
    weights = torch.tensor([[0.25, 0.75]]).expand(6, 2).clone()
    out: Any = buffer.dispatch(x, topk_idx, weights)
    y = buffer.combine(out.x, out.handle)
    lives = torch.tensor([[expert not in dead for expert in row] for row in topk_idx.tolist()])
    factor = (weights * lives).sum(1, keepdim=True)
    if renormalise:
        factor = torch.where(factor > 0, 1.0, factor)
    assert_bitwise(y, x * factor, f"sums with experts {sorted(dead)} dead")


def go_on(group: Any, renormalise: bool) -> list[tuple[int, ...]]:
    """Step until somebody dies, shrink, step on; twice."""
    buffer = moecomm.Buffer(group, **SHAPE, dtype=torch.float32)
    lived: list[tuple[int, ...]] = []
    dead: set[int] = set()
    round = 0
    while round < 25:
        try:
            step(buffer, 100 * round + group.rank, dead, renormalise)
            round += 1
        except PeerLostError:
            lived.append(buffer.shrink(renormalise=renormalise))
            dead, round = {expert for expert in range(8) if expert // 2 not in lived[-1]}, 0
    group.exchange.world.wait(group.exchange.rank, lambda: False, 1.0)  # nobody leaves while others count
    buffer.close()
    return lived


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("renormalise", [False, True])
def test_survivors_go_on_and_their_sums_are_right(seed: int, renormalise: bool) -> None:
    kills = {1: 60 + 11 * seed} if seed % 2 else {3: 50 + 13 * seed, 0: 400}
    outcomes = simulate(go_on, 4, renormalise, seed=seed, faults=Faults(kills=kills))
    assert {rank for rank, outcome in enumerate(outcomes) if outcome.killed} == set(kills)
    stories = {str(story) for story in results_of(outcomes) if story is not None}
    assert len(stories) == 1, outcomes
    last = tuple(rank for rank in range(4) if rank not in kills)
    assert str(last) in stories.pop()


def come_late(group: Any) -> Any:
    buffer = moecomm.Buffer(group, **SHAPE, dtype=torch.float32)
    step(buffer, group.rank, set())
    group.barrier()
    if group.rank == 2:
        group.exchange.world.wait(2, lambda: False, 1000.0)
    return buffer.shrink(timeout_s=5.0)


def test_a_rank_that_comes_too_late_is_told() -> None:
    first, second, late = simulate(come_late, 3, seed=1)
    assert first.result == second.result == (0, 1)
    assert isinstance(late.error, PeerLostError) and "ranks [0, 1] went on without this rank" in str(late.error)


def test_old_handles_are_stale_and_wrong_ids_are_named() -> None:
    def run(group: Any) -> None:
        buffer = moecomm.Buffer(group, **SHAPE, dtype=torch.float32)
        x, idx = torch.ones(1, 4), torch.tensor([[0, 7]])
        out: Any = buffer.dispatch(x, idx)
        group.barrier()
        assert buffer.shrink() == (0, 1, 2)
        with pytest.raises(moecomm.StaleHandleError, match="belongs to another buffer"):
            buffer.combine(out.x, out.handle)
        with pytest.raises(moecomm.RoutingError, match=r"topk_idx\[0, 1\] names no expert: got 8; expected 0 to 7"):
            buffer.dispatch(x, torch.tensor([[0, 8]]))
        step(buffer, group.rank, set())

    results_of(simulate(run, 3, seed=2))


def test_other_transports_say_that_they_cannot() -> None:
    with (
        moecomm.Buffer(**SHAPE) as buffer,
        pytest.raises(UnsupportedError, match=r"transport local cannot shrink.*build a new Buffer"),
    ):
        buffer.shrink()


def outlive(world: World) -> tuple[Any, float]:
    """The same between processes: rank 1 is killed in the middle of the loop."""
    buffer = moecomm.Buffer(**SHAPE, dtype=torch.float32, transport="symmetric")
    step(buffer, world.rank, set())
    world.meet("ready")
    kept: Any = buffer.dispatch(torch.full((1, 4), float(world.rank)), torch.tensor([[0, 7]]))
    picture = kept.x.clone()
    try:
        for round in range(100):
            if round == 3 and world.rank == 1:
                world.die()
            step(buffer, round, set())
    except PeerLostError:
        start = time.monotonic()
        members = buffer.shrink()
    dead = set(moecomm.ExpertPlacement.uniform(8, 3).experts_of_rank[1])
    for round in range(20):
        step(buffer, round, dead)
    assert_bitwise(kept.x, picture, "what was handed out before")
    buffer.close()
    return members, time.monotonic() - start


def test_processes_go_on_without_the_dead_one(nursery: Nursery) -> None:
    first, _, last = process_results(nursery.run(outlive, 3), killed=1)
    assert first[0] == last[0] == (0, 2) and first[1] < 20.0
