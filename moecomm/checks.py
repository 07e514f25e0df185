"""Arguments are checked before anything is sent, so that a refused call leaves the buffer as it was."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moecomm.errors import CapacityError, ConfigError, MoECommError, RoutingError, StaleHandleError, UnsupportedError
from moecomm.handle import DispatchHandle
from moecomm.placement import ExpertPlacement

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
LAYOUTS = ("expert", "rank")
REDUCES = ("rank", "source")
MAX_ALIGN = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferConfig:
    """What a buffer is built for; the same on every rank but for `device`."""

    num_experts: int
    hidden: int
    top_k: int
    max_tokens_per_rank: int
    dtype: torch.dtype
    transport: str
    placement: ExpertPlacement
    reduce: str
    timeout_s: float
    num_segments: int
    device: torch.device

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden", "top_k", "max_tokens_per_rank", "num_segments"):
            value = getattr(self, name)
            least = 2 if name == "num_segments" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is no count", got=repr(value), expected=f"an integer of at least {least}")
        if not isinstance(self.dtype, torch.dtype):
            raise ConfigError("dtype is no torch dtype", got=repr(self.dtype), expected="for example torch.bfloat16")
        if self.reduce not in REDUCES:
            raise ConfigError("reduce is unknown", got=repr(self.reduce), expected=f"one of {REDUCES}")
        if not isinstance(self.timeout_s, (int, float)) or not 0 < self.timeout_s < float("inf"):
            raise ConfigError("timeout_s is no deadline", got=repr(self.timeout_s), expected="a positive number")
        if self.placement.num_experts != self.num_experts:
            raise ConfigError(
                "placement holds another number of experts", got=self.placement.num_experts, expected=self.num_experts
            )

    @property
    def row_bytes(self) -> int:
        """Most bytes of a row: the dtype's, and for one-byte dtypes a float32 scale for every 16 elements beside it."""
        scale_bytes = 4 * -(-self.hidden // 16) if self.dtype.itemsize == 1 else 0
        return self.hidden * self.dtype.itemsize + scale_bytes

    def differences(self, others: list[BufferConfig]) -> str:
        """Which fields differ between ranks, and who has what; empty if none does."""
        lines = []
        for name in (f.name for f in fields(self) if f.name != "device"):
            ranks_of: dict[str, list[int]] = {}
            for rank, other in enumerate(others):
                ranks_of.setdefault(str(getattr(other, name)), []).append(rank)
            if len(ranks_of) > 1:
                lines.append(f"{name}: " + ", ".join(f"{value} on ranks {ranks}" for value, ranks in ranks_of.items()))
        return "; ".join(lines)


@dataclass(frozen=True, slots=True)
class Checker:
    """Refuses wrong arguments by name; `rank` is this rank."""

    config: BufferConfig
    rank: int
    buffer_id: int

    def dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        layout: Any,
        align: Any,
        quant: Any,
        handle: Any,
    ) -> tuple[Tensor, ...]:
        """Check the arguments of a dispatch; the payloads as a tuple."""
        self.options(layout, align, quant)
        payloads = self.payloads(x)
        if handle is None:
            self.routing(topk_idx, len(payloads[0]))
        else:
            self.handle(handle)
            if topk_idx is not None:
                raise self.error(ConfigError, "a handle replays its own routing", got="topk_idx", remedy="leave it out")
            self.same_tokens("x", len(payloads[0]), handle.num_tokens)
        if topk_weights is not None:
            self.tensor("topk_weights", topk_weights, (len(payloads[0]), self.config.top_k), (torch.float32,))
        return payloads

    def options(self, layout: Any, align: Any, quant: Any) -> None:
        """Check layout, align and quant."""
        if layout == "padded":
            raise self.error(UnsupportedError, 'layout "padded" is not there yet', expected=f"one of {LAYOUTS}")
        if layout not in LAYOUTS:
            raise self.error(ConfigError, "layout is unknown", got=repr(layout), expected=f"one of {LAYOUTS}")
        if layout == "rank" and self.config.reduce == "source":
            raise self.error(
                UnsupportedError,
                'layout "rank" sums on the expert rank, which reduce="source" rules out',
                remedy='use layout="expert", or a buffer with reduce="rank"',
            )
        if not isinstance(align, int) or isinstance(align, bool) or align < 1:
            raise self.error(ConfigError, "align is no count", got=repr(align), expected="an integer of at least 1")
        if align > MAX_ALIGN:
            raise self.error(UnsupportedError, "align is too large", got=align, expected=f"at most {MAX_ALIGN}")
        if align > 1 and layout == "rank":
            raise self.error(UnsupportedError, 'layout "rank" has no groups to align', got=f"align={align}")
        if quant is not None:
            raise self.error(
                UnsupportedError,
                "quantising inside the send is not there yet",
                got=f"quant={quant!r}",
                remedy="pass an already quantised (x, scales) pair",
            )

    def payloads(self, x: Any) -> tuple[Tensor, ...]:
        """Check the rows to dispatch: a (T, H) tensor in the buffer's dtype, or a (rows, scales) pair of any dtype."""
        if isinstance(x, (tuple, list)):
            if len(x) != 2:
                raise self.error(ConfigError, "x is no (rows, scales) pair", got=f"{len(x)} items", expected="2")
            rows = self.tensor("x[0]", x[0], (None, self.config.hidden), None)
            scales = self.tensor("x[1]", x[1], (len(rows), ...), None)
            if rows.requires_grad or scales.requires_grad:
                raise self.error(
                    UnsupportedError, "a (rows, scales) pair has no gradient", remedy="detach it, or dispatch a tensor"
                )
            payloads: tuple[Tensor, ...] = (rows, scales)
            self.row_bytes(payloads)
        else:
            payloads = (self.tensor("x", x, (None, self.config.hidden), (self.config.dtype,)),)
        if len(payloads[0]) > self.config.max_tokens_per_rank:
            raise self.error(
                CapacityError,
                "too many tokens",
                got=len(payloads[0]),
                expected=f"at most max_tokens_per_rank={self.config.max_tokens_per_rank}",
                remedy="build the buffer with more, or split the batch",
            )
        return payloads

    def row_bytes(self, payloads: tuple[Tensor, ...]) -> None:
        """Check that a row of all payloads fits the row that the buffer was built for."""
        got = sum(payload.element_size() * math.prod(payload.shape[1:]) for payload in payloads)
        if got > self.config.row_bytes:
            raise self.error(
                CapacityError,
                "a row of the (rows, scales) pair is too long",
                got=f"{got} bytes",
                expected=f"at most {self.config.row_bytes}",
                remedy="build the buffer with a wider dtype",
            )

    def routing(self, topk_idx: Any, num_tokens: int) -> None:
        """Check a (T, K) routing: shape, dtype, and that every id names an expert or is -1."""
        self.tensor("topk_idx", topk_idx, (num_tokens, self.config.top_k), INDEX_DTYPES, RoutingError)
        if not topk_idx.numel():
            return
        low, high = torch.aminmax(topk_idx)
        if int(low) < -1 or int(high) >= self.config.num_experts:
            token, k = ((topk_idx < -1) | (topk_idx >= self.config.num_experts)).nonzero()[0].tolist()
            raise self.error(
                RoutingError,
                f"topk_idx[{token}, {k}] names no expert",
                got=int(topk_idx[token, k]),
                expected=f"0 to {self.config.num_experts - 1}, or -1 for none",
            )

    def combine(self, rows: Any, handle: Any, weighted: Any, bias: Any) -> bool:
        """Check the arguments of a combine; whether rows are to be multiplied by weights."""
        self.handle(handle)
        if self.config.dtype not in FLOAT_DTYPES:
            raise self.error(
                UnsupportedError,
                "combine sums rows of float32, float16 or bfloat16 only",
                got=f"a buffer of {self.config.dtype}",
                remedy="build the buffer with the dtype of the expert outputs and dispatch a (rows, scales) pair",
            )
        num_rows = len(handle.row_weights)
        self.tensor("rows", rows, (num_rows, self.config.hidden), (self.config.dtype,))
        if bias is not None:
            self.tensor("bias", bias, (handle.num_tokens, self.config.hidden), (self.config.dtype,))
        if weighted is not None and not isinstance(weighted, bool):
            raise self.error(ConfigError, "weighted is no truth value", got=repr(weighted), expected="True or False")
        if handle.layout == "rank" and weighted:
            raise self.error(
                UnsupportedError,
                'rows of layout "rank" stand for several experts and are summed as they are',
                remedy="apply out.topk_weights to the expert outputs and leave weighted out",
            )
        return handle.layout == "expert" if weighted is None else weighted

    def handle(self, handle: Any) -> None:
        """Check that a handle is one of this buffer."""
        if not isinstance(handle, DispatchHandle):
            raise self.error(
                ConfigError, "handle is no DispatchHandle", got=type(handle).__name__, remedy="pass out.handle"
            )
        if handle.buffer_id != self.buffer_id:
            raise self.error(
                StaleHandleError,
                "the handle belongs to another buffer",
                remedy="combine and replay on the buffer that dispatched",
            )

    def same_tokens(self, name: str, got: int, expected: int) -> None:
        """Check that a replay has as many tokens as its handle."""
        if got != expected:
            raise self.error(ConfigError, f"{name} does not fit the handle", got=f"{got} tokens", expected=expected)

    def tensor(
        self,
        name: str,
        value: Any,
        shape: tuple[Any, ...],
        dtypes: tuple[torch.dtype, ...] | None,
        kind: type[MoECommError] = ConfigError,
    ) -> Tensor:
        """Check type, shape (None: any length, a final ...: any rest), dtype and device."""
        if not isinstance(value, Tensor):
            raise self.error(kind, f"{name} is no tensor", got=type(value).__name__, expected="a torch.Tensor")
        wanted = shape[:-1] if shape[-1] is ... else shape
        ranks_agree = value.ndim >= len(wanted) if shape[-1] is ... else value.ndim == len(wanted)
        if not ranks_agree or any(w is not None and w != n for w, n in zip(wanted, value.shape, strict=False)):
            wanted_text = ", ".join("any" if w is None else "..." if w is ... else str(w) for w in shape)
            raise self.error(kind, f"{name} has the wrong shape", got=tuple(value.shape), expected=f"({wanted_text})")
        if dtypes is not None and value.dtype not in dtypes:
            accepted = " or ".join(str(dtype) for dtype in dtypes)
            raise self.error(
                kind, f"{name} has the wrong dtype", got=value.dtype, expected=accepted, remedy=f"convert {name}"
            )
        if value.device.type != self.config.device.type or value.layout != torch.strided:
            raise self.error(
                kind,
                f"{name} is in the wrong place",
                got=f"a {value.layout} tensor on {value.device}",
                expected=f"a strided one on {self.config.device}",
                remedy=f"move {name}, or build the buffer with device={str(value.device)!r}",
            )
        return value

    def error(self, kind: type[MoECommError], what: str, **facts: Any) -> MoECommError:
        """An error of this rank."""
        return kind(what, rank=self.rank, **facts)
