"""Padded rows through slots that every rank reaches: written straight where experts read, read where they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from moecomm import _quant_jit
from moecomm._compiled import compiled
from moecomm._jit import LINE_BYTES
from moecomm.core import Core, plain_rows
from moecomm.memory.mail import PLACES
from moecomm.padded import _jit, _quick_jit
from moecomm.padded._jit import TOO_MANY, Receive, Send
from moecomm.padded._quick_jit import EVERYWHERE, Trip
from moecomm.padded.generation import (
    Generation,
    Home,
    Kinds,
    Mover,
    bytes_of_row,
    bytes_of_rows,
    encode_home,
    encoded,
    rows_in,
)
from moecomm.quant import QuantSpec, dequantize
from moecomm.rows import FLOATS, reduce_rows
from moecomm.transport.base import PaddedSlots, Wave

STREAM_BYTES = 8 << 20  # rows of this size would not stay in a cache until they are read, see docs/design/decode.md


@final
class SlotMover(Mover):
    """Each step is one call of machine code; everything it needs was laid out when the buffer was made."""

    def __init__(self, core: Core, slots: PaddedSlots, max_tokens: int, top_k: int, hidden: int) -> None:
        self._core, self._slots = core, slots
        placement, rank = core.tables.placement, core.rank
        self._world, self._local = placement.num_ranks, placement.experts_per_rank[rank]
        self._per_expert, self._hidden = placement.num_ranks * max_tokens, hidden
        self._most_rows = max(placement.experts_per_rank) * self._per_expert
        self._max_tokens, self._top_k, self._experts = max_tokens, top_k, placement.num_experts
        host: dict[str, object] = {"device": "cpu"}
        self._kept = [
            (
                torch.full((max_tokens, top_k), -1, dtype=torch.int64, **host),  # type: ignore[call-overload]
                torch.ones(max_tokens, top_k, dtype=torch.float32, **host),  # type: ignore[call-overload]
                torch.full((max_tokens, top_k), -1, dtype=torch.int32, **host),  # type: ignore[call-overload]
                torch.full((max_tokens, top_k), -1, dtype=torch.int64, **host),  # type: ignore[call-overload]
            )
            for _ in range(2)
        ]
        self._ones = torch.ones(max_tokens, top_k, dtype=torch.float32, device="cpu")
        self._ranges = [torch.zeros(self._local, self._world, 2, dtype=torch.int32, device="cpu") for _ in range(2)]
        self._tokens = [torch.zeros(self._local, dtype=torch.int32, device="cpu") for _ in range(2)]
        self._total = torch.zeros(self._local, dtype=torch.int64, device="cpu")
        self._counts = np.zeros((3, self._experts), np.int32)  # of both generations, and to try
        self._send = [self._send_table(index) for index in range(2)]
        self._receive = [self._receive_table(index) for index in range(2)]
        self._send_words = [memoryview(words) for words in self._send]
        self._receive_words = [memoryview(words) for words in self._receive]
        self._views: dict[object, list[Tensor]] = {}
        self._starts = [area.data_ptr() for area in slots.areas]
        self._forms: dict[QuantSpec, str | None] = {}
        self._staged: dict[QuantSpec, tuple[list[Tensor], list[int]]] = {}
        self._encoded_now: Sequence[Tensor] = ()
        self._plain_kinds: Kinds = ((core.dtype, (hidden,)),)
        self._row_bytes = hidden * core.dtype.itemsize
        self._trips = [self._trip_table(index) for index in range(2)]
        first = int(core.tables.rank_starts[rank])
        self._stride = slots.counts_at(0)[1] if self._trips[0] else 0
        self._counts_at = [slots.counts_at(place)[0] + 4 * first for place in range(PLACES if self._trips[0] else 0)]

    def _send_table(self, index: int) -> np.ndarray:
        tables, slots = self._core.tables, self._slots
        idx, weights, places, homes = self._kept[index]
        words = np.zeros(Send.FIRST_PAYLOAD + 6, np.int64)
        words[Send.TOP_K], words[Send.EXPERTS] = self._top_k, self._experts
        words[Send.MAX_TOKENS], words[Send.FIRST_ROW] = self._max_tokens, self._core.rank * self._max_tokens
        words[Send.ROWS_PER_EXPERT], words[Send.HERE] = self._per_expert, self._core.rank
        words[Send.FLAT_OF_EXPERT] = tables.flat_of_expert.data_ptr()
        words[Send.RANK_OF_FLAT] = tables.rank_of_flat.data_ptr()
        words[Send.LOCAL_OF_FLAT] = tables.local_of_flat.data_ptr()
        words[Send.OUT_AREAS] = slots.addresses[index].ctypes.data
        words[Send.HOME_AREAS] = slots.addresses[2 + index].ctypes.data
        words[Send.HOME_ROW_BYTES] = self._hidden * self._core.dtype.itemsize
        words[Send.COUNTS] = self._counts[index].ctypes.data
        words[Send.IDX_KEPT], words[Send.WEIGHTS_KEPT] = idx.data_ptr(), weights.data_ptr()
        words[Send.PLACES], words[Send.HOMES] = places.data_ptr(), homes.data_ptr()
        return words

    def _receive_table(self, index: int) -> np.ndarray:
        words = np.zeros(len(Receive), np.int64)
        words[Receive.LOCAL], words[Receive.RANKS] = self._local, self._world
        words[Receive.MAX_TOKENS] = self._max_tokens
        words[Receive.RANGES], words[Receive.TOKENS] = self._ranges[index].data_ptr(), self._tokens[index].data_ptr()
        words[Receive.TOTAL] = self._total.data_ptr()
        return words

    def _trip_table(self, index: int) -> tuple[int, memoryview] | None:
        """Address and words of `_quick_jit.Trip`; None where operations do not run from one end to the other."""
        boxes = self._slots.letter_boxes
        if not boxes:
            return None
        words = np.zeros(len(Trip), np.int64)
        words[Trip.BOX], words[Trip.SCRATCH] = boxes, self._counts[2].ctypes.data
        words[Trip.SEND], words[Trip.RECEIVE] = self._send[index].ctypes.data, self._receive[index].ctypes.data
        words[Trip.PER_EXPERT], words[Trip.HIDDEN] = self._per_expert, self._hidden
        words[Trip.ROW_BYTES], words[Trip.AREA] = self._row_bytes, self._slots.areas[2 + index].data_ptr()
        words[Trip.HOMES] = self._kept[index][3].data_ptr()
        return int(words.ctypes.data), memoryview(words)

    def _form(self, spec: QuantSpec) -> str | None:
        """What `_quant_jit` calls that format, or None if it has no loops for it, or for rows of this buffer."""
        if spec not in self._forms:
            jit, dtype = compiled("moecomm._rows_jit"), self._core.dtype
            known = spec.format != "logfmt10" and jit is not None and jit.supports(FLOATS[dtype])
            self._forms[spec] = None if not known else "int8" if spec.format == "int8" else spec.scales
        return self._forms[spec]

    def _encoded(self, g: Generation, rows: Tensor, spec: QuantSpec) -> list[int]:
        """Addresses of codes and scales, in memory that is used again, for they are sent at once."""
        form = self._form(spec)
        if form is None:
            self._encoded_now = encoded((rows,), spec)  # until they are sent
            return [part.data_ptr() for part in self._encoded_now]
        if spec not in self._staged:
            made = [torch.empty(self._max_tokens, *row, dtype=dtype, device="cpu") for dtype, row in g.kinds]
            self._staged[spec] = made, [part.data_ptr() for part in made]
        addresses = self._staged[spec][1]
        kernel = _quant_jit.encode_kernel(FLOATS[self._core.dtype], form)
        kernel(g.num_tokens, rows.data_ptr(), self._hidden, *addresses)
        return addresses

    # -- out ------------------------------------------------------------------------------------------------------

    def check(self, topk_idx_TK: Tensor) -> tuple[int, bool] | None:
        bits = 8 * topk_idx_TK.element_size()
        bad = _jit.check_kernel(bits)(
            topk_idx_TK.numel(),
            topk_idx_TK.data_ptr(),
            self._experts,
            self._max_tokens,
            int(self._send[0][Send.FLAT_OF_EXPERT]),
            self._counts[2].ctypes.data,
        )
        return None if bad < 0 else (bad % TOO_MANY, bad >= TOO_MANY)

    def send(
        self,
        g: Generation,
        payloads: Sequence[Tensor],
        topk_idx_TK: Tensor,
        topk_weights_TK: Tensor | None,
        tag: str,
        spec: QuantSpec | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if spec is not None and len(payloads) == 1:
            sources = self._encoded(g, payloads[0], spec)
        else:
            sources = [payload.data_ptr() for payload in payloads]
        words, offset, row_bytes_of_all = self._send[g.index], 0, 0
        words[Send.TOKENS], words[Send.PAYLOADS] = g.num_tokens, len(sources)
        words[Send.IDX] = topk_idx_TK.data_ptr()
        words[Send.WEIGHTS] = (self._ones if topk_weights_TK is None else topk_weights_TK).data_ptr()
        for number, (source, kind) in enumerate(zip(sources, g.kinds, strict=True)):
            row_bytes, at = bytes_of_row(kind), Send.FIRST_PAYLOAD + 3 * number
            words[at], words[at + 1], words[at + 2] = source, row_bytes, offset
            offset += bytes_of_rows(self._most_rows, kind)
            row_bytes_of_all += row_bytes
        _jit.send_kernel(8 * topk_idx_TK.element_size())(words.ctypes.data)
        self._slots.post(Wave.OUT, g.number, tag, self._counts[g.index])
        self._count(int(words[Send.SENT]), int(words[Send.SENT_HERE]), row_bytes_of_all)
        idx, weights, places = self._kept_of(g)
        return idx, weights, places

    def receive(self, g: Generation, tag: str, out: Sequence[Tensor] | None) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        self._slots.wait(Wave.OUT, g.number, tag)
        words, (address, stride) = self._receive[g.index], self._slots.counts_at(g.number)
        first = int(self._core.tables.rank_starts[self._core.rank])
        words[Receive.COUNTS], words[Receive.COUNTS_STRIDE] = address + 4 * first, stride
        g.trip = _jit.receive_kernel()(words.ctypes.data)
        arrived = self._rows_in(g.index, g.kinds)
        if out is not None:
            for rows, target, kind in zip(arrived, out, g.kinds, strict=True):
                self._copy_runs(g, target.data_ptr(), rows.data_ptr(), bytes_of_row(kind))
        return arrived if out is None else out, self._ranges[g.index], self._tokens[g.index]

    def _copy_runs(self, g: Generation, out: int, rows: int, row_bytes: int) -> None:
        shape = self._local, self._world, self._per_expert
        _jit.runs_kernel()(out, rows, row_bytes, self._ranges[g.index].data_ptr(), *shape)

    def _rows_in(self, area: int, kinds: Kinds) -> list[Tensor]:
        """Views of an area of this rank as rows of those kinds, one behind the other."""
        key = area, kinds
        if key not in self._views:
            shape = self._local, self._per_expert
            self._views[key] = rows_in(self._slots.areas[area], kinds, *shape, self._most_rows)
        return self._views[key]

    def _count(self, sent: int, here: int, row_bytes: int) -> None:
        counters = self._core.counters
        counters["rows_local"] += here
        counters["rows_remote"] += sent - here
        counters["bytes_local"] += here * row_bytes
        counters["bytes_remote"] += (sent - here) * row_bytes

    @property
    def acts_at_once(self) -> bool:
        return self._trips[0] is not None

    def dispatch_at_once(
        self, g: Generation, number: int, x: Any, topk_idx: Any, topk_weights: Any, tag: str
    ) -> tuple[Tensor, ...] | None:
        table = self._trips[g.index]
        num_tokens, top_k = plain_rows(x, self._hidden, self._core.dtype), self._top_k
        if table is None or not 0 <= num_tokens <= self._max_tokens:
            return None
        bits = 64 if plain_rows(topk_idx, top_k, torch.int64) == num_tokens else 32
        if bits == 32 and plain_rows(topk_idx, top_k, torch.int32) != num_tokens:
            return None
        weights = self._ones if topk_weights is None else topk_weights
        if topk_weights is not None and plain_rows(weights, top_k, torch.float32) != num_tokens:
            return None
        send, (address, trip) = self._send_words[g.index], table
        send[Send.TOKENS], send[Send.PAYLOADS], send[Send.IDX] = num_tokens, 1, topk_idx.data_ptr()
        send[Send.WEIGHTS], send[Send.FIRST_PAYLOAD] = weights.data_ptr(), x.data_ptr()
        send[Send.FIRST_PAYLOAD + 1], send[Send.FIRST_PAYLOAD + 2] = self._row_bytes, 0
        receive = self._receive_words[g.index]
        receive[Receive.COUNTS], receive[Receive.COUNTS_STRIDE] = self._counts_at[number % PLACES], self._stride
        trip[Trip.PLACE], trip[Trip.STAMP], trip[Trip.SEQ] = self._slots.next_letter(Wave.OUT, number)
        steps = _quick_jit.dispatch_kernels(bits, self._streams(num_tokens))
        if self._slots.run(steps, address, Wave.OUT, number, tag):
            return None  # an entry has no place and nothing was sent: the long way says so
        g.trip, g.kinds, g.num_tokens = trip[Trip.NUM_ROWS], self._plain_kinds, num_tokens
        self._count(send[Send.SENT], send[Send.SENT_HERE], self._row_bytes)
        self._took(trip)
        rows = self._rows_in(g.index, self._plain_kinds)[0]
        return rows, self._ranges[g.index], self._tokens[g.index], *self._kept_of(g)

    def _kept_of(self, g: Generation) -> list[Tensor]:
        """Views of what is kept of a dispatch: routing, weights and places, (T, K) each."""
        key = g.index, g.num_tokens
        if key not in self._views:
            self._views[key] = [kept[: g.num_tokens] for kept in self._kept[g.index][:3]]
        return self._views[key]

    def _streams(self, num_tokens: int) -> bool:
        """Whether rows go past the caches: so many that they would not stay there until they are read."""
        num_bytes = num_tokens * self._top_k * self._row_bytes
        return num_bytes >= STREAM_BYTES and self._row_bytes % LINE_BYTES == 0

    def _took(self, trip: memoryview) -> None:
        began, sent, _, done = trip[Trip.BEGAN : Trip.DONE + 1]
        phases = self._core.phase_s
        phases["send"] += (sent - began) / 1e9
        phases["wait"] += (done - sent) / 1e9

    # -- home -----------------------------------------------------------------------------------------------------

    def home_rows(self, g: Generation, kinds: Kinds) -> list[Tensor]:
        return self._rows_in(2 + g.index, kinds)

    def lead_home(self, g: Generation, rows: Tensor, spec: QuantSpec | None, number: int, tag: str) -> Kinds:
        kinds = self._plain_kinds if spec is None else spec.kinds(self._hidden)
        areas = self.home_rows(g, kinds)
        form = None if spec is None else self._form(spec)
        if form is not None:
            shape = self._local, self._world, self._per_expert
            kernel = _quant_jit.encode_runs_kernel(FLOATS[self._core.dtype], form)
            ranges, start = int(self._receive[g.index][Receive.RANGES]), int(self._starts[2 + g.index])
            scales = start + bytes_of_rows(self._most_rows, kinds[0])
            kernel(rows.data_ptr(), self._hidden, start, scales, ranges, *shape)
        elif spec is not None:
            encode_home(g, rows, spec, areas)
        elif rows.data_ptr() != areas[0].data_ptr():
            self._copy_runs(g, areas[0].data_ptr(), rows.data_ptr(), bytes_of_row(kinds[0]))
        self._slots.post(Wave.HOME, number, tag)
        self._count(int(g.trip), int(self._send[g.index][Send.SENT_HERE]), sum(map(bytes_of_row, kinds)))
        return kinds

    def combine_at_once(self, g: Generation, home: Home, number: int, tag: str) -> bool:
        table, bias = self._trips[g.index], home.bias
        if table is None:
            return False
        address, trip = table
        trip[Trip.PLACE], trip[Trip.STAMP], trip[Trip.SEQ] = self._slots.next_letter(Wave.HOME, number)
        trip[Trip.TOKENS], trip[Trip.ROWS], trip[Trip.OUT] = g.num_tokens, home.rows.data_ptr(), home.out.data_ptr()
        trip[Trip.WEIGHTS] = 0 if home.weights is None else home.weights.data_ptr()
        trip[Trip.BIAS] = 0 if bias is None else bias.data_ptr()
        trip[Trip.BIAS_STRIDE] = 0 if bias is None else self._hidden * bias.element_size()
        of_bias = None if bias is None else FLOATS[bias.dtype]
        variant = FLOATS[self._core.dtype], home.weights is not None, of_bias, self._streams(g.num_tokens)
        steps = _quick_jit.combine_kernels(*variant)
        bad = self._slots.run(steps, address, Wave.HOME, number, tag)
        assert not bad, f"token {bad - _quick_jit.BROKEN} has a row that lies nowhere"
        self._count(g.trip, self._send_words[g.index][Send.SENT_HERE], self._row_bytes)
        self._took(trip)
        return True

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
        self._slots.wait(Wave.HOME, number, tag)
        if not g.num_tokens:
            return
        homes, came = self._kept[g.index][3], out_TH.dtype
        if len(kinds) > 1 and kinds[0][0] != torch.uint8:
            homes, came = self._decoded_at(g, kinds), torch.float32
        elif len(kinds) > 1:
            rows = self._decoded(g, kinds)
            table = torch.arange(len(rows), device="cpu").view(g.num_tokens, -1)
            reduce_rows(
                out_TH, rows, torch.where(self._kept[g.index][2][: g.num_tokens] < 0, -1, table), weights_TK, bias
            )
            return
        jit = compiled("moecomm._rows_jit")
        assert jit is not None
        by_entry = None if weights_TK is None else "entry"
        of_bias = None if bias is None else FLOATS[bias.dtype]
        kernel = jit.reduce_kernel(FLOATS[came], FLOATS[out_TH.dtype], of_bias, 64, by_entry, False)
        k, row_bytes = self._top_k, self._hidden * out_TH.element_size()
        bad = kernel(
            *(0, g.num_tokens, out_TH.data_ptr(), row_bytes, 0, 1, EVERYWHERE, self._hidden),
            *(homes.data_ptr(), 8 * k, k),
            *(0 if weights_TK is None else weights_TK.data_ptr(), 4 * k),
            *((0, 0) if bias is None else (bias.data_ptr(), bias.stride(0) * bias.element_size())),
        )
        assert bad < 0, f"token {bad} has a row that lies nowhere"

    def _decoded_at(self, g: Generation, kinds: Kinds) -> Tensor:
        """(M, K) int64 addresses of float32 rows: those of this rank's entries, decoded; -1 for none."""
        if "decoded" not in self._views:
            shape = self._max_tokens, self._top_k
            rows = torch.empty(*shape, self._hidden, dtype=torch.float32, device="cpu")
            self._views["decoded"] = [rows, torch.full(shape, -1, dtype=torch.int64, device="cpu")]
        rows, homes = self._views["decoded"]
        words, (code, scale) = self._send[g.index], kinds
        form = "int8" if code[0] == torch.int8 else "ue8m0" if scale[0] == torch.float8_e8m0fnu else "float32"
        _quant_jit.decode_kernel(form)(
            *(g.num_tokens * self._top_k, int(words[Send.IDX_KEPT]), int(words[Send.PLACES])),
            *(int(words[Send.FLAT_OF_EXPERT]), int(words[Send.RANK_OF_FLAT]), int(words[Send.HOME_AREAS])),
            *(bytes_of_rows(self._most_rows, code), self._hidden, rows.data_ptr(), homes.data_ptr()),
        )
        return homes

    def _decoded(self, g: Generation, kinds: Kinds) -> Tensor:
        """(T * K, H) float32 rows of this rank's entries, decoded; those of no expert are anything."""
        idx, _, places, _ = (kept[: g.num_tokens] for kept in self._kept[g.index])
        ranks = self._core.tables.rank_of_expert(idx).clamp(max=self._world - 1)
        areas = torch.from_numpy(self._slots.addresses[2 + g.index])[ranks]
        jit, parts, offset = compiled("moecomm._rows_jit"), [], 0
        assert jit is not None
        for kind in kinds:
            row_bytes = bytes_of_row(kind)
            part = torch.zeros(idx.numel(), row_bytes, dtype=torch.uint8, device="cpu")
            sources = torch.where(places < 0, -1, areas + offset + places.long() * row_bytes).view(-1)
            kernel = jit.copy_kernel(64, 0, False)
            kernel(
                0, len(part), part.data_ptr(), row_bytes, len(part), 0, 1, EVERYWHERE, row_bytes, sources.data_ptr(), 0
            )
            parts.append(part.view(kind[0]).view(len(part), *kind[1]))
            offset += bytes_of_rows(self._most_rows, kind)
        return dequantize(parts[0], parts[1], torch.float32, self._hidden)

    def free(self, g: Generation, tag: str) -> None:
        number = self._core.counters["frees"]
        self._core.counters["frees"] += 1
        self._slots.post(Wave.FREE, number, tag)
        self._slots.wait(Wave.FREE, number, tag)

    @property
    def rows_of_expert(self) -> Tensor:
        return self._total.clone()
