"""The checks of single kernels: make Triton's interpreter quicker, and guard everything that kernels write into."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.runtime.interpreter as interpreter

GUARD_BYTES = 256
POISON = 0xA5


def hurry() -> None:
    """Patch the interpreter to prepare `triton.language` once per launch, not in every call of a device function."""
    prepare, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[frozenset[int]] = set()

    class Nothing:
        def restore(self) -> None:
            return

    def prepare_once(function: Any) -> Any:
        languages = (interpreter.tl, interpreter.tl.core)
        seen = frozenset(id(value) for value in function.__globals__.values() if any(value is x for x in languages))
        if seen in prepared:
            return Nothing()
        prepared.add(seen)
        return prepare(function)

    def run_prepared(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        try:
            run(self, *args, **kwargs)
        finally:
            prepared.clear()

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = run_prepared


def yield_while_polling() -> None:
    """Have every atomic operation of the interpreter that acquires give way to other processes."""
    builder = interpreter.interpreter_builder
    plain = builder.create_atomic_rmw

    def give_way(operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if str(sem).endswith("ACQUIRE"):
            time.sleep(0.0002)
        return plain(operation, pointer, value, mask, sem, scope)

    builder.create_atomic_rmw = give_way


def check_overflow(wanted: bool) -> None:
    """Have the interpreter check every integer operation for overflow, or not: that halves its speed."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted)


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
