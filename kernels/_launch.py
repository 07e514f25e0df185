"""How kernels are launched: in one place, so that ahead-of-time compilation can listen in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

PROGRAMS_PER_SM = 8
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


def num_programs(work: int, like: Tensor, limit: int | None = None) -> int:
    """Programs for `work` independent pieces: from 1 to `limit`, which is 8 per multiprocessor unless told."""
    if limit is None:
        if like.device.type == "cuda":
            limit = PROGRAMS_PER_SM * torch.cuda.get_device_properties(like.device).multi_processor_count
        else:
            limit = _INTERPRETED_PROGRAMS
    return max(1, min(work, limit))
