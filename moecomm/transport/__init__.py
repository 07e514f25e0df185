"""The transports, and how one of them is chosen."""

from __future__ import annotations

import torch

from moecomm.errors import ConfigError, UnsupportedError
from moecomm.group import Group
from moecomm.topology import Topology
from moecomm.transport.base import Support, Transport
from moecomm.transport.collective import CollectiveTransport
from moecomm.transport.local import LocalTransport
from moecomm.transport.mpi import MpiTransport
from moecomm.transport.symmetric import SymmetricTransport

# In the order in which "auto" asks them: the fewest copies first. A group is one of MPI or of torch.distributed, so
# of the last two only one can ever work.
TRANSPORTS: dict[str, type[Transport]] = {
    cls.name: cls for cls in (LocalTransport, SymmetricTransport, MpiTransport, CollectiveTransport)
}


def select(
    name: str, group: Group, topology: Topology, device: torch.device
) -> tuple[type[Transport], dict[str, Support]]:
    """Choose a transport: the named one, or for "auto" the first that works; and what each of them answered."""
    if name != "auto" and name not in TRANSPORTS:
        expected = f"auto or one of {tuple(TRANSPORTS)}"
        remedy = "correct this argument, or MOECOMM_TRANSPORT"
        raise ConfigError("transport is unknown", got=repr(name), expected=expected, remedy=remedy, rank=group.rank)
    answers = {key: cls.supports(group, topology, device) for key, cls in TRANSPORTS.items()}
    chosen = next((key for key, answer in answers.items() if answer.ok), None) if name == "auto" else name
    if chosen is None or not answers[chosen].ok:
        wanted = "no transport works here" if chosen is None else f"transport {chosen!r} does not work here"
        reasons = answers if chosen is None else {chosen: answers[chosen]}
        got = "; ".join(f"{key}: {answer.reason}" for key, answer in reasons.items())
        usable = [key for key, answer in answers.items() if answer.ok]
        remedy = 'leave transport at "auto"' if usable else "see what each transport needs"
        raise UnsupportedError(wanted, got=got, expected=f"one of {usable}", remedy=remedy, rank=group.rank)
    return TRANSPORTS[chosen], answers
