"""Events as DeepEP's callers pass them around: where an accelerator has streams they order them, elsewhere work is done
when a call returns and there is nothing to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch


@final
class EventHandle:
    """A point on the stream that is current when this is made.

    >>> EventHandle().current_stream_wait()
    """

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self._event = None if accelerator is None else torch.Event(accelerator)
        if self._event is not None:
            self._event.record()

    def current_stream_wait(self) -> None:
        """Let the current stream go on after that point only."""
        if self._event is not None:
            torch.accelerator.current_stream().wait_event(self._event)


@final
class EventOverlap:
    """An `EventHandle` or None, with what has to stay alive until it has passed.

    event: None after a call that was not asynchronous. extra_tensors: kept as they are.

    >>> with EventOverlap(EventHandle()) as event:
    ...     pass  # what overlaps; leaving waits
    >>> event.event is not None, EventOverlap().event
    (True, None)
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors
        self._after_wait: list[Callable[[], Any]] = []
        self._release = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Wait on the current stream, then run the hooks; release_handle: let go of the event and the tensors."""
        if self.event is not None:
            self.event.current_stream_wait()
        hooks, self._after_wait = self._after_wait, []
        for hook in hooks:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None

    def register_hook_after_wait(self, hook: Callable[[], Any]) -> None:
        """Run `hook()` once, after the next wait."""
        self._after_wait.append(hook)

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Say what the end of a `with` block does beside waiting."""
        self._release = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        release, self._release = self._release, False
        self.current_stream_wait(release)


def finished(asynchronous: bool, *extra_tensors: torch.Tensor) -> EventOverlap:
    """The event of a call: on the current stream, or none if the caller asked for none."""
    return EventOverlap(EventHandle(), extra_tensors or None) if asynchronous else EventOverlap()


def begin_after(event: EventOverlap | EventHandle | None) -> None:
    """Start behind an event that the caller names."""
    if event is not None:
        event.current_stream_wait()
