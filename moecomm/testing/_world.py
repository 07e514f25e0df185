"""Ranks as threads of which one runs at a time, in virtual time: what happens when is a function of one seed.

A rank runs until it waits. Then the next one that can run is drawn; when none can, the clock jumps to the next event:
a message arrives, a deadline passes, the death of a rank becomes known. Computing takes no time.
"""

from __future__ import annotations

import heapq
import random
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Deliver = Callable[[], object]


class Killed(BaseException):
    """Ends the thread of a rank that is killed; nothing in between may take it for an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """What goes wrong in a simulated world; probabilities are per message with rows or counts.

    Attributes:
        delay_s: a message takes up to so many seconds, drawn for each: the larger, the more they overtake each other.
        fragments: rows of one rank for another travel in up to so many messages of their own.
        duplicate: probability that a message arrives twice, the second time later.
        drop: probability that it never arrives.
        corrupt: probability that one byte of it changes on the way.
        kills: rank -> the step at which it dies: every wait and every message sent is one.
        notice_s: seconds until the death of a rank is known to its peers, up to; None: nobody ever tells them.

    >>> Faults(drop=0.5).drop, Faults().kills
    (0.5, {})
    """

    delay_s: float = 0.001
    fragments: int = 1
    duplicate: float = 0.0
    drop: float = 0.0
    corrupt: float = 0.0
    kills: Mapping[int, int] = field(default_factory=dict)
    notice_s: float | None = 0.01


@dataclass(slots=True)
class Outcome:
    """What became of a simulated rank: what it returned, or what it raised, or that it was killed.

    >>> Outcome(result=3).went_well, Outcome(killed=True).went_well
    (True, False)
    """

    result: Any = None
    error: BaseException | None = None
    trace: str = ""
    killed: bool = False

    @property
    def went_well(self) -> bool:
        """Whether it returned."""
        return self.error is None and not self.killed


class World:
    """Threads, clock and wire of one simulation."""

    def __init__(self, num_ranks: int, seed: int, faults: Faults) -> None:
        self.num_ranks, self.faults = num_ranks, faults
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.num_messages = self.num_switches = 0
        self.alive = [True] * num_ranks
        self.known_dead: list[set[int]] = [set() for _ in range(num_ranks)]  # to each rank
        self.outcomes = [Outcome() for _ in range(num_ranks)]
        self.shared: dict[Any, Any] = {}  # what groups and transports of this world keep
        self._steps = [0] * num_ranks
        self._num_events = 0
        self._events: list[tuple[float, float, int, Deliver]] = []
        self._runnable = list(range(num_ranks))
        self._blocked: dict[int, Callable[[], bool]] = {}
        self._go = [_closed_gate() for _ in range(num_ranks)]
        self._back = _closed_gate()
        self._is_over = False

    # -- what ranks call -------------------------------------------------------------------------------------------

    def wait(self, rank: int, until: Callable[[], bool], timeout_s: float) -> bool:
        """Let the others run until something holds; False once the deadline has passed."""
        self._step(rank)
        deadline_s = self.now_s + timeout_s
        self.after(timeout_s, lambda: self._expire(rank, deadline_s))
        while not until():
            if self.now_s >= deadline_s:
                return False
            self._blocked[rank] = until
            self._pause(rank)
        return True

    def send(self, src: int, dst: int, deliver: Deliver, *, faulty: bool = False, is_last: bool = False) -> None:
        """Send a message; only where it may be `faulty` it is ever lost or doubled; the last one overtakes none."""
        if self._is_over or not self.alive[src]:
            return
        self._step(src)
        draw, faults = self.random.random, self.faults
        self.num_messages += 1
        for copy in range(2):
            if (copy and draw() >= faults.duplicate) or (faulty and draw() < faults.drop):
                continue
            if not copy or faulty:
                delay_s = (copy + 2 * is_last + draw()) * faults.delay_s
                self.after(delay_s, lambda: self._arrive(dst, deliver), is_last=is_last)

    def after(self, seconds: float, action: Deliver, *, is_last: bool = False) -> None:
        """Do something later; what falls on the same moment is done in any order, but for the last."""
        self._num_events += 1
        order = is_last + self.random.random()
        heapq.heappush(self._events, (self.now_s + seconds, order, self._num_events, action))

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, call: Callable[[int], Any]) -> None:
        """Call it on every rank and return when all have ended."""
        threads = [
            threading.Thread(target=self._be_rank, args=(rank, call), name=f"simulated rank {rank}", daemon=True)
            for rank in range(self.num_ranks)
        ]
        for thread in threads:
            thread.start()
        unfinished = self.num_ranks
        try:
            while unfinished:
                if self._runnable:
                    at = self.random.randrange(len(self._runnable))
                    self._runnable[at], self._runnable[-1] = self._runnable[-1], self._runnable[at]
                    unfinished -= self._resume(self._runnable.pop())
                else:
                    self.now_s, _, _, action = heapq.heappop(self._events)
                    action()
        finally:
            self._is_over = True
            for rank in [*self._runnable, *self._blocked]:
                self._resume(rank)
            for thread in threads:
                thread.join()

    def _resume(self, rank: int) -> bool:
        """Let a rank run; whether it has ended."""
        self.num_switches += 1
        self._go[rank].release()
        self._back.acquire()
        return self._steps[rank] < 0

    def _be_rank(self, rank: int, call: Callable[[int], Any]) -> None:
        self._go[rank].acquire()
        outcome = self.outcomes[rank]
        try:
            self._step(rank)
            outcome.result = call(rank)
        except Killed:
            outcome.killed = True
        except BaseException as error:
            outcome.error, outcome.trace = error, traceback.format_exc()
        self._steps[rank] = -1
        self._back.release()

    def _pause(self, rank: int) -> None:
        self._back.release()
        self._go[rank].acquire()
        if self._is_over:
            raise Killed

    def _step(self, rank: int) -> None:
        """Count what a rank does, and kill it where that is due."""
        if self._is_over or not self.alive[rank]:
            raise Killed
        self._steps[rank] += 1
        if self._steps[rank] == self.faults.kills.get(rank):
            self.alive[rank] = False
            for peer in range(self.num_ranks):
                if self.faults.notice_s is not None and peer != rank:
                    self._tell_death(peer, rank)
            raise Killed

    def _tell_death(self, peer: int, dead: int) -> None:
        assert self.faults.notice_s is not None
        notice_s = self.random.random() * self.faults.notice_s
        self.after(notice_s, lambda: self._arrive(peer, lambda: self.known_dead[peer].add(dead)))

    def _arrive(self, rank: int, deliver: Deliver) -> None:
        deliver()
        if rank in self._blocked and self._blocked[rank]():
            self._wake(rank)

    def _expire(self, rank: int, deadline_s: float) -> None:
        if rank in self._blocked and self.now_s >= deadline_s:
            self._wake(rank)

    def _wake(self, rank: int) -> None:
        del self._blocked[rank]
        self._runnable.append(rank)


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate
