"""What the operations of one buffer share: who moves rows, who holds which expert, and what became of it all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from moecomm.errors import AbortedError, MoECommError, PeerLostError, StaleHandleError
from moecomm.plan import PlacementTables
from moecomm.transport.base import Transport
from moecomm.watchdog import announce

is_profiling: Callable[[], bool] = torch.autograd._profiler_enabled  # 0.1 us


class Phase:
    """Adds the time that a `with` block takes to an entry of a table; a fifth of the cost of a generator.

    Under a profiler it also appears there as `moecomm::NAME`, and the bytes counted meanwhile as an event inside it:
    `moecomm::bytes local=... remote=...`.
    """

    __slots__ = ("_before", "_core", "_name", "_shown", "_start")

    def __init__(self, core: Core, name: str) -> None:
        self._core, self._name = core, name

    def __enter__(self) -> None:
        self._shown = None
        if is_profiling():
            self._shown = record_function(f"moecomm::{self._name}")
            self._shown.__enter__()
            self._before = self._core.bytes_sent()
        self._start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._core.phase_s[self._name] += perf_counter() - self._start
        if self._shown is not None:
            self._core.show_bytes(self._before)
            self._shown.__exit__(None, None, None)


def plain_rows(tensor: Any, width: int, dtype: torch.dtype, *, on_host: bool = True) -> int:
    """Rows of an (N, width) tensor that may be read as it is, or -1: the quick answer, for what is right.

    >>> plain_rows(torch.zeros(3, 2), 2, torch.float32), plain_rows(torch.zeros(3, 2).T, 3, torch.float32)
    (3, -1)
    """
    if type(tensor) is not Tensor or tensor.dtype != dtype or tensor.is_cpu != on_host:
        return -1
    try:
        shape = tensor.shape
    except RuntimeError:  # it is nested; to ask would be one call more, and they are counted (docs/design/decode.md)
        return -1
    if len(shape) != 2 or shape[1] != width or not tensor.is_contiguous() or tensor.is_neg():
        return -1
    return -1 if torch.is_grad_enabled() and tensor.requires_grad else shape[0]


@dataclass(eq=False)
class Core:
    """What operations work with: who moves rows, who holds which expert, how to reduce; and what was counted."""

    transport: Transport
    tables: PlacementTables
    reduce: str
    dtype: torch.dtype
    counters: Counter[str] = field(default_factory=Counter)
    phase_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    started: dict[int, Callable[[], Any]] = field(default_factory=dict)
    failure: MoECommError | None = None
    aborted: AbortedError | None = None  # by `abort`, also where the buffer had failed before
    closed: bool = False
    rows_of_expert: np.ndarray | None = None
    padded: Any = None  # `padded.PaddedOperations`
    integrity: Any = None  # `integrity.Integrity` where rows are checked on arrival
    fused: Any = None  # `fused.FusedOperations` where the transport moves whole operations

    @property
    def rank(self) -> int:
        """This rank in its group."""
        return self.transport.group.rank

    @property
    def keys_per_pair(self) -> int:
        """Numbers in `DispatchHandle.recv_keys` for each pair received."""
        return 2 if self.fused is not None else int(self.merge_nodes is not None)

    @property
    def merge_nodes(self) -> np.ndarray | None:
        """(W,) node of each rank if sums are made per node on their way home, else None."""
        return self.transport.node_of_rank if self.reduce == "rank" else None

    def phase(self, name: str) -> Phase:
        """Add the time spent to the named phase."""
        return Phase(self, name)

    def bytes_sent(self) -> tuple[int, int]:
        """Bytes to this rank itself and to others, so far."""
        return self.counters["bytes_local"], self.counters["bytes_remote"]

    def show_bytes(self, before: tuple[int, int]) -> None:
        """Tell the profiler, if there is one, what was sent since then."""
        local, remote = (now - then for now, then in zip(self.bytes_sent(), before, strict=True))
        if (local or remote) and is_profiling():
            with record_function(f"moecomm::bytes local={local} remote={remote}"):
                pass

    def stats(self) -> dict[str, Any]:
        """All counters, those of the transport included."""
        names = ("dispatches", "replays", "combines", "rows_local", "rows_remote", "bytes_local", "bytes_remote")
        phases = ("plan", "counts", "send", "wait", "arrange")
        counted = {name: self.counters[name] for name in names}
        return counted | {f"{name}_s": self.phase_s[name] for name in phases} | self.transport.stats()

    def arrived(self, rows_L: np.ndarray) -> None:
        """Count the rows that arrived for each expert of this rank."""
        if self.rows_of_expert is None:
            self.rows_of_expert = np.zeros(len(rows_L), np.int64)
        self.rows_of_expert += rows_L

    def count_lanes(self, lanes: Sequence[tuple[int, int, int]]) -> None:
        """Count what lanes move: rows in all, those to this rank itself, bytes of one. Rows are those of the first."""
        counters = self.counters
        counters["rows_local"] += lanes[0][1]
        counters["rows_remote"] += lanes[0][0] - lanes[0][1]
        for total, local, row_bytes in lanes:
            counters["bytes_local"] += local * row_bytes
            counters["bytes_remote"] += (total - local) * row_bytes

    def took(self, ns_of_phase: Mapping[str, int]) -> None:
        """Add nanoseconds to phases."""
        for name, took_ns in ns_of_phase.items():
            self.phase_s[name] += took_ns / 1e9

    def check_usable(self) -> None:
        """Refuse to begin anything on a buffer that was closed, or that failed earlier."""
        if self.closed:
            raise StaleHandleError("the buffer is closed", remedy="build a new Buffer", rank=self.rank)
        if self.failure is not None:
            before = self.failure
            what = f"this buffer failed earlier and cannot go on: {before.what}"
            raise type(before)(what, remedy="build a new Buffer", rank=self.rank, peers=before.peers)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Run a part of an operation that peers take part in: if it breaks here, they are told and nothing goes on."""
        self.check_usable()
        try:
            yield
        except MoECommError as error:
            if self.failure is None and not error.harmless:
                self.failure = error
                announce(self.transport, error)
            raise
        except BaseException as error:
            self.break_off(error, self.rank)
            raise

    def break_off(self, error: BaseException, rank: int) -> None:
        """Remember that this rank, of that number now, broke off in the middle of something; peers are told."""
        what = f"rank {rank} broke off with {type(error).__name__}: {error}"
        self.failure = PeerLostError(what, rank=rank, operation="an operation", peers=[rank])
        self.transport.abort(self.failure)

    def abort(self, reason: str) -> None:
        """Give up: peers that wait for this rank, and threads of this rank that wait, stop at once."""
        what = f"rank {self.rank} called abort()" + (f": {reason}" if f"{reason}" else "")
        self.aborted = AbortedError(what, rank=self.rank, operation="abort", peers=[self.rank])
        if not self.closed and self.failure is None:
            self.failure = self.aborted
            self.transport.abort(self.failure)
