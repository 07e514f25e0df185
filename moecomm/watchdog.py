"""What a rank prints when it gives up: who waits for whom, since when, what each was last seen doing, and its stack.

Only the rank that finds out by itself prints; those that are told by it do not. Of several on one host that find out at
the same moment the first one prints.
"""

from __future__ import annotations

import socket
import sys
import time
import traceback
from typing import Any

from moecomm.errors import AbortedError, MoECommError, PeerLostError, StallError, rank_names
from moecomm.transport.base import Transport

_reported: list[socket.socket] = []  # names that are taken for as long as this process lives
_LONGEST_STACK = 12
_MOST_KEPT = 4  # long after a report nobody else is about to print one


def announce(transport: Transport, error: MoECommError) -> None:
    """Print the report of an error that this rank was the first to see."""
    worth_it = isinstance(error, (StallError, PeerLostError)) and not isinstance(error, AbortedError)
    if worth_it and error.told_by is None and _is_first(transport):
        print(report(transport, error), file=sys.stderr, flush=True)


def report(transport: Transport, error: MoECommError) -> str:
    """What is known when a rank gives up.

    >>> from moecomm.group import Group
    >>> from moecomm.transport.base import Transport
    >>> class Silent(Transport):
    ...     name, group = "silent", Group.resolve()
    >>> Silent.__abstractmethods__ = frozenset()
    >>> told = report(Silent.__new__(Silent), StallError("gave up", rank=0, operation="combine", seq=7, peers=[1]))
    >>> told.splitlines()[0][24:]
    'moecomm, rank 0 of 1 on silent: combine #7: gave up'
    """
    group, seen = transport.group, transport.last_seen()
    where = f"{error.operation or 'an operation'}" + ("" if error.seq is None else f" #{error.seq}")
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [f"--- {now} moecomm, rank {group.rank} of {group.size} on {transport.name}: {where}: {error.what}"]
    waits = f"rank {group.rank} waits for {rank_names(error.peers)}; " if error.peers else ""
    lines.append(f"  {waits}last seen:")
    for rank in range(group.size):
        if rank != group.rank and (rank in seen or rank in error.peers):
            lines.append(f"    rank {rank}: {seen.get(rank, 'nothing is known')}")
    lines.append(f"  what rank {group.rank} is doing:")
    lines += [f"    {line}" for line in _stack()]
    return "\n".join(lines)


def _stack() -> list[str]:
    """The frames of the caller, without those of this package and of torch."""
    frames = traceback.extract_stack()
    inside: tuple[Any, ...] = ("moecomm/", "/torch/", "contextlib.py")
    kept = [frame for frame in frames if not any(part in frame.filename for part in inside)]
    return [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in kept[-_LONGEST_STACK:]]


def _is_first(transport: Transport) -> bool:
    """Take a name that only one process of a host can have; it goes with the process."""
    if not transport.is_first_report():
        return False
    identity = transport.buffer_id
    if identity is None or not hasattr(socket, "AF_UNIX") or sys.platform != "linux":
        return True
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.bind(f"\0moecomm-report-{identity:x}")
    except OSError:
        sock.close()
        return False
    _reported.append(sock)
    while len(_reported) > _MOST_KEPT:
        _reported.pop(0).close()
    return True
