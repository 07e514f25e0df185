"""Quick probes of a machine or a cluster; each ends in a finding with what to do about it. All are collective."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch

import moecomm
from moecomm.diagnostics.facts import links, memory, versions
from moecomm.diagnostics.waits import slow_rank
from moecomm.group import Group
from moecomm.launch import Launch, omp_threads
from moecomm.memory.host import host_memory_support
from moecomm.topology import Topology

_SKEW_S = 0.05  # clocks that differ by more make logs of several nodes hard to read; moecomm itself does not care
_FILES_PER_RANK = 8
_ROUNDS = 5
_STEPS = 32
_PAYLOAD_BYTES = 8 << 20
_LOW_SHARE = 0.25  # of what the hardware should give


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one probe found: level is "ok", "warning" or "problem"; remedy says what to do; data holds the numbers."""

    probe: str
    level: str
    text: str
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def examine(launch: Launch) -> Iterator[Finding]:
    """Run every probe, on all ranks alike; the findings of this rank, of which rank 0 has those about all.

    >>> from moecomm.launch import joined
    >>> with joined("cpu") as launch:
    ...     {finding.level for finding in examine(launch)} <= {"ok", "warning", "problem"}
    True
    """
    group = Group.resolve(launch.group)
    probes: tuple[Callable[[Launch, Group], Finding], ...] = (
        _same_versions,
        _shared_memory,
        _file_limit,
        _threads,
        _free_memory,
        _clocks,
        _gpu_peers,
        _transport,
        _pairs,
        _waits,
    )
    for probe in probes:
        name = probe.__name__.strip("_").replace("_", " ")
        try:
            yield probe(launch, group)
        except Exception as error:  # a probe that breaks is a finding
            text = f"{type(error).__name__}: {error}"
            yield Finding(probe=name, level="problem", text=text, remedy="see the message; then run doctor again")


def _same_versions(launch: Launch, group: Group) -> Finding:
    """Compare what decides how bytes are read: moecomm and torch."""
    told = group.all_gather_object({name: versions()[name] for name in ("moecomm", "torch")}, operation="doctor")
    other = [rank for rank, found in enumerate(told) if found != told[0]]
    if other:
        text = f"{_ranks(other)} {'have' if len(other) > 1 else 'has'} {told[other[0]]}, rank 0 has {told[0]}"
        remedy = "install the same versions everywhere: pip install -c constraints.txt moecomm"
        return Finding(probe="versions", level="problem", text=text, remedy=remedy)
    text = f"moecomm {told[0]['moecomm']}, torch {told[0]['torch']} on every rank"
    return Finding(probe="versions", level="ok", text=text)


def _shared_memory(launch: Launch, group: Group) -> Finding:
    """Write a page and read it through a second mapping."""
    reason = host_memory_support()
    if reason is None:
        try:
            fd = os.memfd_create("moecomm-doctor", os.MFD_ALLOW_SEALING)
            os.pwrite(fd, b"moecomm", 0)
            reason = None if os.pread(fd, 7, 0) == b"moecomm" else "what was written is not what is read"
            os.close(fd)
        except OSError as error:
            reason = f"memfd_create fails: {error}"
    bad = _ranks_that(group, reason is not None)
    if bad:
        remedy = "use transport collective or mpi there, or run on Linux without a filter on memfd_create"
        return Finding(probe="shared memory", level="problem", text=f"{_ranks(bad)}: {reason}", remedy=remedy)
    return Finding(probe="shared memory", level="ok", text="memfd works; nothing in /dev/shm is needed")


def _file_limit(launch: Launch, group: Group) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 64 + _FILES_PER_RANK * launch.size
    data = {"soft": soft, "hard": hard, "needed": needed}
    if _ranks_that(group, soft < needed):
        remedy = f"ulimit -n {needed} before the launcher (the hard limit is {hard})"
        return Finding(probe="file limit", level="problem", text=f"{soft} open files allowed", remedy=remedy, data=data)
    return Finding(probe="file limit", level="ok", text=f"{soft} open files, about {needed} needed", data=data)


def _threads(launch: Launch, group: Group) -> Finding:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    wanted = threads * launch.local_size
    data = {"cores": cores, "threads_per_rank": threads, "ranks_on_node": launch.local_size}
    text = f"{launch.local_size} ranks with {threads} threads each on {cores} cores (OMP_NUM_THREADS={omp_threads()})"
    if wanted > cores and threads > 1:
        remedy = f"export OMP_NUM_THREADS={max(1, cores // launch.local_size)}"
        return Finding(probe="threads", level="warning", text=text, remedy=remedy, data=data)
    if launch.local_size > cores and launch.device.type == "cpu":
        remedy = "start fewer ranks per node: they take turns on the cores, and latencies mean little"
        return Finding(probe="threads", level="warning", text=text, remedy=remedy, data=data)
    return Finding(probe="threads", level="ok", text=text, data=data)


