"""Pools of four ranks for all tests of this folder: forked from the usual process, or from one with transformers."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest

from moecomm.testing import RankPool, _processes

_TIMEOUT_S = 240.0  # where ranks are not forked the first function imports transformers, on each of them
_MODELS = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "qwen2_moe")


def _modules() -> list[str]:
    """What the tests use of transformers, where it is installed."""
    if importlib.util.find_spec("transformers") is None:
        return []
    models = [f"transformers.models.{name}.modeling_{name}" for name in _MODELS]
    return ["torch._dynamo", "transformers.generation", "transformers.distributed", *models]


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4, timeout_s=_TIMEOUT_S) as pool:
        yield pool


@pytest.fixture(scope="session")
def hf_ranks() -> Iterator[RankPool]:
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_processes, "_OPTIONAL", ("pytest",))  # what else others need is not imported here
            pool = stack.enter_context(RankPool(4, timeout_s=_TIMEOUT_S, preload=_modules()))
        yield pool
