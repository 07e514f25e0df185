"""How far one thread has filled what another one sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

EVERYTHING = 1 << 62
_HEAD_START_S = 0.01  # at most; a block that is sent first fills the link for longer than it takes to send it
_LOOK_S = 0.2  # how often the one who waits looks whether this was given up


@final
class Fill:
    """Counts rows: `reach` by the thread that fills, `wait` by the one that sends.

    Where cores are few, a thread that fills on and on keeps the other from sending, and the link is idle meanwhile. So
    the one that fills lets the other go first: it pauses after its first rows until these `left`, or a moment.

    >>> fill = Fill(lambda: False, timeout_s=1.0)
    >>> fill.reach(3)
    >>> fill.wait(2)
    True
    """

    def __init__(self, given_up: Callable[[], bool], timeout_s: float, *, pauses: bool = False) -> None:
        self._given_up, self._timeout_s = given_up, timeout_s
        self._left = threading.Event()
        self._pauses = pauses
        self._rows = -1
        self._changed = threading.Condition()

    def reach(self, rows: int) -> None:
        """Say that so many rows are there."""
        with self._changed:
            self._rows = rows
            self._changed.notify_all()
        if self._pauses and 0 < rows < EVERYTHING - 1:
            self._pauses = False
            self._left.wait(_HEAD_START_S)

    def left(self) -> None:
        """Say that the first rows are on their way."""
        self._left.set()

    def wait(self, rows: int) -> bool:
        """Wait for so many rows; False if they do not come in time, or never."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while self._rows < rows and not self._given_up() and time.monotonic() < deadline:
                self._changed.wait(_LOOK_S)
            return self._rows >= rows
