"""Padded rows by kernels: two per operation, nothing read on the host, all of it may be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from moecomm.core import Core
from moecomm.errors import CapacityError, StaleHandleError, UnsupportedError
from moecomm.fused import FusedOperations
from moecomm.padded.generation import Generation, Kinds, Mover, rows_in
from moecomm.quant import QuantSpec, quantize
from moecomm.transport.base import as_bytes

_SCALES = {"float32": 1, "power_of_two": 2, "ue8m0": 3}  # as `kernels.slots` numbers them
_INT8 = 4


@final
class KernelMover(Mover):
    """What each operation launches. Memory is reserved by the first dispatch, which is collective for that reason."""

    def __init__(self, core: Core, area_bytes: int, max_tokens: int, hidden: int) -> None:
        assert isinstance(core.fused, FusedOperations)
        self._core, self._transport = core, core.fused.transport
        self._area_bytes, self._max_tokens, self._hidden = area_bytes, max_tokens, hidden
        placement = core.tables.placement
        self._local = placement.experts_per_rank[core.rank]
        self._per_expert = placement.num_ranks * max_tokens
        self._most_rows = max(placement.experts_per_rank) * self._per_expert
        self._slots: list[Any] = []
        self._free: list[Any] = []
        self._areas: list[Tensor] = []
        self._views: dict[object, list[Tensor]] = {}
        core.fused.padded_notes = self._check_notes

    def _reserve(self) -> None:
        from moecomm.kernels.slots import make_slots, slot_links, slots_bytes, split_areas

        transport, tables = self._transport, self._core.tables
        if transport.copies is not None:
            raise self._refusal('engine="copy" moves blocks by rank, which padded rows are not', "leave engine out")
        transport.refuse_capture("the first padded dispatch", "reserves memory", "dispatch once before capturing")
        memory = transport.share(slots_bytes(transport.wire, self._area_bytes))
        links = slot_links(memory.addresses, transport.wire, self._area_bytes, transport.link)
        experts = torch.arange(tables.placement.num_experts, device=tables.device)
        rank, local = tables.rank_of_expert(experts), tables.local_of_flat[tables.flat_of_expert[experts]]
        self._slots = make_slots(links, rank.to(torch.int32), local.to(torch.int32).contiguous(), transport.wire)
        self._free, self._areas = links[4:], split_areas(memory.tensor, self._area_bytes)

    def _refusal(self, what: str, remedy: str) -> UnsupportedError:
        error = UnsupportedError(what, remedy=remedy, rank=self._core.rank)
        error.harmless = True
        return error

    def _tagged(self, g: Generation, tag: str, home: bool = False) -> Any:
        """The slots of a generation in an operation."""
        slots, number = self._slots[g.index], self._transport.begin(tag).tag
        if home:
            return slots._replace(home=slots.home._replace(tag=number))
        return slots._replace(out=slots.out._replace(tag=number))

    # -- out ------------------------------------------------------------------------------------------------------

    def check(self, topk_idx_TK: Tensor) -> tuple[int, bool] | None:
        """Nothing: ids are on the device, where the kernel looks at them."""

    def send(
        self,
        g: Generation,
        payloads: Sequence[Tensor],
        topk_idx_TK: Tensor,
        topk_weights_TK: Tensor | None,
        tag: str,
        spec: QuantSpec | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from moecomm.kernels.padded import padded_send

        if not self._slots:
            self._reserve()
        transport, quant = self._transport, 0
        if spec is not None and len(payloads) == 1:
            if spec.format == "fp8":
                quant = _SCALES[spec.scales]
            else:
                payloads = self._quantized(payloads[0], spec)
        beside = as_bytes(payloads[1]) if len(payloads) > 1 else None
        with transport.launching(*payloads, beside, topk_idx_TK, topk_weights_TK):
            padded_send(
                payloads[0],
                topk_idx_TK,
                self._tagged(g, tag),
                wire=transport.wire,
                number=g.number,
                topk_weights=topk_weights_TK,
                beside=beside,
                quant=quant,
            )
        transport.num_sent += 1
        key = g.index, g.num_tokens
        if key not in self._views:
            slots = self._slots[g.index]
            self._views[key] = [kept[: g.num_tokens] for kept in (slots.topk_idx, slots.topk_weights, slots.places)]
        idx, weights, places = self._views[key]
        return idx, weights, places

    def _quantized(self, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Codes and scales in a format that kernels do not write."""
        if spec.format == "logfmt10":
            self._transport.refuse_capture("logfmt10", "looks up its steps on the host", 'use "fp8" or "int8"')
        return quantize(rows, replace(spec, column_major=False))

    def receive(self, g: Generation, tag: str, out: Sequence[Tensor] | None) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        from moecomm.kernels.padded import padded_receive

        slots, transport = self._tagged(g, tag), self._transport
        flat = [part.flatten(0, 1).flatten(1) for part in out or ()]
        with transport.launching(*flat):
            beside = flat[1] if len(flat) > 1 else None
            padded_receive(slots, wire=transport.wire, out=flat[0] if flat else None, out_beside=beside)
            marked = transport.mark()
        transport.join(marked)
        self._check_waits("dispatch")
        return self._rows_in(g.index, g.kinds) if out is None else out, slots.ranges, slots.tokens

    def _rows_in(self, area: int, kinds: Kinds) -> list[Tensor]:
        """Views of an area of this rank as rows of those kinds, one behind the other."""
        key = area, kinds
        if key not in self._views:
            self._views[key] = rows_in(self._areas[area], kinds, self._local, self._per_expert, self._most_rows)
        return self._views[key]

    # -- home -----------------------------------------------------------------------------------------------------

    def home_rows(self, g: Generation, kinds: Kinds) -> list[Tensor]:
        return self._rows_in(2 + g.index, kinds)

    def lead_home(self, g: Generation, rows: Tensor, spec: QuantSpec | None, number: int, tag: str) -> Kinds:
        from moecomm.kernels.padded_home import padded_return

        transport, flat, beside, quant = self._transport, rows.flatten(0, 1), None, 0
        kinds: Kinds = ((rows.dtype, (self._hidden,)),)
        if spec is not None:
            kinds = spec.kinds(self._hidden)
            if spec.format == "logfmt10":
                what = "kernels lead rows home in fp8 or int8, for they do not decode logfmt10"
                raise self._refusal(what, 'use quant="fp8"')
            if spec.format == "fp8":
                quant = _SCALES[spec.scales]
            else:
                flat, scales = self._quantized(flat, spec)
                beside = as_bytes(scales)
        in_place = spec is None and rows.data_ptr() == self.home_rows(g, kinds)[0].data_ptr()
        with transport.launching(flat, beside):
            padded_return(
                None if in_place else flat,
                self._tagged(g, tag, home=True),
                wire=transport.wire,
                number=g.number,
                beside=beside,
                quant=quant,
            )
        transport.num_sent += 1
        return kinds

    def sum_home(
        self,
        g: Generation,
        out_TH: Tensor,
        kinds: Kinds,
        number: int,
        tag: str,
        weights_TK: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        from moecomm.kernels.padded_home import padded_sum

        transport, quant = self._transport, 0
        if len(kinds) > 1:
            by_exponent = kinds[1][0] == torch.float8_e8m0fnu
            quant = _INT8 if kinds[0][0] == torch.int8 else _SCALES["ue8m0" if by_exponent else "float32"]
        options = {"wire": transport.wire, "number": g.number, "weights": weights_TK, "bias": bias, "quant": quant}
        with transport.launching(out_TH, weights_TK, bias):
            padded_sum(out_TH, self._tagged(g, tag, home=True), **options)
            marked = transport.mark()
        transport.join(marked)
        self._check_waits("combine")

    def free(self, g: Generation, tag: str) -> None:
        from moecomm.kernels.sync import signal, wait

        slots, transport, frees = self._slots[g.index], self._transport, self._core.counters["frees"]
        self._core.counters["frees"] += 1
        link = self._free[frees % 2]._replace(tag=transport.begin(tag).tag)
        with transport.launching():
            signal(link, transport.wire)
            wait(link, transport.wire)
            slots.book[1:].copy_(slots.out.state[:1])
        self._check_waits(tag.split(" ")[0])

    # -- what kernels noted ---------------------------------------------------------------------------------------

    def _check_waits(self, operation: str) -> None:
        """Raise what kernels noted that gave up, where that costs no wait."""
        if self._transport.device.type == "cpu":
            self._transport.check(operation)

    def _check_notes(self) -> None:
        """Raise what else kernels noted; the host has waited for them."""
        if not self._slots:
            return
        from moecomm.kernels.slots import FULL, REPEATED, STALE
        from moecomm.kernels.wire import decode_bad_id

        noted = self._slots[0].notes
        words = self._transport.read(noted).tolist()
        noted.zero_()
        error: CapacityError | StaleHandleError | UnsupportedError | None = None
        if full := decode_bad_id(words[int(FULL)], self._transport.wire.top_k):
            error = CapacityError(
                f"topk_idx[{full[0]}, {full[1]}] found no slot and was left out",
                got=f"more than {self._max_tokens} entries for expert {full[2]}",
                expected="at most max_tokens_per_rank: a token names an expert once",
                remedy="look at the router, or build the buffer for more tokens",
                rank=self._core.rank,
            )
        if words[int(STALE)]:
            error = StaleHandleError(
                f"padded dispatch {words[int(STALE)] - 1} was overwritten: its sums are NaN",
                remedy="combine before the second dispatch after it, replays of graphs counted",
                rank=self._core.rank,
            )
        if words[int(REPEATED)]:
            error = UnsupportedError(
                f"padded dispatch {words[int(REPEATED)] - 1} was not sent: the one before it was never combined",
                remedy="capture a dispatch and its combine in the same graph",
                rank=self._core.rank,
            )
        if error is not None:
            error.harmless = not words[int(REPEATED)]
            raise error

    @property
    def rows_of_expert(self) -> Tensor:
        device = self._core.tables.device
        return (
            self._slots[0].totals.clone() if self._slots else torch.zeros(self._local, dtype=torch.int64, device=device)
        )
