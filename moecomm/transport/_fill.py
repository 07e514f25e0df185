"""How far one side has filled what another one sends.

What moves an exchange is a generator: it yields how many rows for each other node must be filled before it goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import Generic, TypeVar, cast, final

T = TypeVar("T")

EVERYTHING = 1 << 62
AT_LAST = EVERYTHING + 1  # everything is filled, and the caller has nothing to do but wait
_LOOK_S = 0.2  # how often the one who waits looks whether this was given up


@final
class Fill:
    """Counts rows: `reach` by the thread that fills, `wait` by the one that sends.

    >>> fill = Fill(lambda: False, timeout_s=1.0)
    >>> fill.reach(3)
    >>> fill.wait(2)
    True
    """

    def __init__(self, given_up: Callable[[], bool], timeout_s: float) -> None:
        self._given_up, self._timeout_s = given_up, timeout_s
        self._rows = -1
        self._changed = threading.Condition()

    def reach(self, rows: int) -> None:
        """Say that so many rows are there."""
        with self._changed:
            self._rows = rows
            self._changed.notify_all()

    def wait(self, rows: int) -> bool:
        """Wait for so many rows; False if they do not come in time, or never."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while self._rows < rows and not self._given_up() and time.monotonic() < deadline:
                self._changed.wait(_LOOK_S)
            return self._rows >= rows


@final
class Turns(Generic[T]):
    """The same, where one thread does both: what moves gets its turn whenever what it waits for is filled.

    >>> def moves():
    ...     for rows in (0, 2, AT_LAST):
    ...         yield rows
    ...         print("goes on after", min(rows, 9))
    ...     return "done"
    >>> turns = Turns(moves(), lambda job: job())
    >>> turns.reach(1)
    goes on after 0
    >>> turns.result()
    goes on after 2
    goes on after 9
    'done'
    """

    def __init__(self, steps: Generator[int, None, T], guarded: Callable[[Callable[[], None]], None]) -> None:
        self._steps, self._guarded = steps, guarded
        self._wanted, self._done = -1, False

    def reach(self, rows: int) -> None:
        """Say that so many rows are there, and go on as far as that allows."""
        while not self._done and self._wanted <= rows:
            self._guarded(self._step)

    def _step(self) -> None:
        try:
            self._wanted = next(self._steps)
        except StopIteration as end:
            self._result, self._done = end.value, True

    def result(self) -> T:
        """Go on to the end."""
        self.reach(AT_LAST)
        return cast(T, self._result)
