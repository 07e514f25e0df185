"""Ranks as processes: results, failures, deaths and hangs come back, and nothing stays behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moecomm.errors import StallError
from moecomm.testing import RankFailure, RankPool, _processes, launcher, no_leaks, run_ranks

# -- functions that run on the ranks -----------------------------------------------------------------------------


def sum_of_ranks(rank: int, start: int) -> tuple[float, int, str]:
    total = torch.tensor([float(start + rank)])
    dist.all_reduce(total)
    return total.item(), torch.get_num_threads(), os.environ.get("FLAVOUR", "")


def fail_on(rank: int, bad: int) -> str:
    print(f"rank {rank} says hello")
    if rank == bad:
        raise StallError("out of patience", rank=rank, peers=[7])
    return "fine"


def fail_before_collective(rank: int, bad: int) -> None:
    if rank == bad:
        raise ValueError("before the collective")
    dist.all_reduce(torch.ones(1))


def hang_on(rank: int, bad: int) -> int:
    while rank == bad:
        time.sleep(0.1)
    return rank


def die_on(rank: int, bad: int, code: int) -> int:
    if rank == bad:
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    return rank


def die_at_exit(rank: int) -> None:
    import atexit

    atexit.register(os._exit, 3)


def start_a_sleeper(rank: int, folder: str) -> int:
    sleeper = subprocess.Popen(["sleep", "300"])
    Path(folder, str(rank)).write_text(f"{os.getpid()} {sleeper.pid}")
    return sleeper.pid


def origin(rank: int, name: str) -> tuple[int, int, str | None]:
    return os.getppid(), os.getsid(0), os.environ.get(name)


def origin_or_death(rank: int, name: str) -> tuple[int, int, str | None]:
    """Rank 1 dies."""
    die_on(rank, 1, -9)
    return origin(rank, name)


def return_a_lock(rank: int) -> Any:
    return threading.Lock()


# -- launcher ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout_s=20.0, env={"FLAVOUR": "plum"}) as ranks:
        yield ranks


@pytest.fixture
def bare(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warm processes of this test alone beside those with ranks; they start sooner, with torch and nothing else."""
    kept = {key: warm for key, warm in _processes._all_warm.items() if warm.ranks}
    monkeypatch.setattr(_processes, "_OPTIONAL", ())
    monkeypatch.setattr(_processes, "_python", functools.partial(without_loops, _processes._python))
    monkeypatch.setattr(_processes, "_all_warm", dict(kept))
    yield
    for key in _processes._all_warm.keys() - kept.keys():
        _processes._all_warm.pop(key).close()


