"""What all tests share: GPU tests are skipped, with a reason, where there is no GPU."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"no GPU: torch {torch.__version__} sees no CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not `in item.keywords`: those hold the names of folders too
            item.add_marker(skip)
