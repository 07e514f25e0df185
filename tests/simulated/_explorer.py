"""Every order of requests, every death at any of them, every deadline at any moment: what a rendezvous comes to."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Steps = Callable[[], Generator[Any, Any, Any]]  # what one process does, from the beginning
Demand = Callable[[Mapping[str, str], Mapping[int, Any]], None]  # store and what processes found -> AssertionError


@dataclass(frozen=True)
class Process:
    """What one process asks next and what it remembers, or what it found. All that it does later follows from that.

    So two ways to come there are one state; `answers` is one of them, with which to run the code again.
    """

    asks: Any = None
    remembers: str = ""
    found: Any = None
    is_over: bool = False
    crashed: bool = False
    answers: tuple[Any, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Moment:
    """The store and all processes."""

    store: tuple[tuple[str, str], ...]
    processes: tuple[Process, ...]


request_of = functools.cache(ast.literal_eval)


def resume(begin: Steps, answers: tuple[Any, ...]) -> Process:
    """Where a process is after these answers."""
    steps = begin()
    try:
        request = next(steps)
        for answer in answers:
            request = steps.send(answer)
    except StopIteration as end:
        return Process(found=end.value, is_over=True, answers=answers)
    return Process(asks=str(request), remembers=memory_of(steps), answers=answers)


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


def explore(processes: Sequence[Steps], can_crash: int, demand: Demand) -> tuple[int, int]:
    """Go through every moment, of which each must be as demanded; the number of moments, and of ends."""
    start = Moment((), tuple(resume(begin, ()) for begin in processes))
    seen, todo, num_ends = {start}, [start], 0
    known: dict[tuple[int, Any, Any], Process] = {}
    while todo:
        moment = todo.pop()
        store, is_end = dict(moment.store), True
        for number, state in enumerate(moment.processes):
            if state.crashed or state.is_over:
                continue
            is_end = False
            following = []
            for answer, after in answers_to(request_of(state.asks), store):
                key = number, state, str(sorted(answer) if isinstance(answer, frozenset) else answer)
                if key not in known:
                    known[key] = resume(processes[number], (*state.answers, answer))
                following.append(Moment(tuple(sorted(after.items())), replaced(moment.processes, number, known[key])))
            if sum(other.crashed for other in moment.processes) < can_crash:
                following.append(Moment(moment.store, replaced(moment.processes, number, Process(crashed=True))))
            for then in following:
                if then not in seen:
                    seen.add(then)
                    todo.append(then)
        demand(store, {number: state.found for number, state in enumerate(moment.processes) if state.is_over})
        num_ends += is_end
    return len(seen), num_ends


def replaced(processes: tuple[Process, ...], at: int, state: Process) -> tuple[Process, ...]:
    """The processes, one of them in another state."""
    return (*processes[:at], state, *processes[at + 1 :])