def without_loops(python: Callable[[str], list[str]], code: str) -> list[str]:
    """The command line of a process that compiles no loops over rows, which no function here needs."""
    return python(f"from moecomm.testing import _processes; _processes._train = lambda *_: None; {code}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_ranks_form_a_group_and_return_in_order() -> None:
    with no_leaks():
        assert run_ranks(sum_of_ranks, 2, 10, env={"FLAVOUR": "pear"}) == [(21.0, 1, "pear")] * 2


def test_pool_runs_many_functions(pool: RankPool) -> None:
    assert [pool.run(sum_of_ranks, start)[1] for start in range(5)] == [(2.0 * s + 1, 1, "plum") for s in range(5)]


def test_failure_names_rank_and_shows_traceback_and_logs(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"fail_on failed on ranks \[1\] of 2") as caught:
        pool.run(fail_on, 1)
    message = str(caught.value)
    assert "out of patience" in message and "in fail_on" in message
    assert "rank 0: returned" in message and "rank 0 says hello" in message and "rank 1 says hello" in message
    assert isinstance(caught.value.errors[1], StallError) and caught.value.errors[1].peers == (7,)
    assert caught.value.timed_out == ()


def test_log_of_an_earlier_run_is_not_shown_again(pool: RankPool) -> None:
    pool.run(fail_on, -1)
    with pytest.raises(RankFailure) as caught:
        pool.run(return_a_lock)
    assert "says hello" not in str(caught.value)
    assert "cannot pickle" in str(caught.value)


def test_pool_works_after_a_failure(pool: RankPool) -> None:
    pids = [rank.process.pid for rank in pool._ranks]
    for bad in (0, 1):
        with pytest.raises(RankFailure):
            pool.run(fail_on, bad)
        assert pool.run(sum_of_ranks, 0)[0][0] == 1.0
    assert [rank.process.pid for rank in pool._ranks] == pids, "a plain exception must not cost a new start"


def test_pool_works_after_a_rank_was_left_alone_in_a_collective(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_GRACE_S", 0.5)
    with pytest.raises(RankFailure, match="before the collective"):
        pool.run(fail_before_collective, 0)
    assert pool.run(sum_of_ranks, 0)[0][0] == 1.0


def test_pool_works_after_a_hang_and_shows_where(pool: RankPool) -> None:
    assert pool.run(hang_on, -1) == [0, 1], "the module is imported by now"
    with pytest.raises(RankFailure, match=r"rank 1: did not return within 3 s") as caught:
        pool.run(hang_on, 1, timeout_s=3.0)
    assert caught.value.timed_out == (1,)
    assert "in hang_on" in str(caught.value), "the stacks of the hanging rank are missing"
    assert pool.run(sum_of_ranks, 0)[0][0] == 1.0


def test_pool_works_after_a_death(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"rank 0: ended with exit code -9 without an answer"):
        pool.run(die_on, 0, -9)
    assert pool.run(sum_of_ranks, 0)[0][0] == 1.0


def test_a_killed_rank_can_be_expected() -> None:
    with no_leaks():
        assert run_ranks(die_on, 2, 1, -9, backend=None, expect_exit={1: -9}) == [0, None]


@pytest.mark.parametrize(
    ("expected", "message"), [({1: -9}, "exit code 7, expected -9"), ({0: -9}, "returned, expected exit code -9")]
)
def test_another_exit_than_the_expected_one_fails(expected: dict[int, int], message: str) -> None:
    with pytest.raises(RankFailure, match=message):
        run_ranks(die_on, 2, 1, 7, backend=None, expect_exit=expected)


def test_a_bad_exit_after_the_return_fails() -> None:
    with pytest.raises(RankFailure, match="exit code 3, expected 0"):
        run_ranks(die_at_exit, 1, backend=None)


def test_what_ranks_started_ends_with_them(tmp_path: Path) -> None:
    with no_leaks():
        pids = run_ranks(start_a_sleeper, 2, str(tmp_path), backend=None)
    assert gone_within(pids, 2.0)


SCRIPT = """
import os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from moecomm.testing import _processes, run_ranks

python = _processes._python
skip = "from moecomm.testing import _processes as p; p._train = lambda *_: None"  # compile no loops: none are run
_processes._python = lambda code: python(f"{skip}; {code}")

@dataclass
class Note:
    text: str

def double(rank, note):
    return note.text * rank

def start_a_sleeper_and_hang(rank, folder):
    sleeper = subprocess.Popen(["sleep", "300"])
    Path(folder, str(rank)).write_text(f"{os.getpid()} {sleeper.pid}")
    time.sleep(300)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    print(run_ranks(double, 2, Note("ab"), backend=None), flush=True)
    for folder in sys.argv[1:]:
        if folder == sys.argv[-1] or os.fork() == 0:
            Path(folder, "launcher").write_text(str(os.getpid()))
            run_ranks(start_a_sleeper_and_hang, 2, folder, backend=None)
"""


def test_functions_of_a_script_run_and_nothing_outlives_a_launcher(tmp_path: Path) -> None:
    """However it ends: a script that has started ranks, and two processes that it forks before it starts some more."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    stops = {tmp_path / stop.name: stop for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)}
    for folder in stops:
        folder.mkdir()
    with no_leaks():
        started = subprocess.Popen([sys.executable, str(script), *stops], stdout=subprocess.PIPE, text=True)
        assert started.stdout is not None and started.stdout.readline() == "['', 'ab']\n"
        for folder, stop in stops.items():
            pids = [int(pid) for name in ("launcher", "0", "1") for pid in written(folder / name).split()]
            os.kill(pids[0], stop)
            assert len(pids) == 5
            assert gone_within(pids, 10.0), f"a rank or what it started outlived its launcher, ended by {stop.name}"
        started.communicate(timeout=20)


def written(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"nothing wrote {path.name}"
        time.sleep(0.05)
    return path.read_text()


def test_ranks_are_forked_from_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUIT", "fig")
    first = run_ranks(origin, 2, "FRUIT", backend=None)
    monkeypatch.setenv("FRUIT", "date")
    second = run_ranks(origin, 2, "FRUIT", backend=None)
    assert [fruit for _, _, fruit in first + second] == ["fig", "fig", "date", "date"]
    parents, sessions = ({rank[i] for rank in first + second} for i in (0, 1))
    assert len(parents) == 1 and os.getpid() not in parents and len(sessions) == 4


def test_every_environment_has_its_warm_process(pool: RankPool, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries read at their start is not inherited. A process with ranks stays, and a dead one is replaced."""
    monkeypatch.setattr(_processes, "_MAX_WARM", 1)
    own = {"TRITON_INTERPRET": "1"}
    before = pool.run(origin, "TRITON_INTERPRET")
    (first,) = run_ranks(origin, 1, "TRITON_INTERPRET", backend=None, env=own)
    assert first[2] == "1" and before[0][2] is None
    assert os.getpid() != first[0] != before[0][0]
    assert pool.run(origin, "TRITON_INTERPRET") == before

    os.kill(first[0], signal.SIGKILL)
    assert gone_within([first[0]], 10.0)
    (second,) = run_ranks(origin, 1, "TRITON_INTERPRET", backend=None, env=own)
    assert second[2] == "1" and second[0] not in (os.getpid(), first[0])


def test_ranks_start_afresh_where_a_library_starts_threads(bare: None) -> None:
    """Then no process can be forked from what has loaded it."""
    env = {"OMP_NUM_THREADS": "2"}
    with no_leaks():
        rank, dead = run_ranks(origin_or_death, 2, "OMP_NUM_THREADS", env=env, expect_exit={1: -9})
    assert dead is None
    assert rank[0] == os.getpid() and rank[2] == "2"


def test_ranks_start_afresh_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warm process is asked for one: what starts here ends at once."""
    monkeypatch.setattr(_processes, "CAN_FORK", False)
    monkeypatch.setattr(_processes, "_warm", None)
    monkeypatch.setattr(_processes, "_python", lambda code: [sys.executable, "-S", "-c", f"exit({len(code)})"])
    with pytest.raises(RankFailure, match=r"rank 0: ended with exit code \d+ without an answer"):
        run_ranks(origin, 1, "FLAVOUR", backend=None)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="top level of a module"):
        run_ranks(lambda rank: rank, 1)
    with pytest.raises(ValueError, match="got 0; expected at least 1"):
        RankPool(0)
    with pytest.raises(ValueError, match=r"expect_exit names ranks \[2\]"):
        run_ranks(hang_on, 2, -1, expect_exit={2: -9})
