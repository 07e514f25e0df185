"""The shape of the kernel package: trios and their tests, parameters, where acquire and release may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "kernels").glob("*.py"))}
CHECKS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/kernels/checks").glob("check_*.py"))
MAX_PARAMETERS = 16


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def kernels() -> list[tuple[str, str]]:
    """(module, operation) of every kernel."""
    return [
        (module, name[1 : -len("_kernel")])
        for module, source in SOURCES.items()
        for name in functions(source)
        if name.startswith("_") and name.endswith("_kernel")
    ]


def parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]


def test_there_are_kernels() -> None:
    assert len(kernels()) >= 13, kernels()


@pytest.mark.parametrize(("module", "name"), kernels(), ids=lambda value: value)
def test_trio(module: str, name: str) -> None:
    """Kernel, wrapper and reference are in one file in this order; the last two have one signature."""
    found = functions(SOURCES[module])
    assert {f"_{name}_kernel", name, f"{name}_ref"} <= set(found), f"{module}.{name} is no trio"
    assert found[f"_{name}_kernel"].lineno < found[name].lineno < found[f"{name}_ref"].lineno
    assert parameters(found[name]) == parameters(found[f"{name}_ref"])
    assert ">>>" in (ast.get_docstring(found[name]) or ""), f"{module}.{name} has no example"
    assert len(parameters(found[f"_{name}_kernel"])) <= MAX_PARAMETERS


@pytest.mark.parametrize(("module", "name"), kernels(), ids=lambda value: value)
def test_every_trio_has_its_test(module: str, name: str) -> None:
    assert re.search(rf"def test_{name}_(against_reference|\w*)\(", CHECKS), f"no test_{name}_against_reference"
    assert re.search(rf"\b{name}_ref\b", CHECKS), f"no check compares {name} with {name}_ref"


def test_acquire_and_release_are_in_sync_alone() -> None:
    orders = re.compile(r"""sem\s*=\s*["'](acquire|release|acq_rel)|scope\s*=""")
    assert orders.search(SOURCES["sync"]), "the pattern finds nothing"
    assert [module for module, source in SOURCES.items() if orders.search(source)] == ["sync"]


def test_atomics_elsewhere_are_relaxed() -> None:
    """Only errors are noted with atomics outside of sync: never an order, never a slot."""
    calls = {module: re.findall(r"tl\.atomic_\w+\([^\n]*", source) for module, source in SOURCES.items()}
    outside = [(module, call) for module, found in calls.items() if module != "sync" for call in found]
    assert len(outside) == 1 and outside[0][0] == "layout" and 'sem="relaxed"' in outside[0][1], outside


def test_files_are_small() -> None:
    assert {module: text.count("\n") for module, text in SOURCES.items() if text.count("\n") > 400} == {}


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, moecomm.kernels; print([m for m in ('triton', 'numba', 'mpi4py') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
