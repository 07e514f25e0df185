"""One pool of four ranks for all tests of this folder: importing transformers four times is most of their time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moecomm.testing import RankPool

_TIMEOUT_S = 240.0  # the first function imports transformers, on four ranks, on a machine that may be busy


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4, timeout_s=_TIMEOUT_S) as pool:
        yield pool
