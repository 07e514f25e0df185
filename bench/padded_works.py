"""The kernels of layout "padded" for `bench_kernels.py`: what a decode step launches, each by itself.

W ranks live in one process; all have the rows and the routing of one. Legend: as in `moecomm.kernels.slots`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.kernel_works import Work, same

MOST_TOKENS = 256  # M of a decode step; four areas of L * W * M rows per rank are reserved
_SCALES = 1  # as `moecomm.kernels.slots` numbers them: float32


class PaddedBench:
    """One generation of slots on W ranks, through which every kernel can be launched again.

    Args:
        case: rows, routing and weights of a rank.
        experts: E, a multiple of W.
    """

    def __init__(self, case: Case, world: int, experts: int) -> None:
        from moecomm.kernels.slots import loopback_slots, num_places, split_areas
        from moecomm.kernels.wire import Wire

        self.x, self.world = case.x, world
        device, top_k = case.x.device, case.topk_idx.shape[1]
        self.ids, self.weights = case.topk_idx, case.topk_weights_TK
        self.row_bytes = case.x.shape[1] * case.x.element_size()
        self.wire = Wire.of(world, top_k, experts // world, self.row_bytes + 64)
        area = padded_area_bytes(len(case.x), experts, self.row_bytes)
        local = experts // world
        tables = [torch.arange(experts, dtype=torch.int32, device=device) for _ in range(2)]
        ranks, memory = loopback_slots(self.wire, len(case.x), tables[0] // local, tables[1] % local, area)
        self.slots = [generations[0] for generations in ranks]
        self.areas = [split_areas(of_rank, area)[0] for of_rank in memory]
        self.places = num_places(self.wire, len(case.x))

    def works(self) -> Iterator[Work]:
        """Every kernel: first those that only look, then those that send."""
        from moecomm.kernels.padded import padded_receive, padded_send
        from moecomm.kernels.padded_home import padded_return, padded_sum

        me, row, tokens = self.slots[0], self.row_bytes, len(self.x)
        entries = int((self.ids >= 0).sum())
        send = partial(padded_send, self.x, self.ids, wire=self.wire, number=0, topk_weights=self.weights)
        rows = self.x.new_zeros(self.places, self.x.shape[1])
        for slots in self.slots:
            send(slots)
        look = partial(padded_receive, me, wire=self.wire)
        yield Work("padded_receive", look, 4 * self.world * self.wire.counts_width, self._check_ranges, "counts")
        for slots in self.slots:
            padded_receive(slots, wire=self.wire, out=rows)
            padded_return(rows, slots, wire=self.wire, number=0)
        y = torch.empty_like(self.x)
        home = partial(padded_sum, y, me, wire=self.wire, number=0, weights=self.weights)
        yield Work("padded_sum", home, (entries + tokens) * row + 12 * entries, lambda _: self._check_sum(y))
        here = int(me.tokens.sum())
        back = partial(padded_return, rows, me, wire=self.wire, number=0)
        yield Work("padded_return", back, 2 * here * row, lambda _: None, "what padded_sum then adds up")
        free = partial(self._free, me)
        moved = (tokens + entries) * row + 24 * entries
        yield Work("padded_send", partial(send, me), moved, lambda _: self._check_sent(self.x), before=free)
        fp8 = self.x.shape[1] + 4 * -(-self.x.shape[1] // 128)
        moved = tokens * row + entries * (fp8 + 24)
        quantised = partial(send, me, quant=_SCALES)
        yield Work("padded_send_fp8", quantised, moved, self._check_codes, "codes as the reference's", before=free)
        assert not me.out.status.any() and not me.notes.any(), "a kernel gave up, or sent nothing"

    @staticmethod
    def _free(slots: Any) -> None:
        """Say that the last dispatch is done with, as the sum of its rows would, so that the next may send."""
        from moecomm.kernels.slots import DONE

        slots.book[int(DONE)].copy_(slots.out.state[0])

    def _came(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token, rank and place of every entry that was sent."""
        token, k = torch.nonzero(self.slots[0].places[: len(self.x)] >= 0, as_tuple=True)
        expert = self.ids[token, k]
        return token, self.slots[0].rank_of_expert[expert], self.slots[0].places[token, k].long()

    def _check_ranges(self, _: object) -> None:
        named = torch.bincount(self.ids[self.ids >= 0], minlength=len(self.slots[0].rank_of_expert))
        mine = named[self.slots[0].rank_of_expert == 0]
        counts = self.slots[0].ranges[..., 1] - self.slots[0].ranges[..., 0]
        assert torch.equal(counts.long(), mine[:, None].expand_as(counts)), "padded_receive: other counts"

    def _check_sum(self, y: Tensor) -> None:
        total = torch.zeros_like(self.x, dtype=torch.float32)
        for k in range(self.ids.shape[1]):
            part = self.weights[:, k, None] * self.x.float()
            total = torch.where(self.ids[:, k, None] >= 0, total + part, total)
        same(y, total.to(y.dtype), "padded_sum")

    def _check_sent(self, rows: Tensor) -> None:
        token, rank, place = self._came()
        assert len(token) == int((self.ids >= 0).sum()), "padded_send: an entry was left out"
        width = rows.shape[1] * rows.element_size()
        for peer, area in enumerate(self.areas):
            got = area[: self.places * width].view(self.places, width)[place[rank == peer]]
            same(got, rows[token[rank == peer]], "padded_send")

    def _check_codes(self, _: object) -> None:
        from moecomm.kernels.quant import quantize_ref

        self._check_sent(quantize_ref(self.x.cpu())[0].to(self.x.device))


def padded_area_bytes(tokens: int, experts: int, row_bytes: int) -> int:
    """Of L * W * M rows, and a scale for each 128 elements of at least a byte."""
    return tokens * experts * (row_bytes + row_bytes // 32 + 8) + 64
