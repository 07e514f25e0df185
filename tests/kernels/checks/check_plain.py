"""The interpreter as it comes, without what `interpreter.py` and `plans.py` make quicker: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.checks import plans
from tests.kernels.checks.probe import digests
from tests.kernels.checks.worlds import DEVICE

ROOT = Path(__file__).resolve().parents[3]
PLAIN = """
import triton.runtime.interpreter as interpreter
from tests.kernels.checks.probe import digests
from tests.kernels.checks.worlds import dispatch_and_combine, world_of
from tests.kernels.small import small
dispatch_and_combine(small("odd_align"), world_of(small("odd_align"), 1), 0)
found = digests()
assert interpreter._patch_lang.__module__ == interpreter.__name__
assert interpreter.interpreter_builder.options.sanitize_overflow
print("the same bits", *found)
"""
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="there is no interpreter")


def test_the_plain_interpreter_gives_the_same_bits() -> None:
    """An exchange, held against the oracle, and single operations: here noted, and then repeated with other numbers."""
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", PLAIN]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and "the same bits" in result.stdout, result.stdout + result.stderr
    plans.forget()
    assert len(set(digests())) == 2 + 6  # integers of both types give the same
    assert [digests(), digests()] == [result.stdout.split()[3:]] * 2


@triton.jit
def _looks(out, x):  # type: ignore[no-untyped-def]
    tl.store(out, tl.load(x, mask=tl.load(x) < 9, other=tl.load(x + 1)))


def test_what_looks_at_numbers_is_called_each_time() -> None:
    """Triton leaves out what a masked load gives elsewhere if it is zero: no plan may remember that it was."""
    plans.forget()
    out = torch.zeros(1, dtype=torch.int32)
    for given, wanted in (([9, 0], 0), ([9, 5], 5), ([3, 5], 3)):
        _looks[(1,)](out, torch.tensor(given, dtype=torch.int32))
        assert out.tolist() == [wanted]
    assert [key[0].__name__ for key, plan in plans._plans.items() if plan is False] == ["load"]