def _free_memory(launch: Launch, group: Group) -> Finding:
    found = memory()
    free = found["available_bytes"] / found["total_bytes"]
    text = f"{found['available_bytes'] / 1e9:.1f} of {found['total_bytes'] / 1e9:.1f} GB available"
    low = _ranks_that(group, free < 0.1)
    if low:
        remedy = "end other programs; `python -m moecomm plan` says what a model needs"
        return Finding(probe="free memory", level="warning", text=f"{_ranks(low)}: {text}", remedy=remedy, data=found)
    return Finding(probe="free memory", level="ok", text=text, data=found)


def _clocks(launch: Launch, group: Group) -> Finding:
    """Ask everybody for the time; the answer of the quickest of some rounds counts."""
    best = [(float("inf"), 0.0)] * group.size
    for _ in range(_ROUNDS):
        start = time.time()
        told = group.all_gather_object(time.time(), operation="doctor clocks")
        trip = time.time() - start
        best = [min(old, (trip, then - start - trip / 2)) for old, then in zip(best, told, strict=True)]
    skew = [0.0 if rank == group.rank else offset for rank, (_, offset) in enumerate(best)]
    doubt = max((trip / 2 for trip, _ in best), default=0.0)
    worst = max(range(group.size), key=lambda rank: abs(skew[rank]))
    data = {"skew_s": skew, "uncertainty_s": doubt}
    if abs(skew[worst]) > _SKEW_S + doubt:
        text = f"the clock of rank {worst} differs by {skew[worst]:+.3f} s from that of rank {group.rank}"
        return Finding(probe="clocks", level="warning", text=text, remedy="start chrony or ntpd on its node", data=data)
    text = f"clocks agree to {1e3 * (abs(skew[worst]) + doubt):.1f} ms" if group.size > 1 else "one rank, one clock"
    return Finding(probe="clocks", level="ok", text=text, data=data)


def _gpu_peers(launch: Launch, group: Group) -> Finding:
    count = torch.cuda.device_count()
    if count < 2:
        return Finding(
            probe="gpu peers", level="ok", text=f"{count} GPU{'' if count == 1 else 's'} here, no pair to try"
        )
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        remedy = "put the ranks of one buffer on GPUs that reach each other, or switch ACS off in the BIOS"
        text = f"these GPUs cannot reach each other's memory: {apart}"
        return Finding(probe="gpu peers", level="problem", text=text, remedy=remedy, data={"apart": apart})
    return Finding(probe="gpu peers", level="ok", text=f"all {count} GPUs reach each other's memory")


def _transport(launch: Launch, group: Group) -> Finding:
    """Build a buffer and see rows come home."""
    with _buffer(launch, hidden=64, tokens=16) as buffer:
        x = torch.arange(16 * 64, dtype=torch.float32, device=launch.device).view(16, 64).to(torch.bfloat16)
        idx = torch.arange(16, device=launch.device)[:, None] % group.size
        out = buffer.dispatch(x, idx)
        assert isinstance(out.x, torch.Tensor)
        right = torch.equal(buffer.combine(out.x, out.handle), x)
        name, why = buffer.transport, buffer.explain()
    wrong = _ranks_that(group, not right)
    if wrong:
        remedy = "run `python -m moecomm conformance` and report what it prints"
        return Finding(
            probe="transport", level="problem", text=f"{_ranks(wrong)}: wrong rows over {name}", remedy=remedy
        )
    nodes = Topology.detect(group).num_nodes
    text = f"{name}, {group.size} ranks on {nodes} node{'s' * (nodes > 1)}; rows come home bit for bit"
    if name == "collective" and nodes == 1 and group.size > 1:
        remedy = f"a faster transport exists on one node; what it says:\n{why}"
        return Finding(probe="transport", level="warning", text=text, remedy=remedy)
    return Finding(probe="transport", level="ok", text=text, data={"explain": why})


def _pairs(launch: Launch, group: Group) -> Finding:
    """Send from every rank to the one s further on, for every s: small rows for latency, many for bandwidth."""
    roof = _copy_bytes_per_s(launch, group)
    if group.size == 1:
        return Finding(probe="links", level="ok", text=f"one rank; memory copies at {roof / 1e9:.1f} GB/s")
    hidden = 4096
    tokens = _PAYLOAD_BYTES // (2 * hidden)
    mine: dict[int, tuple[float, float]] = {}
    with _buffer(launch, hidden=hidden, tokens=tokens) as buffer:
        for step in range(1, group.size):
            to, source = (group.rank + step) % group.size, (group.rank - step) % group.size
            latency_s = _time_s(launch, group, buffer, to, rows=1)
            many_s = _time_s(launch, group, buffer, to, rows=tokens)
            mine[source] = (latency_s, tokens * hidden * 2 / many_s)
    table = group.all_gather_object(mine, operation="doctor links")
    topology = Topology.detect(group)
    return _judge_pairs(table, topology, roof, launch)


