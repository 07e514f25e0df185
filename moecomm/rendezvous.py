"""Who goes on, and who comes in: rendezvous at a board, as generators that a test can drive in every order.

Each yields a request and is sent its answer: ("write", key, value) gives None; ("wait", keys) the keys that are there,
none if the deadline passed first; ("look", keys) the same at once; ("propose", key, value) the value that counts;
("read", key) the value of a key that is there. So the very same code runs on a real store, and on one in which a test
tries every order of requests, every death and deadline. The argument and the limits: docs/design/membership.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moecomm.board import Board

T = TypeVar("T")
Request = tuple[Any, ...]


def rendezvous(
    rank: int, size: int, suspects: Sequence[int], *, place: str = "", address: str = "1"
) -> Generator[Request, Any, tuple[int, ...]]:
    """Find out which of `size` ranks go on; gives the members, the same to all that get an answer.

    >>> steps = rendezvous(0, 2, suspects=[1])
    >>> next(steps)
    ('write', 'here/0', '1')
    >>> steps.send(None)
    ('look', ['here/0', 'here/1'])
    >>> steps.send({"here/0"})
    ('propose', 'members', '[0]')
    """
    everybody = [f"{place}here/{peer}" for peer in range(size)]
    yield "write", everybody[rank], address
    awaited = {everybody[peer] for peer in range(size) if peer != rank and peer not in suspects}
    while awaited:
        found = yield "wait", [*sorted(awaited), f"{place}members"]
        if not found or f"{place}members" in found:
            break
        awaited -= found
    here = yield "look", everybody
    mine = json.dumps([peer for peer, key in enumerate(everybody) if key in here])
    told = yield "propose", f"{place}members", mine
    return tuple(json.loads(told))


@dataclass(frozen=True, slots=True)
class Seats:
    """The ranks of a buffer as it was built: `size` of them, those `offered` to who comes, and `empty` ones."""

    size: int
    offered: tuple[int, ...]
    empty: tuple[int, ...]


def admit(rank: int, seats: Seats, invitation: str, address: str) -> Generator[Request, Any, tuple[int, Any]]:
    """Invite whoever waits in `arrive` to the seats that are offered; the number of the meeting, and its members.

    Meetings at one board are numbered. All who belong together have the same invitation, which nobody else has, so they
    find the same number: the first that nobody had taken before them.
    """
    number = 0
    while (yield "propose", f"open/{number}", invitation) != invitation:
        number += 1
    members = yield from rendezvous(rank, seats.size, seats.empty, place=f"{number}/", address=address)
    return number, members


def arrive(
    token: str, address: str, accept: Callable[[str], Seats]
) -> Generator[Request, Any, tuple[int, int, Any] | None]:
    """Wait for an invitation and take a seat that nobody has taken; number, seat and members, None if none came.

    `accept` reads an invitation. Who finds all seats taken, or comes too late, waits for the next one.
    """
    number = 0
    while (yield "wait", [f"open/{number}"]):
        seats = accept((yield "read", f"open/{number}"))
        for seat in seats.offered:
            if (yield "propose", f"{number}/seat/{seat}", token) == token:
                members = yield from rendezvous(seat, seats.size, seats.empty, place=f"{number}/", address=address)
                if seat in members:
                    return number, seat, members
                break
        number += 1
    return None


def meet(steps: Generator[Request, Any, T], board: Board, timeout_s: float) -> T:
    """Run a rendezvous at a board; every wait in it has that deadline, in seconds."""
    answer: Any = None
    while True:
        try:
            what, *given = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result
        if what in ("wait", "look"):
            answer = board.wait(given[0], timeout_s if what == "wait" else 0.0)
        else:
            answer = getattr(board, what)(*given)
