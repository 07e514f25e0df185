"""Signals between ranks: the only file with acquire and release.

Every operation has a sequence number, the same on all ranks. A rank that has sent its part of operation n writes n into
its signal word at every rank (itself included); a rank that needs the parts of operation n polls until all its signal
words are at least n. A kernel that sends never waits and a kernel that waits never sends, so the programs of a grid may
run in any order. The number lives on the device and is advanced by the kernel that sends: a replayed graph goes on
counting. Beside it the word carries a tag, what the operation is; ranks whose tags differ stop.
docs/design/symmetric.md has the argument why no signal is lost and nothing is overwritten before it is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moecomm.kernels._launch import launch
from moecomm.kernels.wire import (  # noqa: F401 - loopback is for the examples
    LATE,
    SIGNALS,
    STALLED,
    TAG_BITS,
    TAG_MASK,
    Link,
    Wire,
    area_of,
    loopback,
    view_memory,
)

# Plain stores and loads with release and acquire reach a peer over PCIe too, where read-modify-write may not be atomic.
# The interpreter has real release and acquire only for read-modify-write.
if hasattr(tl, "atomic_store") and not triton.knobs.runtime.interpret:

    @triton.jit
    def _write_words(words, value, exists):
        tl.atomic_store(words, value, mask=exists, sem="release", scope="sys")

    @triton.jit
    def _read_words(words, exists):
        return tl.atomic_load(words, mask=exists, sem="acquire", scope="sys")

else:

    @triton.jit
    def _write_words(words, value, exists):
        tl.atomic_xchg(words, value, mask=exists, sem="release", scope="sys")

    @triton.jit
    def _read_words(words, exists):
        zero = tl.zeros(words.shape, tl.int64)
        return tl.atomic_add(words, zero, mask=exists, sem="acquire", scope="sys")


@triton.jit
def may_send(link):
    """Whether no earlier wait gave up: after that, peers may still be reading what would be overwritten."""
    return tl.load(link.status + STALLED) == 0


@triton.jit
def signal_when_all_arrived(link, sequence, WIRE: tl.constexpr):
    """End of every program of a kernel that sends: the last one to arrive advances the number and signals all ranks."""
    tl.debug_barrier()  # all threads of this program have written
    arrived = tl.atomic_add(link.state + 1, 1, sem="acq_rel", scope="sys")
    if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(link.state + 1, 0)
        tl.store(link.state, sequence)
        peer = tl.arange(0, WIRE.world_p2)
        exists = peer < WIRE.world
        words = tl.load(link.peers + SIGNALS * WIRE.world + peer, mask=exists, other=0).to(tl.pointer_type(tl.int64))
        value = tl.full((WIRE.world_p2,), 0, tl.int64) + ((sequence << TAG_BITS) | link.tag)
        _write_words(words + link.rank, value, exists)


@triton.jit
def wait_for_all(link, sequence, WIRE: tl.constexpr):
    """Poll until every rank has signalled `sequence` and the tag of this operation; 1 if they have.

    0 after too many polls, or at once if a rank has another tag, or is late and has ended; which ones is noted.
    """
    source = tl.arange(0, WIRE.world_p2)
    exists = source < WIRE.world
    words = area_of(link, 0, SIGNALS, link.rank, WIRE).to(tl.pointer_type(tl.int64)) + source
    late = exists
    seen = tl.full((WIRE.world_p2,), 0, tl.int64)
    differs = exists & (source < 0)
    missing = tl.sum(late.to(tl.int32), 0)
    stalled = tl.load(link.status + STALLED)  # then waiting once more is pointless, in this program or a later kernel
    spins = tl.where(stalled == 0, 0, link.max_spins).to(tl.int64)
    while (missing > 0) & (spins < link.max_spins):
        # Before the words: what a rank signalled before it ended is seen by who saw that it ended.
        gone = tl.load(link.status + LATE + 2 * WIRE.world + source, mask=exists, other=0, volatile=True)
        seen = _read_words(words, exists)
        late = exists & ((seen >> TAG_BITS) < sequence)
        differs = exists & ((seen >> TAG_BITS) == sequence) & ((seen & TAG_MASK) != link.tag)
        missing = tl.sum(late.to(tl.int32), 0)
        hopeless = tl.sum((differs | (late & (gone != 0))).to(tl.int32), 0)
        spins = tl.where(hopeless > 0, link.max_spins, spins + 1)
    tl.debug_barrier()  # what one thread acquired, all threads of this program may read
    num_others = tl.sum(differs.to(tl.int32), 0)
    missing += num_others
    if (missing > 0) & (stalled == 0):
        tl.store(link.status + LATE + source, tl.full((WIRE.world_p2,), 0, tl.int64) + sequence, mask=late)
        shown = differs | ((source == link.rank) & (source < num_others * WIRE.world))  # this rank's too if any differs
        tl.store(link.status + LATE + WIRE.world + source, seen & TAG_MASK, mask=shown)
        tl.store(link.status + STALLED, sequence)
    return (missing == 0).to(tl.int32)


@triton.jit
def _signal_kernel(link, WIRE: tl.constexpr):
    if may_send(link):
        signal_when_all_arrived(link, tl.load(link.state) + 1, WIRE)


def signal(link: Link, wire: Wire) -> None:
    """Send nothing but the signal of the next operation.

    >>> wire = Wire.of(world=2, top_k=1, max_local=1, row_bytes=16)
    >>> (link, peer), memory = loopback(wire, max_tokens=3)
    >>> signal(link, wire)
    >>> link.state.tolist(), (memory[:, -256:].view(torch.int64)[:, :2] >> 24).tolist()  # rank 0's word, at both ranks
    ([1, 0], [[1, 0], [1, 0]])
    """
    launch(_signal_kernel, (1,), link, num_warps=1, WIRE=wire)


def signal_ref(link: Link, wire: Wire) -> None:
    """`signal` in plain torch; all ranks' buffers must be CPU memory of this process."""
    if int(link.status[int(STALLED)]):
        return
    link.state[0] += 1
    for rank in range(wire.world):
        words = view_memory(int(link.peers[0, int(SIGNALS), rank]), (wire.world,), torch.int64)
        words[link.rank] = (link.state[0] << int(TAG_BITS)) | link.tag


