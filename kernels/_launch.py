"""How kernels are launched: in one place, so that ahead-of-time compilation can listen in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST_PER_SM = 32  # programs that a multiprocessor holds at once, whatever their size
_INTERPRETED_PROGRAMS = 4  # enough to have an order that tests can shuffle


class Launch(NamedTuple):
    """A launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int


recorder: list[Launch] | None = None  # when a list: launches are noted there and not run


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constexprs: Any) -> None:
    """Run a kernel; products are never fused with sums (results must not depend on the compiler)."""
    if recorder is not None:
        recorder.append(Launch(kernel, grid, args, constexprs, num_warps))
        return
    kernel[grid](*args, **constexprs, num_warps=num_warps, enable_fp_fusion=False)


_budget: ContextVar[int | None] = ContextVar("multiprocessors for the kernels that are launched", default=None)


@contextmanager
def on_multiprocessors(count: int | None) -> Iterator[None]:
    """Have kernels launched inside take no more programs than fit on so many multiprocessors; None: on all."""
    before = _budget.set(count)
    try:
        yield
    finally:
        _budget.reset(before)


def num_programs(
    work: int, like: Tensor, limit: int | None = None, *, warps: int = 4, columns: int = 1, queued: bool = False
) -> int:
    """Programs for `work` independent pieces: from 1 to as many as fit on the multiprocessors, or to `limit`.

    warps: of a program. columns: of the grid, programs that work on the same pieces. queued: whether there is a program
    per piece where all multiprocessors may be used, so that whichever is free takes the next.

    >>> num_programs(100, torch.zeros(0), limit=8), num_programs(3, torch.zeros(0), limit=8)
    (8, 3)
    >>> with on_multiprocessors(1):
    ...     num_programs(100, torch.zeros(0), warps=8), num_programs(100, torch.zeros(0), warps=8, columns=2)
    (8, 4)
    """
    if limit is None:
        threads, warp_size, count = 2048, 32, _budget.get()
        if like.device.type == "cuda":
            device = torch.cuda.get_device_properties(like.device)
            threads, warp_size = device.max_threads_per_multi_processor, device.warp_size
            count = min(count or device.multi_processor_count, device.multi_processor_count)
            if queued and count == device.multi_processor_count:
                return max(1, work)
        most = min(_MOST_PER_SM, threads // (warps * warp_size))
        limit = _INTERPRETED_PROGRAMS if count is None else count * most // columns
    return max(1, min(work, limit))
