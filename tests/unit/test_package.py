"""One version, one place for pins, everything shipped, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import moecomm

ROOT = Path(__file__).resolve().parents[2]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Written in halves, or this file would be the first to break the rule.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|tmp/br" + r"ief)/",
            r"py" + r"pi\.org",
            r"python" + r"hosted\.org",
            r"download\.py" + r"torch\.org",
            r"--(?:extra-)?index" + r"-url",
            r"--find" + r"-links",
        ]
    )
)
MAX_FILE_LINES = 450  # "about 400"
MAX_FUNCTION_LINES = 65  # "about 60", signature and docstring not counted
MAX_KERNEL_PARAMETERS = 16


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def python_files() -> list[Path]:
    folders = ("moecomm", "kernels", "bench", "examples", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match.group().lower().replace("_", "-")


def test_version_is_in_one_place() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert importlib.metadata.version("moecomm") == moecomm.__version__
    tree = ast.parse((ROOT / "moecomm/_version.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_every_package_is_shipped() -> None:
    found = {"moecomm.kernels"} | {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "moecomm").rglob("*.py")}
    found |= {".".join(["moecomm", *p.parent.relative_to(ROOT).parts]) for p in (ROOT / "kernels").rglob("*.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found
    assert all(
        (ROOT / name.replace("moecomm.kernels", "kernels").replace(".", "/") / "__init__.py").is_file()
        for name in found
    )


def test_types_are_shipped() -> None:
    assert (ROOT / "moecomm/py.typed").is_file()
    assert PYPROJECT["tool"]["setuptools"]["package-data"] == {"moecomm": ["py.typed"]}


def test_every_requirement_is_pinned_once() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [name_of(line) for line in lines if line and not line.startswith("#")]
    assert len(pins) == len(set(pins))
    project = PYPROJECT["project"]
    requirements = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    requirements += [line for extra in project["optional-dependencies"].values() for line in extra]
    assert {name_of(line) for line in requirements} - {"moecomm"} == set(pins) - {"mkdocstrings-python"}
    assert set(project["optional-dependencies"]) >= {"mpi", "bench", "docs", "test", "dev"}


def test_no_other_file_pins_a_version() -> None:
    names = "torch|triton|llvmlite|ruff|mypy|pytest|mpi4py|mpich|setuptools"
    pin = re.compile(rf"\b(?:{names})(?:\[[\w,]+\])?\s*==\s*\d")
    files = [path for path in tracked_files() if path.name != "constraints.txt" and path.suffix != ".md"]
    assert not [str(path) for path in files if pin.search(path.read_text(encoding="utf-8", errors="ignore"))]


def test_no_machine_paths_or_registries() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found, found


@pytest.mark.parametrize(
    "line",
    ["cd /wo" + "rk/main", "see /ro" + "ot/x", "pip install --extra-index" + "-url x", "https://py" + "pi.org/simple"],
)
def test_the_machine_pattern_can_match(line: str) -> None:
    assert MACHINE.search(line)
    assert not MACHINE.search(line.replace("/", "-").replace("--", "").replace(".", "-"))


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, without signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_files_and_functions_are_small() -> None:
    found = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(ROOT)
        if len(text.splitlines()) > MAX_FILE_LINES:
            found.append(f"{where}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if function_lines(node) > MAX_FUNCTION_LINES:
                found.append(f"{where}:{node.lineno}: {node.name} has {function_lines(node)} lines")
            arguments = len(node.args.args) + len(node.args.kwonlyargs)
            if path.is_relative_to(ROOT / "kernels") and arguments > MAX_KERNEL_PARAMETERS:
                found.append(f"{where}:{node.lineno}: {node.name} has {arguments} parameters")
    assert not found, found


def test_python_is_plain_ascii() -> None:
    assert not [
        str(path.relative_to(ROOT)) for path in python_files() if not path.read_text(encoding="utf-8").isascii()
    ]
