"""The checks of single kernels: make Triton's interpreter quicker, and guard everything that kernels write into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from tests.kernels.checks.interpreter import check_overflow, hurry

GUARD_BYTES = 256
POISON = 0xA5


if triton.knobs.runtime.interpret:
    hurry()
    check_overflow(False)


@pytest.fixture
def overflow_checked() -> Iterator[None]:
    """Integer operations that overflow fail in this test."""
    check_overflow(True)
    yield
    check_overflow(False)


@pytest.fixture(autouse=True)
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Surround every tensor that `torch.empty` makes with poison, fill it with poison, and look at the surroundings."""
    if "unguarded" in request.fixturenames:
        yield
        return
    made: list[tuple[torch.Tensor, int, int]] = []
    plain = torch.empty

    def guarded_empty(*shape: Any, **options: Any) -> torch.Tensor:
        wanted = plain(*shape, **options)
        size = wanted.numel() * wanted.element_size()
        raw = plain(size + 2 * GUARD_BYTES, dtype=torch.uint8, device=wanted.device).fill_(POISON)
        made.append((raw, GUARD_BYTES, GUARD_BYTES + size))
        if raw.data_ptr() % 16:
            return wanted
        return raw[GUARD_BYTES : GUARD_BYTES + size].view(wanted.dtype).view(wanted.shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield
    for raw, begin, end in made:
        outside = torch.cat([raw[:begin], raw[end:]])
        assert bool((outside == POISON).all()), f"a kernel wrote outside a buffer of {end - begin} bytes"


@pytest.fixture
def unguarded() -> None:
    """Leave `torch.empty` alone: for tensors that are too large to be filled."""
