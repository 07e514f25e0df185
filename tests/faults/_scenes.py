"""What the fault tests have in common: a small buffer, one right step whose bits are checked, and catching errors."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import moecomm
from moecomm.testing import assert_bitwise
from tests.faults._ranks import AT_ONCE, World

E, H, K, M = 6, 16, 2, 8
TRANSPORTS = ("symmetric", "collective")
VICTIM = 1  # the rank to which something happens


def patience(seconds: float) -> float:
    """How long something may take here and now that may take so long on an idle machine."""
    return seconds * max(1.0, max(os.getloadavg()[0], AT_ONCE) / (os.cpu_count() or 1))


def build(transport: str = "symmetric", **changed: Any) -> moecomm.Buffer:
    """A small buffer; `changed` are arguments that differ."""
    good: dict[str, Any] = {"num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": M}
    good |= {"dtype": torch.float32, "transport": transport, "timeout_s": 20.0}
    return moecomm.Buffer(**(good | changed))


def tokens_of(rank: int, round: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_idx and topk_weights of a rank: small integers and halves, so that every sum is exact."""
    generator = torch.Generator().manual_seed(1000 * round + rank)
    num_tokens = (5, 7, 0, 8)[(rank + round) % 4]
    x = torch.randint(-64, 64, (num_tokens, H), generator=generator).float()
    topk_idx = torch.randint(-1, E, (num_tokens, K), generator=generator)
    return x, topk_idx, torch.full((num_tokens, K), 0.5)


def right_step(buffer: moecomm.Buffer, world: World, round: int = 0) -> Any:
    """One dispatch and combine, all bits checked; what dispatch gave."""
    x, topk_idx, weights = tokens_of(world.rank, round)
    out: Any = buffer.dispatch(x, topk_idx, weights)
    assert_bitwise(out.x, rows_for(buffer, world, round), f"rows of round {round}")
    y = buffer.combine(out.x, out.handle)
    assert_bitwise(y, 0.5 * x * (topk_idx >= 0).sum(1, keepdim=True) + 0.0, f"sums of round {round}")
    return out


def rows_for(buffer: moecomm.Buffer, world: World, round: int = 0) -> Tensor:
    """What this rank must receive: by local expert, source rank, token, k."""
    sent = [tokens_of(rank, round) for rank in range(world.size)]
    rows = [
        x[token]
        for expert in buffer.config.placement.experts_of_rank[world.rank]
        for x, topk_idx, _ in sent
        for token, chosen in enumerate(topk_idx.tolist())
        for choice in chosen
        if choice == expert
    ]
    return torch.stack(rows) if rows else torch.empty(0, H)


@dataclass(frozen=True)
class Caught:
    """An error that a rank got, when, and what the buffer says afterwards."""

    error: moecomm.MoECommError
    seconds: float
    since_death_s: float = 0.0
    afterwards: moecomm.MoECommError | None = None

    @property
    def text(self) -> str:
        return str(self.error)


def catch(call: Callable[[], Any], world: World | None = None, buffer: moecomm.Buffer | None = None) -> Caught:
    """Call what must fail; with a buffer, ask it again afterwards; with a world, measure from the death of a rank."""
    start = time.monotonic()
    try:
        call()
    except moecomm.MoECommError as error:
        seconds, since = time.monotonic() - start, world.seconds_since_death() if world else 0.0
        afterwards = None
        if buffer is not None:
            afterwards = catch(lambda: buffer.dispatch(*tokens_of(0)[:2])).error
        return Caught(error, seconds, since, afterwards)
    raise AssertionError("it was not refused")


def loop(buffer: moecomm.Buffer, rank: int, between: Callable[[int], None] = lambda round: None) -> None:
    """Dispatch and combine until something stops it."""
    for round in range(10**6):
        x, topk_idx, weights = tokens_of(rank, round)
        out: Any = buffer.dispatch(x, topk_idx, weights)
        between(round)
        buffer.combine(out.x, out.handle)


def happen(event: str, buffer: moecomm.Buffer) -> None:
    """What happens to a rank by itself, of the events of the failure table."""
    if event == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "disagree":
        buffer.dispatch(*tokens_of(buffer.group.rank), align=2)
    if event == "exception":
        raise ValueError("a mistake between dispatch and combine")
    if event == "interrupt":
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()  # when it waits for the others
    if event == "abort":
        buffer.abort("enough")


def play(buffer: moecomm.Buffer, event: str, act: Callable[[], None]) -> tuple[str, float, str, str]:
    """The loop on one rank, in whose third round the victim acts.

    What it raised, when by the monotonic clock, what the buffer says then, what was printed.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    printed, rank = io.StringIO(), buffer.group.rank

    def between(round: int) -> None:
        if round == 3 and rank == VICTIM:
            act()
        elif round == 3 and event == "interrupt":
            time.sleep(1.0)

    kind = ""
    with contextlib.redirect_stderr(printed):
        try:
            with buffer:
                loop(buffer, rank, between)
        except BaseException as error:
            kind, text, ended = type(error).__name__, str(error), time.monotonic()
    mock.patch.stopall()
    try:
        buffer.dispatch(*tokens_of(rank))
        after = "it went on"
    except moecomm.MoECommError as error:
        after = f"{error} (it had raised: {text})"
    return kind, ended, after, printed.getvalue()
