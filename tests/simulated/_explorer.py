"""Every order of requests, every death at any of them, every deadline at any moment: what a rendezvous comes to.

The processes are the generators of `moecomm.rendezvous`. What one of them asks next and remembers is its state, so two
ways to come there are one; states and stores are numbered, and what follows from one is found out once.

A death need not be tried: whoever is dead is somebody who is never again drawn, and every moment with him is a moment
of a run in which he is only slow, with the same store and the same findings. `can_crash` tries deaths all the same, and
a test compares. That the living come to an end whoever is dead is what `explore` checks beside: from every moment each
process ends by itself, whatever it is answered.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from moecomm.errors import MoECommError
from moecomm.rendezvous import GiveUp

Steps = Callable[[], Generator[Any, Any, Any]]  # what one process does, from the beginning
Demand = Callable[[Mapping[str, str], Mapping[int, Any]], None]  # store and what processes found -> AssertionError

DEAD = -1  # a state that every process has
GIVES_UP = "gives up"  # instead of an answer


@dataclass(frozen=True)
class State:
    """What one process asks next and what it remembers, or what it found: None if it gave up before it said anything,
    or came too late; text where a meeting was broken off.

    `answers` is one way to come there, with which to run the code again.
    """

    asks: Any = None
    remembers: str = ""
    found: Any = None
    is_over: bool = False
    gave_up: bool = False
    answers: tuple[Any, ...] = field(default=(), compare=False)


def resume(begin: Steps, number: int, answers: tuple[Any, ...]) -> State:
    """Where a process is after these answers."""
    steps, gave_up = begin(), GIVES_UP in answers
    try:
        request = next(steps)
        for answer in answers:
            if answer == GIVES_UP:
                request = steps.throw(GiveUp(number, "enough", is_wanted=True))
            else:
                request = steps.send(answer)
    except StopIteration as end:
        return State(found=end.value, is_over=True, answers=answers)
    except GiveUp:
        return State(is_over=True, gave_up=True, answers=answers)
    except MoECommError as error:
        found = None if "went on without" in error.what else f"broken off by {error.peers}"
        return State(found=found, is_over=True, gave_up=gave_up, answers=answers)
    return State(asks=str(request), remembers=memory_of(steps), gave_up=gave_up, answers=answers)


def memory_of(steps: Any) -> str:
    """The local variables of a generator that yields from another; the innermost says in its request all it knows."""
    told = []
    while steps.gi_yieldfrom is not None:
        known = steps.gi_frame.f_locals
        told.append(str({name: known[name] for name in sorted(known)}))
        steps = steps.gi_yieldfrom
    return "; ".join(told)


def answers_to(request: Any, store: dict[str, str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """Every answer that a linearisable store may give now, and what it then holds."""
    what, *given = request
    if what == "write":
        yield None, store | {given[0]: given[1]}
    elif what == "propose":
        kept = {given[0]: given[1]} | store
        yield kept[given[0]], kept
    elif what == "read":
        yield store[given[0]], store
    else:
        found = frozenset(key for key in given[0] if key in store)
        if found or what == "look":
            yield found, store
        if what == "wait":  # a deadline may pass at any moment, also when something is there that was not seen
            yield frozenset(), store


@final
class Numbers:
    """Things, each of which has a number."""

    def __init__(self) -> None:
        self.things: list[Any] = []
        self._number_of: dict[Any, int] = {}

    def of(self, thing: Any) -> int:
        if thing not in self._number_of:
            self._number_of[thing] = len(self.things)
            self.things.append(thing)
        return self._number_of[thing]


request_of = functools.cache(ast.literal_eval)


@final
class Explorer:
    """All moments: (store, state of each process), as numbers."""

    def __init__(self, processes: Sequence[Steps], can_give_up: Collection[int] = ()) -> None:
        self.processes, self._can_give_up = processes, can_give_up
        self.stores = Numbers()
        self.states = [Numbers() for _ in processes]
        self._moves: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        self._after: dict[tuple[int, int, Any], int] = {}
        self._ends: dict[tuple[int, int, int], bool] = {}
        pairs = zip(self.states, processes, strict=True)
        begun = [numbers.of(resume(begin, i, ())) for i, (numbers, begin) in enumerate(pairs)]
        self.start = (self.stores.of(()), *begun)

    def moves(self, process: int, state: int, store: int) -> list[tuple[int, int]]:
        """What a process may come to, and the store, with its next request; nothing if it is over."""
        key = process, state, store
        if key not in self._moves:
            self._moves[key] = list(self._find_moves(process, state, dict(self.stores.things[store])))
        return self._moves[key]

    def _find_moves(self, process: int, state: int, store: dict[str, str]) -> Iterator[tuple[int, int]]:
        now: State = self.states[process].things[state]
        if now.is_over:
            return
        if process in self._can_give_up and not now.gave_up:
            yield self._follow(process, state, now, GIVES_UP), self.stores.of(tuple(sorted(store.items())))
        for answer, then in answers_to(request_of(now.asks), store):
            yield self._follow(process, state, now, answer), self.stores.of(tuple(sorted(then.items())))

    def _follow(self, process: int, state: int, now: State, answer: Any) -> int:
        key = process, state, answer
        if key not in self._after:
            after = resume(self.processes[process], process, (*now.answers, answer))
            self._after[key] = self.states[process].of(after)
        return self._after[key]

    def found(self, moment: tuple[int, ...]) -> tuple[int, ...]:
        """The states of those that are over, DEAD for the others."""
        states = enumerate(moment[1:])
        return tuple(s if s != DEAD and self.states[p].things[s].is_over else DEAD for p, s in states)

    def ends_alone(self, process: int, state: int, store: int) -> bool:
        """Whether a process comes to an end if nobody else does anything any more, whatever it is answered."""
        key = process, state, store
        if key not in self._ends:
            self._ends[key] = False  # unless found otherwise: who comes here again goes in a circle
            self._ends[key] = all(self.ends_alone(process, *move) for move in self.moves(*key))
        return self._ends[key]


def explore(
    processes: Sequence[Steps], can_crash: int, demand: Demand, can_give_up: Collection[int] = ()
) -> tuple[int, int]:
    """Go through every moment, of which each must be as demanded; the number of moments, and of ends.

    can_give_up: processes that may break off at any moment.
    """
    explorer = Explorer(processes, can_give_up)
    seen, todo, num_ends = {explorer.start}, [explorer.start], 0
    judged = set()
    while todo:
        moment = todo.pop()
        store, *states = moment
        is_end = True
        can_die = can_crash > states.count(DEAD)
        for at, state in enumerate(states, start=1):
            if state == DEAD or not (moves := explorer.moves(at - 1, state, store)):
                continue
            is_end = False
            assert explorer.ends_alone(at - 1, state, store), f"process {at - 1} waits for ever"
            before, behind = moment[1:at], moment[at + 1 :]
            following = [(then, *before, after, *behind) for after, then in moves]
            if can_die:
                following.append((store, *before, DEAD, *behind))
            for then in following:
                if then not in seen:
                    seen.add(then)
                    todo.append(then)
        num_ends += is_end
        if (store, found := explorer.found(moment)) not in judged:
            judged.add((store, found))
            over = {p: explorer.states[p].things[s] for p, s in enumerate(found) if s != DEAD}
            told = {p: state.found for p, state in over.items()}
            demand(dict(explorer.stores.things[store]), told)
    return len(seen), num_ends
