"""Dispatch and combine in layout "padded": the protocol of the two generations. Legend: in `generation.py`.

Dispatch number n uses generation n % 2. What lay there was sent by dispatch n - 2, and may be overwritten because every
rank has sent a combine of n - 2, or, where none was called, says here that it is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from moecomm._compiled import compiled
from moecomm.blocks import empty_rows
from moecomm.checks import FLOAT_DTYPES, BufferConfig, Checker, is_one_of
from moecomm.core import Core, is_profiling, plain_rows
from moecomm.encoding import arranged, refuse_encoding, refuse_gradient, spec_of
from moecomm.errors import CapacityError, ConfigError, RoutingError, StaleHandleError, UnsupportedError
from moecomm.footprint import slot_bytes
from moecomm.handle import Dispatched, PaddedHandle, Pending
from moecomm.padded.generation import Generation, Home, Kinds, Mover
from moecomm.quant import QuantSpec


def _mover(core: Core, config: BufferConfig) -> Mover:
    """Kernels where they move rows; slots where ranks share memory and loops can be compiled; else lanes."""
    max_tokens, top_k, hidden = config.max_tokens_per_rank, config.top_k, config.hidden
    if core.fused is not None:
        from moecomm.padded.kernels import KernelMover

        return KernelMover(core, slot_bytes(config, core.tables.placement.num_ranks), max_tokens, hidden)
    if core.integrity is not None or core.transport.padded_slots is None or compiled("moecomm.padded._jit") is None:
        from moecomm.padded.lanes import LaneMover

        return LaneMover(core, max_tokens, top_k, hidden)
    from moecomm.padded.slots import SlotMover

    return SlotMover(core, core.transport.padded_slots, max_tokens, top_k, hidden)


@final
class PaddedOperations:
    """The padded operations of one buffer."""

    def __init__(self, core: Core, check: Checker) -> None:
        self._core, self._check, self._config = core, check, check.config
        config, placement = check.config, core.tables.placement
        self.mover = _mover(core, config)
        self._generations = Generation(0), Generation(1)
        self._number = self._num_homes = 0
        rows = placement.num_ranks * config.max_tokens_per_rank
        self.shape = placement.experts_per_rank[core.rank], rows, config.hidden
        self._on_host = config.device.type == "cpu"
        self._kinds: dict[object, tuple[Kinds, str]] = {}
        self._plain_tag = self._tag_of(((core.dtype, (config.hidden,)),))

    def refuse_options(self, layout: Any, align: Any) -> None:
        """Refuse what does not go with layout "padded", or with a handle of such a dispatch."""
        if not is_one_of(layout, ("padded", "expert")):
            what, remedy = "a handle replays its own layout", "leave layout out"
            raise self._check.error(ConfigError, what, got=repr(layout), expected="'padded'", remedy=remedy)
        if not isinstance(align, int) or align != 1:
            what, remedy = 'layout "padded" has no groups to align', "leave align out"
            raise self._check.error(UnsupportedError, what, got=f"align={align!r}", expected="align=1", remedy=remedy)

    def rows_of_expert(self) -> Tensor:
        """(L,) int64 rows that arrived for each local expert so far, in any layout."""
        rows, others = self.mover.rows_of_expert, self._core.rows_of_expert
        return rows if others is None else rows + torch.from_numpy(others).to(rows.device)

    # -- dispatch -------------------------------------------------------------------------------------------------

    def dispatch(
        self, x: Any, topk_idx: Any, topk_weights: Any, handle: Any, quant: Any, out: Any, *, wait: bool = False
    ) -> Pending[Dispatched]:
        """Send now; the result is the receive hook. wait: whether the caller calls it at once."""
        core = self._core
        core.check_usable()
        at_once = wait and self.mover.acts_at_once and not is_profiling()
        if at_once and handle is None and quant is None and out is None:
            given = self._dispatch_at_once(x, topk_idx, topk_weights)
            if given is not None:
                return Pending(lambda: given)
        spec = spec_of(quant, self._check)
        payloads, num_tokens = self._payloads(x)
        if spec is not None and core.dtype not in FLOAT_DTYPES:
            refuse_encoding(payloads, self._check)
        idx, weights = self._routing(num_tokens, topk_idx, topk_weights, handle)
        kinds, tag = self._kinds_of(payloads, spec)
        targets = None if out is None else self._targets(out, kinds)
        if bad := self.mover.check(idx):
            raise self._refused(idx, *bad)
        with core.guarded(), core.phase("send"):
            g = self._turn(kinds, num_tokens, tag)
            kept = self.mover.send(g, payloads, idx, weights, tag, spec)
        core.counters["dispatches" if handle is None else "replays"] += 1
        number = g.number
        return Pending(lambda: self._arrive(g, number, tag, kept, targets, spec))

    def _dispatch_at_once(self, x: Any, topk_idx: Any, topk_weights: Any) -> Dispatched | None:
        """The whole operation, if its generation is free and the mover can; else None."""
        core, number = self._core, self._number
        g = self._generations[number % 2]
        if g.home is not None:
            g.home.wait()
        g.home = None
        if not g.is_free:
            return None
        with core.guarded():
            given = self.mover.dispatch_at_once(g, number, x, topk_idx, topk_weights, self._plain_tag)
        if given is None:
            return None
        rows, ranges, per_expert, idx, weights, places = given
        g.number, g.tag, g.has_arrived, g.ranges = number, self._plain_tag, True, ranges
        g.is_free, g.led = False, 0
        self._number += 1
        core.counters["dispatches"] += 1
        return self._dispatched(rows, ranges, per_expert, (idx, weights, places), number)

    def _dispatched(
        self, x: Any, ranges: Tensor, per_expert: Tensor, kept: Sequence[Tensor], number: int
    ) -> Dispatched:
        idx, weights, places = kept
        return Dispatched(
            x=x,
            expert_offsets=None,
            tokens_per_expert=per_expert,
            row_weights=None,
            topk_idx=None,
            topk_weights=None,
            handle=PaddedHandle(
                topk_idx=idx, topk_weights=weights, places=places, number=number, buffer_id=self._check.buffer_id
            ),
            ranges=ranges,
        )

    def _turn(self, kinds: Kinds, num_tokens: int, tag: str) -> Generation:
        """The generation of the next dispatch, once every rank is done with what lies there."""
        g = self._generations[self._number % 2]
        if g.home is not None:
            g.home.wait()
        g.home = None
        if not g.is_free:
            if not g.has_arrived:  # nobody will wait for it any more
                self.mover.receive(g, g.tag, None)
            self.mover.free(g, f"dispatch layout=padded frees={g.number}")
        g.number, g.num_tokens, g.kinds, g.tag = self._number, num_tokens, kinds, tag
        g.has_arrived, g.is_free, g.led = False, False, 0
        self._number += 1
        return g

    def _arrive(
        self,
        g: Generation,
        number: int,
        tag: str,
        kept: Sequence[Tensor],
        targets: Sequence[Tensor] | None,
        spec: QuantSpec | None,
    ) -> Dispatched:
        core = self._core
        if g.number != number:
            raise self._stale(number, "was never waited for, and")
        with core.guarded(), core.phase("wait"):
            arrived, ranges, per_expert = self.mover.receive(g, tag, targets)
            g.has_arrived, g.ranges = True, ranges
        x = arrived[0] if len(arrived) == 1 else tuple(arrived)
        given = self._dispatched(x, ranges, per_expert, kept, number)
        return arranged(given, spec)

    # -- combine --------------------------------------------------------------------------------------------------

    def combine(
        self, rows: Any, handle: PaddedHandle, weighted: Any, bias: Any, quant: Any, out: Any, *, wait: bool = False
    ) -> Pending[Tensor]:
        """Let rows go home now; the result sums them there. wait: whether the caller asks for it at once."""
        core = self._core
        core.check_usable()
        g = self._of(handle)
        spec = spec_of(quant, self._check)
        rows = self._home_rows(rows)
        weights = self._check_home(g, handle, weighted, bias)
        if bias is not None:
            bias = bias.contiguous()
        summed = out if out is not None else empty_rows(g.num_tokens, self.shape[2], core.dtype, core.tables.device)
        if out is not None:
            self._check.tensor("out", out, (g.num_tokens, self.shape[2]), (core.dtype,))
        tag = f"combine layout=padded dispatch={g.number} weighted={weights is not None} quant={spec}"
        at_once = wait and self.mover.acts_at_once and not is_profiling()
        if at_once and spec is None and self._combine_at_once(g, Home(rows, weights, bias, summed), tag):
            return Pending(lambda: summed)
        with core.guarded(), core.phase("send"):
            if g.home is not None:
                g.home.wait()
            if g.led:
                self.mover.free(g, f"combine layout=padded frees={g.number}")
            number = self._num_homes
            self._num_homes += 1
            kinds = self.mover.lead_home(g, rows, spec, number, tag)
        core.counters["combines"] += 1
        g.is_free, g.led = True, g.led + 1

        def finish() -> Tensor:
            with core.guarded(), core.phase("wait"):
                self.mover.sum_home(g, summed, kinds, number, tag, weights, bias)
            return summed

        g.home = Pending(finish)
        return g.home

    def _combine_at_once(self, g: Generation, home: Home, tag: str) -> bool:
        """The whole operation, if it is the first of this dispatch and the mover can; else nothing, and False."""
        core = self._core
        if g.home is not None or g.led or not home.out.is_contiguous():
            return False
        weights = home.weights
        if weights is not None and plain_rows(weights, self._config.top_k, torch.float32) != g.num_tokens:
            return False
        with core.guarded():
            if not self.mover.combine_at_once(g, home, self._num_homes, tag):
                return False
        self._num_homes += 1
        core.counters["combines"] += 1
        g.is_free, g.led = True, 1
        return True

    def combine_input(self, handle: PaddedHandle) -> Tensor:
        """(L, W * M, H) memory of the buffer: rows written there go home without a copy."""
        self._core.check_usable()
        if not isinstance(handle, PaddedHandle):
            what, got = "handle is no PaddedHandle", type(handle).__name__
            raise self._error(
                ConfigError, what, got, 'what dispatch gave in layout "padded"', "pass `out.handle` of one"
            )
        return self.mover.home_rows(self._of(handle), ((self._core.dtype, self.shape[2:]),))[0]

    # -- checks ---------------------------------------------------------------------------------------------------

    def _payloads(self, x: Any) -> tuple[tuple[Tensor, ...], int]:
        """The rows, or the pair, that were given, and for how many tokens."""
        num_tokens = self._plain(x, self.shape[2], self._core.dtype)
        if not 0 <= num_tokens <= self._config.max_tokens_per_rank:
            payloads = self._check.payloads(x)
            self._no_gradient(*payloads)
            return tuple(part.resolve_conj().resolve_neg().contiguous() for part in payloads), len(payloads[0])
        return (x,), num_tokens

    def _plain(self, tensor: Any, width: int, dtype: torch.dtype) -> int:
        return plain_rows(tensor, width, dtype, on_host=self._on_host)

    def _routing(self, num_tokens: int, idx: Any, weights: Any, handle: Any) -> tuple[Tensor, Tensor | None]:
        """The routing and weights to use, contiguous; what names no expert is found later."""
        top_k = self._config.top_k
        if handle is not None:
            if not isinstance(handle, PaddedHandle):
                what, got = 'layout "padded" replays handles of its own', type(handle).__name__
                raise self._error(ConfigError, what, got, "a PaddedHandle", "leave layout out")
            self._of(handle)
            if idx is not None:
                what, remedy = "a handle replays its own routing", "leave topk_idx or handle out"
                raise self._error(ConfigError, what, "topk_idx too", "handle alone", remedy)
            if num_tokens != handle.num_tokens:
                what, remedy = "x does not fit the handle", "pass one row for each token that was dispatched"
                raise self._error(ConfigError, what, f"{num_tokens} tokens", f"{handle.num_tokens} tokens", remedy)
            idx, weights = handle.topk_idx, handle.topk_weights if weights is None else weights
        elif self._plain(idx, top_k, torch.int64) != num_tokens:
            self._check.tensor("topk_idx", idx, (num_tokens, top_k), (torch.int32, torch.int64), RoutingError)
            idx = idx.contiguous()
        if weights is not None and self._plain(weights, top_k, torch.float32) != num_tokens:
            self._check.tensor("topk_weights", weights, (num_tokens, top_k), (torch.float32,))
            self._no_gradient(weights)
            weights = weights.resolve_neg().contiguous()
        return idx, weights

    def _refused(self, idx: Tensor, entry: int, is_full: bool) -> Exception:
        token, k = divmod(entry, self._config.top_k)
        expert = int(idx[token, k])
        if is_full:
            return self._error(
                CapacityError,
                f"topk_idx[{token}, {k}] finds no slot",
                f"more than {self._config.max_tokens_per_rank} entries for expert {expert}",
                "at most max_tokens_per_rank: a token names an expert once",
                "look at the router, or build the buffer for more tokens",
            )
        return self._error(
            RoutingError,
            f"topk_idx[{token}, {k}] names no expert",
            expert,
            f"0 to {self._config.num_experts - 1}, or -1 for none",
            "look at the router, or build the buffer with more experts",
        )

    def _targets(self, out: Any, kinds: Kinds) -> list[Tensor]:
        """The tensors of the caller to copy rows to."""
        given = list(out) if isinstance(out, (tuple, list)) else [out]
        if len(given) != len(kinds):
            raise self._error(ConfigError, "out does not fit", f"{len(given)} tensors", f"{len(kinds)}", "correct out")
        for target, (dtype, shape) in zip(given, kinds, strict=True):
            self._check.tensor("out", target, (*self.shape[:2], *shape), (dtype,))
            if not target.is_contiguous():
                raise self._error(ConfigError, "out is not contiguous", target.stride(), "rows that follow", "copy it")
        return given

    def _home_rows(self, rows: Any) -> Tensor:
        core = self._core
        if core.dtype not in FLOAT_DTYPES:
            what, expected = "rows of this dtype cannot be summed", "float32, float16 or bfloat16"
            remedy = "build the buffer with the dtype of the expert outputs"
            raise self._error(UnsupportedError, what, f"a buffer of {core.dtype}", expected, remedy)
        self._check.tensor("rows", rows, self.shape, (core.dtype,))
        self._no_gradient(rows)
        return rows.resolve_neg().contiguous()

    def _check_home(self, g: Generation, handle: PaddedHandle, weighted: Any, bias: Any) -> Tensor | None:
        """The weights to use."""
        if weighted is not None and not isinstance(weighted, bool):
            what, expected = "weighted is no truth value", "True, False or None"
            raise self._error(ConfigError, what, repr(weighted), expected, "correct weighted")
        if bias is not None:
            self._check.tensor("bias", bias, (g.num_tokens, self.shape[2]), (self._core.dtype, torch.float32))
            self._no_gradient(bias)
        return None if weighted is False else handle.topk_weights

    def _no_gradient(self, *tensors: Tensor) -> None:
        refuse_gradient('layout "padded" has no gradient', self._check, *tensors)

    def _of(self, handle: PaddedHandle) -> Generation:
        """The generation of a handle that is still good."""
        self._check.same_buffer(handle.buffer_id)
        number = handle.number if handle.sequence is None else int(handle.sequence)
        g = self._generations[number % 2]
        if g.number != number:
            raise self._stale(number, "was overwritten:")
        return g

    def _stale(self, number: int, what: str) -> StaleHandleError:
        return StaleHandleError(
            f"padded dispatch {number} {what} its rows are gone",
            got=f"{self._number - 1 - number} dispatches since",
            expected="at most 1: there are two generations",
            remedy='combine before the second dispatch after it, or use layout "expert"',
            rank=self._core.rank,
        )

    def _error(self, kind: Any, what: str, got: object, expected: object, remedy: str) -> Any:
        return self._check.error(kind, what, got=got, expected=expected, remedy=remedy)

    def _kinds_of(self, payloads: Sequence[Tensor], spec: QuantSpec | None) -> tuple[Kinds, str]:
        """Dtypes and row shapes of what travels, and the tag of the dispatch: what all ranks must agree on."""
        key = spec, *((part.dtype, part.shape[1:]) for part in payloads)
        found = self._kinds.get(key)
        if found is None:
            kinds: Kinds = tuple((part.dtype, tuple(part.shape[1:])) for part in payloads)
            if spec is not None and len(payloads) == 1:
                kinds = spec.kinds(self.shape[2])
            found = self._kinds[key] = kinds, self._tag_of(kinds)
        return found

    def _tag_of(self, kinds: Kinds) -> str:
        told = ",".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for dtype, shape in kinds)
        return f"dispatch layout=padded top_k={self._config.top_k} payload={told}"
