"""One pool of four ranks for all tests of the compatible API."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from moecomm.testing import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool(4, timeout_s=150.0) as pool:
        yield pool


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
