"""`shrink`: survivors agree whatever happens in whatever order, and go on with the right sums; every order is tried."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import moecomm
from moecomm.errors import PeerLostError, UnsupportedError
from moecomm.membership import rendezvous
from moecomm.testing import assert_bitwise
from moecomm.testing.simulated import Faults, results_of, simulate
from tests.faults._ranks import Nursery, World
from tests.faults._ranks import results_of as process_results

# -- the protocol: every order of requests, every death, every deadline -------------------------------------------


@dataclass(frozen=True)
class Rank:
    """What one rank asks next, or the members that it found. All that it does later follows from that.

    So two ways to come there are one state; `answers` is one of them, with which to run the code again.
    """

    asks: Any = None
    found: Any = None
    crashed: bool = False
    answers: tuple[Any, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Moment:
    """The store and all ranks."""

    store: tuple[tuple[str, str], ...]
    ranks: tuple[Rank, ...]


def resume(rank: int, size: int, suspects: tuple[int, ...], answers: tuple[Any, ...]) -> Rank:
    """Where a rank is after these answers."""
    steps = rendezvous(rank, size, suspects)
    try:
        request = next(steps)
        for answer in answers:
            request = steps.send(answer)
    except StopIteration as end:
        return Rank(found=end.value, answers=answers)
    return Rank(asks=str(request), answers=answers)


def answers_to(request: Any, store: dict[str, str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """Every answer that a linearisable store may give now, and what it then holds."""
    what, *given = request
    if what == "write":
        yield None, store | {given[0]: given[1]}
    elif what == "propose":
        kept = {given[0]: given[1]} | store
        yield kept[given[0]], kept
    else:
        found = frozenset(key for key in given[0] if key in store)
        if found or what == "look":
            yield found, store
        if what == "wait":  # a deadline may pass at any moment, also when something is there that was not seen
            yield frozenset(), store


def explore(size: int, suspects: tuple[int, ...], can_crash: int) -> tuple[int, int]:
    """Go through every moment; the number of moments, and of ends. Checks what must hold in each."""
    start = Moment((), tuple(resume(rank, size, suspects, ()) for rank in range(size)))
    seen, todo, num_ends = {start}, [start], 0
    known: dict[tuple[int, Any, Any], Rank] = {}
    while todo:
        moment = todo.pop()
        store, is_end = dict(moment.store), True
        for rank, state in enumerate(moment.ranks):
            if state.crashed or state.asks is None:
                continue
            is_end = False
            following = []
            for answer, after in answers_to(ast.literal_eval(state.asks), store):
                key = rank, state, str(sorted(answer) if isinstance(answer, frozenset) else answer)
                if key not in known:
                    known[key] = resume(rank, size, suspects, (*state.answers, answer))
                following.append(Moment(tuple(sorted(after.items())), replaced(moment.ranks, rank, known[key])))
            if sum(other.crashed for other in moment.ranks) < can_crash:
                following.append(Moment(moment.store, replaced(moment.ranks, rank, Rank(crashed=True))))
            for then in following:
                if then not in seen:
                    seen.add(then)
                    todo.append(then)
        check(store, {rank: state.found for rank, state in enumerate(moment.ranks) if state.found is not None})
        num_ends += is_end
    return len(seen), num_ends


def replaced(ranks: tuple[Rank, ...], at: int, state: Rank) -> tuple[Rank, ...]:
    return (*ranks[:at], state, *ranks[at + 1 :])


def check(store: dict[str, str], decided: dict[int, Any]) -> None:
    """Agreement: all that decide decide the same. Validity: the members had come."""
    assert len(set(decided.values())) <= 1, f"two memberships: {decided}"
    for members in decided.values():
        assert members and all(f"here/{member}" in store for member in members), f"{members} of {store}"
        assert json.loads(store["members"]) == list(members)


@pytest.mark.parametrize(
    ("size", "suspects", "can_crash"),
    [(1, (), 0), (2, (), 1), (2, (1,), 1), (3, (), 2), (3, (2,), 1), (4, (), 0)],
)
def test_every_order_every_death_every_deadline(size: int, suspects: tuple[int, ...], can_crash: int) -> None:
    num_moments, num_ends = explore(size, suspects, can_crash)
    print(f"W={size}, suspects {suspects}, up to {can_crash} deaths: {num_moments} moments, {num_ends} ends, all agree")
    assert num_ends >= 1 and num_moments >= size


def test_the_explorer_sees_a_protocol_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(rank: int, size: int, suspects: tuple[int, ...]) -> Any:
        yield "write", f"here/{rank}", "1"
        here = yield "look", [f"here/{peer}" for peer in range(size)]
        members = json.dumps(sorted(int(key[5:]) for key in here))
        yield "write", "members", members  # the last one counts, and each believes its own
        return tuple(json.loads(members))

    monkeypatch.setitem(globals(), "rendezvous", hasty)
    with pytest.raises(AssertionError, match="two memberships"):
        explore(2, (), 0)


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


def survive(world: World) -> tuple[Any, float]:
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
    first, _, last = process_results(nursery.run(survive, 3), killed=1)
    assert first[0] == last[0] == (0, 2) and first[1] < 20.0
