"""Dispatch and combine as a few kernels each, for a transport that is made of kernels.

The same operations as in `moecomm.operations`, with the same results bit for bit; what they note in a handle differs:

    send_order, send_slots, pair_tokens   empty: nothing is sorted
    send_pos (T, K)      t * K + k, the row in which an entry comes home by itself, -1 for none
    pair_pos (T, W)      w * M + slot, the row of the token's pair at rank w, and in which its sum comes home
    recv_keys (2 * P,)   rows of the pairs on the wire (source * M + slot), then their tokens at the source
    expert_counts (W, E), pair_counts (W, W)   what this rank sends or receives; 0 for what concerns others only

Legend: T tokens, K top-k, W ranks, M max tokens per rank, P pairs received, N rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from moecomm.core import Core
from moecomm.handle import DispatchHandle
from moecomm.operations import Arrived, Homecoming, Planned, Route, handle_counts, row_bytes_of
from moecomm.plan import Counts, PlacementTables, SendPlan
from moecomm.transport._symmetric_device import KernelTransport
from moecomm.transport.base import as_bytes


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
        self._entries_MK = torch.arange(transport.max_tokens * top_k, dtype=torch.int32, device=device).view(-1, top_k)

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
        """Plan, send, wait on the host for the counts, and launch what receives: three kernels."""
        transport = self.transport
        with core.phase("send"), transport.launching(*payloads, topk_idx_TK, topk_weights_TK):
            sent = self._send_planned(payloads, topk_idx_TK, topk_weights_TK)
        with core.phase("counts"):
            come = transport.await_counts("dispatch")
        counts = self._counts(come, transport.read(sent.counts)[:, 0], align)
        num_pairs = int(come[:, 0].sum())
        num_rows = num_pairs if layout == "rank" else int(counts.rows_of_rank[core.rank])
        with core.phase("arrange"), transport.launching():
            got = self._receive(payloads, layout, align, num_pairs, num_rows)
            keys = torch.cat([got.wire_row, got.token])
            flat_TK = sent.meta[:, : topk_idx_TK.shape[1]]
            send_pos = torch.where(flat_TK >= 0, self._entries_MK[: len(flat_TK)], -1)
            marked = transport.mark()
        core.counters["dispatches"] += 1
        self._count(core, counts.pair_counts[core.rank], payloads)
        transport.check("dispatch", topk_idx_TK.shape[1])
        none = [send_pos.new_empty(0, dtype=torch.int64) for _ in range(3)]
        plan = SendPlan(np.empty(0, np.int32), none[2], none[0], send_pos, none[2], none[1], none[2], sent.pair_row)
        route = Route(counts, none[0], None, none[1], topk_idx_TK.shape[1])

        def finish() -> Planned:
            transport.join(marked, got.x, got.scales, got.weights, got.table, keys, send_pos, sent.pair_row)
            arrived = Arrived(got.x, _restore(got.scales, payloads), got.weights, got.table, keys)
            return Planned(arrived, route, plan)

        return finish

    def start_replay(
        self, core: Core, payloads: Sequence[Tensor], topk_weights_TK: Tensor | None, handle: DispatchHandle
    ) -> Callable[[], Arrived]:
        """Send along a planned route and launch what receives: two kernels, three with new weights."""
        transport = self.transport
        num_pairs, num_rows = len(handle.recv_table), len(handle.row_weights)
        with core.phase("send"), transport.launching(*payloads, topk_weights_TK, *handle.tensors()):
            weights = None
            if topk_weights_TK is None:
                self._push(payloads, self._sent(handle.pair_pos))
                rows, scales = self._receive_replayed(core, payloads, handle, num_rows)
            else:
                self._send_planned(payloads, handle.topk_idx, topk_weights_TK)
                got = self._receive(payloads, handle.layout, handle.align, num_pairs, num_rows)
                rows, scales, weights = got.x, got.scales, got.weights
            marked = transport.mark()
        core.counters["replays"] += 1
        self._count(core, handle.pair_counts[core.rank].numpy(), payloads)
        self._check_unless_busy("dispatch")

        def finish() -> Arrived:
            transport.join(marked, rows, scales, weights)
            return Arrived(rows, _restore(scales, payloads), weights, None, None)

        return finish

    def _send_planned(self, payloads: Sequence[Tensor], topk_idx_TK: Tensor, topk_weights_TK: Tensor | None) -> Any:
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
        self._push(payloads, sent)
        return sent

    def _push(self, payloads: Sequence[Tensor], sent: Any) -> None:
        from moecomm.kernels.push import push

        transport = self.transport
        scales = _as_floats(payloads[1]) if len(payloads) > 1 else None
        push(payloads[0], sent, transport.link, wire=transport.wire, scales=scales, replay=sent.meta is None)
        transport.seq += 1

    def _receive(self, payloads: Sequence[Tensor], layout: str, align: int, num_pairs: int, num_rows: int) -> Any:
        from moecomm.kernels.receive import receive

        sizes = {"experts": self._experts, "num_pairs": num_pairs, "num_rows": num_rows}
        return receive(self._arriving(_form(payloads)), layout=layout, align=align, **sizes)

    def _receive_replayed(
        self, core: Core, payloads: Sequence[Tensor], handle: DispatchHandle, num_rows: int
    ) -> tuple[Tensor, Tensor | None]:
        from moecomm.kernels.permute import permute

        come = self._arriving(_form(payloads), handle.recv_keys[: len(handle.recv_table)])
        if handle.layout == "rank":
            table = torch.arange(num_rows, dtype=torch.int32, device=self.transport.device)[:, None]
            rows, scales = permute(come, table, num_rows=num_rows)
        else:
            counts = handle_counts(core, handle)
            groups = torch.from_numpy(np.stack([counts.expert_offsets, counts.tokens_per_expert]))
            groups = groups.to(self.transport.device, torch.int32, non_blocking=True)
            rows, scales = permute(come, handle.recv_table, groups, num_rows=num_rows, align=handle.align)
        return rows, scales

    # -- combine -------------------------------------------------------------------------------------------------

    def start_combine(
        self, core: Core, home: Homecoming, handle: DispatchHandle
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Lead rows home and launch what sums them there: two kernels; `carried` takes two more."""
        transport = self.transport
        inputs = [home.rows, home.bias, home.carried, *handle.tensors()]
        with core.phase("send"), transport.launching(*inputs):
            summed = None if home.rows is None else self._sum_home(core, home, home.rows, handle)
            carried = None if home.carried is None else self._carry_home(home.carried, handle)
            marked = transport.mark()
        core.counters["combines"] += 1
        if home.rows is not None:
            self._count(core, handle.pair_counts[:, core.rank].numpy(), [home.rows])
        self._check_unless_busy("combine")

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
        form, num_pairs = RowFormat(rows.shape[1], rows.dtype), len(handle.recv_table)
        wire_row, token = handle.recv_keys[:num_pairs], handle.recv_keys[num_pairs:]
        if handle.layout == "rank":  # rows as they are
            push(rows, self._sent(self._homes(wire_row)), transport.link, wire=transport.wire, replay=True)
        else:
            weights = handle.row_weights if home.weighted and not each else None
            table = handle.recv_table
            push_reduced(rows, table, weights, wire_row, token, transport.link, wire=transport.wire, each=each)
        transport.seq += 1
        if each:
            by_entry = handle.topk_weights if home.weighted else None
            return reduce(self._arriving(form), handle.send_pos, by_entry, home.bias)
        return reduce(self._arriving(form), handle.pair_pos, None, home.bias)

    def _carry_home(self, carried: Tensor, handle: DispatchHandle) -> Tensor:
        """(T, K) of (N,) or (N, K) float32 values: each pair's line travels like a row of K elements."""
        from moecomm.kernels.permute import permute
        from moecomm.kernels.push import push
        from moecomm.kernels.rows import RowFormat

        transport, (num_tokens, top_k) = self.transport, handle.topk_idx.shape
        lines_PK = carried
        if handle.layout == "expert":  # index -1 hits the zero at the end
            lines_PK = torch.cat([carried, carried.new_zeros(1)])[handle.recv_table.long()]
        homes = self._homes(handle.recv_keys[: len(handle.recv_table)])
        push(lines_PK, self._sent(homes), transport.link, wire=transport.wire, replay=True)
        transport.seq += 1
        places = handle.pair_pos.reshape(-1)
        table = torch.arange(len(places), dtype=torch.int32, device=places.device)[:, None]
        come = self._arriving(RowFormat(top_k, torch.float32), places)
        lines, _ = permute(come, table, num_rows=len(places))
        rank_TK = self.tables.rank_of_expert(handle.topk_idx)
        known = rank_TK < transport.group.size
        line_TK = torch.arange(num_tokens, device=places.device)[:, None] * transport.group.size
        k = torch.arange(top_k, device=places.device)
        found = lines.view(-1)[((line_TK + rank_TK.masked_fill(~known, 0)) * top_k + k)] if len(places) else lines[:0]
        if handle.layout == "rank":
            found = found + 0.0  # sums over ranks have no negative zero
        return torch.where(known, found.view(num_tokens, top_k), 0.0)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _homes(self, wire_row: Tensor) -> Tensor:
        """(P, W) row of each received pair at its source; -1 elsewhere."""
        ranks = torch.arange(self.transport.group.size, dtype=torch.int32, device=wire_row.device)
        here = wire_row[:, None] // self.transport.max_tokens == ranks
        return torch.where(here, wire_row[:, None], -1)

    def _sent(self, pair_row: Tensor) -> Any:
        from moecomm.kernels.layout import SendLayout

        return SendLayout(None, pair_row.contiguous(), None)

    def _arriving(self, form: Any, wire_row: Tensor | None = None) -> Any:
        from moecomm.kernels.rows import Arriving

        return Arriving(self.transport.link, self.transport.wire, form, wire_row)

    def _counts(self, come: np.ndarray, pairs_sent: np.ndarray, align: int) -> Counts:
        """The counts that concern this rank, in the shape in which all would be."""
        size, rank = self.transport.group.size, self.transport.group.rank
        (first, count), num_experts = self._experts, self.tables.placement.num_experts
        experts, pairs = np.zeros((size, num_experts), np.int32), np.zeros((size, size), np.int32)
        experts[:, first : first + count] = come[:, 1 : 1 + count]
        pairs[rank], pairs[:, rank] = pairs_sent, come[:, 0]
        return Counts(experts, pairs, self.tables.rank_starts, rank, align)

    def _check_unless_busy(self, operation: str) -> None:
        """Look at what kernels noted where that costs nothing; on a GPU the next operation that waits does."""
        if self.transport.device.type == "cpu":
            self.transport.check(operation, self.transport.wire.top_k)

    def _count(self, core: Core, pairs_W: np.ndarray, payloads: Sequence[Tensor]) -> None:
        """Count the pairs that travel, and their bytes; those to itself apart."""
        row_bytes = sum(map(row_bytes_of, payloads))
        local, total = int(pairs_W[core.rank]), int(pairs_W.sum())
        core.counters["rows_local"] += local
        core.counters["rows_remote"] += total - local
        core.counters["bytes_local"] += local * row_bytes
        core.counters["bytes_remote"] += (total - local) * row_bytes


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
