"""Replacements and replicas: seats are taken once, all agree who sits there, and sums are right again."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moecomm
from moecomm.errors import ConfigError, PeerLostError, StallError
from moecomm.group import Group
from moecomm.rendezvous import Seats, admit, arrive, rendezvous, survive
from moecomm.testing import assert_bitwise
from moecomm.testing.simulated import Faults, results_of, simulate, simulated_group
from tests.faults._ranks import Nursery, World
from tests.faults._ranks import results_of as process_results
from tests.simulated._explorer import explore

# -- the protocol: every order of requests, every death, every deadline -------------------------------------------


def explore_meeting(
    members: tuple[int, ...], size: int, num_newcomers: int, can_crash: int, offered: int = 9, can_give_up: int = 0
) -> tuple[int, int]:
    """Some members of a buffer of `size` ranks invite, newcomers arrive; what must hold in every moment.

    can_give_up: how many of the members may break off.
    """
    empty = tuple(rank for rank in range(size) if rank not in members)
    seats = Seats("we/", size, empty[:offered], empty[offered:])
    people: list[Any] = [functools.partial(admit, "", seat, seats, "us", "") for seat in members]
    people += [functools.partial(arrive, "", f"new{i}", "", lambda _: seats) for i in range(num_newcomers)]

    def demand(store: Mapping[str, str], decided: Mapping[int, Any]) -> None:
        broken = {number: found for number, found in decided.items() if isinstance(found, str)}
        sure = {number: found for number, found in decided.items() if found is not None and number not in broken}
        assert not broken or not sure, f"some go on: {decided}"
        assert all(number < len(members) for number in broken), "a newcomer waits for the next invitation"
        told = {found[-1] for found in sure.values()}
        assert len(told) <= 1, f"two memberships: {sure}"
        taken = [members[number] if number < len(members) else found[1] for number, found in sure.items()]
        seated = [seat for seat in taken if seat in next(iter(told))]
        assert len(set(seated)) == len(seated), f"two on one seat: {sure}"
        for found in sure.values():
            assert all(f"{found[0]}here/{seat}" in store for seat in found[-1]), f"{found} of {store}"
            assert not set(found[-1]) - set(members) - set(seats.offered), "a seat that was not offered"

    return explore(people, can_crash, demand, range(can_give_up))


@pytest.mark.parametrize(
    ("members", "size", "num_newcomers", "can_crash", "offered", "can_give_up"),
    [
        ((0,), 2, 1, 2, 9, 1),
        ((0,), 2, 2, 3, 9, 0),  # two want one seat
        ((1,), 3, 1, 2, 1, 1),  # one of two seats is offered
        ((0, 2), 3, 1, 3, 9, 2),
        ((1,), 3, 2, 3, 9, 0),
        ((0, 1, 3), 4, 1, 4, 9, 0),
        ((0, 2), 4, 2, 0, 9, 0),
        ((0,), 4, 2, 3, 2, 1),  # two of three seats are offered to two
    ],
)
def test_every_order_every_death_every_deadline(
    members: tuple[int, ...], size: int, num_newcomers: int, can_crash: int, offered: int, can_give_up: int
) -> None:
    num_moments, num_ends = explore_meeting(members, size, num_newcomers, can_crash, offered, can_give_up)
    what = f"{members} of {size} and {num_newcomers}, up to {can_crash} deaths, {can_give_up} may give up"
    print(f"{what}: {num_moments} moments, {num_ends} ends")
    assert num_ends >= 1 and num_moments >= size


def explore_confusion(
    members: tuple[int, ...], size: int, shrinking: tuple[int, ...], can_crash: int, num_newcomers: int = 1
) -> tuple[int, int]:
    """Of a group some members shrink while the others invite: no two of them may go on apart."""
    empty = tuple(seat for seat in range(size) if seat not in members)
    seats = Seats("we/", size, empty, ())
    people: list[Any] = []
    for seat in members:
        if seat in shrinking:
            people.append(functools.partial(survive, "we/", seat, size, empty, ""))
        else:
            people.append(functools.partial(admit, "", seat, seats, "us", ""))
    people += [functools.partial(arrive, "", f"new{i}", "", lambda _: seats) for i in range(num_newcomers)]

    def demand(store: Mapping[str, str], decided: Mapping[int, Any]) -> None:
        places = {(found[0], found[-1]) for found in decided.values() if isinstance(found, tuple)}
        assert len(places) <= 1, f"two groups go on: {places}"

    return explore(people, can_crash, demand)


@pytest.mark.parametrize(
    ("members", "size", "shrinking", "can_crash"),
    [((0, 1), 3, (1,), 3), ((0, 2), 4, (0,), 3), ((0, 1, 2), 4, (2,), 0), ((0, 1, 2), 4, (0, 1), 1)],
)
def test_only_one_group_goes_on_where_some_shrink_and_others_invite(
    members: tuple[int, ...], size: int, shrinking: tuple[int, ...], can_crash: int
) -> None:
    num_moments, num_ends = explore_confusion(members, size, shrinking, can_crash)
    print(f"{members} of {size}, {shrinking} shrink, up to {can_crash} deaths: {num_moments} moments, {num_ends} ends")
    assert num_ends >= 1 and num_moments >= size


def test_the_explorer_sees_two_on_one_seat() -> None:
    seats = Seats("we/", 2, (1,), ())

    def rude(token: str) -> Any:
        yield "wait", ["open/0"]
        yield "write", "0/seat/1", token  # without asking whether somebody sits there
        members = yield from rendezvous(1, 2, (), place="0/")
        return "0/", 1, members

    def demand(store: Mapping[str, str], decided: Mapping[int, Any]) -> None:
        sat = [found for number, found in decided.items() if number and 1 in found[-1]]
        assert len(sat) <= 1, "two on one seat"

    people = [functools.partial(admit, "", 0, seats, "us", ""), *(functools.partial(rude, f"new{i}") for i in range(2))]
    with pytest.raises(AssertionError, match="two on one seat"):
        explore(people, 0, demand)


# -- the buffer --------------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"num_experts": 6, "hidden": 4, "top_k": 2, "max_tokens_per_rank": 6, "timeout_s": 20.0}


def step(buffer: moecomm.Buffer, seed: int, dead: set[int]) -> None:
    """A dispatch and combine in which every expert multiplies by what its global id says: who has a row is checked."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 50, (6, 4), generator=generator).float()
    topk_idx = torch.rand(6, 6, generator=generator).topk(2).indices
    out: Any = buffer.dispatch(x, topk_idx, torch.ones(6, 2))
    ends = [0, *out.expert_offsets.tolist()]
    assert len(ends) == len(buffer.local_experts) + 1
    for expert, start, end in zip(buffer.local_experts, ends, ends[1:], strict=False):
        out.x[start:end] *= 2**expert
    factor = torch.tensor([[0 if e in dead else 2**e for e in row] for row in topk_idx.tolist()]).sum(1, keepdim=True)
    assert_bitwise(buffer.combine(out.x, out.handle), x * factor, f"sums with experts {sorted(dead)} dead")


