"""What all tests share: long files come first, and GPU tests are skipped, with a reason, where there is no GPU."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent

# Files that take half a minute and more, the longest first: no worker is to be left with one of them at the end.
# A worker is given two files at first, so the third is a short one: it waits for the longest.
LONG = [
    "conformance/test_conformance.py",
    "conformance/test_mpi.py",
    "unit/test_rows.py",
    "kernels/test_conformance.py",
    "multinode/test_nodes.py",
    "faults/test_table.py",
    "faults/test_stalled.py",
    "unit/test_launcher.py",
    "kernels/test_interpreter.py",
    "examples/test_examples.py",
    "unit/test_mpi.py",
    "faults/test_mpi_faults.py",
    "unit/test_autograd.py",
    "kernels/test_protocol.py",
    "faults/test_leaks.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {TESTS / name: at for at, name in enumerate(LONG)}
    assert all(path.exists() for path in place), "LONG names a file that is gone"
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"no GPU: torch {torch.__version__} sees no CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not `in item.keywords`: those hold the names of folders too
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is imported by now stays: to look through all of it takes a fifth of a second each time."""
    gc.collect()
    gc.freeze()
