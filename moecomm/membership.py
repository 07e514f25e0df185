"""Going on without dead ranks, and with replacements: who is left agrees on it, and builds the buffer anew.

The protocol is a rendezvous at one linearisable store, not a vote: everybody who calls says that it is here, waits for
those it does not believe dead, and proposes who is there; the first proposal counts, for all. So the members are always
the same for all of them, and each of them was alive when it came. What it cannot do: outlive the process that hosts the
store, or keep a rank that came too late; that one is told. docs/design/membership.md has the argument and the limits.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from moecomm import _env
from moecomm.checks import INDEX_DTYPES, BufferConfig, Checker, configure
from moecomm.core import Core
from moecomm.errors import (
    AbortedError,
    ConfigError,
    MoECommError,
    PeerLostError,
    RoutingError,
    StallError,
    UnsupportedError,
)
from moecomm.group import Group
from moecomm.placement import ExpertPlacement
from moecomm.plan import first_bad_entry
from moecomm.rendezvous import Seats, admit, arrive, meet, survive

TRANSPORTS = ("symmetric", "simulated")
_BOARD = "members"


@dataclass(frozen=True, eq=False)
class Survivors:
    """What a buffer knows after it shrank.

    members: the ranks that are there, numbered as when the buffer was built. experts: their expert ids, as they were
    called then, in local order. table: (E + 1,) int64 what each expert id of then is called now, -1 if nobody holds it;
    the last entry is for -1. check: of the buffer as it was built.
    """

    members: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    table: Tensor
    check: Checker
    renormalise: bool

    def mask(self, topk_idx: Any, topk_weights: Any) -> tuple[Any, Any]:
        """Translate a routing: choices of dead experts become -1 and weigh nothing."""
        check = self.check
        check.tensor("topk_idx", topk_idx, (None, check.config.top_k), INDEX_DTYPES, RoutingError)
        if first_bad_entry(topk_idx, check.config.num_experts) is not None:
            check.routing(topk_idx, len(topk_idx))  # says which
        masked = self.table[topk_idx.long()].to(topk_idx.dtype)
        gone = (masked < 0) & (topk_idx >= 0)
        if topk_weights is None and not self.renormalise:
            return masked, None
        if topk_weights is None:
            topk_weights = torch.ones(topk_idx.shape, dtype=torch.float32, device=topk_idx.device)
        check.tensor("topk_weights", topk_weights, tuple(topk_idx.shape), (torch.float32,))
        kept = topk_weights.masked_fill(gone, 0.0)
        if not self.renormalise:
            return masked, kept
        chosen = topk_weights.masked_fill(topk_idx < 0, 0.0).sum(1, keepdim=True)
        left = kept.sum(1, keepdim=True)
        return masked, kept * torch.where(left != 0, chosen / torch.where(left != 0, left, 1.0), 1.0)


@dataclass(frozen=True, eq=False)
class Rest:
    """Who goes on, and with what to build anew. place: where they met, which no other group did."""

    group: Group
    place: str
    placement: ExpertPlacement
    survivors: Survivors
    transport: str

    def arguments(self) -> dict[str, Any]:
        """Those of the buffer as it was built, but for what changed."""
        config = self.survivors.check.config
        names = {f.name for f in fields(config)} - {"byte_order"}  # which the machine gives, not the caller
        given = {name: getattr(config, name) for name in names} | {"topology": None, "transport": self.transport}
        return given | {"num_experts": self.placement.num_experts, "placement": self.placement}


def shrink(core: Core, check: Checker, rest: Rest | None, renormalise: bool, timeout_s: float | None) -> Rest:
    """Agree with the other survivors; what to build anew."""
    _demand_transport(core, "shrink")
    group, home, seats = _whereabouts(core, rest)
    wait_s = _deadline("timeout_s", timeout_s, check.config.timeout_s, group.rank)
    core.abort("it shrinks")  # whoever waits in an operation hears that it is over
    core.aborted = None  # who calls `abort` from here on means the meeting
    failure = core.failure
    blamed = () if failure is None or isinstance(failure, AbortedError) else failure.peers
    suspects = [peer for peer in blamed if peer != group.rank]
    first = check if rest is None else rest.survivors.check
    size, present = first.config.placement.num_ranks, [seats[i] for i in range(group.size) if i not in suspects]
    absent = sorted(set(range(size)).difference(present))
    seat = seats[group.rank]
    try:
        steps = survive(home, seat, size, absent, _address(group))
        place, members = meet(steps, group.board(_BOARD), wait_s, group.rank, lambda: core.aborted)
    except PeerLostError as error:
        if not isinstance(error, AbortedError):  # who broke off is not waited for next time, nor are the dead of before
            error.peers = tuple({*suspects, *error.peers})
            core.failure = error
        raise
    found = _regroup(group, place, seat, members)
    return _rest(found, place, members, first, renormalise, core.transport.name)


def take_in(
    core: Core, check: Checker, rest: Rest | None, name: str, most: int | None, timeout_s: float | None
) -> Rest:
    """Agree with the other members and with who waits in `join`; what to build anew."""
    _demand_transport(core, "take in ranks")
    core.check_usable()
    group, home, numbers = _whereabouts(core, rest)
    first = check if rest is None else rest.survivors.check
    empty = sorted(set(range(first.config.placement.num_ranks)) - set(numbers))
    if not empty or (most is not None and not (isinstance(most, int) and 1 <= most <= len(empty))):
        expected = f"at most {len(empty)}, as many as died and were not replaced"
        got, remedy = len(empty) if most is None else most, "call shrink() first when a rank is dead"
        raise ConfigError("there are no seats for so many", got=got, expected=expected, remedy=remedy, rank=group.rank)
    told: dict[str, Any] = {"transport": core.transport.name, "config": _described(first.config)}
    told["renormalise"] = rest is not None and rest.survivors.renormalise
    offered = len(empty) if most is None else most
    seats = Seats(home, first.config.placement.num_ranks, tuple(empty[:offered]), tuple(empty[offered:]))
    seat = numbers[group.rank]
    invitation = json.dumps(told | asdict(seats), sort_keys=True)  # no other group has this home
    wait_s = _deadline("timeout_s", timeout_s, check.config.timeout_s, group.rank)
    with core.guarded():
        try:
            steps = admit(_door(name), seat, seats, invitation, _address(group))
            place, members = meet(steps, group.board(_BOARD), wait_s, group.rank, lambda: core.aborted)
        except MoECommError as error:
            core.transport.abort(error)  # who is still in an operation hears of it
            raise
    found = _regroup(group, place, seat, members)
    return _rest(found, place, members, first, told["renormalise"], core.transport.name)


def join(store: Any, name: str, wait_s: float | None, buffer: type, arguments: dict[str, Any]) -> Rest:
    """Wait until the members of a buffer with these arguments take this process in; what to build."""
    try:
        bound = signature(buffer).bind(**arguments)
    except TypeError as error:
        what, remedy = "these are no arguments of Buffer()", "join with those of the buffer as it was built first"
        raise ConfigError(what, got=str(error), remedy=remedy, operation="join") from None
    bound.apply_defaults()
    given = {name: value for name, value in bound.arguments.items() if name != "group"}
    alone = store if isinstance(store, Group) else Group.at_store(store)
    told: dict[str, Any] = {}

    def accept(invitation: str) -> Seats:
        told.update(json.loads(invitation))
        told["mine"] = _the_same(told, given)
        return Seats(told["home"], told["size"], told["offered"], told["empty"])

    wait_s = _deadline("wait_s", wait_s, _env.timeout_s(), None)
    steps = arrive(_door(name), secrets.token_hex(8), _address(alone), accept)
    arrived = meet(steps, alone.board(_BOARD), wait_s)
    if arrived is None:
        what, remedy = f"nobody took this process in within {wait_s:g} s", f"call admit(name={name!r}) on the others"
        raise StallError(what, remedy=remedy, operation="join")
    place, seat, members = arrived
    found = _regroup(alone, place, seat, members)
    first = Checker(told["mine"], found.rank, 0)
    return _rest(found, place, members, first, told["renormalise"], told["transport"])


def build_anew(buffer: Any, rest: Rest) -> tuple[int, ...]:
    """Close a `Buffer`, and build what was found; if that fails, `shrink` begins from there. Its members."""
    before: Core | None = getattr(buffer, "_core", None)
    buffer.close()
    buffer._rest = rest
    try:
        buffer.__init__(rest.group, **rest.arguments())
        if before is not None and before.aborted is not None:  # while nothing was there that could be aborted
            buffer._core.transport.abort(before.aborted)
            raise before.aborted
    except BaseException as error:
        core: Core | None = getattr(buffer, "_core", None)
        if core is not None and isinstance(error, MoECommError):
            core.failure = error
        elif core is not None:
            core.break_off(error, rest.group.rank)
        if core is not None:
            core.closed = False
        raise
    buffer._calls.survivors = rest.survivors
    return rest.survivors.members


def _the_same(told: dict[str, Any], arguments: dict[str, Any]) -> BufferConfig:
    """The configuration that the arguments make, if it is the one that was told."""
    mine = configure(0, told["size"], **arguments)
    if isinstance(mine, MoECommError):
        raise mine
    described = _described(mine)
    if odd := [field for field in described if described[field] != told["config"].get(field)]:
        field = odd[0]
        raise ConfigError(
            f"{field} is not what the buffer was built with",
            got=described[field],
            expected=told["config"].get(field),
            remedy="join with the arguments of the buffer as it was built first",
            operation="join",
        )
    return mine


def _described(config: BufferConfig) -> dict[str, str]:
    """What all ranks must have in common, as text."""
    described = {f.name: repr(getattr(config, f.name)) for f in fields(config)}
    return described | {"device": config.device.type}


def _demand_transport(core: Core, to: str) -> None:
    rank, name = core.rank, core.transport.name
    if name not in TRANSPORTS:
        raise UnsupportedError(
            f"a buffer on transport {name} cannot {to}",
            got=name,
            expected=f"one of {TRANSPORTS}",
            remedy="build a new Buffer in a process group without the dead rank",
            rank=rank,
        )


def _deadline(name: str, given: Any, default: float, rank: int | None) -> float:
    """The deadline that was given, or the default."""
    if given is None:
        return default
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 < given < math.inf:
        expected, remedy = "a positive number of seconds", f"correct {name}, or leave it out"
        raise ConfigError(f"{name} is no deadline", got=repr(given), expected=expected, remedy=remedy, rank=rank)
    return float(given)


def _whereabouts(core: Core, rest: Rest | None) -> tuple[Group, str, Sequence[int]]:
    """The group, where its keys begin, and what its ranks were called at first."""
    if rest is not None:
        return rest.group, rest.place, rest.survivors.members
    group = core.transport.group
    return group, f"buffer/{core.transport.buffer_id:x}/", range(group.size)


def _door(name: str) -> str:
    """Where the keys begin of those who wait under that name."""
    return f"join/{name}/"


def _address(group: Group) -> str:
    """What others must know of this rank for `Group.regroup`."""
    return str(getattr(group.exchange, "address", ""))


def _regroup(group: Group, place: str, seat: int, members: Sequence[int]) -> Group:
    """The group of the members, who have all said at that place where they are."""
    board = group.board(_BOARD)
    addresses = [board.read(f"{place}here/{member}") for member in members]
    return group.regroup(members.index(seat), addresses, place)


def _rest(group: Group, place: str, members: Sequence[int], first: Checker, renormalise: bool, transport: str) -> Rest:
    """What follows from who is there, the same for all of them."""
    config = first.config
    held = config.placement.held_by(members)
    new_id = {expert: number for number, expert in enumerate(sorted(itertools.chain(*held)))}
    if not new_id:
        raise PeerLostError("no expert is left", rank=group.rank, operation="shrink")
    table = torch.tensor([new_id.get(expert, -1) for expert in range(config.num_experts)] + [-1], device=config.device)
    placement = ExpertPlacement.explicit([[new_id[expert] for expert in experts] for experts in held])
    survivors = Survivors(tuple(members), tuple(map(tuple, held)), table, first, renormalise)
    return Rest(group, place, placement, survivors, transport)
