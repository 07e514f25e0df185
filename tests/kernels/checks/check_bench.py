"""The gate of `bench_kernels.py`: every kernel passes it, and a damaged result does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.case import make_case
from bench.kernel_works import Bench
from bench.options import make_parser, settings
from tests.kernels.checks.worlds import DEVICE

OPTIONS = ["--tokens", "3", "--hidden", "32", "--experts", "4", "--top-k", "2"]


def damage(given: object, bench: Bench) -> object:
    """Another bit in what a kernel gave: in its tensors, or in the memory of all ranks if it gave nothing."""
    if given is None:
        bench.memory.bitwise_xor_(1)
        return None
    if isinstance(given, Tensor):
        return (given.contiguous().view(torch.uint8) ^ 1).view(given.dtype)
    assert isinstance(given, tuple)
    changed: list[Any] = [part if part is None else damage(part, bench) for part in given]
    return type(given)(*changed) if hasattr(given, "_fields") else (*changed,)


def test_the_gate_lets_right_results_pass_and_no_others() -> None:
    (setting,) = settings(make_parser("").parse_args(OPTIONS))
    bench = Bench(make_case(setting, 0, 1, torch.device(DEVICE)), 2, setting.experts)
    names = []
    for work in bench.works():
        result = work.launch()
        work.check(result)
        damaged = damage(result, bench)
        with pytest.raises(AssertionError, match=work.name):
            work.check(damaged)
        if result is None:
            damage(None, bench)
        names.append(work.name)
    assert len(names) == 9 and len(set(names)) == 9
