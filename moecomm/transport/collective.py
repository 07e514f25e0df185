"""Any torch.distributed backend: pack, all_to_all_single, unpack. The portable fallback."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.blocks import empty_rows
from moecomm.errors import DesyncError, MoECommError, PeerLostError, StallError
from moecomm.group import Group
from moecomm.rows import copy_rows
from moecomm.topology import Topology
from moecomm.transport._bulletin import ROLL_CALL_S, Bulletin, Verdict
from moecomm.transport._pairs import BREAK_S, Arrival, PairExchange, Waiter
from moecomm.transport.base import TAG_BYTES, Exchange, Lane, Support, Transport, TransportOptions

_HEAD_COUNTS = 256  # counts that travel with the tag; more follow once the ranks are known to agree
_SLICE_S = 0.5  # how often a waiting rank looks whether another one gave up or left


@final
class CollectiveTransport(Transport):
    """Rows travel as bytes, so that every backend carries every dtype."""

    name = "collective"

    def __init__(self, group: Group, topology: Topology, options: TransportOptions) -> None:
        assert group.process_group is not None
        self.group, self.device, self.timeout_s = group, options.device, options.timeout_s
        self.process_group: dist.ProcessGroup = group.process_group
        store = dist.PrefixStore(f"moecomm/collective/{options.buffer_id}", self.process_group.get_group_store())
        self._bulletin = Bulletin(store, group.rank, group.size)
        self._topology = topology
        self._away = [rank for rank in range(group.size) if not topology.same_node(rank, group.rank)]
        self._seq = 0  # of the next operation
        # A duplicate is gloo, on connections of our own: who agrees already needs no collective there.
        self._waiter = Waiter(self.process_group, self.timeout_s) if group.is_duplicate else None
        self.takes_less = group.is_duplicate
        self.buffer_id = options.buffer_id
        self._seen: dict[int, str] = {}

    @classmethod
    def supports(cls, group: Group, topology: Topology, device: torch.device) -> Support:
        if group.process_group is None:
            return Support(False, "the group is not one of torch.distributed")
        try:
            backend = group.process_group._get_backend(device).name()
        except RuntimeError:
            return Support(False, f"the process group has no backend for {device.type} tensors")
        return Support(True, f"all_to_all_single of {backend}")

    def gather_counts(self, tag: str, counts: np.ndarray) -> np.ndarray:
        """Every operation begins with one of these: it is also where disagreement shows."""
        counts = counts.astype(np.int32)
        name = np.frombuffer(tag.encode()[:TAG_BYTES].ljust(TAG_BYTES), np.uint8)
        head = np.zeros(_HEAD_COUNTS, np.int32)
        head[: len(counts)] = counts[:_HEAD_COUNTS]
        # Of the same size whatever is being done: a rank that does something else must be able to say so.
        heads = self._all_gather(np.concatenate([name, head.view(np.uint8)]), tag)
        tags = [row[:TAG_BYTES].tobytes().decode(errors="replace").rstrip() for row in heads]
        if error := DesyncError.among(tags, self.group.rank, self._seq):
            raise error
        self._seen = {rank: f"{tag.split(' ')[0]} #{self._seq}" for rank in range(self.group.size)}
        if len(counts) > _HEAD_COUNTS:
            return self._all_gather(counts.view(np.uint8), tag).view(np.int32)
        return heads[:, TAG_BYTES:].copy().view(np.int32)[:, : len(counts)]

    def _all_gather(self, blob: np.ndarray, tag: str) -> np.ndarray:
        """(W, len(blob)) the bytes of all ranks."""
        if self._waiter is not None:
            blobs = torch.from_numpy(np.tile(blob, (self.group.size, 1)))
            self.finish(self._waiter.gather(blobs), tag, self._seq)
            return blobs.numpy()
        # Straight to every peer: all_gather of gloo goes around a ring, which takes as many steps as there are peers.
        mine = torch.from_numpy(blob).to(self.device).repeat(self.group.size)
        blobs = torch.empty_like(mine)
        self.finish(dist.all_to_all_single(blobs, mine, group=self.process_group, async_op=True), tag, self._seq)
        return blobs.view(self.group.size, len(blob)).cpu().numpy()

    def open(self, tag: str, lanes: Sequence[Lane], *, agreed: bool) -> Exchange:
        if not agreed:
            self.gather_counts(tag, np.empty(0, np.int32))
        self._seq += 1
        if agreed and self._waiter is not None:
            return PairExchange(self, self._waiter, tag, self._seq - 1, lanes)
        return CollectiveExchange(self, tag, self._seq - 1, lanes)

    def close(self) -> None:
        self._bulletin.leave(self._seq)
        if self._waiter is not None:
            self._waiter.close()

    def abort(self, error: MoECommError) -> None:
        self._bulletin.publish(Verdict.of(error, self.group.rank))
        if self._waiter is not None:
            self._waiter.break_off()

    def last_seen(self) -> dict[int, str]:
        return self._seen

    @property
    def _spare_s(self) -> float:
        """What it takes to find out who is missing."""
        return BREAK_S if self._waiter is not None and self._bulletin.is_silent else 0.0

    def finish(self, work: dist.Work | Arrival, tag: str, seq: int) -> None:
        """Wait for a collective of operation `seq` until the deadline, or until another rank gave up or left."""
        start = time.monotonic()
        while True:
            left_s = self.timeout_s - (time.monotonic() - start)
            was_over = work.is_completed()  # what ends just as a slice does is looked at once more
            try:
                work.wait(timedelta(seconds=max(0.001, min(_SLICE_S, left_s - self._spare_s))))
                return
            except RuntimeError as error:
                left_s = self.timeout_s - (time.monotonic() - start)
                timed_out = "timed out" in str(error).lower()
                over = not timed_out or was_over or left_s <= self._spare_s
                calling = left_s <= ROLL_CALL_S + _SLICE_S
                trouble = not over and self._bulletin.look(seq, call_roll=calling, timeout_s=left_s)
                if over or trouble:
                    # Who saw it first is about to say what it is; who only heard of it does not know.
                    verdict = self._bulletin.verdict(ROLL_CALL_S + _SLICE_S if trouble else 0.0)
                    self._give_up(error, timed_out, self.timeout_s - left_s, tag.split(" ")[0], seq, verdict)

    def _give_up(
        self,
        cause: RuntimeError,
        timed_out: bool,
        waited_s: float,
        operation: str,
        seq: int,
        verdict: Verdict | None,
    ) -> NoReturn:
        """Raise what the first rank that gave up found out; if that is this one, find out who is missing."""
        where: dict[str, Any] = {"rank": self.group.rank, "operation": operation, "seq": seq}
        if verdict is not None:
            raise self._heard(verdict, where) from cause
        error = self._diagnose(cause, timed_out, waited_s, where)
        verdict = self._bulletin.publish(Verdict.of(error, self.group.rank))
        raise (error if verdict.rank == self.group.rank else self._heard(verdict, where)) from cause

    def _heard(self, verdict: Verdict, where: dict[str, Any]) -> MoECommError:
        error = verdict.error(**where)
        error.told_by = verdict.rank
        return error

    def _diagnose(
        self,
        cause: RuntimeError,
        timed_out: bool,
        waited_s: float,
        where: dict[str, Any],
    ) -> PeerLostError | StallError:
        if left := self._bulletin.left_before(where["seq"]):
            remedy = "look for the first error of those ranks"
            return PeerLostError(f"ranks {left} closed their buffer", remedy=remedy, **where, peers=left)
        missing = self._bulletin.call_roll()
        who = f"ranks {missing} do not answer" if missing else "all ranks answer"
        if missing is None:
            who, missing = "which ranks are missing is not known, as the key-value store does not answer", self._away
            if self._waiter is not None:
                silent = self._waiter.silent()
                missing = [peer for peer in self._away if any(self._topology.same_node(peer, one) for one in silent)]
                who = f"the key-value store does not answer, and nothing comes from the nodes of ranks {missing}"
            elif missing:
                who = f"the key-value store does not answer, and with it all ranks of other nodes, {missing}"
        if timed_out:
            what = f"gave up after {waited_s:.1f} s: {who}"
            remedy = "look at what those ranks do, or raise timeout_s; go on in a new process group"
            return StallError(what, remedy=remedy, **where, peers=missing)
        what, remedy = f"the backend lost a peer: {who}", "look for the first error of all ranks"
        return PeerLostError(what, got=str(cause).splitlines()[0], remedy=remedy, **where, peers=missing)


@final
class CollectiveExchange(Exchange):
    """Rows packed by destination; one all_to_all_single per lane; rows unpacked where they do not lie in order."""

    def __init__(self, transport: CollectiveTransport, tag: str, seq: int, lanes: Sequence[Lane]) -> None:
        self._transport, self._tag, self._seq, self._lanes = transport, tag, seq, lanes
        self._packed = [self._empty(lane.send_counts.sum(), lane.row_bytes) for lane in lanes]
        self._starts = [np.cumsum(lane.send_counts) - lane.send_counts for lane in lanes]
        self._works: list[dist.Work] = []
        self._received: list[Tensor] = []
        self._out: list[Tensor] | None = None

    def put(self, lane: int, dst: int, src: Tensor, index: Tensor) -> None:
        copy_rows(self.target(lane, dst), src, index)

    def target(self, lane: int, dst: int) -> Tensor:
        start = int(self._starts[lane][dst])
        return self._packed[lane][start : start + int(self._lanes[lane].send_counts[dst])]

    def commit(self) -> None:
        for lane, packed in zip(self._lanes, self._packed, strict=True):
            received = self._empty(lane.recv_counts.sum(), lane.row_bytes)
            work = dist.all_to_all_single(
                received,
                packed,
                lane.recv_counts.tolist(),
                lane.send_counts.tolist(),
                group=self._transport.process_group,
                async_op=True,
            )
            self._works.append(work)
            self._received.append(received)

    def wait(self) -> list[Tensor]:
        if self._out is None:
            for work in self._works:
                self._transport.finish(work, self._tag, self._seq)
            self._out = [
                received if lane.recv_slots is None else self._unpack(lane, received)
                for lane, received in zip(self._lanes, self._received, strict=True)
            ]
            self._packed, self._received = [], []
        return self._out

    def own(self, lane: int) -> Tensor:
        return self.wait()[lane]

    def release(self) -> None: ...

    def _unpack(self, lane: Lane, received: Tensor) -> Tensor:
        assert lane.recv_slots is not None
        out = self._empty(lane.out_rows[self._transport.group.rank], lane.row_bytes)
        slots = torch.from_numpy(lane.recv_slots()).to(out.device)
        copy_rows(out, received, torch.arange(len(received), device=out.device), slots)
        return out

    def _empty(self, num_rows: int, row_bytes: int) -> Tensor:
        return empty_rows(int(num_rows), row_bytes, torch.uint8, self._transport.device)
