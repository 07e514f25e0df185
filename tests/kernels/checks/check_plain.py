"""The interpreter as it comes, without what `interpreter.py` makes quicker: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.checks.worlds import DEVICE

ROOT = Path(__file__).resolve().parents[3]
PLAIN = """
import triton.runtime.interpreter as interpreter
from moecomm.testing.cases import CASES
from tests.kernels.checks.worlds import dispatch_and_combine, world_of
dispatch_and_combine(CASES["odd_align"], world_of(CASES["odd_align"], 1), 0)
assert interpreter._patch_lang.__module__ == interpreter.__name__
assert interpreter.interpreter_builder.options.sanitize_overflow
print("the same bits")
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="there is no interpreter")
def test_an_exchange_in_the_plain_interpreter() -> None:
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", PLAIN]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and "the same bits" in result.stdout, result.stdout + result.stderr
