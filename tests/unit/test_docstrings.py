"""The public surface is small, sorted and documented, and every example in the package runs."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import moecomm

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = [name for name in moecomm.__all__ if name != "__version__"]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Kernels run in Triton's interpreter here, and it is chosen when triton is imported: a process of their own.
RUN_DOCTESTS = f"""
import doctest, importlib, sys
result = doctest.testmod(importlib.import_module(sys.argv[1]), optionflags={OPTIONS})
sys.exit(result.failed)
"""


def modules(folder: str, package: str) -> list[str]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    parts = [path.relative_to(ROOT / folder).with_suffix("").parts for path in paths if path.stem != "__main__"]
    return [".".join([package, *(part for part in p if part != "__init__")]) for p in parts]


def test_all_is_sorted_and_small() -> None:
    assert list(moecomm.__all__) == sorted(moecomm.__all__)
    assert len(set(moecomm.__all__)) == len(moecomm.__all__) <= 20


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_an_example(name: str) -> None:
    thing = getattr(moecomm, name)
    assert "__doc__" in vars(thing), f"moecomm.{name} has no docstring of its own"
    assert doctest.DocTestParser().get_examples(thing.__doc__), f"the docstring of moecomm.{name} has no >>> example"


@pytest.mark.parametrize("module", modules("moecomm", "moecomm"))
def test_examples_run(module: str) -> None:
    result = doctest.testmod(import_module(module), optionflags=OPTIONS)
    assert result.failed == 0


@pytest.mark.parametrize("module", modules("kernels", "moecomm.kernels"))
def test_kernel_examples_run(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN_DOCTESTS, module],
        env=dict(os.environ, TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_wrong_example_fails() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1
