"""A few keys at one place that all ranks see, and on whose order they agree: what a rendezvous needs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, final

import torch.distributed as dist

from moecomm.errors import PeerLostError, StallError

T = TypeVar("T")

_LOOK_S = 0.002
_MAX_PAUSE_S = 0.002
_GRACE_S = 2.0  # what a store gets to answer; one whose host has stopped never does


class Wait:
    """The deadline of one operation, and how to spend the time until then."""

    def __init__(self, operation: str, rank: int, timeout_s: float) -> None:
        self.operation, self.rank, self.timeout_s = operation, rank, timeout_s
        self._end = time.monotonic() + timeout_s
        self._pause_s = 0.00005

    def pause(self) -> bool:
        """Yield the processor for a moment; return False once the deadline has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(self._pause_s, left))
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
        return True

    def end(self) -> None:
        """Nobody waits any more."""
        self._end = -math.inf

    def stall(self, peers: Sequence[int], did_not: str = "arrive") -> StallError:
        names = f"ranks {sorted(peers)}" if peers else "the key-value store of the process group"
        return StallError(
            f"{names} did not {did_not} in time",
            expected=f"all ranks within {self.timeout_s:g} s",
            remedy="look at what those ranks are doing, or raise timeout_s",
            rank=self.rank,
            operation=self.operation,
            peers=sorted(peers),
        )


class Board(Protocol):
    """Keys and values; every operation takes effect at one moment between its call and its return."""

    def write(self, key: str, value: str) -> None:
        """Write a key."""

    def wait(self, keys: Sequence[str], timeout_s: float, is_over: Callable[[], bool]) -> set[str]:
        """Those of the keys that are there, as soon as one is, or it is over, or at the deadline."""

    def propose(self, key: str, value: str) -> str:
        """Write a key unless it is there; what it then holds."""

    def read(self, key: str) -> str:
        """What a key holds that is known to be there."""


@final
class StoreBoard:
    """A board in a torch.distributed store.

    >>> board = StoreBoard(dist.HashStore(), rank=0)
    >>> board.write("here", "1")
    >>> sorted(board.wait(["here", "there"], 1.0, bool)), board.propose("chosen", "a"), board.propose("chosen", "b")
    (['here'], 'a', 'a')
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def write(self, key: str, value: str) -> None:
        """Write a key."""
        self._ask(lambda: self._store.set(key, value), 0.0)

    def wait(self, keys: Sequence[str], timeout_s: float, is_over: Callable[[], bool]) -> set[str]:
        """Those of the keys that are there, as soon as one is, or it is over, or at the deadline."""
        deadline = time.monotonic() + timeout_s
        left = threading.Event()

        def look() -> set[str]:
            while not (found := {key for key in keys if self._store.check([key])}) and time.monotonic() < deadline:
                if is_over() or left.wait(_LOOK_S):
                    break
            return found

        try:
            return self._ask(look, timeout_s)
        finally:
            left.set()

    def propose(self, key: str, value: str) -> str:
        """Write a key unless it is there; what it then holds."""
        return self._ask(lambda: self._store.compare_set(key, "", value), 0.0).decode()

    def read(self, key: str) -> str:
        """What a key holds that is known to be there."""
        return self._ask(lambda: self._store.get(key), 0.0).decode()

    def _ask(self, step: Callable[[], T], timeout_s: float) -> T:
        """Ask in a thread of its own: a store whose host has stopped blocks whoever asks."""
        answers: list[T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                answers.append(step())
            except Exception as error:  # handed to the caller below
                errors.append(error)

        thread = threading.Thread(target=run, name="moecomm board", daemon=True)
        thread.start()
        thread.join(timeout_s + _GRACE_S)
        if answers:
            return answers[0]
        what = "the key-value store of the process group is gone, or does not answer"
        cause = errors[0] if errors else None
        raise PeerLostError(what, remedy="start the job again", rank=self._rank, operation="rendezvous") from cause
