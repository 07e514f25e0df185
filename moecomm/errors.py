"""The exceptions of moecomm: one tree, each class one kind of cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class MoECommError(Exception):
    """Base of every error that moecomm raises on purpose.

    Args:
        what: what failed, one clause.
        got: the offending value, if there is one.
        expected: what would have been accepted.
        remedy: what the caller can do about it.
        rank: the rank that raises, inside its group.
        operation: the operation that failed, such as "dispatch".
        seq: sequence number of that operation on this buffer.
        peers: the ranks that caused it.

    harmless: set where the operation came to its end on all ranks all the same, so that the buffer goes on.

    >>> print(ConfigError("top_k does not fit", got=9, expected="at most 8", remedy="lower top_k", rank=0))
    rank 0: top_k does not fit: got 9; expected at most 8; lower top_k
    """

    told_by: int | None = None  # the rank whose message this error repeats

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
        rank: int | None = None,
        operation: str | None = None,
        seq: int | None = None,
        peers: Sequence[int] = (),
    ) -> None:
        self.what, self.got, self.expected, self.remedy = what, got, expected, remedy
        self.rank, self.operation, self.seq, self.peers = rank, operation, seq, tuple(peers)
        self.harmless = False
        prefix = "" if rank is None else f"rank {rank}: "
        if operation is not None:
            prefix += operation + ("" if seq is None else f" #{seq}") + ": "
        facts = [f"got {got}"] if got is not None else []
        facts += [f"expected {expected}"] if expected is not None else []
        facts += [remedy] if remedy is not None else []
        super().__init__(prefix + what + (": " + "; ".join(facts) if facts else ""))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__, self.args)


def _rebuild(cls: type[MoECommError], state: dict[str, object], args: tuple[object, ...]) -> MoECommError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(MoECommError, ValueError):
    """An argument is wrong, or ranks were given different ones.

    >>> import moecomm
    >>> try:
    ...     moecomm.Buffer(num_experts=0, hidden=8, top_k=1, max_tokens_per_rank=1)
    ... except moecomm.ConfigError as error:
    ...     print(error.what, error.got)
    num_experts is no count 0
    """


class RoutingError(MoECommError, ValueError):
    """A routing names an expert that does not exist, or has the wrong shape or dtype.

    >>> import torch, moecomm
    >>> buffer = moecomm.Buffer(num_experts=2, hidden=1, top_k=1, max_tokens_per_rank=1, dtype=torch.float32)
    >>> try:
    ...     buffer.dispatch(torch.zeros(1, 1), torch.tensor([[2]]))
    ... except moecomm.RoutingError as error:
    ...     print(error.what, error.got)
    topk_idx[0, 0] names no expert 2
    """


class CapacityError(MoECommError, ValueError):
    """More tokens or bytes than the buffer was built for.

    >>> import torch, moecomm
    >>> buffer = moecomm.Buffer(num_experts=2, hidden=1, top_k=1, max_tokens_per_rank=1, dtype=torch.float32)
    >>> try:
    ...     buffer.dispatch(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    ... except moecomm.CapacityError as error:
    ...     print(error.got, error.expected)
    2 at most max_tokens_per_rank=1
    """


class UnsupportedError(MoECommError, NotImplementedError):
    """What was asked for is not available here; the message says what is.

    >>> import moecomm
    >>> try:
    ...     moecomm.Buffer(num_experts=2, hidden=1, top_k=1, max_tokens_per_rank=1, transport="collective")
    ... except moecomm.UnsupportedError as error:
    ...     print(error.got)
    collective: the group is not one of torch.distributed
    """


class StallError(MoECommError, TimeoutError):
    """A deadline passed; `peers` are the ranks that did not arrive.

    >>> StallError("gave up after 60.0 s waiting for rank 3", operation="dispatch", seq=7, peers=[3]).peers
    (3,)
    """


class PeerLostError(MoECommError, ConnectionError):
    """A peer died or closed its end; `peers` names it where the transport can know.

    >>> print(PeerLostError("rank 1 is gone", rank=0, operation="combine", seq=2, peers=[1]))
    rank 0: combine #2: rank 1 is gone
    """


class AbortedError(PeerLostError):
    """A rank called `Buffer.abort()`, or left the `with` block of its buffer with an exception; `peers` names it.

    >>> issubclass(AbortedError, PeerLostError)
    True
    """


class DesyncError(MoECommError, RuntimeError):
    """Ranks called different operations, or the same one with different arguments.

    >>> issubclass(DesyncError, RuntimeError)
    True
    """

    @classmethod
    def among(cls, tags: Sequence[str], rank: int, seq: int) -> DesyncError | None:
        """The error to raise when the ranks do not do the same, or None; tags: what each rank does.

        >>> print(DesyncError.among(["dispatch", "combine"], rank=0, seq=3).peers)
        (1,)
        """
        others = [peer for peer, tag in enumerate(tags) if tag != tags[rank]]
        if not others:
            return None
        said = "; ".join(f"rank {peer} called {tags[peer]}" for peer in others)
        return cls(
            f"the ranks do not do the same: {said}; this rank called {tags[rank]}",
            remedy="call the same operations with the same arguments in the same order on every rank",
            rank=rank,
            operation=tags[rank].split(" ")[0],
            seq=seq,
            peers=others,
        )


class CorruptionError(MoECommError, RuntimeError):
    """A row arrived that is not the one that was sent; only a buffer with `check` looks.

    Args:
        token: of the row, on the rank that dispatched it; None if that is not known.
        phase: where it was seen, such as "arrival of combine, rows".
        evidence: path of a file with the tags and bytes of the wrong rows.

    >>> CorruptionError("row 3 is not what was sent", rank=0, peers=[1], token=7, phase="arrival of dispatch").token
    7
    """

    def __init__(
        self, what: str, *, token: int | None = None, phase: str = "", evidence: str = "", **rest: Any
    ) -> None:
        super().__init__(what, **rest)
        self.token, self.phase, self.evidence = token, phase, evidence


class StaleHandleError(MoECommError, RuntimeError):
    """A handle, buffer or view that is no longer valid, or that belongs to another buffer.

    >>> import torch, moecomm
    >>> buffer = moecomm.Buffer(num_experts=2, hidden=1, top_k=1, max_tokens_per_rank=1, dtype=torch.float32)
    >>> buffer.close()
    >>> try:
    ...     buffer.dispatch(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    ... except moecomm.StaleHandleError as error:
    ...     print(error)
    rank 0: the buffer is closed: build a new Buffer
    """


def rank_names(ranks: Sequence[int]) -> str:
    """Ranks as a reader wants them named.

    >>> rank_names([2]), rank_names([0, 3])
    ('rank 2', 'ranks 0, 3')
    """
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
