"""`Group` over one rank, torch.distributed and MPI: results, subgroups, and every way in which a rank does not come."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moecomm.errors import ConfigError, DesyncError, MoECommError, PeerLostError, StallError, UnsupportedError
from moecomm.group import Group
from moecomm.testing.launcher import RankPool, run_ranks
from moecomm.testing.mpi import mpi_missing
from tests.under_mpi import run_under_mpi


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["W1", "W2", "W3"])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param, timeout_s=40) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three() -> Iterator[RankPool]:
    with RankPool(3, timeout_s=40) as ranks:
        yield ranks


def outcome(operation: Any) -> tuple[str, tuple[int, ...], str]:
    """Run it, which must fail; return class, peers and message of the error."""
    with pytest.raises(MoECommError) as caught:
        operation()
    return type(caught.value).__name__, caught.value.peers, str(caught.value)


# -- results ---------------------------------------------------------------------------------------------------------


def count_keys() -> int:
    """Keys in the store while no rank is exchanging anything."""
    world: Any = dist.group.WORLD
    dist.barrier()
    count = world.get_group_store().num_keys()
    dist.barrier()
    return count


def exchange_much(rank: int) -> dict[str, Any]:
    group = Group.resolve()
    keys = count_keys()
    rounds = [group.all_gather_object((rank, i, torch.full((i,), rank))) for i in range(6)]
    big = group.all_gather_object(bytes([rank]) * 3_000_000)
    roots = [group.broadcast_object(("from", rank), root) for root in range(group.size)]
    again = Group.resolve(dist.group.WORLD)
    mixed = [view.all_gather_object(rank) for view in (group, again, again, group)]
    group.barrier()
    return {
        "rank_size": (group.rank, group.size, group.process_group is dist.group.WORLD, group.mpi_comm),
        "rounds": [[(sender, i, x.tolist()) for sender, i, x in replies] for replies in rounds],
        "big": [(len(blob), blob[0], blob[-1]) for blob in big],
        "roots": roots,
        "mixed": mixed,
        "keys_left": count_keys() - keys,
    }


def test_torch_group(pool: RankPool) -> None:
    size = pool.world_size
    for rank, result in enumerate(pool.run(exchange_much)):
        assert result["rank_size"] == (rank, size, True, None)
        assert result["rounds"] == [[(r, i, [r] * i) for r in range(size)] for i in range(6)]
        assert result["big"] == [(3_000_000, r, r) for r in range(size)]
        assert result["roots"] == [("from", root) for root in range(size)]
        assert result["mixed"] == [list(range(size))] * 4
        assert result["keys_left"] == 0, "an exchange left keys in the store"


def last_rank_waits(rank: int) -> float:
    group = Group.resolve()
    if rank == group.size - 1:
        time.sleep(0.4)
    start = time.monotonic()
    group.barrier()
    return time.monotonic() - start


def test_barrier_waits_for_the_last(three: RankPool) -> None:
    waited = three.run(last_rank_waits)
    assert min(waited[:2]) > 0.3


def subgroups(rank: int) -> tuple[Any, ...]:
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    if rank == 1:
        error = outcome(lambda: Group.resolve(pair))
        return Group.resolve(alone).all_gather_object(rank), error
    group = Group.resolve(pair)
    return group.rank, group.size, group.all_gather_object(rank), group.broadcast_object(rank, 1)


def test_subgroups_count_their_own_ranks(three: RankPool) -> None:
    first, outsider, second = three.run(subgroups)
    assert first == (0, 2, [0, 2], 2)
    assert second == (1, 2, [0, 2], 2)
    gathered, (kind, _, message) = outsider
    assert gathered == [1]
    assert kind == "ConfigError"
    assert "this process is not in the process group: got GroupMember.NON_GROUP_MEMBER; expected" in message


def test_single_rank() -> None:
    group = Group.resolve()
    assert (group.rank, group.size, group.process_group, group.mpi_comm) == (0, 1, None, None)
    sent = {"a": [1, 2]}
    (received,) = group.all_gather_object(sent)
    assert received == sent
    assert received is not sent, "every rank gets a copy, also a single one"
    assert group.broadcast_object("x") == "x"
    group.barrier()


# -- ranks that do not come ------------------------------------------------------------------------------------------


def stay_away(rank: int, absent: int) -> list[Any]:
    """One rank does not come in time, hears so when it comes late, and the group goes on."""
    group = Group.resolve()
    results: list[Any] = []
    start = time.monotonic()
    if rank != absent:
        results.append(outcome(lambda: group.all_gather_object(rank, timeout_s=1.0, operation="roll call")))
    waited = time.monotonic() - start
    dist.barrier()
    if rank == absent:
        results.append(outcome(lambda: group.all_gather_object(rank, timeout_s=1.0, operation="roll call")))
    dist.barrier()
    return [*results, waited, group.all_gather_object(rank)]


@pytest.mark.parametrize("absent", [1, 2])
def test_missing_rank_is_named(three: RankPool, absent: int) -> None:
    for rank, ((kind, peers, message), waited, after) in enumerate(three.run(stay_away, absent)):
        assert (kind, peers) == ("StallError", (absent,))
        assert message.startswith(
            f"rank {rank}: roll call: ranks [{absent}] did not arrive in time: expected all ranks"
        )
        assert "within 1 s; look at what those ranks are doing, or raise timeout_s" in message
        assert (waited < 3) if rank == absent else (0.9 < waited < 3)
        assert after == [0, 1, 2], "the group works on after a stall"


def stay_away_first(rank: int) -> Any:
    """Rank 0 comes when the others have left; it collects what they wrote, and misses them."""
    group = Group.resolve()
    error = outcome(lambda: group.barrier(timeout_s=0.6)) if rank != 0 else None
    dist.barrier()
    if rank == 0:
        error = outcome(lambda: group.barrier(timeout_s=0.6))
    dist.barrier()
    return error, group.all_gather_object(rank)


def test_missing_rank_zero_is_named(three: RankPool) -> None:
    (first, _), *others = results = three.run(stay_away_first)
    assert [error[:2] for error, _ in others] == [("StallError", (0,))] * 2
    assert first[:2] == ("StallError", (1, 2))
    assert "barrier: ranks [1, 2] did not leave in time" in first[2]
    assert [after for _, after in results] == [[0, 1, 2]] * 3


def die(rank: int, victim: int) -> Any:
    group = Group.resolve()
    group.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return outcome(lambda: group.all_gather_object(rank, timeout_s=1.5))


def test_killed_rank_is_named() -> None:
    results = run_ranks(die, 3, 1, expect_exit={1: -signal.SIGKILL})
    assert [results[rank][:2] for rank in (0, 2)] == [("StallError", (1,))] * 2


def host_a_store(rank: int, folder: str, how: int) -> Any:
    """Rank 0 hosts the store, and is killed or stopped once both ranks are in."""
    port = Path(folder, "port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.with_suffix(".part").write_text(f"{store.port} {os.getpid()}")
        port.with_suffix(".part").rename(port)
    else:
        while not port.exists():
            time.sleep(0.02)
        store = dist.TCPStore("127.0.0.1", int(port.read_text().split()[0]), is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group = Group.resolve()
    group.barrier()
    if rank == 0:
        os.kill(os.getpid(), how)
    start = time.monotonic()
    result = (*outcome(lambda: group.barrier(timeout_s=2.0)), time.monotonic() - start)
    os.kill(int(port.read_text().split()[1]), signal.SIGKILL)
    return result


def test_store_that_dies_is_a_lost_peer(tmp_path: Path) -> None:
    expect_exit = {0: -signal.SIGKILL}
    _, result = run_ranks(host_a_store, 2, str(tmp_path), signal.SIGKILL, backend=None, expect_exit=expect_exit)
    kind, _, message, waited = result
    assert kind == "PeerLostError"
    assert message.startswith("rank 1: barrier: the key-value store of the process group is gone: got ")
    assert waited < 2.0, "a closed connection needs no deadline"


def test_store_that_stops_is_a_stall(tmp_path: Path) -> None:
    expect_exit = {0: -signal.SIGKILL}
    _, result = run_ranks(host_a_store, 2, str(tmp_path), signal.SIGSTOP, backend=None, expect_exit=expect_exit)
    kind, _, message, waited = result
    assert kind == "StallError"
    assert message.startswith("rank 1: barrier: the key-value store of the process group did not answer in time")
    assert 2.0 < waited < 5.0


def disagree(rank: int) -> Any:
    group = Group.resolve()
    error = outcome(group.barrier if rank == 1 else lambda: group.all_gather_object(rank))
    return error, group.all_gather_object(rank)


def test_other_operation_is_a_desync(three: RankPool) -> None:
    results = three.run(disagree)
    assert [error[:2] for error, _ in results] == [
        ("DesyncError", (1,)),
        ("DesyncError", (0, 2)),
        ("DesyncError", (1,)),
    ]
    assert results[0][0][2] == (
        "rank 0: all_gather_object: ranks are in different operations: got barrier on rank 1; expected "
        "all_gather_object on all 3 ranks; call the same operations in the same order on every rank"
    )
    assert [after for _, after in results] == [[0, 1, 2]] * 3


# -- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["world", 3, object(), [0, 1], Group])
def test_wrong_type_is_refused(group: Any) -> None:
    name = f"{type(group).__module__}.{type(group).__qualname__}"
    with pytest.raises(ConfigError, match="group has a type that moecomm does not know") as caught:
        Group.resolve(group)
    assert f"got {name}; expected a torch.distributed.ProcessGroup, an mpi4py.MPI.Comm, or None" in str(caught.value)


def test_a_group_is_given_back() -> None:
    group = Group.resolve()
    assert Group.resolve(group) is group


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("inf"), float("nan"), "60"])
def test_timeout_must_be_a_deadline(timeout_s: Any) -> None:
    message = r"rank 0: barrier: timeout_s is no deadline: got .*; expected a positive number of seconds"
    with pytest.raises(ConfigError, match=message):
        Group.resolve().barrier(timeout_s=timeout_s)


@pytest.mark.parametrize("root", [1, -1])
def test_root_must_be_a_rank(root: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank 0: root is no rank of the group: got {root}; expected 0 to 0"):
        Group.resolve().broadcast_object(1, root)


def test_default_deadline_is_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMM_TIMEOUT_S", "never")
    with pytest.raises(ConfigError, match="MOECOMM_TIMEOUT_S is no deadline: got 'never'"):
        Group.resolve().barrier()


def test_group_without_a_store_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Storeless:
        def rank(self) -> int:
            return 0

        size = rank

        def get_group_store(self) -> None:
            raise RuntimeError("no store here")

    monkeypatch.setattr(dist, "ProcessGroup", Storeless)
    with pytest.raises(
        UnsupportedError, match=r"no key-value store: got 'no store here'; .*pass the mpi4py communicator"
    ):
        Group.resolve(Storeless())


# -- MPI -------------------------------------------------------------------------------------------------------------


def content_with_mpi(world: Any) -> str:
    rank, size = world.Get_rank(), world.Get_size()
    group = Group.resolve(world)
    assert (group.rank, group.size, group.process_group) == (rank, size, None)
    assert group.mpi_comm is world
    for i in range(6):
        assert group.all_gather_object((rank, i)) == [(r, i) for r in range(size)]
    big = group.all_gather_object(bytes([rank]) * 3_000_000)
    assert [(len(b), b[0]) for b in big] == [(3_000_000, r) for r in range(size)]
    assert [group.broadcast_object(rank, root) for root in range(size)] == list(range(size))
    again = Group.resolve(world)
    assert [view.all_gather_object(rank) for view in (group, again, group)] == [list(range(size))] * 3

    half = world.Split(rank % 2, rank)
    assert Group.resolve(half).all_gather_object(rank) == [r for r in range(size) if r % 2 == rank % 2]
    pair = world.Create(world.group.Incl([0]))
    if rank:
        kind, _, message = outcome(lambda: Group.resolve(pair))
        assert kind == "ConfigError" and "got MPI.COMM_NULL" in message
    if size > 1:
        miss_and_disagree(world, group)
    group.barrier()
    assert not dist.is_initialized()
    return f"rank {rank} of {size} is content"


def miss_and_disagree(world: Any, group: Group) -> None:
    """The last rank does not come in time; then the first calls another operation."""
    rank, absent = group.rank, group.size - 1
    if rank != absent:
        kind, peers, message = outcome(lambda: group.all_gather_object(b"x" * 1000, timeout_s=1.0))
        assert (kind, peers) == ("StallError", (absent,)), message
        assert f"rank {rank}: all_gather_object: ranks [{absent}] did not arrive in time" in message
    world.Barrier()
    if rank == absent:
        group.all_gather_object(b"late", timeout_s=1.0)  # the others gave up; their messages are still there
    world.Barrier()
    assert group.all_gather_object(rank) == list(range(group.size))
    kind, peers, message = outcome(group.barrier if rank == 0 else lambda: group.all_gather_object(rank))
    assert (kind, peers) == ("DesyncError", tuple(range(1, group.size)) if rank == 0 else (0,)), message


@pytest.mark.skipif(bool(mpi_missing()), reason=mpi_missing())
@pytest.mark.parametrize("size", [1, 3])  # with 3, communicators of 1 and 2 ranks come along
def test_mpi_group(size: int) -> None:
    said = run_under_mpi(content_with_mpi, size)
    assert said == [f"rank {rank} of {size} is content" for rank in range(size)]


def test_error_classes_are_the_ones_promised() -> None:
    assert issubclass(StallError, TimeoutError)
    assert issubclass(PeerLostError, ConnectionError)
    assert issubclass(DesyncError, RuntimeError)