@triton.jit
def _wait_kernel(link, WIRE: tl.constexpr):
    wait_for_all(link, tl.load(link.state), WIRE)


def wait(link: Link, wire: Wire) -> None:
    """Wait until all ranks have sent their part of the last operation that this rank sent.

    Gives up after `link.max_spins` polls, or when that is hopeless, and notes in `link.status` who was late.

    >>> wire = Wire.of(world=2, top_k=1, max_local=1, row_bytes=16)
    >>> (link, peer), memory = loopback(wire, max_tokens=3)
    >>> signal(link, wire)
    >>> wait(link, wire)  # rank 1 has not signalled operation 1
    >>> link.status.tolist()
    [0, 0, 1, 0, 1, 0, 0, 0, 0]
    """
    launch(_wait_kernel, (1,), link, num_warps=1, WIRE=wire)


def wait_ref(link: Link, wire: Wire) -> None:
    """`wait` in plain torch; the polled words change only through other processes or threads."""
    signals = view_memory(int(link.peers[0, int(SIGNALS), link.rank]), (wire.world,), torch.int64)
    late, differs, gone = link.status[int(LATE) :].view(3, -1)
    if int(link.status[int(STALLED)]):
        return
    sequence, bits, mask = int(link.state[0]), int(TAG_BITS), int(TAG_MASK)
    for _ in range(link.max_spins):
        ended = gone != 0
        seen = signals.clone()
        missing = seen >> bits < sequence
        other = (seen >> bits == sequence) & (seen & mask != link.tag)
        if not (missing | other).any():
            return
        if (other | (missing & ended)).any():
            break
    late[missing] = sequence
    if other.any():
        other[link.rank] = True
    differs[other] = seen[other] & mask
    link.status[int(STALLED)] = sequence


def barrier(link: Link, wire: Wire) -> None:
    """Signal, then wait: two launches, for a kernel that sends never waits.

    >>> wire = Wire.of(world=1, top_k=1, max_local=1, row_bytes=16)
    >>> (link,), memory = loopback(wire, max_tokens=3)
    >>> barrier(link, wire)
    >>> link.state.tolist(), link.status.tolist()
    ([1, 0], [0, 0, 0, 0, 0, 0])
    """
    signal(link, wire)
    wait(link, wire)


def barrier_ref(link: Link, wire: Wire) -> None:
    """`barrier` in plain torch."""
    signal_ref(link, wire)
    wait_ref(link, wire)
