"""Dispatch and combine as a few kernels each, for a transport that is made of kernels.

The same operations as in `moecomm.operations`, with the same results bit for bit; what they note in a handle differs:

    send_order, send_slots, pair_tokens   empty: nothing is sorted
    send_pos (T, K)      t * K + k, the row in which an entry comes home by itself, -1 for none
    pair_pos (T, W)      w * M + slot, the row of the token's pair at rank w, and in which its sum comes home
    recv_keys (2 * P,)   rows of the pairs on the wire (source * M + slot), then their tokens at the source
    expert_counts (W, E), pair_counts (W, W)   what this rank sends or receives; 0 for what concerns others only.
        With static sizes nobody on the host knows: (2, L) int32 on the device, end of each group and its tokens; (0,)

Legend: T tokens, K top-k, W ranks, M max tokens per rank, P pairs received, N rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from moecomm.checks import bad_id
from moecomm.core import Core
from moecomm.handle import DispatchHandle
from moecomm.operations import Arrived, Homecoming, Planned, Route, dispatch_tag, handle_counts, row_bytes_of
from moecomm.plan import Counts, PlacementTables, SendPlan
from moecomm.transport._symmetric_device import KernelTransport
from moecomm.transport.base import as_bytes


def attach(core: Core) -> None:
    """Let the kernels of a buffer's transport do whole operations."""
    assert isinstance(core.transport, KernelTransport)
    core.fused = FusedOperations(core.transport, core.tables)


