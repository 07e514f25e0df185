"""What a call of `Buffer` becomes: arguments checked, then an operation started, or left to an operator of torch."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch
from torch import Tensor

from moecomm import autograd
from moecomm._compiled import compiled
from moecomm.checks import Checker, is_one_of
from moecomm.core import Core
from moecomm.encoding import arranged, encoded, home_spec, only_padded, refuse_tracing_or_gradient, spec_of
from moecomm.handle import Dispatched, PaddedHandle, Pending
from moecomm.operations import Homecoming, start_combine, start_dispatch, start_replay

if TYPE_CHECKING:
    from moecomm.membership import Survivors

T = TypeVar("T")

_operations = itertools.count()  # numbers of those under way


@final
class Calls:
    """The operations of one buffer, as its user calls them."""

    def __init__(self, core: Core, check: Checker) -> None:
        self._core, self._check = core, check
        if core.transport.is_fused:
            from moecomm import fused

            fused.attach(core)
        if check.config.check != "off":
            from moecomm import integrity

            integrity.attach(core, check.config.check)
        from moecomm.padded import PaddedOperations

        self.padded = core.padded = PaddedOperations(core, check)
        self.survivors: Survivors | None = None  # once the buffer shrank
        self._express = _express_of(core, check)

    def dispatch(self, x: Any, topk_idx: Any, topk_weights: Any, *options: Any, wait: bool) -> Pending[Dispatched]:
        """`Buffer.dispatch`; wait: whether the caller waits at once."""
        layout, align, handle, quant, out = options
        if self.survivors is not None and handle is None:
            topk_idx, topk_weights = self.survivors.mask(topk_idx, topk_weights)
        if is_one_of(layout, ("padded",)) or isinstance(handle, PaddedHandle):
            self.padded.refuse_options(layout, align)
            return self.padded.dispatch(x, topk_idx, topk_weights, handle, quant, out, wait=wait)
        core, is_plain = self._core, handle is None and quant is None and out is None
        is_plain = is_plain and is_one_of(layout, ("expert",)) and type(align) is int and align == 1
        if wait and is_plain and self._express is not None:
            quickly = self._express.dispatch(x, topk_idx, topk_weights)
            if quickly is not None:
                return Pending(lambda: quickly)
        core.check_usable()
        only_padded(self._check, out=out)
        spec = spec_of(quant, self._check)
        payloads = self._check.dispatch(x, topk_idx, topk_weights, layout, align, handle)
        payloads = encoded([payload.resolve_conj().resolve_neg() for payload in payloads], spec, self._check)
        if spec is not None:
            self._check.row_bytes(payloads)  # of a few elements: scales may take more than was saved
        rows, scales = payloads[0], payloads[1] if len(payloads) > 1 else None
        if topk_weights is not None:
            topk_weights = _packed(topk_weights)
        wait = wait or not autograd.can_start(*payloads, topk_idx, topk_weights)
        if handle is None:
            topk_idx = _packed(topk_idx)
            started = -1 if wait else self._start(start_dispatch, payloads, topk_idx, topk_weights, layout, align)
            return self._pending(
                started,
                lambda: arranged(
                    autograd.dispatched(
                        rows, scales, topk_idx, topk_weights, self._check.buffer_id, layout, align, started
                    ),
                    spec,
                ),
            )
        started = -1 if wait else self._start(start_replay, payloads, topk_weights, handle)
        return self._pending(
            started, lambda: arranged(autograd.replayed(rows, scales, topk_weights, handle, started), spec)
        )

    def combine(
        self, rows: Any, handle: Any, weighted: bool | None, bias: Any, quant: Any, out: Any, *, wait: bool
    ) -> Pending[Tensor]:
        """`Buffer.combine`; wait: whether the caller waits at once."""
        if isinstance(handle, PaddedHandle):
            return self.padded.combine(rows, handle, weighted, bias, quant, out, wait=wait)
        if wait and self._express is not None and quant is None and out is None:
            summed = self._express.combine(rows, handle, weighted, bias)
            if summed is not None:
                return Pending(lambda: summed)
        self._core.check_usable()
        only_padded(self._check, out=out)
        use_weights = self._check.combine(rows, handle, weighted, bias)
        spec = None if quant is None else home_spec(quant, self._core, self._check, handle.layout)
        rows, bias = _packed(rows), None if bias is None else _packed(bias)
        can_start = autograd.can_start(rows, bias)
        if spec is not None:
            refuse_tracing_or_gradient(self._check, can_start, rows, bias, handle.row_weights if use_weights else None)
        home = Homecoming(rows=rows, weighted=use_weights, bias=bias, quant=spec)
        started = -1 if wait or not can_start else self._start(start_combine, home, handle)
        return self._pending(started, lambda: autograd.combined(rows, home, handle, started))

    def _start(self, start: Any, *args: Any) -> int:
        """Start an operation now; the number under which its autograd operator will find it."""
        number = next(_operations)
        transport = self._core.transport
        transport.goes_on = True
        try:
            with torch.no_grad(), self._core.guarded():
                self._core.started[number] = start(self._core, *args)
        finally:
            transport.goes_on = False
        return number

    def _pending(self, started: int, finish: Callable[[], T]) -> Pending[T]:
        """The result of an operation; if nobody waits for it, what it holds is given back when it is dropped."""
        if started >= 0:
            weakref.finalize(finish, self._core.started.pop, started, None).atexit = False
        return Pending(finish)


def _express_of(core: Core, check: Checker) -> Any:
    """The quick way of a buffer, where ranks share memory and loops can be compiled; else None."""
    if core.transport.name != "symmetric" or compiled("moecomm._express_jit") is None:
        return None
    from moecomm.express import Express

    return Express.of(core, check)


def _packed(tensor: Tensor) -> Tensor:
    """The tensor as its bytes say it: contiguous, and not to be negated by who reads it."""
    return tensor.resolve_neg().contiguous()
