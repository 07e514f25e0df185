"""A model of the signal protocol, explored state by state.

Every rank runs a list of kernels, one after another; the programs of a kernel run in any interleaving (or one after
another in any order). A program that pushes writes its part of every peer's buffer and then arrives, which only its own
rank sees and so is no step of its own; the last to arrive signals every peer. A program that waits polls all signals of
this rank and then reads its part of every source's data.

What makes it more than an interleaving: memory is weak. Each piece of data goes through stages, and who is not ordered
behind the step before by a release and an acquire must not go on:

    FREE -> write -> WRITTEN -> signal (release) -> SENT -> poll (acquire) -> THERE -> read -> READ
         <- poll (acquire) <- RELEASED <- the reader's next signal (release) <-

A rank's rows for itself need no signal once the kernel that wrote or read them has ended.
A write to data that is not FREE is a lost or torn row; a read of data that is not THERE, or of another operation's, is
a row that was read too early or overwritten; a state from which nothing can happen before all is done is a deadlock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

FREE, WRITTEN, SENT, THERE, READ, RELEASED = range(6)
Step = tuple[str, int]
TURNS = {  # what becomes of every byte, operation * 8 + stage, when one stage is the next
    (old, new): bytes(byte - old + new if byte % 8 == old else byte for byte in range(256))
    for old, new in ((WRITTEN, SENT), (SENT, THERE), (WRITTEN, THERE), (READ, RELEASED), (RELEASED, FREE), (READ, FREE))
}


def everybody(source: int, destination: int, operation: int) -> bool:
    """Every rank has rows for every rank."""
    return True


def downhill(source: int, destination: int, operation: int) -> bool:
    """Rows go from lower to higher ranks only."""
    return source < destination


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is explored; the defaults are the protocol of the kernels.

    operations: how many, 1 and up. generations: of buffers, in turn. ahead: operations that a rank may have sent
    without having waited for them. programs: of every kernel. one_by_one: programs run one after another, in any order.
    fine: one step per peer instead of one for all peers. equal: wait for exactly the number instead of at least it.
    early: the first program to arrive signals, not the last. relaxed: signals without release and acquire. fused: one
    kernel sends and waits. lazy: signal, and wait for, only ranks that rows go to or come from. odd_one: a rank and the
    operation in which it does something else than the others. blind: tags are not compared. sends: who has rows for
    whom.
    """

    world: int
    operations: int = 4
    generations: int = 2
    ahead: int = 1
    programs: int = 2
    one_by_one: bool = False
    fine: bool = False
    equal: bool = False
    early: bool = False
    relaxed: bool = False
    fused: bool = False
    lazy: bool = False
    odd_one: tuple[int, int] = (-1, -1)
    blind: bool = False
    sends: Callable[[int, int, int], bool] = everybody

    def __str__(self) -> str:
        """What is not as usual."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return " ".join(f"{n}={getattr(v, '__name__', v)}" for n, (v, usual) in values.items() if v != usual)

    def kernels(self) -> list[tuple[str, int]]:
        """What every rank launches, in order."""
        numbers = range(1, self.operations + 1)
        if self.fused:
            return [("both", n) for n in numbers]
        found = [("push", n) for n in numbers[: self.ahead]]
        for n in numbers:
            found.append(("wait", n))
            if n + self.ahead <= self.operations:
                found.append(("push", n + self.ahead))
        return found

    def steps(self, kind: str) -> list[Step]:
        """What a program of a kernel does; -1: all peers at once."""
        peers = list(range(self.world)) if self.fine else [-1]
        push = [("write", q) for q in peers] + [("signal", q) for q in range(self.world)]
        wait = [("poll", 0)] + [("read", q) for q in peers]
        return {"push": push, "wait": wait, "both": push + wait}[kind]


class State(NamedTuple):
    """Everything, as bytes: a state is kept for every one of up to millions.

    ranks: per rank its kernel, the programs that have arrived, and the next step of every program. signals: word
    [receiver][source]. data: operation * 8 + stage of [receiver][source][generation][part].
    """

    ranks: bytes
    signals: bytes
    data: bytes


class Fault(Exception):
    """The protocol breaks here."""


@dataclass(frozen=True)
class Result:
    """How many states there are; the first fault, and the steps that lead to it."""

    states: int
    fault: str | None
    trace: tuple[str, ...]


class Model:
    """The transitions of a protocol."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.kernels = protocol.kernels()
        self.steps = {kind: protocol.steps(kind) for kind in ("push", "wait", "both")}

    def start(self) -> State:
        """Nothing sent, nothing read."""
        p = self.protocol
        slots = p.world * p.world * p.generations * p.programs
        return State(bytes(p.world * (2 + p.programs)), bytes(p.world * p.world), bytes([FREE] * slots))

    def place(self, receiver: int, source: int, operation: int, part: int) -> int:
        """Index into `data`."""
        p = self.protocol
        return ((receiver * p.world + source) * p.generations + operation % p.generations) * p.programs + part

    def likeness(self, state: State) -> State:
        """The same state for all that differ in which of two programs is the first, on all ranks alike."""
        if self.protocol.programs != 2:
            return state
        ranks, data = bytearray(state.ranks), bytearray(state.data)
        ranks[2::4], ranks[3::4] = state.ranks[3::4], state.ranks[2::4]
        if ranks > state.ranks:
            return state
        data[::2], data[1::2] = state.data[1::2], state.data[::2]
        return min(state, State(bytes(ranks), state.signals, bytes(data)))

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        """All states one step further; raises Fault where a step breaks the protocol."""
        width = 2 + self.protocol.programs
        for r in range(self.protocol.world):
            kernel, _, *programs = state.ranks[r * width : (r + 1) * width]
            if kernel == len(self.kernels):
                continue
            kind, n = self.kernels[kernel]
            steps = self.steps[kind]
            busy = [i for i, at in enumerate(programs) if 0 < at < len(steps)]
            for i, at in enumerate(programs):
                if at == len(steps) or (self.protocol.one_by_one and busy and i not in busy):
                    continue
                further = self.take(state, r, i, n, steps)
                if further is not None:
                    yield f"rank {r} {kind} {n} program {i}: {steps[at][0]} {steps[at][1]}", further

    def take(self, state: State, r: int, i: int, n: int, steps: list[Step]) -> State | None:
        """The state after one step of program i of rank r in operation n; None if it has to wait."""
        width = 2 + self.protocol.programs
        rank = bytearray(state.ranks[r * width : (r + 1) * width])
        name, q = steps[rank[2 + i]]
        skip = 1
        if name == "write":
            state = self.write(state, r, i, n, self.some(q))
            if steps[rank[2 + i] + 1][0] == "signal":  # it has written all, and arrives
                rank[1] += 1
                chosen = 1 if self.protocol.early else self.protocol.programs
                skip = 1 if rank[1] == chosen else 1 + self.protocol.world
        elif name == "signal":
            state = self.signal(state, r, q, n)
        elif name == "poll":
            if not self.protocol.blind and self.another_tag(state, r, n):  # note it, send no more
                stopped = bytes([len(self.kernels)] + [0] * (width - 1))
                return state._replace(ranks=state.ranks[: r * width] + stopped + state.ranks[(r + 1) * width :])
            if not self.all_signalled(state, r, n):
                return None
            state = self.acquire(state, r, n)
        else:
            state = self.read(state, r, i, n, self.some(q))
        rank[2 + i] += skip
        if name in ("write", "signal") and steps[rank[2 + i] :][:1] == [("signal", r)]:
            state = self.signal(state, r, r, n)
            rank[2 + i] += 1
        if all(at == len(steps) for at in rank[2:]):  # a stream runs one kernel after another
            rank = bytearray([rank[0] + 1] + [0] * (width - 1))
            state = self.turn(self.turn(state, r, r, WRITTEN, THERE), r, r, READ, FREE)
        ranks = state.ranks[: r * width] + bytes(rank) + state.ranks[(r + 1) * width :]
        return State(ranks, state.signals, state.data)

    def some(self, q: int) -> range:
        return range(self.protocol.world) if q < 0 else range(q, q + 1)

    def write(self, state: State, r: int, i: int, n: int, peers: range) -> State:
        data = bytearray(state.data)
        for q in peers:
            if not self.protocol.sends(r, q, n):
                continue
            place = self.place(q, r, n, i)
            was, stage = divmod(data[place], 8)
            if stage in (WRITTEN, SENT, THERE):
                raise Fault(f"operation {was} of rank {r} at rank {q} is overwritten before it is read")
            if stage != FREE:
                raise Fault(
                    f"operation {was} of rank {r} at rank {q} is overwritten by a rank that cannot know it is read"
                )
            data[place] = n * 8 + WRITTEN
        return state._replace(data=bytes(data))

    def signal(self, state: State, r: int, q: int, n: int) -> State:
        """Release what rank r wrote for rank q, and what it has read of rank q's."""
        if self.protocol.lazy and not self.protocol.sends(r, q, n):
            return state
        signals = bytearray(state.signals)
        signals[q * self.protocol.world + r] = n
        state = state._replace(signals=bytes(signals))
        return self.turn(self.turn(state, q, r, WRITTEN, SENT), r, q, READ, RELEASED)

    def all_signalled(self, state: State, r: int, n: int) -> bool:
        p = self.protocol
        for source in range(p.world):
            if p.lazy and not p.sends(source, r, n):
                continue
            seen = state.signals[r * p.world + source]
            if seen != n if p.equal else seen < n:
                return False
        return True

    def tag(self, rank: int, operation: int) -> bool:
        """What a rank's operation is: one of two things."""
        return self.protocol.odd_one == (rank, operation)

    def another_tag(self, state: State, r: int, n: int) -> bool:
        """Whether a rank stands at operation n, with another tag than rank r."""
        seen = state.signals[r * self.protocol.world : (r + 1) * self.protocol.world]
        return any(at == n and self.tag(source, n) != self.tag(r, n) for source, at in enumerate(seen))

    def acquire(self, state: State, r: int, n: int) -> State:
        """See what the signals of all ranks released: rows for rank r, and that its own rows were read."""
        for source in range(self.protocol.world):
            if not self.protocol.lazy or self.protocol.sends(source, r, n):
                state = self.turn(self.turn(state, r, source, SENT, THERE), source, r, RELEASED, FREE)
        return state

    def turn(self, state: State, receiver: int, source: int, old: int, new: int) -> State:
        """Move all data between two ranks from one stage to the next."""
        if self.protocol.relaxed:
            return state
        first = self.place(receiver, source, 0, 0)
        last = first + self.protocol.generations * self.protocol.programs
        data = state.data
        moved = data[first:last].translate(TURNS[old, new])
        return (
            state
            if moved == data[first:last]
            else State(state.ranks, state.signals, data[:first] + moved + data[last:])
        )

    def read(self, state: State, r: int, i: int, n: int, sources: range) -> State:
        data = bytearray(state.data)
        for source in sources:
            if not self.protocol.sends(source, r, n):
                continue
            place = self.place(r, source, n, i)
            was, stage = divmod(data[place], 8)
            if self.tag(source, n) != self.tag(r, n):
                raise Fault(f"rank {r} takes operation {n} of rank {source} for another one")
            if was != n or stage != THERE:
                raise Fault(f"rank {r} reads operation {n} of rank {source} and finds {was} in stage {stage}")
            data[place] = n * 8 + READ
        return state._replace(data=bytes(data))


def explore(protocol: Protocol, limit: int = 1_500_000) -> Result:
    """Visit every state that can be reached, breadth first, until a fault is found.

    Of states in which only the programs have other numbers, one is visited: no step looks at the number of a program.
    """
    model = Model(protocol)
    start = model.start()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        alive = False
        try:
            for name, further in model.successors(state):
                alive = True
                further = model.likeness(further)
                if further not in came_from:
                    came_from[further] = state, name
                    queue.append(further)
        except Fault as fault:
            return Result(len(came_from), str(fault), _trace(came_from, state))
        if not alive and any(kernel < len(model.kernels) for kernel in state.ranks[:: 2 + protocol.programs]):
            return Result(len(came_from), "deadlock", _trace(came_from, state))
        assert len(came_from) <= limit, f"more than {limit} states"
    return Result(len(came_from), None, ())


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    names, step = [], came_from[state]
    while step is not None:
        names.append(step[1])
        step = came_from[step[0]]
    return tuple(reversed(names))
