"""Arguments are checked before anything is sent, so that a refused call leaves the buffer as it was."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moecomm import _env
from moecomm.errors import CapacityError, ConfigError, MoECommError, RoutingError, StaleHandleError, UnsupportedError
from moecomm.handle import DispatchHandle
from moecomm.memory.device import moves_by_kernels
from moecomm.placement import ExpertPlacement
from moecomm.plan import first_bad_entry
from moecomm.topology import Topology

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)
LAYOUTS = ("expert", "rank", "padded")
REDUCES = ("rank", "source")
CHECKS = ("off", "cheap", "full")
ENGINES = ("kernels", "copy")
MAX_ALIGN = 256
TAG_BYTES = 24  # beside each checked row, see `moecomm.integrity`

# What each tensor argument holds: the remedy when something else comes.
_MEANT = {
    "x": "pass one row of `hidden` elements per token",
    "x[0]": "pass one row of `hidden` elements per token",
    "x[1]": "pass the scales of each token in one row",
    "topk_idx": "pass `top_k` global expert ids for each row of x, -1 for none",
    "topk_weights": "pass one weight for each choice of each token",
    "rows": "pass one row for each row that dispatch gave, in the same order",
    "bias": "pass one row for each token that this rank dispatched",
    "out": "pass a tensor for what the operation gives",
}


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
    topology: Topology | None = None
    beside_bytes: int = 0
    check: str = "off"
    engine: str = "kernels"
    num_sms: int | None = None
    max_recv_tokens: int | None = None
    byte_order: str = sys.byteorder  # rows travel as bytes: the other order would be read as other numbers

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden", "top_k", "max_tokens_per_rank", "num_segments", "beside_bytes"):
            value = getattr(self, name)
            least = {"num_segments": 2, "beside_bytes": 0}.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                is_large = isinstance(value, int) and value > least
                expected = "one below 2**31" if is_large else f"an integer of at least {least}"
                raise self._refusal(f"{name} is no count", repr(value), expected)
        if not isinstance(self.dtype, torch.dtype):
            raise self._refusal("dtype is no torch dtype", repr(self.dtype), "one such as torch.bfloat16")
        if not isinstance(self.transport, str):
            raise self._refusal("transport is no name", repr(self.transport), '"auto" or the name of a transport')
        if not is_one_of(self.reduce, REDUCES):
            raise self._refusal("reduce is unknown", repr(self.reduce), f"one of {REDUCES}")
        if not is_one_of(self.check, CHECKS):
            raise self._refusal("check is unknown", repr(self.check), f"one of {CHECKS}, also as MOECOMM_CHECK")
        is_number = isinstance(self.timeout_s, (int, float)) and not isinstance(self.timeout_s, bool)
        if not is_number or not 0 < self.timeout_s < float("inf"):
            raise self._refusal("timeout_s is no deadline", repr(self.timeout_s), "a positive number of seconds")
        if self.placement.num_experts != self.num_experts:
            what = "placement holds another number of experts"
            raise self._refusal(what, self.placement.num_experts, f"num_experts={self.num_experts}")
        if self.topology is not None:
            num_ranks = self.placement.num_ranks
            if not isinstance(self.topology, Topology):
                raise self._refusal("topology is no Topology", repr(self.topology), "a moecomm.Topology, or None")
            if self.topology.num_ranks != num_ranks:
                what = "topology is for another number of ranks"
                raise self._refusal(what, f"{self.topology.num_ranks} ranks", f"{num_ranks}, those of the group")
        self._check_kernel_options()

    def _check_kernel_options(self) -> None:
        for name in ("num_sms", "max_recv_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise self._refusal(f"{name} is no count", repr(value), "an integer of at least 1, or None")
        if not is_one_of(self.engine, ENGINES):
            raise self._refusal("engine is unknown", repr(self.engine), f"one of {ENGINES}")
        if self.engine == "copy" and self.max_recv_tokens is not None:
            what, expected = "the copy engines need the host for every send", "max_recv_tokens=None"
            raise self._refusal(what, f"max_recv_tokens={self.max_recv_tokens}, which does without", expected)

    @classmethod
    def of(
        cls,
        num_ranks: int,
        *,
        placement: Any,
        device: Any,
        transport: Any,
        timeout_s: Any,
        check: Any = None,
        **rest: Any,
    ) -> BufferConfig:
        """Fill in what was left to the defaults, and check everything."""
        return cls(
            transport=_env.transport() if is_one_of(transport, ("auto",)) else transport,
            timeout_s=_env.timeout_s() if timeout_s is None else timeout_s,
            placement=_placement(placement, rest["num_experts"], num_ranks),
            device=_device(device),
            check=_env.check() if check is None else check,
            **rest,
        )

    @staticmethod
    def _refusal(what: str, got: object, expected: str) -> ConfigError:
        return ConfigError(what, got=got, expected=expected, remedy="correct this argument")

    @property
    def row_bytes(self) -> int:
        """Most bytes of a row: the dtype's, for one-byte dtypes a float32 scale per 16 elements, `beside_bytes`."""
        scale_bytes = 4 * -(-self.hidden // 16) if self.dtype.itemsize == 1 else 0
        return self.hidden * self.dtype.itemsize + scale_bytes + self.beside_bytes

    @property
    def tag_bytes(self) -> int:
        """Bytes of tags beside each row, at most: for the rows alone, or for rows, scales, weights and tables."""
        return {"off": 0, "cheap": TAG_BYTES, "full": 4 * TAG_BYTES}[self.check]

    def kernel_options(self) -> dict[str, Any]:
        """Options that are not left to their defaults and mean something to kernels only."""
        given: dict[str, Any] = {"num_sms": self.num_sms, "max_recv_tokens": self.max_recv_tokens}
        given["engine"] = None if self.engine == "kernels" else self.engine
        return {name: value for name, value in given.items() if value is not None}

    def differences(self, others: Sequence[BufferConfig]) -> str:
        """Which fields differ between ranks, and who has what; empty if none does. Of devices the type counts."""
        lines = []
        names = [f.name for f in fields(self)]
        if any(other.num_experts != self.num_experts for other in others):
            names.remove("placement")  # which follows from that
        for name in names:
            ranks_of: dict[Any, list[int]] = {}
            for rank, other in enumerate(others):
                value = getattr(other, name)
                ranks_of.setdefault(value.type if name == "device" else value, []).append(rank)
            if len(ranks_of) > 1:
                told = [f"{textwrap.shorten(str(value), 200)} on ranks {ranks}" for value, ranks in ranks_of.items()]
                lines.append(f"{name}: {', '.join(told)}")
        return "; ".join(lines)


def is_one_of(value: Any, names: Sequence[str]) -> bool:
    """Whether a value is one of these words; arrays compare with words, too, but not to yes or no."""
    return isinstance(value, str) and value in names


def configure(rank: int, num_ranks: int, **arguments: Any) -> BufferConfig | MoECommError:
    """The configuration that the arguments of Buffer() make, or the error to raise once the other ranks know of it."""
    try:
        return BufferConfig.of(num_ranks, **arguments)
    except MoECommError as error:
        return type(error)(
            error.what,
            got=error.got,
            expected=error.expected,
            remedy=error.remedy or "correct this argument",
            rank=rank,
            operation="Buffer()",
        )


def agree(
    given: BufferConfig | MoECommError, of_ranks: Sequence[BufferConfig | MoECommError], rank: int
) -> BufferConfig:
    """The configuration; raise on every rank if one of them was given wrong arguments, or if they differ."""
    if isinstance(given, MoECommError):
        raise given
    refused = {peer: str(other) for peer, other in enumerate(of_ranks) if isinstance(other, MoECommError)}
    configs = [other for other in of_ranks if isinstance(other, BufferConfig)]
    if refused:
        what, expected = "other ranks were given arguments that are refused", "the same right ones on every rank"
    elif differences := given.differences(configs):
        what, expected = "the ranks were given different arguments", "the same on every rank"
    else:
        return given
    raise ConfigError(
        what,
        got="; ".join(refused.values()) or differences,
        expected=expected,
        remedy="look at how those ranks were started",
        rank=rank,
        operation="Buffer()",
        peers=list(refused) or [peer for peer, other in enumerate(configs) if given.differences([given, other])],
    )


def _placement(placement: Any, num_experts: Any, num_ranks: int) -> ExpertPlacement:
    if placement is None:
        return ExpertPlacement.uniform(num_experts, num_ranks)
    if not isinstance(placement, ExpertPlacement):
        try:
            placement = ExpertPlacement.explicit(placement)
        except ConfigError as error:
            what = error.what.replace("experts_of_rank", "placement")
            remedy = "list the global expert ids of each rank"
            raise ConfigError(what, got=error.got, expected=error.expected, remedy=remedy) from None
    if placement.num_ranks != num_ranks:
        what, got = "placement is for another number of ranks", placement.num_ranks
        raise ConfigError(what, got=got, expected=num_ranks, remedy="give each rank a list, if only an empty one")
    return placement


def _device(device: Any) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        what, expected, remedy = "device is unknown", 'one such as "cpu" or "cuda:0"', str(error).splitlines()[0]
        raise ConfigError(what, got=repr(device), expected=expected, remedy=remedy) from None


def bad_id(token: int, k: int, got: int | str, num_experts: int, rank: int) -> RoutingError:
    """The error of an expert id that is out of range."""
    return RoutingError(
        f"topk_idx[{token}, {k}] names no expert",
        got=got,
        expected=f"0 to {num_experts - 1}, or -1 for none",
        remedy="look at the router, or build the buffer with more experts",
        rank=rank,
    )


@dataclass(frozen=True, slots=True)
class Checker:
    """Refuses wrong arguments by name; `rank` is this rank."""

    config: BufferConfig
    rank: int
    buffer_id: int
    ids_on_device: bool = False  # ids out of range are found by whoever plans, without the host

    def dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        layout: Any,
        align: Any,
        handle: Any,
    ) -> tuple[Tensor, ...]:
        """Check the arguments of a dispatch; the payloads as a tuple."""
        self.options(layout, align)
        payloads = self.payloads(x)
        if handle is None:
            self.routing(topk_idx, len(payloads[0]))
        else:
            self.replay(handle, topk_idx, layout, align, len(payloads[0]))
        if topk_weights is not None:
            self.tensor("topk_weights", topk_weights, (len(payloads[0]), self.config.top_k), (torch.float32,))
        return payloads

    def options(self, layout: Any, align: Any) -> None:
        """Check layout and align."""
        known = f"one of {LAYOUTS}"
        if not is_one_of(layout, LAYOUTS):
            what, remedy = "layout is unknown", "correct layout"
            raise self.error(ConfigError, what, got=repr(layout), expected=known, remedy=remedy)
        if layout == "rank" and self.config.reduce == "source":
            raise self.error(
                UnsupportedError,
                'layout "rank" sums on the expert rank, which reduce="source" rules out',
                got=repr(layout),
                expected='layout "expert"',
                remedy='use that, or a buffer with reduce="rank"',
            )
        if not isinstance(align, int) or isinstance(align, bool) or align == 0:
            what, expected = "align is no count", f"an integer from 1 to {MAX_ALIGN}, or a negative one"
            raise self.error(ConfigError, what, got=repr(align), expected=expected, remedy="correct align")
        if align < 0 and moves_by_kernels(self.config.device):
            what, remedy = "groups of a fixed size are not there where kernels move rows", 'use layout="padded"'
            raise self.error(UnsupportedError, what, got=f"align={align}", expected="at least 1", remedy=remedy)
        if align > MAX_ALIGN:
            what, remedy = "align is too large", "use a smaller one"
            raise self.error(UnsupportedError, what, got=align, expected=f"at most {MAX_ALIGN}", remedy=remedy)
        if align != 1 and layout == "rank":
            what, remedy = 'layout "rank" has no groups to align', 'leave align out, or use layout="expert"'
            raise self.error(UnsupportedError, what, got=f"align={align}", expected="align=1", remedy=remedy)

    def payloads(self, x: Any) -> tuple[Tensor, ...]:
        """Check the rows to dispatch: a (T, H) tensor in the buffer's dtype, or a (rows, scales) pair of any dtype."""
        if isinstance(x, (tuple, list)):
            if len(x) != 2:
                what, remedy = "x is no (rows, scales) pair", "pass two tensors, or one"
                raise self.error(ConfigError, what, got=f"{len(x)} items", expected="2 items", remedy=remedy)
            rows = self.tensor("x[0]", x[0], (None, self.config.hidden), None)
            scales = self.tensor("x[1]", x[1], (len(rows), ...), None)
            if rows.requires_grad or scales.requires_grad:
                what, got = "a (rows, scales) pair has no gradient", "one that requires grad"
                remedy = "detach both, or dispatch a single tensor"
                raise self.error(UnsupportedError, what, got=got, expected="one that does not", remedy=remedy)
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
                remedy="build the buffer for more, or split the batch",
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
                remedy="build the buffer with more beside_bytes",
            )

    def routing(self, topk_idx: Any, num_tokens: int) -> None:
        """Check a (T, K) routing: shape, dtype, and that every id names an expert or is -1."""
        self.tensor("topk_idx", topk_idx, (num_tokens, self.config.top_k), INDEX_DTYPES, RoutingError)
        bad = None if self.ids_on_device else first_bad_entry(topk_idx, self.config.num_experts)
        if bad is not None:
            token, k = divmod(bad, self.config.top_k)
            raise bad_id(token, k, int(topk_idx[token, k]), self.config.num_experts, self.rank)

    def replay(self, handle: Any, topk_idx: Any, layout: Any, align: Any, num_tokens: int) -> None:
        """Check what replays a handle: a handle of this buffer, the same number of tokens, no other routing."""
        self.handle(handle)
        if topk_idx is not None:
            what, remedy = "a handle replays its own routing", "leave topk_idx or handle out"
            raise self.error(ConfigError, what, got="topk_idx too", expected="handle alone", remedy=remedy)
        if num_tokens != handle.num_tokens:
            what, remedy = "x does not fit the handle", "pass one row for each token that was dispatched"
            expected = f"{handle.num_tokens} tokens"
            raise self.error(ConfigError, what, got=f"{num_tokens} tokens", expected=expected, remedy=remedy)
        for name, given, default in (("layout", layout, "expert"), ("align", align, 1)):
            replayed = getattr(handle, name)
            if given not in (default, replayed):
                what, remedy = f"a handle replays its own {name}", f"leave {name} out"
                raise self.error(ConfigError, what, got=repr(given), expected=repr(replayed), remedy=remedy)

    def combine(self, rows: Any, handle: Any, weighted: Any, bias: Any) -> bool:
        """Check the arguments of a combine; whether rows are to be multiplied by weights."""
        self.handle(handle)
        if self.config.dtype not in FLOAT_DTYPES:
            raise self.error(
                UnsupportedError,
                "rows of this dtype cannot be summed",
                got=f"a buffer of {self.config.dtype}",
                expected="float32, float16 or bfloat16",
                remedy="build the buffer with the dtype of the expert outputs and dispatch a (rows, scales) pair",
            )
        num_rows = len(handle.row_weights)
        self.tensor("rows", rows, (num_rows, self.config.hidden), (self.config.dtype,))
        if bias is not None:
            dtypes = tuple(dict.fromkeys((self.config.dtype, torch.float32)))
            self.tensor("bias", bias, (handle.num_tokens, self.config.hidden), dtypes)
        if weighted is not None and not isinstance(weighted, bool):
            what, expected = "weighted is no truth value", "True, False or None"
            raise self.error(ConfigError, what, got=repr(weighted), expected=expected, remedy="correct weighted")
        if handle.layout == "rank" and weighted:
            raise self.error(
                UnsupportedError,
                'rows of layout "rank" stand for several experts and are summed as they are',
                got="weighted=True",
                expected="False or None",
                remedy="apply out.topk_weights to the expert outputs and leave weighted out",
            )
        return handle.layout == "expert" if weighted is None else weighted

    def handle(self, handle: Any) -> None:
        """Check that a handle is one of this buffer."""
        if not isinstance(handle, DispatchHandle):
            what, got, remedy = "handle is no DispatchHandle", type(handle).__name__, "pass the one in `out.handle`"
            raise self.error(ConfigError, what, got=got, expected="what dispatch gave", remedy=remedy)
        self.same_buffer(handle.buffer_id)

    def same_buffer(self, buffer_id: int) -> None:
        """Check that what a handle says of its buffer is true of this one."""
        if buffer_id != self.buffer_id:
            raise self.error(
                StaleHandleError,
                "the handle belongs to another buffer",
                got=f"a handle of buffer {buffer_id:x}",
                expected=f"one of buffer {self.buffer_id:x}",
                remedy="combine and replay on the rank and the buffer that dispatched",
            )

    def tensor(
        self,
        name: str,
        value: Any,
        shape: tuple[Any, ...],
        dtypes: tuple[torch.dtype, ...] | None,
        kind: type[MoECommError] = ConfigError,
    ) -> Tensor:
        """Check type, shape (None: any length, a final ...: any rest), dtype and device."""
        if not isinstance(value, Tensor) or value.is_nested:
            got, expected = "a nested tensor" if isinstance(value, Tensor) else type(value).__name__, "a torch.Tensor"
            raise self.error(kind, f"{name} is no tensor", got=got, expected=expected, remedy=_MEANT[name])
        wanted = shape[:-1] if shape[-1] is ... else shape
        ranks_agree = value.ndim >= len(wanted) if shape[-1] is ... else value.ndim == len(wanted)
        if not ranks_agree or any(w is not None and w != n for w, n in zip(wanted, value.shape, strict=False)):
            expected = f"({', '.join('any' if w is None else '...' if w is ... else str(w) for w in shape)})"
            got = str(tuple(value.shape))
            raise self.error(kind, f"{name} has the wrong shape", got=got, expected=expected, remedy=_MEANT[name])
        if dtypes is not None and value.dtype not in dtypes:
            what, accepted = f"{name} has the wrong dtype", " or ".join(str(dtype) for dtype in dtypes)
            raise self.error(kind, what, got=value.dtype, expected=accepted, remedy=f"convert {name}")
        if value.device.type != self.config.device.type or value.layout != torch.strided:
            raise self.error(
                kind,
                f"{name} is in the wrong place",
                got=f"a {value.layout} tensor on {value.device}",
                expected=f"a {torch.strided} one on {self.config.device}",
                remedy=f"move or convert {name}, or build the buffer for that device",
            )
        return value

    def error(self, kind: type[MoECommError], what: str, *, got: object, expected: object, remedy: str) -> MoECommError:
        """An error of this rank that says everything a reader needs."""
        return kind(what, got=got, expected=expected, remedy=remedy, rank=self.rank)
