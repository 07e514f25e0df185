"""Hear of it at once when a peer ends, while kernels wait for its signals and this process does something else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, final

from moecomm.errors import MoECommError
from moecomm.group import Group
from moecomm.memory.channel import Channel

_LISTEN_S = 60.0


@final
class Watch:
    """A thread that sleeps until a peer ends; `tell` is called there, once for each.

    Made by all ranks at the same time. It never looks at messages between living ranks: those are the kernels' signals.
    """

    def __init__(self, group: Group, timeout_s: float, tell: Callable[[int], None]) -> None:
        self._ended: list[int] = []
        self._closing = False
        fd = os.open(os.devnull, os.O_RDONLY)  # a channel hands memory around; there is none here
        try:
            self._channel = Channel(group, range(group.size), timeout_s, fd, 0)
        finally:
            os.close(fd)
        self._channel.close_descriptors()
        self._thread = threading.Thread(target=self._listen, args=(tell,), name="moecomm watch", daemon=True)
        if self._channel.peers:
            self._thread.start()

    @property
    def ended(self) -> list[int]:
        """The peers that have ended so far."""
        return self._ended

    def raise_ended(self, ended: Sequence[int], seq: int, tag: str) -> NoReturn:
        """Raise what became of peers that have ended, and tell the others."""
        self._channel.raise_ended(ended, seq, tag)

    def abort(self, error: MoECommError) -> None:
        """Tell the peers why this rank gives up."""
        self._channel.abort(error)

    def close(self) -> None:
        """Say goodbye, and end the thread."""
        self._closing = True
        self._channel.leave()
        if self._thread.is_alive():
            self._thread.join()
        self._channel.close()

    def _listen(self, tell: Callable[[int], None]) -> None:
        while not self._closing and len(self._ended) < len(self._channel.peers):
            for peer in self._channel.ends(_LISTEN_S):
                if peer not in self._ended and not self._closing:
                    tell(peer)
                    self._ended = [*self._ended, peer]
