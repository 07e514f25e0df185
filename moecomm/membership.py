"""Going on without dead ranks: the survivors agree who they are, and build the buffer anew among themselves.

The protocol is a rendezvous at one linearisable store, not a vote: everybody who calls says that it is here, waits for
those it does not believe dead, and proposes who is there; the first proposal counts, for all. So the members are always
the same for all of them, and each of them was alive when it came. What it cannot do: outlive the process that hosts the
store, or keep a rank that came too late; that one is told. docs/design/membership.md has the argument and the limits.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moecomm.board import Board
from moecomm.checks import INDEX_DTYPES, BufferConfig, Checker
from moecomm.core import Core
from moecomm.errors import AbortedError, PeerLostError, RoutingError, UnsupportedError
from moecomm.group import Group
from moecomm.placement import ExpertPlacement
from moecomm.plan import first_bad_entry

TRANSPORTS = ("symmetric", "simulated")

# ("write", key, value) gives None; ("wait", keys) the keys that are there, none if the deadline passed first; ("look",
# keys) the same at once; ("propose", key, value) the value that counts.
Request = tuple[Any, ...]


def rendezvous(rank: int, size: int, suspects: Sequence[int]) -> Generator[Request, Any, tuple[int, ...]]:
    """Find out who goes on: what one rank asks the store, request by request; gives the members.

    A generator, so that the very same code runs on a real store, and on one in which a test tries every order of
    requests, every death and every deadline.

    >>> steps = rendezvous(0, 2, suspects=[1])
    >>> next(steps)
    ('write', 'here/0', '1')
    >>> steps.send(None)
    ('look', ['here/0', 'here/1'])
    >>> steps.send({"here/0"})
    ('propose', 'members', '[0]')
    """
    yield "write", f"here/{rank}", "1"
    awaited = {f"here/{peer}" for peer in range(size) if peer != rank and peer not in suspects}
    while awaited:
        found = yield "wait", [*sorted(awaited), "members"]
        if not found or "members" in found:
            break
        awaited -= found
    everybody = [f"here/{peer}" for peer in range(size)]
    here = yield "look", everybody
    mine = json.dumps([peer for peer, key in enumerate(everybody) if key in here])
    told = yield "propose", "members", mine
    return tuple(json.loads(told))


def agree_on_members(group: Group, name: str, suspects: Sequence[int], timeout_s: float) -> tuple[int, ...]:
    """Run the rendezvous of a group at its store; the members, this rank among them.

    Raises:
        PeerLostError: the others went on without this rank, or the store is gone.
    """
    board: Board = group.board(name)
    steps = rendezvous(group.rank, group.size, suspects)
    answer: Any = None
    while True:
        try:
            what, *given = steps.send(answer)
        except StopIteration as end:
            members: tuple[int, ...] = end.value
            break
        if what == "write":
            answer = None
            board.write(given[0], given[1])
        elif what == "propose":
            answer = board.propose(given[0], given[1])
        else:
            answer = board.wait(given[0], timeout_s if what == "wait" else 0.0)
    if group.rank not in members:
        what = f"ranks {list(members)} went on without this rank, which came too late"
        raise PeerLostError(what, rank=group.rank, operation="shrink", peers=members)
    return members


@dataclass(frozen=True, eq=False)
class Survivors:
    """What a buffer knows after it shrank.

    members: the ranks that are left, numbered as when the buffer was built. table: (E + 1,) int64 what each expert id
    of then is called now, -1 if its rank is dead; the last entry is for -1. check: of the buffer as it was built.
    """

    members: tuple[int, ...]
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
    """What is left, and with what to build anew."""

    group: Group
    placement: ExpertPlacement
    survivors: Survivors

    def arguments(self, config: BufferConfig, transport: str) -> dict[str, Any]:
        """Those of the buffer, but for what changed."""
        names = {f.name for f in fields(config)} - {"byte_order"}  # which the machine gives, not the caller
        given = {name: getattr(config, name) for name in names} | {"topology": None, "transport": transport}
        return given | {"num_experts": self.placement.num_experts, "placement": self.placement}


def shrink(core: Core, check: Checker, before: Survivors | None, renormalise: bool, timeout_s: float | None) -> Rest:
    """Agree with the other survivors; the group, the placement and the translation with which to build anew."""
    group, name = core.transport.group, core.transport.name
    if name not in TRANSPORTS:
        raise UnsupportedError(
            f"a buffer on transport {name} cannot shrink",
            got=name,
            expected=f"one of {TRANSPORTS}",
            remedy="build a new Buffer in a process group without the dead rank",
            rank=group.rank,
        )
    core.abort("it shrinks")  # whoever waits in an operation hears that it is over
    failure = core.failure
    blamed = () if failure is None or isinstance(failure, AbortedError) else failure.peers
    suspects = [peer for peer in blamed if peer != group.rank]
    place = f"shrink/{core.transport.buffer_id:x}"
    wait_s = check.config.timeout_s if timeout_s is None else timeout_s
    members = agree_on_members(group, place, suspects, wait_s)
    held = check.config.placement.experts_of_rank
    left = [expert for member in members for expert in held[member]]
    if not left:
        raise PeerLostError("no expert is left", rank=group.rank, operation="shrink", peers=suspects)
    new_id = {expert: number for number, expert in enumerate(sorted(left))}
    now = torch.tensor([new_id.get(expert, -1) for expert in range(check.config.num_experts)] + [-1])
    placement = ExpertPlacement.explicit([[new_id[expert] for expert in held[member]] for member in members])
    if before is not None:
        now = now.to(before.table.device)[before.table]
        members_then = tuple(before.members[member] for member in members)
    else:
        members_then = members
    first_check = check if before is None else before.check
    survivors = Survivors(members_then, now.to(check.config.device), first_check, renormalise)
    return Rest(group.part(members, place), placement, survivors)
