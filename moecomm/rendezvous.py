"""Who goes on, and who comes in: rendezvous at a board, as generators that a test can drive in every order.

Each yields a request and is sent its answer: ("write", key, value) gives None; ("wait", keys) the keys that are there,
none if the deadline passed first; ("look", keys) the same at once; ("propose", key, value) the value that counts;
("read", key) the value of a key that is there. Instead of an answer it may be thrown `GiveUp`. So the very same code
runs on a real store, and on one in which a test tries every order of requests, every death, deadline and abort. The
argument and the limits: docs/design/membership.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from moecomm.board import Board
from moecomm.errors import AbortedError, MoECommError, PeerLostError

T = TypeVar("T")
Request = tuple[Any, ...]
Steps = Generator[Request, Any, T]
Membership = tuple[str, tuple[int, ...]]  # where its members met, and the members
NOTHING: Mapping[str, str] = MappingProxyType({})


class GiveUp(Exception):
    """Thrown into a rendezvous: propose that nobody goes on, because of this rank, by its number in the group."""

    def __init__(self, rank: int | None, what: str, *, is_wanted: bool) -> None:
        super().__init__(what)
        self.verdict = json.dumps({"rank": rank, "what": what, "wanted": is_wanted})


def rendezvous(
    rank: int,
    size: int,
    suspects: Sequence[int],
    *,
    place: str = "",
    address: str = "1",
    alarms: Mapping[str, str] = NOTHING,
) -> Steps[tuple[int, ...]]:
    """Find out which of `size` ranks go on; gives the members, or raises who gave up, the same to all.

    alarms: keys that make this rank give up once one is there, and what it then says.

    >>> steps = rendezvous(0, 2, suspects=[1])
    >>> next(steps)
    ('write', 'here/0', '1')
    >>> steps.send(None)
    ('look', ['here/0', 'here/1'])
    >>> steps.send({"here/0"})
    ('propose', 'members', '[0]')
    """
    everybody = [f"{place}here/{peer}" for peer in range(size)]
    try:
        yield "write", everybody[rank], address
        awaited = {everybody[peer] for peer in range(size) if peer != rank and peer not in suspects}
        while awaited:
            found = yield "wait", [*sorted(awaited), f"{place}members", *alarms]
            if not found or f"{place}members" in found:
                break
            for alarm in sorted(found & alarms.keys()):
                raise GiveUp(None, alarms[alarm], is_wanted=True)
            awaited -= found
        here = yield "look", everybody
        mine = json.dumps([peer for peer, key in enumerate(everybody) if key in here])
    except GiveUp as given_up:
        mine = given_up.verdict
    told = json.loads((yield "propose", f"{place}members", mine))
    if isinstance(told, dict):
        raise _broken_off(told)
    return tuple(told)


def _broken_off(told: dict[str, Any]) -> MoECommError:
    """What everybody gets where one gave up before there were members."""
    kind = AbortedError if told["wanted"] else PeerLostError
    return kind(told["what"], operation="rendezvous", peers=[] if told["rank"] is None else [told["rank"]])


def _first(home: str, place: str) -> Steps[str]:
    """The place of the meeting that counts: of all those of one group, whatever they were for, the first one."""
    return (yield "propose", f"{home}next", place)


def _settled(home: str, place: str, seat: int, members: tuple[int, ...]) -> Steps[Membership]:
    """What counts after a meeting."""
    if seat in members and (counts := (yield from _first(home, place))) != place:
        place, members = counts, tuple(json.loads((yield "read", f"{counts}members")))
    if seat not in members:
        what = f"ranks {list(members)} went on without this rank, which came too late"
        raise PeerLostError(what, operation="rendezvous", peers=members)
    return place, members


def survive(home: str, seat: int, size: int, absent: Sequence[int], address: str) -> Steps[Membership]:
    """Find out who of a group goes on; the place of the meeting, and its members.

    Where that was settled before (in what this rank broke off) nobody meets. Whoever takes part in a meeting that is
    broken off hears of it once, and goes to the next one when it calls again. home: where the keys of this group begin.
    """
    if (yield "look", [f"{home}next"]):
        place = yield "read", f"{home}next"
        return (yield from _settled(home, place, seat, tuple(json.loads((yield "read", f"{place}members")))))
    for number in itertools.count():
        place = f"{home}shrink/{number}/"
        known = yield "look", [f"{place}here/{seat}", f"{place}members"]
        if len(known) < 2 or isinstance(json.loads((yield "read", f"{place}members")), list):
            break
    members = yield from rendezvous(seat, size, absent, place=place, address=address)
    return (yield from _settled(home, place, seat, members))


@dataclass(frozen=True, slots=True)
class Seats:
    """The ranks of a buffer as it was built: `size` of them, those `offered` to who comes, and `empty` ones.

    home: where the keys of the group that invites begin.
    """

    home: str
    size: int
    offered: tuple[int, ...]
    empty: tuple[int, ...]


def admit(door: str, seat: int, seats: Seats, invitation: str, address: str) -> Steps[tuple[str, tuple[int, ...]]]:
    """Invite whoever waits in `arrive` to the seats that are offered; the place of the meeting, and its members.

    Meetings at one `door` are numbered. All who belong together have the same invitation, which nobody else has, so
    they find the same number: the first that nobody had taken before them. If one of them shrinks instead, all must.
    """
    for number in itertools.count():
        if (yield "propose", f"{door}open/{number}", invitation) == invitation:
            break
    place = f"{door}{number}/"
    members = [seat for seat in range(seats.size) if seat not in seats.offered + seats.empty]
    alarms = {f"{seats.home}shrink/0/here/{member}": "a rank calls shrink() instead" for member in members}
    found = yield from rendezvous(seat, seats.size, seats.empty, place=place, address=address, alarms=alarms)
    return (yield from _settled(seats.home, place, seat, found))


def arrive(
    door: str, token: str, address: str, accept: Callable[[str], Seats]
) -> Steps[tuple[str, int, tuple[int, ...]] | None]:
    """Wait for an invitation and take a seat that nobody has taken; place, seat and members, None if none came.

    `accept` reads an invitation. Who finds all seats taken, comes too late, or to a meeting that is broken off or does
    not count, waits for the next one.
    """
    number = 0
    while (yield "wait", [f"{door}open/{number}"]):
        place = f"{door}{number}/"
        seats = accept((yield "read", f"{door}open/{number}"))
        for seat in seats.offered:
            if (yield "propose", f"{place}seat/{seat}", token) == token:
                members: tuple[int, ...] = ()
                with contextlib.suppress(AbortedError, PeerLostError):  # it is the others that tell why
                    members = yield from rendezvous(seat, seats.size, seats.empty, place=place, address=address)
                if seat in members and (yield from _first(seats.home, place)) == place:
                    return place, seat, members
                break
        number += 1
    return None


def meet(
    steps: Steps[T],
    board: Board,
    timeout_s: float,
    rank: int = -1,
    aborted: Callable[[], MoECommError | None] = lambda: None,
) -> T:
    """Run a rendezvous at a board; every wait in it has that deadline, in seconds.

    rank: of a member, -1 for none: if it breaks off, in its code or because it was `aborted`, nobody goes on.
    """
    try:
        request = next(steps)
        while True:
            what, *given = request
            if what in ("wait", "look"):
                wait_s = timeout_s if what == "wait" else 0.0
                answer = board.wait(given[0], wait_s, lambda: aborted() is not None)
            else:
                answer = getattr(board, what)(*given)
            error = aborted() if what == "wait" else None
            request = steps.send(answer) if error is None else steps.throw(GiveUp(rank, error.what, is_wanted=True))
    except StopIteration as end:
        result: T = end.value
        return result
    except BaseException as error:
        if not isinstance(error, MoECommError) and rank >= 0:
            _break_off(steps, board, GiveUp(rank, f"rank {rank} broke off with {error!r}", is_wanted=False))
        raise


def _break_off(steps: Steps[Any], board: Board, given_up: GiveUp) -> None:
    """Tell those who wait for this rank that it will not come; where it has said nothing yet, nobody waits."""
    with contextlib.suppress(GiveUp, StopIteration, MoECommError):
        _, key, verdict = steps.throw(given_up)
        board.propose(key, verdict)
