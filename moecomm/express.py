"""Dispatch and combine of few tokens between ranks that share memory: each operation is one call of machine code.

What travels, where it lies, and which letters say so, are those of `moecomm.operations` over the transport "symmetric":
each rank chooses for itself, call by call, and one that cannot go this way takes the other. It is for plain calls:
layout "expert" with align=1, one payload, nobody who records gradients, traces, profiles or checks, and rows few enough
for the caches. Legend: see `moecomm.operations`; L experts of this rank.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor

from moecomm import _express_jit as jit
from moecomm._express_jit import TOO_LARGE, Home, HomeStep, Out, OutStep, Part, Wire
from moecomm._jit import LINE_BYTES
from moecomm.autograd import nobody_watches
from moecomm.checks import FLOAT_DTYPES, Checker
from moecomm.core import Core, is_profiling, plain_rows
from moecomm.errors import CapacityError
from moecomm.handle import Dispatched, DispatchHandle
from moecomm.memory.channel import Steps
from moecomm.memory.mail import PLACES, Kind, Mail, place_of
from moecomm.operations import dispatch_tag
from moecomm.rows import FLOATS, can_scatter
from moecomm.transport.symmetric import SymmetricTransport

_MOST_ENTRIES = 2048  # for which memory to plan in is held
_INDEX_BITS = {torch.int64: 64, torch.int32: 32}


@final
class Kept:
    """What a handle of a dispatch keeps: one block of memory, and tensors over it once somebody asks for them."""

    __slots__ = ("_begins", "_block", "_made", "_sizes", "_tags", "address", "num_received", "num_rows", "num_tokens")

    def __init__(self, block: Tensor, begins: Sequence[int], sizes: Mapping[str, Any]) -> None:
        self._block, self._begins, self._sizes = block, begins, sizes
        self.address = block.data_ptr()
        self.num_tokens, self.num_rows, self.num_received = sizes["T"], sizes["N"], sizes["P"]
        self._tags: dict[bool, str] = {}
        self._made: dict[str, Tensor] = {}

    def at(self, part: Part) -> int:
        """The address of a part."""
        return self.address + self._begins[part]

    @property
    def is_made(self) -> bool:
        """Whether the caller holds tensors over the block."""
        return bool(self._made)

    @property
    def weights_at(self) -> int:
        """The address of the weights of rows; 0: all are 1, and nobody can have changed them."""
        if self._sizes["weighted"]:
            return self.at(Part.ROW_WEIGHTS)
        return self._made["row_weights"].data_ptr() if self._made else 0

    def tag(self, weighted: bool) -> str:
        """What all ranks must agree on in a combine."""
        if weighted not in self._tags:
            begin, size = self._begins[Part.EXPERT_COUNTS], 4 * self._sizes["W"] * self._sizes["E"]
            check_sum = zlib.crc32(self._block.numpy()[begin : begin + size])
            what = f"combine layout=expert top_k={self._sizes['K']} weighted={weighted} carries=rows"
            self._tags[weighted] = f"{what} routing={check_sum:08x}"
        return self._tags[weighted]

    def fields_of(self, kind: type) -> dict[str, Tensor]:
        """The fields of a `DispatchHandle` or a `Dispatched` that were not made at once."""
        made = self._made = self._made or self._make()
        if kind is DispatchHandle:
            return {name: value for name, value in made.items() if name not in _OF_GROUPS}
        return {name: made[name] for name in (*_OF_GROUPS, "row_weights")}

    def _make(self) -> dict[str, Tensor]:
        n = self._sizes
        num_tokens, top_k, ranks, experts = n["T"], n["K"], n["W"], n["E"]

        def part(which: Part, dtype: torch.dtype, *shape: int) -> Tensor:
            begin, count = self._begins[which], int(np.prod(shape))
            return self._block[begin : begin + count * dtype.itemsize].view(dtype).view(shape)

        ints = torch.int32
        groups = part(Part.GROUPS, ints, 2, n["L"])
        made = {
            "expert_offsets": groups[0],
            "tokens_per_expert": groups[1],
            "topk_idx": part(Part.TOPK_IDX, n["dtype"], num_tokens, top_k),
            "send_order": part(Part.SEND_ORDER, torch.int64, n["S"]),
            "send_slots": part(Part.SEND_SLOTS, ints, n["S"]),
            "send_pos": part(Part.SEND_POS, ints, num_tokens, top_k),
            "pair_tokens": part(Part.PAIR_TOKENS, torch.int64, n["Q"]),
            "pair_pos": part(Part.PAIR_POS, ints, num_tokens, ranks),
            "recv_table": part(Part.RECV_TABLE, ints, n["P"], top_k),
            "recv_keys": self._block.new_empty(0, dtype=ints),
            "expert_counts": part(Part.EXPERT_COUNTS, ints, ranks, experts),
            "pair_counts": part(Part.PAIR_COUNTS, ints, ranks, ranks),
        }
        if n["weighted"]:
            made["topk_weights"] = part(Part.TOPK_WEIGHTS, torch.float32, num_tokens, top_k)
            made["row_weights"] = part(Part.ROW_WEIGHTS, torch.float32, n["N"])
        else:
            made["topk_weights"] = torch.ones(num_tokens, top_k, dtype=torch.float32, device="cpu")
            made["row_weights"] = torch.ones(n["N"], dtype=torch.float32, device="cpu")
        return made


_OF_GROUPS = ("expert_offsets", "tokens_per_expert")
_TIMES = struct.Struct("=7q")  # words of `Wire`, from BEGAN on
_OUT_GIVEN = struct.Struct("=12q")  # from LETTERS on
_OUT_FOUND = struct.Struct("=6q")  # from NUM_SENT on
_HOME_GIVEN = struct.Struct("=15q")
_HOME_FOUND = struct.Struct("=2q")
_BEGINS = struct.Struct(f"={len(Part)}q")


@final
class Express:
    """The quick way of one buffer; each operation gives None where it is not open."""

    def __init__(self, core: Core, check: Checker, transport: SymmetricTransport, mail: Mail) -> None:
        self._core, self._check, self._transport = core, check, transport
        config, placement = check.config, core.tables.placement
        self._hidden, self._top_k, self._world = config.hidden, config.top_k, placement.num_ranks
        self._tags: dict[bool, str] = {}
        self._sums_here = core.reduce == "rank" and core.dtype in FLOAT_DTYPES
        self._experts, self._local = config.num_experts, placement.experts_per_rank[core.rank]
        self._row_bytes = config.hidden * config.dtype.itemsize
        self._most_tokens = min(config.max_tokens_per_rank, _MOST_ENTRIES // config.top_k)
        self._done_at = [mail.letter_at(Kind.DONE, place) for place in range(PLACES)]
        self._counts_at = [mail.payload_at(Kind.ARRIVE, place)[0] for place in range(PLACES)]
        self._begins = np.zeros(len(Part), np.int64)
        self._out, self._out_memory = self._out_table(mail)
        self._home = np.zeros(len(Wire) + len(Home), np.int64)
        self._home[: len(Wire)] = self._out[: len(Wire)]
        self._home[Home.TOP_K], self._home[Home.ROW_BYTES] = self._top_k, self._row_bytes
        self._home[Home.HIDDEN] = self._hidden
        self._out_at, self._home_at, self._begins_at = (
            int(words.ctypes.data) for words in (self._out, self._home, self._begins)
        )
        self._out_bytes, self._home_bytes, self._begins_bytes = (
            memoryview(words).cast("B") for words in (self._out, self._home, self._begins)
        )

    @classmethod
    def of(cls, core: Core, check: Checker) -> Express | None:
        """That of a buffer, if ranks write to each other's memory there and nobody checks rows on arrival."""
        transport = core.transport
        if not isinstance(transport, SymmetricTransport) or core.integrity is not None or core.fused is not None:
            return None
        mail = transport.channel.mail
        if mail is None or not mail.is_fast or len(mail.peers) != transport.group.size - 1:
            return None
        return cls(core, check, transport, mail) if core.tables.device.type == "cpu" else None

    def _out_table(self, mail: Mail) -> tuple[np.ndarray, list[np.ndarray]]:
        core, tables, transport = self._core, self._core.tables, self._transport
        world, told, entries = self._world, self._experts + self._world, self._most_tokens * self._top_k
        pairs = self._most_tokens * min(self._top_k, world)
        core.rows_of_expert = np.zeros(self._local, np.int64)
        made = {  # bytes of each
            Wire.STARTS: 8 * world,
            Out.COUNTS: 4 * told,
            Out.FLAT: 8 * entries,
            Out.RANK_TK: 8 * entries,
            Out.ORDER: 8 * entries,
            Out.POS: 4 * entries,
            Out.PAIR_TOKENS: 8 * pairs,
            Out.PAIR_RANKS: 8 * pairs,
            Out.PAIR_POS: 4 * self._most_tokens * world,
            Out.CURSOR: 8 * (told + 2),
            Out.GATHERED: 4 * world * told,
            Out.TOTALS: 8 * ((world + 1) * world + self._local),
            Out.SLOTS: 4 * entries,
            Out.TABLE: 4 * pairs * self._top_k,
            Out.LANES: 8 * 3 * 4 * world,
        }
        held = {Wire.MEMORY: transport.addresses, Wire.BOX: mail.words, Out.RANK_STARTS: tables.rank_starts}
        held[Out.ROWS_SO_FAR] = core.rows_of_expert
        words = np.zeros(len(Wire) + len(Out), np.int64)
        for name, array in held.items():
            words[name] = array.ctypes.data
        sizes = [-(-size // LINE_BYTES) * LINE_BYTES for size in made.values()]
        memory = np.zeros(sum(sizes), np.uint8)  # one piece: it goes as it came
        for name, begin in zip(made, np.cumsum(sizes) - sizes, strict=True):
            words[name] = memory.ctypes.data + begin
        words[Wire.RANKS], words[Wire.RANK], words[Wire.STRIDE] = world, core.rank, mail.stride
        words[Wire.SEGMENT_BYTES], words[Out.NUM_LOCAL] = transport.pool.segment_bytes, self._local
        words[Out.TOP_K], words[Out.EXPERTS], words[Out.ROW_BYTES] = self._top_k, self._experts, self._row_bytes
        words[Out.FLAT_OF_EXPERT] = tables.flat_of_expert.data_ptr()
        words[Out.RANK_OF_FLAT] = tables.rank_of_flat.data_ptr()
        return words, [memory, *held.values()]

    def _is_open(self) -> bool:
        """Whether nothing is under way, and there is a segment for what arrives next and one to spare."""
        core, transport = self._core, self._transport
        if core.closed or core.failure is not None or transport.channel.mail is None or is_profiling():
            return False
        number = transport.num_exchanges
        return 0 < number == transport.channel.num_done and not transport.unwaited and transport.pool.num_free > 1

    # -- dispatch --------------------------------------------------------------------------------------------------

    def dispatch(self, x: Any, topk_idx: Any, topk_weights: Any) -> Dispatched | None:
        """`Buffer.dispatch` in layout "expert"."""
        top_k = self._top_k
        num_tokens = plain_rows(x, self._hidden, self._core.dtype)
        if not 0 <= num_tokens <= self._most_tokens or not can_scatter(num_tokens * top_k * self._row_bytes):
            return None
        index_dtype = torch.int32 if isinstance(topk_idx, Tensor) and topk_idx.dtype == torch.int32 else torch.int64
        if plain_rows(topk_idx, top_k, index_dtype) != num_tokens:
            return None
        if topk_weights is not None and plain_rows(topk_weights, top_k, torch.float32) != num_tokens:
            return None
        if not self._is_open() or not nobody_watches(x, topk_idx, topk_weights):
            return None
        with self._core.guarded():
            return self._dispatch(x, topk_idx, topk_weights, num_tokens, index_dtype)

    def _dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_tokens: int, index_dtype: torch.dtype
    ) -> Dispatched | None:
        weighted = topk_weights is not None
        transport, channel = self._transport, self._transport.channel
        number, gathering, segment = transport.num_exchanges, channel.num_gathered, transport.ticket
        following = transport.pool.take()
        tag = self._tag_of(x, topk_weights)
        given = x.data_ptr(), 0 if topk_weights is None else topk_weights.data_ptr()
        _OUT_GIVEN.pack_into(
            self._out_bytes,
            8 * Wire.LETTERS,
            *(self._done_at[(number - 1) % PLACES], transport.seq, following),
            *(place_of(Kind.DONE, number), number + 1, place_of(Kind.ARRIVE, gathering), gathering + 1),
            *(self._counts_at[gathering % PLACES], num_tokens, topk_idx.data_ptr(), *given),
        )
        bits = _INDEX_BITS[index_dtype]
        letters: dict[int, tuple[Kind, int]] = {
            OutStep.SEND: (Kind.ARRIVE, gathering),
            OutStep.END: (Kind.DONE, number),
        }
        code = self._run(jit.dispatch_kernels(bits, weighted), self._out_at, letters, tag)
        if code:
            transport.pool.give_back(following)
            if code >= TOO_LARGE:
                self._refuse(code)
            return None  # an id is out of range and nothing was sent: the general way says so
        channel.num_gathered += 1
        self._completed(tag, following)
        return self._arranged(segment, num_tokens, bits, index_dtype, weighted)

    def _tag_of(self, x: Tensor, topk_weights: Tensor | None) -> str:
        tag = self._tags.get(topk_weights is None)
        if tag is None:
            tag = self._tags[topk_weights is None] = dispatch_tag((x,), topk_weights, "expert", 1, self._top_k)
        return tag

    def _arranged(
        self, segment: int, num_tokens: int, index_bits: int, index_dtype: torch.dtype, weighted: bool
    ) -> Dispatched:
        core, pool, top_k, world = self._core, self._transport.pool, self._top_k, self._world
        sent, pairs, sent_here, pairs_here, num_rows, received = _OUT_FOUND.unpack_from(
            self._out_bytes, 8 * Out.NUM_SENT
        )
        entries = num_tokens * top_k
        size = 8 * (sent + pairs + self._local) + entries * index_bits // 8 + 8 * len(Part)
        size += 4 * (sent + entries + num_tokens * world + received * top_k + world * (self._experts + world))
        size += 4 * (entries + num_rows) if weighted else 0
        block = torch.empty(size, dtype=torch.uint8, device="cpu")
        jit.keep_kernel(index_bits, weighted)(self._out_at, block.data_ptr(), self._begins_at)
        if num_rows:
            rows = pool.lease(segment, 0, num_rows * self._row_bytes).view(core.dtype).view(num_rows, self._hidden)
        else:
            pool.give_back(segment)
            rows = torch.empty(0, self._hidden, dtype=core.dtype, device="cpu")
        began, planned, counted, settled, written, arrived, done = _TIMES.unpack_from(self._out_bytes, 0)
        core.took({"plan": planned - began + settled - counted, "counts": counted - planned})
        core.took({"send": written - settled, "wait": arrived - written, "arrange": done - arrived})
        rows_lane, table_lane = (sent, sent_here, self._row_bytes + 4 * weighted), (pairs, pairs_here, 4 * top_k)
        core.count_lanes((rows_lane, table_lane))
        core.counters["dispatches"] += 1
        sizes = {"T": num_tokens, "K": top_k, "W": world, "E": self._experts, "L": self._local, "S": sent, "Q": pairs}
        sizes |= {"N": num_rows, "P": received, "dtype": index_dtype, "weighted": weighted}
        kept = Kept(block, _BEGINS.unpack_from(self._begins_bytes, 0), sizes)
        handle = DispatchHandle.later(kept, layout="expert", align=1, buffer_id=self._check.buffer_id)
        return Dispatched.later(kept, x=rows, topk_idx=None, topk_weights=None, handle=handle, ranges=None)

    def _refuse(self, code: int) -> NoReturn:
        """Raise what was found once all ranks had told their counts."""
        assert code < jit.BROKEN, "a plan names rows that are not there"
        raise CapacityError(
            "the rows do not fit the receive segment",
            got=f"more than there is room for on rank {code - TOO_LARGE}",
            expected=f"at most {self._transport.pool.segment_bytes} bytes",
            remedy="raise max_tokens_per_rank, or send smaller rows",
            rank=self._core.rank,
        )

    # -- combine ---------------------------------------------------------------------------------------------------

    def combine(self, rows: Any, handle: DispatchHandle, weighted: Any, bias: Any) -> Tensor | None:
        """`Buffer.combine` of a handle that `dispatch` gave."""
        kept, dtype = getattr(handle, "_maker", None), self._core.dtype
        if type(kept) is not Kept or handle.buffer_id != self._check.buffer_id or not self._sums_here:
            return None
        if plain_rows(rows, self._hidden, dtype) != kept.num_rows or not (weighted is None or type(weighted) is bool):
            return None
        if not can_scatter(kept.num_received * self._row_bytes, dtype) or not self._is_open():
            return None
        num_tokens, weighted = kept.num_tokens, weighted is not False
        if bias is not None:
            bias_dtype = torch.float32 if isinstance(bias, Tensor) and bias.dtype == torch.float32 else dtype
            if plain_rows(bias, self._hidden, bias_dtype) != num_tokens:
                return None
        if not nobody_watches(rows, bias, handle.row_weights if kept.is_made else None):
            return None
        with self._core.guarded():
            return self._combine(rows, kept, weighted, bias)

    def _combine(self, rows: Tensor, kept: Kept, weighted: bool, bias: Tensor | None) -> Tensor:
        core, dtype, num_tokens, transport = self._core, self._core.dtype, kept.num_tokens, self._transport
        weights_at, tag = kept.weights_at if weighted else 0, kept.tag(weighted)
        bias_name, bias_at = (None, 0) if bias is None else (FLOATS[bias.dtype], bias.data_ptr())
        number, segment, following = transport.num_exchanges, transport.ticket, transport.pool.take()
        summed = torch.empty(num_tokens, self._hidden, dtype=dtype, device="cpu")
        _HOME_GIVEN.pack_into(
            self._home_bytes,
            8 * Wire.LETTERS,
            *(self._done_at[(number - 1) % PLACES], transport.seq, following, place_of(Kind.DONE, number), number + 1),
            *(num_tokens, rows.data_ptr(), kept.num_rows, weights_at, kept.at(Part.RECV_TABLE)),
            *(kept.at(Part.PAIR_COUNTS), kept.at(Part.PAIR_POS), summed.data_ptr(), bias_at),
            self._hidden * (0 if bias is None else bias.element_size()),
        )
        steps = jit.combine_kernels(FLOATS[dtype], weights_at != 0, bias_name)
        code = self._run(steps, self._home_at, {HomeStep.END: (Kind.DONE, number)}, tag)
        if code:
            raise IndexError(f"combine: sum {code - jit.BROKEN} needs a row that is not there")
        self._completed(tag, following)
        transport.pool.give_back(segment)
        began, _, _, _, written, arrived, done = _TIMES.unpack_from(self._home_bytes, 0)
        core.took({"send": written - began, "wait": arrived - written, "arrange": done - arrived})
        core.count_lanes([(*_HOME_FOUND.unpack_from(self._home_bytes, 8 * Home.NUM_SENT), self._row_bytes)])
        core.counters["combines"] += 1
        return summed

    # -- what both do ----------------------------------------------------------------------------------------------

    def _run(self, steps: Steps, table: int, letters: Mapping[int, tuple[Kind, int]], tag: str) -> int:
        """Run an operation to its end; 0, or what is wrong. letters: for which ones a step waits."""
        return self._transport.channel.run(steps, table, letters, self._transport.seq, tag)

    def _completed(self, tag: str, following: int) -> None:
        """Say that an exchange came to its end."""
        transport, channel = self._transport, self._transport.channel
        channel.last = transport.seq, tag
        transport.seq += 1
        transport.num_exchanges += 1
        channel.num_done = transport.num_exchanges
        transport.ticket = following
