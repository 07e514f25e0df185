"""Ranks forked from one process compile a loop once, whatever becomes of the one that does it."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path
from unittest import mock

import pytest

from moecomm.shared_code import SharedCode
from moecomm.testing import RankPool, _processes, run_ranks

pytest.importorskip("llvmlite", reason="llvmlite is not installed")
forked = pytest.mark.skipif(not _processes.CAN_FORK, reason="ranks are not forked here")


def compile_together(rank: int, name: str, victim: int, mark: str) -> tuple[int, bytes]:
    """How often this rank has compiled the module, and its code. A victim dies in the middle, and is the first."""
    from moecomm import _jit

    shared, compiled = _jit.machine_code, []
    assert isinstance(shared, SharedCode)
    compile_itself = shared._compile

    def compile(text: str) -> bytes:
        if rank == victim:
            Path(mark).touch()
            time.sleep(0.2)  # the other one waits for this one's code by then
            os.kill(os.getpid(), signal.SIGKILL)
        compiled.append(text)
        return compile_itself(text)

    while victim not in (-1, rank) and not Path(mark).exists():
        time.sleep(0.01)
    with mock.patch.object(shared, "_compile", compile):
        codes = {shared(f"define i64 @{name}() {{ ret i64 7 }}") for _ in range(2)}
    assert len(codes) == 1
    return len(compiled), codes.pop()


@forked
def test_ranks_compile_a_loop_once_between_them() -> None:
    name = f"seven_{uuid.uuid4().hex}"
    results = []
    for world_size in (3, 2):  # the second pool finds what the first one has compiled
        with RankPool(world_size) as pool:
            results += pool.run(compile_together, name, -1, "")
    assert sum(times for times, _ in results) == 1
    assert len({code for _, code in results}) == 1


@forked
def test_a_rank_that_is_killed_while_it_compiles_holds_up_nobody(tmp_path: Path) -> None:
    name = f"seven_{uuid.uuid4().hex}"
    _, (times, _) = run_ranks(compile_together, 2, name, 0, str(tmp_path / "mark"), expect_exit={0: -9})
    assert times == 1


def test_where_nothing_can_be_written_everybody_compiles() -> None:
    shared = SharedCode(lambda text: text.encode())
    for pwrite in (mock.Mock(side_effect=OSError(28, "no space left")), mock.Mock(return_value=3)):
        with mock.patch("os.pwrite", pwrite):
            assert [shared("a"), shared("a"), shared("b")] == [b"a", b"a", b"b"]
    assert [shared("a"), shared("b")] == [b"a", b"b"]