def _waits(launch: Launch, group: Group) -> Finding:
    """Run steps of a layer and look for whom everybody waits."""
    with _buffer(launch, hidden=1024, tokens=16) as buffer:
        x = torch.ones(16, 1024, dtype=torch.bfloat16, device=launch.device)
        idx = torch.arange(16, device=launch.device)[:, None] % group.size
        for _ in range(_STEPS):
            out = buffer.dispatch(x, idx)
            buffer.combine(out.x, out.handle)
        waited = buffer.stats().get("waited_s")
    if waited is None:
        return Finding(probe="waits", level="ok", text=f"transport {buffer.transport} does not tell its peers apart")
    told = group.all_gather_object(waited, operation="doctor waits")
    worst, text = slow_rank(told, _STEPS)
    if worst is not None:
        remedy = f"look at the core, clock and load of rank {worst}"
        return Finding(probe="waits", level="warning", text=text, remedy=remedy)
    return Finding(probe="waits", level="ok", text=text)


@dataclass(frozen=True, slots=True)
class Pair:
    """From one rank to another: seconds of one row, bytes per second of many, and what the hardware should give."""

    source: int
    to: int
    same_node: bool
    latency_s: float
    bytes_per_s: float
    should: float


def _judge_pairs(
    table: Sequence[dict[int, tuple[float, float]]], topology: Topology, roof: float, launch: Launch
) -> Finding:
    """Compare with a copy in memory inside a node, with the fastest interface between nodes."""
    speeds = [int(text.split()[0]) for text in links()["interfaces"].values() if text[0].isdigit()]
    wire = max(speeds, default=0) * 1e6 / 8
    pairs = []
    for to, of_rank in enumerate(table):
        for source, (latency_s, bytes_per_s) in of_rank.items():
            inside = topology.same_node(source, to)
            pairs.append(Pair(source, to, inside, latency_s, bytes_per_s, roof if inside else wire))
    slow = [pair for pair in pairs if pair.should and pair.bytes_per_s < _LOW_SHARE * pair.should]
    worst, best = min(pairs, key=lambda pair: pair.bytes_per_s), max(pairs, key=lambda pair: pair.bytes_per_s)
    latencies_us = [1e6 * pair.latency_s for pair in pairs]
    text = (
        f"{len(pairs)} pairs: {worst.bytes_per_s / 1e9:.2f} ({worst.source} -> {worst.to}) to "
        f"{best.bytes_per_s / 1e9:.2f} GB/s, where a copy in memory has {roof / 1e9:.2f}; "
        f"one row takes {min(latencies_us):.0f} to {max(latencies_us):.0f} us"
    )
    data = {
        "pairs": [asdict(pair) for pair in pairs],
        "copy_gb_per_s": round(roof / 1e9, 2),
        "wire_gb_per_s": round(wire / 1e9, 2),
    }
    if slow:
        names = ", ".join(f"{pair.source} -> {pair.to}" for pair in slow[:4])
        remedy = (
            f"below {_LOW_SHARE:.0%} of what the hardware should give: {names}"
            f"{' and more' if len(slow) > 4 else ''}. Look for other load, ranks without a core of their own, "
            "or traffic on the wrong interface (GLOO_SOCKET_IFNAME)"
        )
        return Finding(probe="links", level="warning", text=text, remedy=remedy, data=data)
    return Finding(probe="links", level="ok", text=text, data=data)


def _buffer(launch: Launch, hidden: int, tokens: int) -> moecomm.Buffer:
    """One expert per rank, so that a routing names ranks."""
    return moecomm.Buffer(
        launch.group,
        num_experts=launch.size,
        hidden=hidden,
        top_k=1,
        max_tokens_per_rank=tokens,
        device=launch.device,
    )


def _time_s(launch: Launch, group: Group, buffer: moecomm.Buffer, to: int, rows: int) -> float:
    """The median over some rounds of a dispatch of so many rows to one rank, from a barrier on."""
    x = torch.ones(rows, buffer.config.hidden, dtype=torch.bfloat16, device=launch.device)
    idx = torch.full((rows, 1), to, device=launch.device)
    times = []
    handle = buffer.dispatch(x, idx).handle
    for _ in range(_ROUNDS):
        group.barrier()
        start = time.perf_counter()
        buffer.dispatch(x, handle=handle)
        _synchronize(launch)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _copy_bytes_per_s(launch: Launch, group: Group) -> float:
    """Speed of a copy in memory while all ranks do the same; the slowest rank's."""
    source = torch.ones(_PAYLOAD_BYTES, dtype=torch.uint8, device=launch.device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(_ROUNDS):
        group.barrier()
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(launch)
        times.append(time.perf_counter() - start)
    return min(group.all_gather_object(_PAYLOAD_BYTES / sorted(times)[len(times) // 2], operation="doctor copy"))


def _synchronize(launch: Launch) -> None:
    if launch.device.type == "cuda":
        torch.cuda.synchronize(launch.device)


def _ranks_that(group: Group, here: bool) -> list[int]:
    """The ranks on which something holds."""
    return [rank for rank, holds in enumerate(group.all_gather_object(here, operation="doctor")) if holds]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
