"""One warm process for all fault tests; ranks are forked from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults._ranks import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as warm:
        yield warm
