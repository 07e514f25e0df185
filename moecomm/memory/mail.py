"""Letters between the ranks of one host, in memory that they share.

A *letter* says what its sender does, brings a few bytes, and is stamped last: who sees the stamp sees all of it. A
receiver looks for a while, in machine code that lets others run; then it goes to sleep on its socket, says so in a
flag, and must be woken. Without llvmlite there is nothing to order memory with but system calls: then nobody looks, all
sleep and are always woken.

A letter lies in the receiver's memory, in a place of its kind, number modulo `PLACES`, and source. A place is used anew
only when its letter has been read, which the protocol of the transport sees to.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import final

import numpy as np
from torch import Tensor

from moecomm._compiled import compiled

PLACES = 4
WAKE, WAIT, STOP = 16, 32, 1 << 40  # what a step of an operation gives, see `Channel.run`
TAG_BYTES = 192
_FLAG_BYTES = 64
_HEAD_BYTES = 64  # words: stamp, sequence number, check sum of the tag, ticket, bytes of the tag; the rest is free
_FIXED_BYTES = _HEAD_BYTES + TAG_BYTES  # what comes before the payload
_LINE_BYTES = 64
_PAGE_BYTES = 4096
_TRIES = 1000  # looks before going to sleep: each gives up the core, so it takes 0.3 ms where nobody else wants it


class Kind(IntEnum):
    """What a letter says."""

    ARRIVE = 0  # the sender takes part in a gathering; with its bytes
    DONE = 1  # the sender's rows of an operation are written; ticket: where it wants those of the next one
    OUT = 2  # the sender's rows of a padded dispatch lie in their slots; with how many there are for each expert
    HOME = 3  # the sender's rows of a padded combine can be read
    FREE = 4  # the sender has no more use for what lies in its slots


def letter_bytes(payload_bytes: int) -> int:
    """Bytes of one letter, in whole cache lines.

    >>> letter_bytes(4)
    320
    """
    return -(-(_FIXED_BYTES + payload_bytes) // _LINE_BYTES) * _LINE_BYTES


def mail_bytes(num_ranks: int, payload_bytes: int) -> int:
    """Bytes of one rank's letter box, in whole pages.

    >>> mail_bytes(2, 4)
    16384
    """
    used = _FLAG_BYTES + len(Kind) * PLACES * num_ranks * letter_bytes(payload_bytes)
    return -(-used // _PAGE_BYTES) * _PAGE_BYTES


def cut_tag(tag: str) -> str:
    """What arrives of a tag: a letter holds `TAG_BYTES` of it.

    >>> len(cut_tag("x" * 1000))
    192
    """
    return tag.encode()[:TAG_BYTES].decode(errors="replace")


@final
class Mail:
    """The letter boxes of this rank and its peers. boxes: rank -> (`mail_bytes`,) uint8, this rank's among them.

    >>> import torch
    >>> box = torch.zeros(mail_bytes(1, 4), dtype=torch.uint8)
    >>> mail = Mail({0: box}, rank=0, num_ranks=1, payload_bytes=4)
    >>> mail.post(Kind.DONE, 0, seq=7, tag="combine", ticket=3)
    []
    >>> mail.has_all(Kind.DONE, 0), mail.tickets(0), mail.tags(7)
    (True, {}, {})
    """

    def __init__(self, boxes: Mapping[int, Tensor], rank: int, num_ranks: int, payload_bytes: int) -> None:
        self.rank, self.peers = rank, [peer for peer in boxes if peer != rank]
        self.payload_bytes = payload_bytes
        self._jit = compiled("moecomm.memory._mail_jit")
        self._boxes = dict(boxes)  # keeps the memory
        self._stride = letter_bytes(payload_bytes)
        mine = boxes[rank].numpy()
        shape = len(Kind), PLACES, num_ranks, self._stride
        letters = mine[_FLAG_BYTES : _FLAG_BYTES + math.prod(shape)].reshape(shape)
        self._heads = letters[..., :_HEAD_BYTES].view(np.int64)
        self._tags = letters[..., _HEAD_BYTES:_FIXED_BYTES]
        self._payloads = letters[..., _FIXED_BYTES:]
        self._flag = mine[:8].view(np.int64)
        self._flag[0] = self._jit is None
        self._draft = np.zeros(self._stride, np.uint8)
        self._draft_bytes, self._draft_head = memoryview(self._draft), self._draft[:_HEAD_BYTES].view(np.int64)
        self._draft_tag = ""
        self._asleep = np.zeros(len(boxes), np.int64)
        self._clock = np.zeros(1 + 2 * len(self.peers), np.int64)  # see `_mail_jit.await_kernel`
        order = [rank, *self.peers]
        self._flags = np.array([boxes[to].data_ptr() for to in order], np.int64)
        self._clock_at, self._box = int(self._clock.ctypes.data), int(self._flags[0])
        place = np.arange(len(Kind) * PLACES * num_ranks).reshape(shape[:3]) * self._stride + _FLAG_BYTES
        # (kind, place) -> where this rank writes in every box, and where peers write in this one.
        self._outward = np.ascontiguousarray(self._flags + place[..., rank, None])
        self._inward = np.ascontiguousarray(boxes[rank].data_ptr() + place[..., self.peers])
        self._inward_at = int(self._inward.ctypes.data)
        self.words = self._table() if self.is_fast else np.empty(0, np.int64)

    def _table(self) -> np.ndarray:
        """What machine code knows of these boxes: words of `_mail_jit.Box`."""
        assert self._jit is not None
        known = {"COUNT": len(self._flags), "FIXED_BYTES": _FIXED_BYTES, "FLAG": self._box, "TRIES": _TRIES}
        for name in ("OUTWARD", "INWARD", "DRAFT", "FLAGS", "ASLEEP", "CLOCK"):
            known[name] = int(getattr(self, f"_{name.lower()}").ctypes.data)
        return np.array([known[word.name] for word in self._jit.Box], np.int64)

    @property
    def is_fast(self) -> bool:
        """Whether letters are read and written in machine code, without a system call."""
        return self._jit is not None

    def post(
        self, kind: Kind, number: int, *, seq: int, tag: str, ticket: int = -1, payload: np.ndarray | None = None
    ) -> Sequence[int]:
        """Send letter `number` of a kind to all, this rank included; the peers that sleep and must be woken."""
        self.draft(tag)
        if self._jit is not None:
            size, data = (0, 0) if payload is None else (payload.nbytes, payload.ctypes.data)
            given = place_of(kind, number), number + 1, seq, ticket, data, size
            return self.asleep() if self._jit.send_kernel()(self.words.ctypes.data, *given) else []
        self._draft_head[1], self._draft_head[3] = seq, ticket
        size = _FIXED_BYTES
        if payload is not None:
            self._draft[size : size + payload.nbytes] = payload.view(np.uint8)
            size += payload.nbytes
        places = self._outward[kind, number % PLACES] - self._flags
        for box, place in zip((self.rank, *self.peers), places, strict=True):
            target = self._boxes[box].numpy()[place : place + size]
            target[:8] = 0
            target[8:] = self._draft[8:size]
            target[:8].view(np.int64)[0] = number + 1
        return self.peers

    def draft(self, tag: str) -> None:
        """Prepare letters that say so: those that machine code posts, and against which it compares what comes."""
        if tag != self._draft_tag:
            name = tag.encode()[:TAG_BYTES]
            self._draft_bytes[_HEAD_BYTES : _HEAD_BYTES + len(name)] = name
            self._draft_tag, self._draft_head[2], self._draft_head[4] = tag, zlib.crc32(name), len(name)

    def asleep(self) -> list[int]:
        """The peers that slept when this rank last posted a letter."""
        return [peer for peer, sleeps in zip(self.peers, self._asleep[1:].tolist(), strict=True) if sleeps]

    def has_all(self, kind: Kind, number: int, *, patient: bool = True) -> bool:
        """Whether all peers have sent letter `number` of a kind; patient: look for a while.

        If not, this rank counts as asleep until `woke`, and a later letter of any kind will wake it.
        """
        if self._jit is None:
            return self._look(kind, number, begins=patient)
        places = self._inward_at + 8 * len(self.peers) * place_of(kind, number)
        tries, flag = _TRIES if patient else 0, self._box
        return bool(self._jit.await_kernel()(len(self.peers), places, number + 1, tries, flag, self._clock_at))

    def _look(self, kind: Kind, number: int, *, begins: bool) -> bool:
        """`_mail_jit.await_kernel` without compiler, and without patience."""
        start, seen, waited = self._clock[:1], *self._clock[1:].reshape(2, -1)
        if begins:
            start[0], seen[:] = time.monotonic_ns(), 0
        missing = self.missing(kind, number)
        arrived = np.array([not was and peer not in missing for peer, was in zip(self.peers, seen, strict=True)], bool)
        waited[arrived] += time.monotonic_ns() - start[0]
        seen[arrived] = 1
        return not missing

    def waited_s(self, num_ranks: int) -> np.ndarray:
        """(num_ranks,) seconds for which this rank waited for letters of each rank; 0 for those without a box here."""
        total = np.zeros(num_ranks)
        total[self.peers] = self._clock[1 + len(self.peers) :] / 1e9
        return total

    def woke(self) -> None:
        """This rank looks at its letters again."""
        self._flag[0] = self._jit is None

    def missing(self, kind: Kind, number: int) -> list[int]:
        """The peers that have not sent letter `number` of a kind."""
        stamps = self._heads[kind, number % PLACES, :, 0].tolist()
        return [peer for peer in self.peers if stamps[peer] <= number]

    def agrees(self, kind: Kind, number: int, tag: str) -> bool:
        """Whether all that have sent exactly this letter do what `tag` says; False may be a false alarm."""
        heads = self._heads[kind, number % PLACES].tolist()
        check = int(self._draft_head[2]) if tag == self._draft_tag else zlib.crc32(tag.encode()[:TAG_BYTES])
        return all(heads[peer][2] == check or heads[peer][0] != number + 1 for peer in self.peers)

    def tags(self, seq: int) -> dict[int, str]:
        """What peers are known to do in operation `seq`."""
        told = {}
        for peer in self.peers:
            for kind in Kind:
                for place in range(PLACES):
                    head = self._heads[kind, place, peer]
                    stamp, of, _, _, size, *_ = head.tolist()
                    tag = self._tags[kind, place, peer, :size].tobytes().decode(errors="replace")
                    if stamp and of == seq and int(head[0]) == stamp:  # else it is being written
                        told[peer] = tag
        return told

    def is_first_report(self) -> bool:
        """Whether no rank has said this before; it stays said when that rank has ended."""
        word = self._boxes[min(self._boxes)].numpy()[8:16].view(np.int64)  # behind the flag
        before, word[0] = int(word[0]), 1
        return not before

    def last_seen(self) -> dict[int, tuple[int, str]]:
        """The last operation in which each peer was seen, and what it did there; (-1, "") if in none."""
        seen = {}
        for peer in self.peers:
            seq, kind, place = max(
                (int(head[1]) if head[0] else -1, kind, place)
                for kind in Kind
                for place, head in enumerate(self._heads[kind, :, peer].tolist())
            )
            size = int(self._heads[kind, place, peer, 4])
            seen[peer] = seq, "" if seq < 0 else self._tags[kind, place, peer, :size].tobytes().decode(errors="replace")
        return seen

    def tickets(self, number: int) -> dict[int, int]:
        """What tickets came with the letters DONE of that number."""
        tickets = self._heads[Kind.DONE, number % PLACES, :, 3].tolist()
        return {peer: tickets[peer] for peer in self.peers}

    def letter_at(self, kind: Kind, number: int) -> int:
        """Where letter `number` from rank 0 lies; those of the other ranks follow, `stride` bytes from each other."""
        return int(self._heads[kind, number % PLACES].ctypes.data)

    @property
    def stride(self) -> int:
        """Bytes from one letter to the next."""
        return self._stride

    def payload_at(self, kind: Kind, number: int) -> tuple[int, int]:
        """Where the payload of letter `number` from rank 0 lies, and the bytes from there to that of rank 1."""
        return self.letter_at(kind, number) + _FIXED_BYTES, self._stride

    def gathered(self, number: int, count: int) -> np.ndarray:
        """(num_ranks, count) int32 payloads of the letters ARRIVE of that number, 0 from who has no box here."""
        return self._payloads[Kind.ARRIVE, number % PLACES, :, : 4 * count].view(np.int32).copy()


def place_of(kind: Kind, number: int) -> int:
    """The place of letter `number` of a kind, as machine code counts them.

    >>> place_of(Kind.DONE, 5)
    5
    """
    return kind * PLACES + number % PLACES
