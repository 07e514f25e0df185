"""The transports, and how one of them is chosen. Their modules are loaded when the first buffer asks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module

import torch

from moecomm.errors import ConfigError, UnsupportedError
from moecomm.group import Group
from moecomm.memory.device import moves_by_kernels
from moecomm.topology import Topology
from moecomm.transport.base import Support, Transport, TransportOptions

# In the order in which "auto" asks them: the fewest copies first. A group is one of MPI or of torch.distributed, so
# of the last two only one can ever work.
TRANSPORTS = ("local", "symmetric", "hierarchical", "mpi", "collective")
_FLAT = ("mpi", "collective")  # those that may move rows between nodes
_PATIENCE_S = 8.0  # what a transport between nodes takes after its deadline to find out who is missing


def select(
    name: str, group: Group, topology: Topology, device: torch.device
) -> tuple[type[Transport], dict[str, Support]]:
    """Choose a transport: the named one, or for "auto" the first that works; and what each of them answered."""
    known = _known() if group.transport is None else {group.transport.name: group.transport}
    if name != "auto" and name not in known:
        expected = f"auto or one of {tuple(known)}"
        remedy = "correct this argument, or MOECOMM_TRANSPORT"
        raise ConfigError("transport is unknown", got=repr(name), expected=expected, remedy=remedy, rank=group.rank)
    answers = _ask(known, group, topology, device)
    chosen = next((key for key, answer in answers.items() if answer.ok), None) if name == "auto" else name
    if chosen is None or not answers[chosen].ok:
        wanted = "no transport works here" if chosen is None else f"transport {chosen!r} does not work here"
        reasons = answers if chosen is None else {chosen: answers[chosen]}
        got = "; ".join(f"{key}: {answer.reason}" for key, answer in reasons.items())
        usable = [key for key, answer in answers.items() if answer.ok]
        remedy = 'leave transport at "auto"' if usable else "see what each transport needs"
        raise UnsupportedError(wanted, got=got, expected=f"one of {usable}", remedy=remedy, rank=group.rank)
    return known[chosen], answers


def ask(group: Group, topology: Topology, device: torch.device) -> dict[str, Support]:
    """What each transport answers, in the order of "auto"."""
    return _ask(_known(), group, topology, device)


def _ask(
    known: Mapping[str, type[Transport]], group: Group, topology: Topology, device: torch.device
) -> dict[str, Support]:
    answers = {key: _answer(cls, group, topology, device) for key, cls in known.items()}
    missing = _missing(device)
    return {key: Support(False, missing) if answer.ok and missing else answer for key, answer in answers.items()}


def _known(names: Sequence[str] = TRANSPORTS) -> dict[str, type[Transport]]:
    """The transports of those names."""
    return {name: getattr(import_module(f"{__name__}.{name}"), f"{name.title()}Transport") for name in names}


def _missing(device: torch.device) -> str:
    """Why tensors cannot be on a device here, in the words of torch; nothing if they can."""
    try:
        torch.empty(1, device=device).cpu()  # memory of "meta" holds nothing
    except (AssertionError, ImportError, RuntimeError) as error:
        return f"no tensor can be on {device} here: {str(error).splitlines()[0]}"
    return ""


def build(cls: type[Transport], group: Group, topology: Topology, options: TransportOptions) -> Transport:
    """Make a transport that was selected; collective."""
    if cls.name == "symmetric" and moves_by_kernels(options.device):
        from moecomm.transport._symmetric_device import KernelTransport

        return KernelTransport(group, topology, options)
    if cls.name != "hierarchical":
        return cls(group, topology, options)
    from moecomm.transport.hierarchical import HierarchicalTransport
    from moecomm.transport.symmetric import SymmetricTransport

    flat = next(cls for cls in _known(_FLAT).values() if cls.supports(group, topology, options.device).ok)
    made: list[Transport] = []
    try:
        # Two groups of its own: its threads must not meet each other's messages, nor those of the caller.
        for _ in range(2):
            twin = group.duplicate(timeout_s=options.timeout_s)
            made.append(flat(twin, topology, options))
        # A mate that is late here may wait for another node: it must be the first to give up, and say for whom.
        patient = replace(options, slot_bytes=0, timeout_s=options.timeout_s + _PATIENCE_S)
        made.append(SymmetricTransport(group, topology, patient))
        return HierarchicalTransport(group, topology, options, between=made[0], control=made[1], inside=made[2])
    except BaseException:
        for transport in made:
            transport.close()
            transport.group.free()
        raise


def _answer(cls: type[Transport], group: Group, topology: Topology, device: torch.device) -> Support:
    """What a transport says; the hierarchical one works if both transports that it is made of do."""
    own = cls.supports(group, topology, device)
    if cls.name != "hierarchical" or not own.ok:
        return own
    inside, *between = _known(("symmetric", *_FLAT)).values()
    in_node = inside.supports(group, Topology((0,) * group.size), device)
    flats = [flat.supports(group, topology, device) for flat in between]
    if not in_node.ok:
        return Support(False, f"inside a node: {in_node.reason}")
    if not any(answer.ok for answer in flats):
        return Support(False, f"between nodes: {'; '.join(answer.reason for answer in flats)}")
    if group.mpi_comm is not None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return Support(False, "between nodes: MPI was not started with MPI_THREAD_MULTIPLE")
    reason = next(answer.reason for answer in flats if answer.ok)
    return Support(True, f"{own.reason}: shared memory inside, {reason} between")
