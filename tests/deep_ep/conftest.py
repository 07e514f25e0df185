"""One pool of four ranks for all tests of the compatible API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moecomm.testing import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4, timeout_s=150.0) as pool:
        yield pool
