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

# Kernels run in Triton's interpreter here, and it is chosen when triton is imported: a process of their own, one for
# all of them, which says after each module how many of its examples failed.
RUN_DOCTESTS = f"""
import doctest, importlib, sys
from tests.kernels.checks.interpreter import hurry
hurry()
for name in sys.argv[1:]:
    result = doctest.testmod(importlib.import_module(name), optionflags={OPTIONS})
    print(f"{{name}}: {{result.failed}} failed", flush=True)
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


@pytest.fixture(scope="module")
def kernel_examples() -> str:
    """What the examples of all kernels print."""
    result = subprocess.run(
        [sys.executable, "-c", RUN_DOCTESTS, *modules("kernels", "moecomm.kernels")],
        cwd=ROOT,
        env=dict(os.environ, TRITON_INTERPRET="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    return result.stdout


@pytest.mark.parametrize("module", modules("kernels", "moecomm.kernels"))
def test_kernel_examples_run(module: str, kernel_examples: str) -> None:
    assert f"{module}: 0 failed" in kernel_examples.splitlines(), kernel_examples


def test_a_wrong_example_fails() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1