@final
class FusedOperations:
    """What `operations` hands over to where the transport moves rows by kernels."""

    def __init__(self, transport: KernelTransport, tables: PlacementTables) -> None:
        device = transport.device
        self.transport, self.tables = transport, tables
        self._flat_of_expert = tables.flat_of_expert[:-1].to(torch.int32)
        self._expert_begin = torch.from_numpy(tables.rank_starts).to(device, torch.int32)
        begin, end = tables.rank_starts[transport.group.rank :][:2].tolist()
        self._experts = begin, end - begin
        top_k = transport.wire.top_k
        self.padded_notes: Callable[[], None] | None = None  # raises what kernels of layout "padded" noted
        self._entries_MK = torch.arange(transport.max_tokens * top_k, dtype=torch.int32, device=device).view(-1, top_k)

    def static_sizes(self, layout: str) -> tuple[int, int] | None:
        """Rows and pairs that every dispatch gives, or None: as many as come. A pair has a row at least."""
        num_rows, transport = self.transport.max_recv_tokens, self.transport
        if num_rows is None:
            return None
        return num_rows, num_rows if layout == "rank" else min(num_rows, transport.group.size * transport.max_tokens)

    # -- dispatch ------------------------------------------------------------------------------------------------

    def start_dispatch(
        self,
        core: Core,
        payloads: Sequence[Tensor],
        topk_idx_TK: Tensor,
        topk_weights_TK: Tensor | None,
        layout: str,
        align: int,
    ) -> Callable[[], Planned]:
        """Plan, send, wait on the host for the counts unless sizes are static, launch what receives: three kernels."""
        transport, sizes, counts = self.transport, self.static_sizes(layout), None
        if sizes is None:
            transport.refuse_capture("a dispatch")
        tag = dispatch_tag(payloads, topk_weights_TK, layout, align, topk_idx_TK.shape[1])
        with core.phase("send"), transport.launching(*payloads, topk_idx_TK, topk_weights_TK):
            sent, link = self._send_planned(tag, payloads, topk_idx_TK, topk_weights_TK)
            marked = transport.mark()
        if sizes is None:
            with core.phase("counts"):
                come = transport.await_counts(tag, marked)
            counts = self._counts(come, transport.read(sent.counts)[:, 0], align)
            num_pairs = int(come[:, 0].sum())
            sizes = num_pairs if layout == "rank" else int(counts.rows_of_rank[core.rank]), num_pairs
        with core.phase("arrange"), transport.launching():
            got = self._receive(link, payloads, layout, align, sizes)
            keys = torch.cat([got.wire_row, got.token])
            flat_TK = sent.meta[:, : topk_idx_TK.shape[1]]
            send_pos = torch.where(flat_TK >= 0, self._entries_MK[: len(flat_TK)], -1)
            marked = transport.mark()
        core.counters["dispatches"] += 1
        if counts is not None:
            core.arrived(counts.tokens_per_expert)
            self._count(core, counts.pair_counts[core.rank], payloads)
            self.check("dispatch")
        none = [send_pos.new_empty(0, dtype=torch.int64) for _ in range(3)]
        plan = SendPlan(np.empty(0, np.int32), none[2], none[0], send_pos, none[2], none[1], none[2], sent.pair_row)
        route = None if counts is None else Route(counts, none[0], None, none[1], topk_idx_TK.shape[1])

        def finish() -> Planned:
            made = got.x, got.scales, got.weights, got.table, got.groups, keys, send_pos, sent.pair_row
            transport.join(marked, *made)
            arrived = Arrived(got.x, _restore(got.scales, payloads), got.weights, got.table, keys)
            return Planned(arrived, route, plan, got.groups)

        return finish

    def start_replay(
        self, core: Core, payloads: Sequence[Tensor], topk_weights_TK: Tensor | None, handle: DispatchHandle
    ) -> Callable[[], Arrived]:
        """Send along a planned route and launch what receives: two kernels, three with new weights."""
        transport, sizes = self.transport, (len(handle.row_weights), len(handle.recv_table))
        tag = dispatch_tag(payloads, topk_weights_TK, handle.layout, handle.align, handle.topk_idx.shape[1]) + " replay"

        def num_rows() -> np.ndarray:
            return handle.pair_counts[core.rank].numpy()

        with core.phase("send"), transport.launching(*payloads, topk_weights_TK, *handle.tensors()):
            weights = None
            if topk_weights_TK is None:
                link = self._push(tag, payloads, self._sent(handle.pair_pos), num_rows)
                rows, scales = self._receive_replayed(core, link, payloads, handle)
            else:
                _, link = self._send_planned(tag, payloads, handle.topk_idx, topk_weights_TK)
                got = self._receive(link, payloads, handle.layout, handle.align, sizes)
                rows, scales, weights = got.x, got.scales, got.weights
            marked = transport.mark()
        core.counters["replays"] += 1
        self._finish_launching(core, "dispatch", num_rows, payloads)

        def finish() -> Arrived:
            transport.join(marked, rows, scales, weights)
            return Arrived(rows, _restore(scales, payloads), weights, None, None)

        return finish

    def _send_planned(
        self, tag: str, payloads: Sequence[Tensor], topk_idx_TK: Tensor, topk_weights_TK: Tensor | None
    ) -> tuple[Any, Any]:
        from moecomm.kernels.layout import layout

        transport = self.transport
        sent = layout(
            topk_idx_TK,
            topk_weights_TK,
            self._flat_of_expert,
            self._expert_begin,
            wire=transport.wire,
            max_tokens=transport.max_tokens,
            status=transport.link.status,
        )
        return sent, self._push(tag, payloads, sent, lambda: transport.read(sent.counts)[:, 0])

    def _push(self, tag: str, payloads: Sequence[Tensor], sent: Any, num_rows: Callable[[], np.ndarray]) -> Any:
        from moecomm.kernels.push import push

        planned = sent.meta is not None
        scales = _as_floats(payloads[1]) if len(payloads) > 1 else None
        options = {"wire": self.transport.wire, "scales": scales, "replay": not planned}
        return self._send(tag, lambda link: push(payloads[0], sent, link, **options), num_rows, planned=planned)

    def _receive(self, link: Any, payloads: Sequence[Tensor], layout: str, align: int, sizes: tuple[int, int]) -> Any:
        from moecomm.kernels.receive import receive

        options = {"experts": self._experts, "num_rows": sizes[0], "num_pairs": sizes[1], "align": align}
        static = self.transport.max_recv_tokens is not None
        return receive(self._arriving(link, _form(payloads)), layout=layout, zero_rest=static, **options)

    def _receive_replayed(
        self, core: Core, link: Any, payloads: Sequence[Tensor], handle: DispatchHandle
    ) -> tuple[Tensor, Tensor | None]:
        from moecomm.kernels.permute import permute

        num_rows, static = len(handle.row_weights), self.transport.max_recv_tokens is not None
        come = self._arriving(link, _form(payloads), handle.recv_keys[: len(handle.recv_table)])
        if handle.layout == "rank":
            table = torch.arange(num_rows, dtype=torch.int32, device=self.transport.device)[:, None]
            return permute(come, table, num_rows=num_rows)
        if static:
            groups = handle.expert_counts
        else:
            counts = handle_counts(core, handle)
            groups = torch.from_numpy(np.stack([counts.expert_offsets, counts.tokens_per_expert]))
            groups = groups.to(self.transport.device, torch.int32, non_blocking=True)
        options = {"num_rows": num_rows, "align": handle.align, "zero_rest": static}
        return permute(come, handle.recv_table, groups, **options)

    # -- combine -------------------------------------------------------------------------------------------------

    def start_combine(
        self, core: Core, home: Homecoming, handle: DispatchHandle
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Lead rows home and launch what sums them there: two kernels; `carried` takes two more."""
        transport = self.transport
        inputs = [home.rows, home.bias, home.carried, *handle.tensors()]
        with core.phase("send"), transport.launching(*inputs):
            summed = None if home.rows is None else self._sum_home(core, home, home.rows, handle)
            carried = None if home.carried is None else self._carry_home(core, home.carried, handle)
            marked = transport.mark()
        core.counters["combines"] += 1
        payloads = [] if home.rows is None else [home.rows]
        self._finish_launching(core, "combine", _sums_sent(core, handle), payloads)

        def finish() -> tuple[Tensor | None, Tensor | None]:
            transport.join(marked, summed, carried)
            return summed, carried

        return finish

    def _sum_home(self, core: Core, home: Homecoming, rows: Tensor, handle: DispatchHandle) -> Tensor:
        from moecomm.kernels.combine import push_reduced
        from moecomm.kernels.push import push
        from moecomm.kernels.reduce import reduce
        from moecomm.kernels.rows import RowFormat

        transport, each = self.transport, core.reduce == "source"
        form, num_pairs, wire = RowFormat(rows.shape[1], rows.dtype), len(handle.recv_table), transport.wire
        wire_row, token = handle.recv_keys[:num_pairs], handle.recv_keys[num_pairs:]
        tag = f"combine layout={handle.layout} weighted={home.weighted} payload={rows.dtype}"
        num_rows, block = _sums_sent(core, handle), transport.max_tokens
        table = handle.send_pos if each else handle.pair_pos
        if handle.layout == "rank":  # rows as they are
            sent = self._sent(self._homes(wire_row))
            send = lambda link: push(rows, sent, link, wire=wire, replay=True)  # noqa: E731
        elif each and transport.copies is not None:
            block *= wire.top_k
            num_rows, table = _rows_sent(core, handle), self._copied_places(handle, block)
            sent = self._sent(self._copied_rows(len(rows), handle.recv_table, wire_row, block))
            send = lambda link: push(rows, sent, link, wire=wire, replay=True)  # noqa: E731
        else:
            weights = handle.row_weights if home.weighted and not each else None
            send = lambda link: push_reduced(  # noqa: E731
                rows, handle.recv_table, weights, wire_row, token, link, wire=wire, each=each
            )
        link = self._send(tag, send, num_rows, block=block)
        by_entry = handle.topk_weights if each and home.weighted else None
        return reduce(self._arriving(link, form), table, by_entry, home.bias)

    def _copied_rows(self, num_rows: int, table_PK: Tensor, wire_row: Tensor, block: int) -> Tensor:
        """(N, W) place of each row in its source's block, numbered by (token, k); -1 elsewhere."""
        size = self.transport.group.size
        source_PK = (wire_row // self.transport.max_tokens)[:, None].expand_as(table_PK).masked_fill(table_PK < 0, size)
        place = source_PK * block + _numbers(source_PK.reshape(-1), size).view_as(source_PK)
        out = wire_row.new_full((num_rows + 1, size + 1), -1)
        out[table_PK.masked_fill(table_PK < 0, num_rows).long(), source_PK.long()] = place.to(out.dtype)
        return out[:num_rows, :size]

    def _copied_places(self, handle: DispatchHandle, block: int) -> Tensor:
        """(T, K) where `_copied_rows` of the ranks come home; -1 for none."""
        rank_TK, size = self._rank_of_entry(handle), self.transport.group.size
        place = rank_TK * block + _numbers(rank_TK.reshape(-1), size).view_as(rank_TK)
        return place.masked_fill(rank_TK == size, -1).int()

    def _carry_home(self, core: Core, carried: Tensor, handle: DispatchHandle) -> Tensor:
        """(T, K) of (N,) or (N, K) float32 values: each pair's line travels like a row of K elements."""
        from moecomm.kernels.permute import permute
        from moecomm.kernels.push import push
        from moecomm.kernels.rows import RowFormat

        transport, (num_tokens, top_k) = self.transport, handle.topk_idx.shape
        lines_PK = carried
        if handle.layout == "expert":  # index -1 hits the zero at the end
            lines_PK = torch.cat([carried, carried.new_zeros(1)])[handle.recv_table.long()]
        sent = self._sent(self._homes(handle.recv_keys[: len(handle.recv_table)]))
        tag = f"combine layout={handle.layout} carries=weights"
        options = {"wire": transport.wire, "replay": True}
        link = self._send(tag, lambda link: push(lines_PK, sent, link, **options), _sums_sent(core, handle))
        places = handle.pair_pos.reshape(-1)
        table = torch.arange(len(places), dtype=torch.int32, device=places.device)[:, None]
        come = self._arriving(link, RowFormat(top_k, torch.float32), places)
        lines, _ = permute(come, table, num_rows=len(places))
        rank_TK = self._rank_of_entry(handle)
        known = rank_TK < transport.group.size
        line_TK = torch.arange(num_tokens, device=places.device)[:, None] * transport.group.size
        k = torch.arange(top_k, device=places.device)
        found = lines.view(-1)[((line_TK + rank_TK.masked_fill(~known, 0)) * top_k + k)] if len(places) else lines[:0]
        if handle.layout == "rank":
            found = found + 0.0  # sums over ranks have no negative zero
        return torch.where(known, found.view(num_tokens, top_k), 0.0)

    # -- what kernels found wrong --------------------------------------------------------------------------------

    def check(self, operation: str) -> None:
        """Raise what kernels noted. The host waits for them here: only where it has to wait anyway."""
        from moecomm.kernels.wire import BAD_ID, decode_bad_id

        transport = self.transport
        bad = decode_bad_id(int(transport.check(operation)[int(BAD_ID)]), transport.wire.top_k)
        if bad is not None:
            transport.link.status[int(BAD_ID)] = 0
            token, k, got = bad
            shown = {2**31 - 1: f"{got} or more", -(2**31): f"{got} or less"}.get(got, got)  # kernels note 32 bits
            error = bad_id(token, k, shown, self.tables.placement.num_experts, transport.group.rank)
            error.harmless = True
            raise error

    def synchronize(self) -> None:
        """Wait on the host until everything is done, and look at what kernels noted."""
        self.transport.synchronize()
        self.check("synchronize")
        if self.padded_notes is not None:
            self.padded_notes()

    def _finish_launching(
        self, core: Core, operation: str, num_pairs: Callable[[], np.ndarray], payloads: Sequence[Tensor]
    ) -> None:
        """Count, and look at what kernels noted, where that costs no wait: not with static sizes, nor on a GPU."""
        if self.transport.max_recv_tokens is None:
            if payloads:
                self._count(core, num_pairs(), payloads)
            if self.transport.device.type == "cpu":
                self.check(operation)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _send(
        self,
        tag: str,
        push: Callable[[Any], None],
        num_rows: Callable[[], np.ndarray],
        *,
        block: int = 0,
        planned: bool = False,
    ) -> Any:
        """Send by a kernel, or by the copy engines (see there); this rank's end of the wire in that operation."""
        transport = self.transport
        link = transport.begin(tag)
        if transport.copies is None:
            push(link)
        else:
            transport.copies.send(link, push, num_rows, block=block or transport.max_tokens, planned=planned)
        transport.num_sent += 1
        return link

    def _rank_of_entry(self, handle: DispatchHandle) -> Tensor:
        """(T, K) rank of each entry, W for none; ids that the kernels found out of range are none."""
        return self.tables.rank_of_expert(handle.topk_idx.masked_fill(handle.send_pos < 0, -1))

    def _homes(self, wire_row: Tensor) -> Tensor:
        """(P, W) row of each received pair at its source; -1 elsewhere."""
        ranks = torch.arange(self.transport.group.size, dtype=torch.int32, device=wire_row.device)
        here = wire_row[:, None] // self.transport.max_tokens == ranks
        return torch.where(here, wire_row[:, None], -1)

    def _sent(self, pair_row: Tensor) -> Any:
        from moecomm.kernels.layout import SendLayout

        return SendLayout(None, pair_row.contiguous(), None)

    def _arriving(self, link: Any, form: Any, wire_row: Tensor | None = None) -> Any:
        from moecomm.kernels.rows import Arriving

        return Arriving(link, self.transport.wire, form, wire_row)

    def _counts(self, come: np.ndarray, pairs_sent: np.ndarray, align: int) -> Counts:
        """The counts that concern this rank, in the shape in which all would be."""
        size, rank = self.transport.group.size, self.transport.group.rank
        (first, count), num_experts = self._experts, self.tables.placement.num_experts
        experts, pairs = np.zeros((size, num_experts), np.int32), np.zeros((size, size), np.int32)
        experts[:, first : first + count] = come[:, 1 : 1 + count]
        pairs[rank], pairs[:, rank] = pairs_sent, come[:, 0]
        return Counts(experts, pairs, self.tables.rank_starts, rank, align)

    def _count(self, core: Core, pairs_W: np.ndarray, payloads: Sequence[Tensor]) -> None:
        """Count the pairs that travel, and their bytes; those to itself apart."""
        row_bytes = sum(map(row_bytes_of, payloads))
        local, total = int(pairs_W[core.rank]), int(pairs_W.sum())
        core.counters["rows_local"] += local
        core.counters["rows_remote"] += total - local
        before = core.bytes_sent()
        core.counters["bytes_local"] += local * row_bytes
        core.counters["bytes_remote"] += (total - local) * row_bytes
        core.show_bytes(before)


def _sums_sent(core: Core, handle: DispatchHandle) -> Callable[[], np.ndarray]:
    """Gives (W,) how many pairs came from each rank: so many sums go home."""
    return lambda: handle.pair_counts[:, core.rank].numpy()


def _rows_sent(core: Core, handle: DispatchHandle) -> Callable[[], np.ndarray]:
    """Gives (W,) how many rows came from each rank."""
    return lambda: handle_counts(core, handle).entries[:, core.rank]


def _numbers(ranks: Tensor, size: int) -> Tensor:
    """How many of the same rank come before each; `size` is a rank too.

    >>> _numbers(torch.tensor([1, 0, 1, 2, 1]), 2).tolist()
    [0, 0, 1, 0, 2]
    """
    hits = torch.nn.functional.one_hot(ranks.long(), size + 1)
    return (hits.cumsum(0) - hits).gather(1, ranks.long()[:, None])[:, 0]


def _form(payloads: Sequence[Tensor]) -> Any:
    from moecomm.kernels.rows import RowFormat

    columns = 0
    if len(payloads) > 1:
        columns = -(-row_bytes_of(payloads[1]) // 4)
    return RowFormat(payloads[0].shape[1], payloads[0].dtype, columns)


def _as_floats(scales: Tensor) -> Tensor | None:
    """(T, ...) values of any dtype as (T, G) words that are called float32; kernels copy their bits."""
    raw = as_bytes(scales)
    if not raw.shape[1]:
        return None
    return torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4)).contiguous().view(torch.float32)


def _restore(words: Tensor | None, payloads: Sequence[Tensor]) -> Tensor | None:
    """What `_as_floats` took apart, for the rows that arrived."""
    if len(payloads) == 1:
        return None
    kind = payloads[1]
    if words is None:
        raise AssertionError("scales without elements")
    raw = words.view(torch.uint8)[:, : row_bytes_of(kind)].contiguous()
    return raw.view(kind.dtype).view(len(words), *kind.shape[1:])
