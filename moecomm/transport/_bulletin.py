"""What the ranks of a broken group tell each other: who left, who gave up and why, who is still there.

It travels through the key-value store of a torch.distributed process group, because its backend does not say who is
missing. Nothing here blocks for long, also when the process that hosts the store has stopped.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, final

import torch.distributed as dist

from moecomm import errors
from moecomm.errors import MoECommError

T = TypeVar("T")

_ANSWER_S = 2.0  # what a store gets to answer; one that does not is not asked again
_SILENCE_S = 10.0  # how long nobody else asks it
ROLL_CALL_S = 1.5  # what the others get to say that they are there: who waits looks every half second
_LOOK_S = 0.02  # how often a roll call looks for answers


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a rank gave up. kind: name of an exception; peers: the ranks that caused it."""

    rank: int
    during: str
    kind: str
    what: str
    remedy: str | None
    peers: tuple[int, ...]

    @classmethod
    def of(cls, error: MoECommError, rank: int) -> Verdict:
        """That of a rank that raises an error."""
        during = f"{error.operation or 'an operation'}" + ("" if error.seq is None else f" #{error.seq}")
        return cls(rank, during, type(error).__name__, error.what, error.remedy, error.peers)

    def error(self, *, rank: int, operation: str, seq: int) -> MoECommError:
        """The error that another rank raises because of it."""
        kind: type[MoECommError] = getattr(errors, self.kind)
        who = "this rank" if rank in self.peers else f"ranks {list(self.peers)}"
        what = f"rank {self.rank} gave up in {self.during} because of {who}: {self.what}"
        return kind(what, remedy=self.remedy, rank=rank, operation=operation, seq=seq, peers=self.peers)


@final
class Bulletin:
    """The board of one buffer. The first verdict counts: all ranks raise the same error, also those that come late."""

    silent_s = -_SILENCE_S  # when a store of this process last did not answer: they are most likely the same one

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.is_silent = False  # the store does not answer any more
        self._is_here = False
        self._called_s: float | None = None  # when this rank began to call the roll
        Bulletin.silent_s = -_SILENCE_S  # the ranks have just met there

    def leave(self, num_operations: int) -> None:
        """Say that this rank closed its buffer after so many operations."""
        self._ask(lambda: self._store.set(f"left/{self._rank}", str(num_operations)), None)

    def left_before(self, operation: int) -> list[int]:
        """The ranks that closed their buffer and will not come to that operation."""

        return self._ask(lambda: self._left_before(operation), [])

    def _left_before(self, operation: int) -> list[int]:
        left = [rank for rank in range(self._size) if self._store.check([f"left/{rank}"])]
        return [rank for rank in left if int(self._store.get(f"left/{rank}")) <= operation]

    def look(self, operation: int, *, call_roll: bool, timeout_s: float) -> bool:
        """Whether there is no point in waiting for that operation: a rank has given up, or left before it.

        Answers a roll call, or begins one.
        """

        def ask() -> bool:
            if call_roll and self._called_s is None:
                self._called_s = time.monotonic()
                self._store.set("roll", "1")
            if not self._is_here and (call_roll or self._store.check(["roll"])):
                self._store.set(f"here/{self._rank}", "1")
                self._is_here = True
            return self._store.check(["trouble"]) or bool(self._left_before(operation))

        return self._ask(ask, False, min(timeout_s, _ANSWER_S))

    def verdict(self, timeout_s: float = 0.0) -> Verdict | None:
        """The verdict, if there is one; where somebody is about to find it, waits so long."""
        deadline = time.monotonic() + timeout_s

        def ask() -> Verdict | None:
            while not self._store.check(["verdict"]):
                if time.monotonic() >= deadline or not self._store.check(["trouble"]):
                    return None
                time.sleep(_LOOK_S)
            return _parse(self._store.get("verdict"))

        return self._ask(ask, None, timeout_s + _ANSWER_S)

    def publish(self, verdict: Verdict) -> Verdict:
        """Propose a verdict; the one that counts."""

        def ask() -> Verdict:
            self._store.set("trouble", "1")
            return _parse(self._store.compare_set("verdict", "", json.dumps(asdict(verdict))))

        return self._ask(ask, verdict)

    def call_roll(self) -> list[int] | None:
        """The ranks that do not answer, None if nobody knows. Does not wait where `look` began to call long enough ago.

        Those who wait, and those who saw the trouble, answer.
        """

        def ask() -> list[int]:
            self._store.set("roll", "1")
            self._store.set("trouble", "1")
            self._store.set(f"here/{self._rank}", "1")
            missing = [rank for rank in range(self._size) if rank != self._rank]
            while True:
                missing = [rank for rank in missing if not self._store.check([f"here/{rank}"])]
                if not missing or time.monotonic() >= deadline:
                    return missing
                time.sleep(_LOOK_S)

        deadline = ROLL_CALL_S + (time.monotonic() if self._called_s is None else self._called_s)
        return self._ask(ask, None, max(0.0, deadline - time.monotonic()) + _ANSWER_S)

    def _ask(self, ask: Callable[[], T], otherwise: T, timeout_s: float = _ANSWER_S) -> T:
        """What the store answers, or `otherwise`: one that is gone raises, one whose host has stopped never answers."""
        answers: list[T] = []

        def run() -> None:
            with contextlib.suppress(RuntimeError):  # DistError is one
                answers.append(ask())

        if self.is_silent or time.monotonic() - Bulletin.silent_s < _SILENCE_S:
            return otherwise
        if sys.is_finalizing():  # no thread begins any more, and up to Python 3.11 `start` waits for it
            return otherwise
        with contextlib.suppress(RuntimeError):  # the interpreter is about to end
            thread = threading.Thread(target=run, name="moecomm bulletin", daemon=True)
            thread.start()
            thread.join(timeout_s)
        if not answers and timeout_s >= _ANSWER_S:
            self.is_silent, Bulletin.silent_s = True, time.monotonic()
        return answers[0] if answers else otherwise


def _parse(text: bytes) -> Verdict:
    told: dict[str, Any] = json.loads(text)
    return Verdict(**{**told, "peers": tuple(told["peers"])})
