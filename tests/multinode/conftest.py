"""A cluster of network namespaces for the tests of this folder; they are skipped where there can be none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moecomm.testing import no_leaks
from moecomm.testing.namespaces import Cluster, why_not


@pytest.fixture(scope="session")
def reason() -> str | None:
    """Why there is no cluster here, or None."""
    return why_not()


@pytest.fixture(autouse=True)
def nothing_stays_behind(reason: str | None) -> Iterator[None]:
    """Skip, or see that no process, nothing in /dev/shm and no interface stays."""
    if reason is not None:
        pytest.skip(f"no cluster of namespaces: {reason}")
    with no_leaks():
        yield


@pytest.fixture
def cluster(nothing_stays_behind: None) -> Iterator[Cluster]:
    """Two nodes with slow links: what the ranks of these tests send takes a while."""
    with Cluster(2, rate="200mbit") as nodes:
        yield nodes
