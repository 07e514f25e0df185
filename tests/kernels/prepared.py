"""Loaded by the process that interpreting ranks are forked from: a rank finds the kernels read and rewritten."""

from __future__ import annotations

import functools
import os

import torch

from moecomm.testing.conformance import run_in_turn
from tests.kernels.small import small

PRELOAD = ("tests.kernels.prepared",)
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}


@functools.cache
def prepare() -> None:
    """Make the interpreter of this process quicker, and give way to other ranks while it polls."""
    from moecomm.transport import _symmetric_device
    from tests.kernels.checks.interpreter import check_overflow, hurry, yield_while_polling

    _symmetric_device._PAUSE_S = 0.001
    hurry()
    yield_while_polling()
    check_overflow(False)


if os.environ.get("TRITON_INTERPRET") == "1":
    prepare()
    if torch.version.cuda is None and torch.version.hip is None:  # a device that is touched here is lost for ranks
        for result in run_in_turn(None, "symmetric", [small("one_token")], rounds=3):
            assert result.ok, result.message
