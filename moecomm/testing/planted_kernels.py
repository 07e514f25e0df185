"""Faults planted inside Triton kernels: a line of their source is changed, and they are compiled or interpreted anew.

What `moecomm.testing.planted` does between buffer and transport, where kernels move the rows and there is nothing in
between. Works where kernels do: on a GPU, and anywhere in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from moecomm.testing.planted import Planted

__all__ = ["PLANTED_IN_KERNELS"]


def _changed(module: str, *changes: tuple[str, str]) -> Any:
    """Have the kernels of a module be those of its changed source, wherever they are used."""

    @contextmanager
    def patch() -> Iterator[None]:
        original = importlib.import_module(f"moecomm.kernels.{module}")
        source = Path(str(original.__file__)).read_text(encoding="utf-8")
        for before, after in changes:
            assert before in source, f"moecomm.kernels.{module} has no line {before!r} any more"
            source = source.replace(before, after)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            path = Path(folder, f"{module}.py")  # the source of a kernel is read when it first runs
            path.write_text(source, encoding="utf-8")
            changed = _load(path)
            for name, kernel in list(vars(original).items()):
                if getattr(getattr(kernel, "fn", None), "__module__", "") == original.__name__:
                    for user, its_name in _users(kernel):
                        stack.enter_context(mock.patch.object(user, its_name, getattr(changed, name)))
            yield

    return patch


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"moecomm.kernels.planted_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _users(kernel: object) -> list[tuple[ModuleType, str]]:
    """Where in `moecomm.kernels` a kernel is known, and by what name."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("moecomm.kernels.")]
    return [(module, name) for module in modules for name, value in vars(module).items() if value is kernel]


_ENTRY = "row = tl.load(table + first + j)"
_ADDED = "tl.where(row >= 0, total + value, total)"

PLANTED_IN_KERNELS: tuple[Planted, ...] = (
    Planted(
        "dropped last word",
        "a row is sent without its end",
        _changed(
            "push", ("value, mask=used(column < ROW.words, pair)", "value, mask=used(column < ROW.words - 1, pair)")
        ),
    ),
    Planted(
        "off-by-one slot",
        "a row is written one slot too early",
        _changed(
            "push",
            ("rank, WIRE), row, WIRE.row_bytes, WORD", "rank, WIRE), tl.maximum(row - 1, 0), WIRE.row_bytes, WORD"),
        ),
    ),
    Planted(
        "stale generation",
        "rows of every other operation go where nobody looks",
        _changed("push", ("generation = sequence & 1", "generation = sequence & 0")),
    ),
    Planted(
        "lost signal",
        "nobody hears that the rows were written",
        _changed(
            "sync",
            ("_write_words(words + link.rank, value, exists)", "_write_words(words + link.rank, value, peer < 0)"),
        ),
    ),
    Planted(
        "torn row",
        "every other word is read from its neighbour's place",
        _changed("receive", ("tl.load(data + column, mask", "tl.load(data + column // 2 * 2, mask")),
    ),
    Planted(
        "wrong reduce order",
        "sums run from the last to the first",
        _changed("reduce", ("first + j", "first + (COLUMNS - 1 - j)")),
    ),
    Planted(
        "double add",
        "a row counts twice",
        _changed("reduce", (_ADDED, "tl.where(row >= 0, total + value + value, total)")),
    ),
    Planted(
        "wrong weight",
        "weights belong to the neighbour",
        _changed("reduce", ("tl.load(weights + row,", "tl.load(weights + tl.maximum(row - 1, 0),")),
    ),
    Planted(
        "ignored -1",
        "no row is taken for row 0",
        _changed("reduce", (_ENTRY, "row = tl.maximum(tl.load(table + first + j), 0)")),
    ),
    Planted(
        "wrong dtype cast",
        "products pass through a narrower dtype",
        _changed("reduce", (_ADDED, "tl.where(row >= 0, total + value.to(tl.bfloat16).to(tl.float32), total)")),
    ),
    Planted(
        "lost bias",
        "sums do not begin with the bias",
        _changed(
            "reduce",
            (
                "total = widen(tl.load(source + column, mask=inside, other=0.0))",
                "total = tl.full((SUM.block,), 0, tl.float32)",
            ),
        ),
    ),
)
