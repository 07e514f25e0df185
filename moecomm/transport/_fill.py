"""How far one thread has filled what another one sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

EVERYTHING = 1 << 62
_LOOK_S = 0.2  # how often the one who waits looks whether this was given up
_PATIENCE_S = 0.02  # for how long in all the one who fills lets the other go first


@final
class Fill:
    """Counts rows: `reach` by the thread that fills, `wait` by the one that sends.

    Where cores are few, a thread that fills on and on keeps the other from sending, and the link is idle meanwhile. So
    the one that fills lets the other go first: while that one has the rows that it asked for, this one pauses.

    >>> fill = Fill(lambda: False, timeout_s=1.0)
    >>> fill.reach(3)
    >>> fill.wait(2)
    True
    """

    def __init__(self, given_up: Callable[[], bool], timeout_s: float, *, pauses: bool = False) -> None:
        self._given_up, self._timeout_s = given_up, timeout_s
        self._rows, self._wanted = -1, 0
        self._patience_s = _PATIENCE_S if pauses else 0.0
        self._changed = threading.Condition()

    def reach(self, rows: int) -> None:
        """Say that so many rows are there."""
        with self._changed:
            self._rows = rows
            self._changed.notify_all()
            if 0 < rows < EVERYTHING - 1 and self._patience_s > 0:
                start = time.monotonic()
                self._changed.wait_for(lambda: self._wanted > rows, self._patience_s)
                self._patience_s -= time.monotonic() - start

    def wait(self, rows: int) -> bool:
        """Wait for so many rows; False if they do not come in time, or never."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            if rows > self._wanted:
                self._wanted = rows
                self._changed.notify_all()
            while self._rows < rows and not self._given_up() and time.monotonic() < deadline:
                self._changed.wait(_LOOK_S)
            return self._rows >= rows
