"""The failure table: what happens on each transport when something goes wrong. Tests fill every cell; docs print it.

python -m tests.faults._table > docs/failures.md
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

TRANSPORTS = ("symmetric", "collective", "mpi", "hierarchical", "simulated")
TIMEOUT_S = 4.0  # timeout_s of the buffers where something waits for it
PATIENCE_S = 30.0  # elsewhere: all ranks must get so far that something can happen, also on a busy machine


@dataclass(frozen=True)
class Event:
    """One row of the table.

    happens: what the reader sees. peers_get, culprit_gets: names of exceptions on the other ranks and on the one where
    it happened ("" if nobody is left to get one). bound_s: seconds until the last rank has it, by transport, without
    `timeout_s`; waits: whether that much comes on top. afterwards: what can still be used.
    """

    happens: str
    peers_get: str
    culprit_gets: str
    bound_s: dict[str, float]
    afterwards: str
    waits: bool = False


NEW = "survivors: on symmetric and simulated `shrink()`, then `admit()` a replacement; else a new Buffer in a new group"
BUILD = "nothing is lost but the buffer: build a new one"
SOON = {"symmetric": 1.0, "collective": 4.0, "mpi": 2.0, "hierarchical": 4.0, "simulated": 1.0}

EVENTS: dict[str, Event] = {
    "killed": Event("a peer is killed (`kill -9`)", "PeerLostError", "", SOON, NEW),
    "hung": Event("a peer hangs (stopped, or busy elsewhere)", "StallError", "", SOON, NEW, waits=True),
    "cut": Event(
        "the connections of a rank are cut",
        "PeerLostError",
        "PeerLostError",
        SOON,
        BUILD + " in a new process group",
    ),
    "disagree": Event(
        "ranks pass different arguments", "DesyncError", "DesyncError", SOON, BUILD + "; the process group is as it was"
    ),
    "memory": Event("out of memory on one rank", "PeerLostError", "MemoryError", SOON, BUILD),
    "exception": Event(
        "an exception in user code between dispatch and combine", "AbortedError", "ValueError", SOON, BUILD
    ),
    "interrupt": Event("Ctrl-C on one rank while it waits", "PeerLostError", "KeyboardInterrupt", SOON, BUILD),
    "abort": Event("`buffer.abort()` on one rank", "AbortedError", "AbortedError", SOON, BUILD),
}

# Cells that are not what the row says, and why.
EXCEPTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("cut", "simulated"): ("StallError", "messages are lost for good, which only the deadline tells"),
    ("cut", "mpi"): (
        "PeerLostError",
        "the connections are those of MPI; tested is that it reports an error on one rank",
    ),
    ("killed", "mpi"): ("PeerLostError", "where the launcher lets the others live; MPICH's does not by itself"),
}


def timeout_s(event: str) -> float:
    """`timeout_s` of the buffers of a row."""
    return TIMEOUT_S if EVENTS[event].waits else PATIENCE_S


def expected(event: str, transport: str) -> str:
    """What the peers get."""
    return EXCEPTIONS.get((event, transport), (EVENTS[event].peers_get, ""))[0]


def bound_s(event: str, transport: str) -> float:
    """Seconds within which the last rank has its error."""
    waits = EVENTS[event].waits or expected(event, transport) == "StallError"
    return EVENTS[event].bound_s[transport] + TIMEOUT_S * waits


INTRODUCTION = """
Every cell is a test in `tests/faults/test_table.py` (`mpi`: `test_mpi_faults.py`), on three ranks in the middle of
a loop of dispatch and combine; this page is printed from the same table (`python -m tests.faults._table`). A cell
says what the other ranks raise, and within how many seconds the last of them has it; T is `timeout_s`. Times on
`simulated` are virtual. After any of these errors the buffer refuses to go on and says why; it never gives out
wrong rows.
"""


def render() -> str:
    """The page."""
    lines = [
        "# What happens when something goes wrong",
        "",
        *textwrap.wrap(INTRODUCTION.strip(), 115),
        "",
        "| what happens | " + " | ".join(f"`{name}`" for name in TRANSPORTS) + " | the rank itself | afterwards |",
        "|---" * (len(TRANSPORTS) + 3) + "|",
    ]
    for name, event in EVENTS.items():
        cells = []
        for transport in TRANSPORTS:
            waits = "T + " * (event.waits or expected(name, transport) == "StallError")
            cells.append(f"{expected(name, transport)}, {waits}{event.bound_s[transport]:g} s")
        itself = event.culprit_gets or "-"
        lines.append(f"| {event.happens} | {' | '.join(cells)} | {itself} | {event.afterwards} |")
    lines += ["", *(f"* {name} on `{transport}`: {why}." for (name, transport), (_, why) in EXCEPTIONS.items())]
    lines += [
        "* Refused arguments (wrong shape, dtype, expert id, too many tokens) raise ConfigError, RoutingError or",
        "  CapacityError before anything is sent, on the rank that passed them; the buffer goes on.",
        "* The cells of `mpi` are in `tests/faults/test_mpi_faults.py`, which also has ranks that are stopped, late or",
        "  leave, and a death before and among rows.",
        "* `symmetric` on a GPU (rows moved by kernels): a late rank is StallError and a closed one PeerLostError",
        "  there too, with static sizes, on two ranks that shared an H200 (`tests/gpu`); the rest has only been run",
        "  in Triton's interpreter.",
        "",
        "The first rank that notices prints one report to standard error: who waits for whom, the operation and",
        "sequence number in which every rank was last seen, and the Python stack of the rank that prints. The others,",
        "who are told by it, print nothing.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