def steps_until_death(buffer: moecomm.Buffer, rank: int, num_rounds: int, dead: set[int]) -> bool:
    """Whether somebody died in so many rounds."""
    try:
        for round in range(num_rounds):
            step(buffer, 10 * round + rank, dead)
    except (PeerLostError, StallError):
        return True
    return False


def dead_of(placement: moecomm.ExpertPlacement, members: tuple[int, ...]) -> set[int]:
    return set(range(placement.num_experts)).difference(*placement.held_by(members))


def replaced(group: Group, victims: int, spares: int) -> Any:
    """Three ranks of a world of more: ranks die, the others shrink and take in the spare ones; who is there."""
    exchange: Any = group.exchange
    world, rank = exchange.world, exchange.rank
    placement = moecomm.ExpertPlacement.uniform(6, 3)
    if rank >= 3:
        buffer = moecomm.Buffer.join(
            simulated_group(world, rank, [rank], "alone"), wait_s=1e4, **SHAPE, dtype=torch.float32
        )
        told = [buffer._rest.survivors.members]
    else:
        buffer = moecomm.Buffer(simulated_group(world, rank, [0, 1, 2], "first"), **SHAPE, dtype=torch.float32)
        told = []
        assert steps_until_death(buffer, rank, 10**3, set())
        while len(told) == 0 or len(told[-1]) + victims > 3:
            told.append(buffer.shrink())
            if not steps_until_death(buffer, rank, 10, dead_of(placement, told[-1])):
                break
        told.append(buffer.admit(spares))
    for round in range(5):
        step(buffer, 100 + 10 * round + rank, dead_of(placement, told[-1]))
    seat = told[-1][buffer.group.rank]
    assert buffer.local_experts == placement.experts_of_rank[seat]
    world.wait(rank, lambda: False, 1.0)
    buffer.close()
    return told[-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_replacement_has_the_seat_and_the_experts_of_the_dead(seed: int) -> None:
    victim = seed % 3
    outcomes = simulate(replaced, 4, 1, 1, seed=seed, faults=Faults(kills={victim: 60 + 7 * seed}))
    assert [outcome.killed for outcome in outcomes] == [rank == victim for rank in range(4)]
    assert {str(story) for story in results_of(outcomes) if story is not None} == {"(0, 1, 2)"}


def go_on_whatever(group: Group, last: list[tuple[int, ...]]) -> None:
    """Step until somebody dies and shrink, also when somebody dies in that; until only the last two are left."""
    buffer = moecomm.Buffer(group, **SHAPE, dtype=torch.float32)
    members: tuple[int, ...] = (0, 1, 2, 3)
    placement = buffer.config.placement
    while steps_until_death(buffer, group.rank, 12, dead_of(placement, members)):
        while True:
            try:
                members = buffer.shrink()
                break
            except (PeerLostError, StallError):
                with pytest.raises((PeerLostError, StallError), match="cannot go on"):
                    step(buffer, 0, set())
    last.append(members)
    exchange: Any = group.exchange
    exchange.world.wait(exchange.rank, lambda: False, 1.0)
    buffer.close()


@pytest.mark.parametrize(("notice_s", "every"), [(0.01, 3), (None, 12)])
def test_a_death_at_any_moment_of_shrinking_is_survived(notice_s: float | None, every: int) -> None:
    for at in range(61, 109, every):
        last: list[tuple[int, ...]] = []
        faults = Faults(kills={1: 60, 2: at}, notice_s=notice_s)
        results_of(simulate(go_on_whatever, 4, last, seed=at, faults=faults))
        assert last == [(0, 3)] * 2, (at, last)


def move(group: Group) -> list[tuple[int, ...]]:
    """Rank 1 dies; its expert 3 moves to rank 2, which has a replica; expert 2 has none; then a replacement comes."""
    exchange: Any = group.exchange
    world, rank = exchange.world, exchange.rank
    placement = moecomm.ExpertPlacement(((0, 1), (2, 3), (5, 4)), ((), (), (3, 0)))
    given: dict[str, Any] = SHAPE | {"placement": placement, "dtype": torch.float32}
    if rank == 3:
        buffer = moecomm.Buffer.join(simulated_group(world, rank, [rank], "alone"), wait_s=1e4, **given)
        held = []
    else:
        buffer = moecomm.Buffer(simulated_group(world, rank, [0, 1, 2], "first"), **given)
        held = [buffer.local_experts]
        assert steps_until_death(buffer, rank, 10**3, set())
        members = buffer.shrink()
        held.append(buffer.local_experts)
        assert not steps_until_death(buffer, rank, 5, {2}) and members == (0, 2)
        members = buffer.admit()
    held.append(buffer.local_experts)
    assert not steps_until_death(buffer, rank, 5, set())
    world.wait(rank, lambda: False, 1.0)
    buffer.close()
    return held


def test_experts_move_to_a_replica_and_back() -> None:
    first, dead, last, new = simulate(move, 4, seed=5, faults=Faults(kills={1: 90}))
    assert dead.killed
    assert results_of([first, last, new]) == [[(0, 1)] * 3, [(5, 4), (5, 4, 3), (5, 4)], [(2, 3)]]


def replace_a_process(world: World) -> list[Any]:
    """The same between processes: rank 1 of three is killed, and a fourth process takes its place."""
    root = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    given: dict[str, Any] = SHAPE | {"dtype": torch.float32, "transport": "symmetric"}
    name = f"test {world.wait_for('here', 0)[0] if world.rank else os.getpid()}"
    if world.rank == 0:
        world.mark("here")
    placement = moecomm.ExpertPlacement.uniform(6, 3)
    if world.rank == 3:
        with pytest.raises(ConfigError, match="hidden is not what the buffer was built with: got 5; expected 4"):
            moecomm.Buffer.join(root, name=name, **(given | {"hidden": 5}))
        buffer = moecomm.Buffer.join(root, name=name, **given)
    else:
        dist.init_process_group("gloo", store=dist.PrefixStore(name, root), rank=world.rank, world_size=3)
        buffer = moecomm.Buffer(**given)
        step(buffer, world.rank, set())
        if world.rank == 1:
            world.die()
        assert steps_until_death(buffer, world.rank, 10**4, set())
        members = buffer.shrink()
        assert not steps_until_death(buffer, world.rank, 5, dead_of(placement, members))
        assert buffer.admit(name=name, timeout_s=60.0) == (0, 1, 2)
    assert not steps_until_death(buffer, world.rank, 10, set())
    told = [buffer.group.rank, buffer.local_experts]
    with pytest.raises(ConfigError, match="there are no seats for so many: got 0"):
        buffer.admit(name=name)
    world.meet_others("stepped", 1)
    buffer.close()
    return told


def test_a_process_takes_the_place_of_a_dead_one(nursery: Nursery) -> None:
    told = process_results(nursery.run(replace_a_process, 4, backend=None), killed=1)
    assert told == [[0, (0, 1)], None, [2, (4, 5)], [1, (2, 3)]]


def test_what_cannot_join_is_told_so() -> None:
    with pytest.raises(ConfigError, match="this is no store: got str"):
        moecomm.Buffer.join("tcp://host", **SHAPE)
    with pytest.raises(ConfigError, match="wait_s is no deadline: got -1; expected a positive number of seconds"):
        moecomm.Buffer.join(dist.HashStore(), wait_s=-1, **SHAPE)
    with pytest.raises(ConfigError, match=r"these are no arguments of Buffer\(\): got .*colour"):
        moecomm.Buffer.join(dist.HashStore(), colour="red", **SHAPE)
    with pytest.raises(StallError, match=r"nobody took this process in within 0.01 s.*admit\(name="):
        moecomm.Buffer.join(dist.HashStore(), wait_s=0.01, **SHAPE)


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (((1,),), "another number of ranks: got 1; expected one list for each of 2"),
        (((0,), ()), r"replicas_of_rank\[0\] does not list experts of other ranks: got \(0,\)"),
        (((), (0, 0)), r"replicas_of_rank\[1\].*each once"),
        (((5,), ()), "ids below 2 that rank 0 does not hold"),
        ((3, 4), "replicas_of_rank is no list of expert lists"),
    ],
)
def test_replicas_are_checked(replicas: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moecomm.ExpertPlacement(((0,), (1,)), replicas)


def test_who_has_least_takes_an_expert_over() -> None:
    placement = moecomm.ExpertPlacement(((0, 1, 2), (3,), (4,), ()), ((), (0, 1, 2), (0, 1), (2,)))
    assert placement.held_by([1, 2, 3]) == [[3, 0], [4, 1], [2]]
    assert placement.held_by([0, 3]) == [[0, 1, 2], []]
    assert placement.held_by([3]) == [[2]]


def test_a_deadline_that_is_none_is_refused_and_nobody_notices() -> None:
    def run(group: Group) -> None:
        buffer = moecomm.Buffer(group, **SHAPE, dtype=torch.float32)
        with pytest.raises(ConfigError, match="timeout_s is no deadline: got 'soon'"):
            buffer.shrink(timeout_s="soon")  # type: ignore[arg-type]
        step(buffer, group.rank, set())

    results_of(simulate(run, 2, seed=1))
