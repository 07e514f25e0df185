"""The kernels that `bench_kernels.py` times: how to launch each, the bytes it moves, whether its result is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, check_dispatch
from bench.traffic import count_rows
from moecomm import ExpertPlacement


@dataclass(frozen=True)
class Work:
    """One kernel: how to launch it, the bytes that it reads and writes, and what is wrong with its result.

    check: given what `launch` gave, raises AssertionError; proves: what it has then shown, as in `Measurement.gate`;
    before: what must be done before every launch, and is not timed.
    """

    name: str
    launch: Callable[[], Any]
    num_bytes: int
    check: Callable[[Any], None]
    proves: str = "bit for bit"
    before: Callable[[], Any] | None = None


class Bench:
    """W ranks on one device, all with the rows and routing of one, and what every kernel needs to be launched again.

    Args:
        case: rows, routing and weights; of W ranks that are all the same.
        experts: E, a multiple of W.
    """

    def __init__(self, case: Case, world: int, experts: int) -> None:
        from moecomm.kernels.rows import RowFormat
        from moecomm.kernels.wire import Wire, buffer_bytes, loopback

        device = case.x.device
        self.case = replace(case, x_of_rank=[case.x] * world, topk_idx_of_rank=[case.topk_idx] * world)
        self.placement = ExpertPlacement.uniform(experts, world)
        self.world, self.local, self.x = world, experts // world, case.x
        self.tokens, self.hidden = case.x.shape
        self.top_k = case.topk_idx.shape[1]
        self.row_bytes = self.hidden * self.x.element_size()
        self.form = RowFormat(self.hidden, self.x.dtype)
        self.wire = Wire.of(world, self.top_k, self.local, self.form.wire_bytes + 64)
        memory = torch.zeros(world, buffer_bytes(self.wire, self.tokens), dtype=torch.uint8, device=device)
        self.links, self.memory = loopback(self.wire, self.tokens, memory=memory)
        self.tables = (
            torch.arange(experts, dtype=torch.int32, device=device),
            torch.arange(0, experts + 1, self.local, dtype=torch.int32, device=device),
        )

    def works(self) -> Iterator[Work]:
        """Every kernel, in an order in which what it waits for has been sent."""
        from moecomm.kernels.layout import layout
        from moecomm.kernels.push import push
        from moecomm.kernels.rows import Arriving

        ids, weights = self.case.topk_idx.to(torch.int32), self.case.topk_weights_TK
        facts = {"wire": self.wire, "max_tokens": self.tokens, "status": self.links[0].status}
        make = partial(layout, ids, weights, *self.tables, **facts)
        sent = make()
        meta, line = 4 * self.wire.meta_words, 4 * self.top_k
        moved = self.tokens * (2 * line + meta + 4 * self.world)
        yield Work("layout", make, moved, self._check_layout, "counts as the routing has them")
        for link in self.links:
            push(self.x, sent, link, wire=self.wire)
        yield from self._works_here(Arriving(self.links[0], self.wire, self.form), sent)
        assert not self.links[0].status.any(), f"a kernel gave up: {self.links[0].status.tolist()}"

    def _works_here(self, come: Any, sent: Any) -> Iterator[Work]:
        """Those of a rank that has been sent rows, then those that send."""
        from moecomm.kernels.combine import push_reduced
        from moecomm.kernels.permute import permute
        from moecomm.kernels.push import push
        from moecomm.kernels.receive import receive
        from moecomm.kernels.reduce import reduce, reduce_ref

        counts, row = sent.counts.cpu(), self.row_bytes
        pairs, arrive = int(counts[:, 0].sum()), self.world * int(counts[0, 0])
        entries = self.world * int(counts[0, 1:].sum())
        meta, line = 4 * self.wire.meta_words, 4 * self.top_k
        take = partial(receive, come, experts=(0, self.local), num_pairs=arrive, num_rows=entries)
        got = take()
        moved = arrive * (row + meta + line) + entries * (row + 4)
        yield Work("receive", take, moved, lambda got: self._check_rows(got.x, "receive"))
        again = partial(permute, come._replace(wire_row=got.wire_row), got.table, num_rows=entries)
        moved = arrive * (row + line) + entries * row
        yield Work("permute", again, moved, lambda given: self._check_rows(given[0], "permute"))
        yield from self._works_alone()
        for link in self.links:  # what rank 0 would get if all ranks had its rows
            push(self.x, sent, link, wire=self.wire, replay=True)

        def check_reduce(y: Tensor) -> None:
            same(y, reduce_ref(self._area(0), sent.pair_row), "reduce")

        moved = pairs * row + self.tokens * (row + 4 * self.world)
        yield Work("reduce", lambda: reduce(come, sent.pair_row), moved, check_reduce)
        home = got.table, got.weights, got.wire_row, got.token, self.links[0]

        def check_sums(_: None) -> None:
            sums, source = reduce_ref(got.x, got.table, got.weights), got.wire_row // self.tokens
            for rank in range(self.world):
                slots = got.wire_row[source == rank].long() - rank * self.tokens
                same(self._area(rank)[slots], sums[source == rank], "push_reduced")

        moved = entries * (row + 4) + arrive * (row + line + 8)
        yield Work("push_reduced", lambda: push_reduced(got.x, *home, wire=self.wire), moved, check_sums)
        yield from self._works_sending(sent, pairs)

    def _works_alone(self) -> Iterator[Work]:
        """Those that need no peer."""
        from moecomm.kernels.permute import unpermute
        from moecomm.kernels.quant import quantize, quantize_ref

        order = torch.randperm(self.tokens).to(self.x.device, torch.int32)
        yield Work(
            "unpermute",
            lambda: unpermute(self.x, order),
            2 * self.tokens * self.row_bytes,
            lambda y: same(y, self.x[order.long()], "unpermute"),
        )

        def check_codes(given: tuple[Tensor, Tensor]) -> None:
            for got, expected in zip(given, quantize_ref(self.x.cpu()), strict=True):
                same(got.cpu(), expected, "quantize")

        moved = self.tokens * (self.row_bytes + self._fp8_bytes)
        yield Work("quantize", lambda: quantize(self.x), moved, check_codes, "as the reference quantises")

    def _works_sending(self, sent: Any, pairs: int) -> Iterator[Work]:
        """Rows to all ranks, as they are and quantised."""
        from moecomm.kernels.push import push, push_quantized
        from moecomm.kernels.quant import quantize_ref

        me, meta = self.links[0], 4 * self.wire.meta_words
        where = sent.pair_row >= 0

        def check_sent(expected_TH: Tensor, name: str) -> None:
            for rank in range(self.world):
                slots = sent.pair_row[where[:, rank], rank].long() - rank * self.tokens
                got = self._area(rank, expected_TH.dtype)[slots]
                same(got, expected_TH[where[:, rank]], name)

        moved = (self.tokens + pairs) * (self.row_bytes + meta)
        yield Work("push", lambda: push(self.x, sent, me, wire=self.wire), moved, lambda _: check_sent(self.x, "push"))
        moved = self.tokens * (self.row_bytes + meta) + pairs * (self._fp8_bytes + meta)
        yield Work(
            "push_quantized",
            lambda: push_quantized(self.x, sent, me, wire=self.wire),
            moved,
            lambda _: check_sent(quantize_ref(self.x.cpu())[0].to(self.x.device), "push_quantized"),
            "codes as the reference quantises",
        )

    @property
    def _fp8_bytes(self) -> int:
        return self.hidden + 4 * -(-self.hidden // 128)

    def _area(self, rank: int, dtype: torch.dtype | None = None) -> Tensor:
        """(W * T, H) rows that lie with a rank since the last operation of rank 0, by source rank and slot."""
        from moecomm.kernels.wire import area_bytes

        rows_bytes, meta, counts, _ = area_bytes(self.wire, self.tokens)
        begin = (int(self.links[0].state[0]) & 1) * (rows_bytes + meta + counts)
        num_rows = self.world * self.tokens
        raw = self.memory[rank, begin : begin + num_rows * self.wire.row_bytes].view(num_rows, self.wire.row_bytes)
        dtype = self.x.dtype if dtype is None else dtype
        return raw[:, : self.hidden * dtype.itemsize].contiguous().view(dtype)

    def _check_layout(self, sent: Any) -> None:
        entries, pairs = count_rows(self.case.ids_of_rank[:1], self.placement)
        counts = sent.counts.cpu()
        assert counts[:, 0].tolist() == pairs[0].tolist(), "layout: another number of pairs"
        assert counts[:, 1:].sum(1).tolist() == entries[0].tolist(), "layout: another number of entries"

    def _check_rows(self, rows_NH: Tensor, name: str) -> None:
        check_dispatch(self.case, rows_NH, self.placement, name)


def same(got: Tensor, expected: Tensor, name: str) -> None:
    """Raise AssertionError unless both are of the same bytes."""
    is_same = torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert is_same, f"{name}: not what the reference gives"
