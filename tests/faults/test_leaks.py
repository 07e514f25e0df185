"""Nothing leaks (promise 8): files, processes, sockets, descriptors, threads, memory; memory is what was planned."""

from __future__ import annotations

import gc
import mmap
import os
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import moecomm
from moecomm.testing import RankFailure, _worker, no_leaks, run_ranks
from tests.faults._holdings import Holdings, belongings, resident_bytes, settled
from tests.faults._ranks import Nursery, World, results_of
from tests.faults._scenes import TRANSPORTS, E, H, K, M, build, catch, right_step, tokens_of

MEBI = 1 << 20


# -- whole processes -------------------------------------------------------------------------------------------------


def work_and_die(rank: int, transport: str, victim: int | None) -> float:
    """A real process of the launcher: work, and one rank dies by `kill -9` with everything open."""
    world = World(rank, dist.get_world_size(), dist.PrefixStore("marks", dist.group.WORLD.get_group_store()), -1)  # type: ignore[union-attr]
    buffer = build(transport, timeout_s=3.0)
    kept = [right_step(buffer, world, round).x for round in range(3)]
    assert len(kept) == 3
    if victim is not None:
        if rank == victim:
            os.kill(os.getpid(), 9)
        error = catch(lambda: right_step(buffer, world, 3)).error
        assert error.peers == (victim,), error
    return time.monotonic()  # the buffer is left open: the end of the process must close it


@pytest.mark.parametrize(("transport", "victim"), [("symmetric", 1), ("collective", 0), ("symmetric", None)])
def test_nothing_stays_behind(transport: str, victim: int | None) -> None:
    with no_leaks():
        ended = run_ranks(work_and_die, 2, transport, victim, expect_exit={} if victim is None else {victim: -9})
        assert time.monotonic() - max(end for end in ended if end is not None) < 30.0, "a rank took long to end"


def fail_while_others_wait(rank: int) -> None:
    buffer = build("symmetric", timeout_s=30.0)
    if rank == 1:
        raise RuntimeError("no more")
    buffer.dispatch(*tokens_of(rank))


def test_nothing_stays_behind_after_an_exception() -> None:
    with no_leaks(), pytest.raises(RankFailure, match="no more") as caught:
        run_ranks(fail_while_others_wait, 2)
    assert set(caught.value.failures) <= {0, 1}


_open_to_the_end: list[moecomm.Buffer] = []


def leave_open(rank: int, transport: str) -> None:
    """A forked rank ends without a teardown of its modules, but this one."""
    vars(_worker)["_end"] = lambda: None
    _open_to_the_end.append(build(transport))
    _open_to_the_end[0].dispatch(*tokens_of(rank))


@pytest.mark.parametrize("transport", ["symmetric", "collective"])
def test_a_process_ends_with_a_buffer_that_nobody_closed(transport: str) -> None:
    """A name of a module dies when the interpreter ends, and no thread begins then."""
    with no_leaks():
        run_ranks(leave_open, 2, transport)


# -- one process -----------------------------------------------------------------------------------------------------


WINDOWS, ROUNDS, LEAKY_ROUNDS = 12, 40, 24
BUFFER_WINDOWS = 4


def keep_going(world: World, transport: str, windows: int, leak: bool) -> dict[str, Any]:
    """Windows of operations of every kind on one buffer, until in one of them nothing has grown on any rank.

    The first operations take memory that later ones use again; gloo does so for its first thousands of collectives,
    also without moecomm. What leaks grows in every window.
    """
    before = belongings()
    buffer = build(transport, num_segments=4)
    leaked: list[object] = []
    rounds = LEAKY_ROUNDS if leak else ROUNDS

    def work(buffer: moecomm.Buffer = buffer) -> None:
        for round in range(rounds):
            out = right_step(buffer, world, round % 8)
            x, topk_idx, weights = tokens_of(world.rank, round % 8)
            rows: Any = buffer.dispatch(x.requires_grad_(), handle=out.handle).x
            buffer.combine(rows, out.handle).sum().backward()
            buffer.dispatch_async(x.detach(), topk_idx, weights)  # dropped
            assert catch(lambda: buffer.dispatch(x.half(), topk_idx)).error.rank == world.rank  # noqa: B023
            if leak:
                leaked.append(some_of_everything())

    def operations(buffer: moecomm.Buffer = buffer) -> int:
        return int(sum(buffer.stats()[name] for name in ("dispatches", "replays", "combines")))

    work()
    first, start = Holdings.now(), operations()
    grown: list[list[str]] = []
    for window in range(windows):
        work()
        last = Holdings.now()
        per_window = (operations() - start) // (window + 1)
        grown.append(last.grown(first, per_window))
        first = last
        if not said_by_any(world, f"window {window}", bool(grown[-1])):
            break
    world.meet("done")
    buffer.close()
    del buffer, work, operations
    return {"operations": per_window, "grown": grown, "closed": settled(before, 0.0 if leak else 20.0)}


def some_of_everything() -> object:
    """What seven operations might forget: little of everything, a bit more than is allowed."""
    fd = os.memfd_create("moecomm leak")
    os.ftruncate(fd, mmap.PAGESIZE)
    shared = mmap.mmap(fd, mmap.PAGESIZE)
    # Of private memory more: the allocator gives pages back in some windows, and takes them again in others.
    private = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared[0] = 1
    private[:: mmap.PAGESIZE] = bytes([1] * 4)
    return fd, shared, private, [object() for _ in range(7)], bytearray(7 * 80)


def said_by_any(world: World, name: str, mine: bool) -> bool:
    """Whether any rank says yes."""
    world.store.set(f"{name}/{world.rank}", str(int(mine)))
    return any(int(world.store.get(f"{name}/{rank}")) for rank in range(world.size))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_hundreds_of_operations_take_nothing_more(nursery: Nursery, transport: str) -> None:
    for told in results_of(nursery.run(keep_going, 2, transport, WINDOWS, False, timeout_s=100.0)):
        assert told["operations"] == 7 * ROUNDS
        assert told["grown"][-1] == []
        assert told["closed"] == {}, "what the buffer opened must be closed with it"


def test_what_leaks_is_noticed(nursery: Nursery) -> None:
    for told in results_of(nursery.run(keep_going, 2, "symmetric", 5, True)):
        for kind in (
            "descriptor of /memfd:moecomm leak",
            "/memfd:moecomm leak",
            "blocks",
            "heap",
            "resident",
            "shared",
        ):
            noticed = [any(line.startswith(kind) for line in window) for window in told["grown"]]
            assert len(noticed) == 5 and sum(noticed) >= 3, (kind, told["grown"])


def build_and_close(world: World, transport: str) -> dict[str, Any]:
    """Twenty buffers, closed in all the ways that there are; results of some outlive them. And so on, until in twenty
    of them nothing has grown on any rank: what leaks grows each time.
    """
    kept: list[Any] = []

    def cycle(number: int) -> None:
        # 64 MiB of address space each, of which a little is touched.
        buffer = build(transport, max_tokens_per_rank=4096, num_segments=8)
        out = right_step(buffer, world, number)
        if number % 5 == 0:
            kept[:] = [out.x]
        if number % 3 == 1:
            buffer.dispatch_async(*tokens_of(world.rank, number))
        if number % 4 == 3:
            world.meet(f"leave {number}")
            with buffer:
                return
        world.meet(f"leave {number}")
        if number % 4 != 2:
            buffer.close()  # else the garbage collector closes it

    # Early ones take what later ones use again. (The collector is asked: without, garbage of some buffers counts.)
    grown: list[int] = []
    for window in range(BUFFER_WINDOWS):
        before, bytes_before = belongings(), resident_bytes()
        for number in range(20 * window, 20 * (window + 1)):
            cycle(number)
        kept.clear()
        gc.collect()
        grown.append(resident_bytes() - bytes_before)
        if not said_by_any(world, f"buffers {window}", window == 0 or grown[-1] >= 2 * MEBI):
            break
    return {"more": settled(before), "grown": grown}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_twenty_buffers_leave_nothing(nursery: Nursery, transport: str) -> None:
    for told in results_of(nursery.run(build_and_close, 2, transport, timeout_s=90.0)):
        assert told["more"] == {}
        assert told["grown"][-1] < 2 * MEBI, f"bytes more after 20 buffers, again and again: {told['grown']}"


def fail_to_build(world: World) -> dict[str, Any]:
    """Constructors that fail on one rank, at every step of connecting, leave nothing on any."""
    from moecomm.memory import channel, host
    from moecomm.transport import symmetric

    broken: list[tuple[Any, str]] = [
        (host.HostMemory, "create"),
        (host.HostMemory, "__init__"),
        (channel.socket, "send_fds"),
        (channel.socket, "recv_fds"),
        (symmetric, "SegmentPool"),
    ]
    with build() as warm:
        right_step(warm, world)
    before = belongings()
    names = []
    for place, name in broken:
        fault = OSError(28, "no space left")
        if world.rank == 1:
            with mock.patch.object(place, name, side_effect=fault), pytest.raises((OSError, moecomm.MoECommError)):
                build(timeout_s=0.5)
        else:
            error = catch(lambda: build(timeout_s=0.5)).error
            assert isinstance(error, (moecomm.StallError, moecomm.PeerLostError)) and 1 in error.peers, error
        names.append(name)
        world.meet(f"failed {name}")
    return {"more": settled(before), "names": names}


def test_constructors_that_fail_leave_nothing(nursery: Nursery) -> None:
    for told in results_of(nursery.run(fail_to_build, 2)):
        assert len(told["names"]) == 5
        assert told["more"] == {}


# -- memory is what was planned --------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {},
    {"num_experts": 64, "hidden": 512, "top_k": 8, "max_tokens_per_rank": 100, "dtype": torch.bfloat16},
    {"reduce": "source", "top_k": 4, "hidden": 33},
    {"num_segments": 2, "max_tokens_per_rank": 300, "dtype": torch.float8_e4m3fn},
]


def measure_memory(world: World, shape: dict[str, Any]) -> tuple[int, int, int, int]:
    """The sizes of the memfds, as the kernel tells them; what the plan says; what the transport says."""
    made: list[int] = []
    create = os.memfd_create

    def note(*args: Any) -> int:
        made.append(os.dup(create(*args)))
        return os.dup(made[-1])

    with mock.patch.object(os, "memfd_create", note), build("symmetric", **shape) as buffer:
        (fd,) = made
        size = os.fstat(fd).st_size
        given: dict[str, Any] = {"num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": M} | shape
        given.setdefault("dtype", torch.float32)
        plan = moecomm.Buffer.plan_memory(num_ranks=world.size, **given)
        world.meet("measured")
        parts = plan.segment_bytes * plan.num_segments + plan.mail_bytes + plan.padded_bytes
        return size, plan.total_bytes, parts, buffer._core.transport.allocated_bytes


@pytest.mark.parametrize("shape", SHAPES, ids=["small", "moe", "source", "fp8"])
def test_what_is_planned_is_what_is_allocated(nursery: Nursery, shape: dict[str, Any]) -> None:
    for size, planned, product, allocated in results_of(nursery.run(measure_memory, 2, shape)):
        assert planned == product == allocated
        assert abs(size - planned) <= 0.01 * planned


def fill_up(world: World, shape: dict[str, Any]) -> int:
    """The worst case fits: every token of every rank goes to one rank, with every payload and table, in all ways."""
    with build(**shape) as buffer:
        config = buffer.config
        tokens, top_k, num_experts = config.max_tokens_per_rank, config.top_k, config.num_experts
        x = torch.randn(tokens, config.hidden).to(config.dtype)
        routings = [torch.full((tokens, top_k), num_experts - 1)]
        routings.append(torch.arange(tokens * top_k).view(tokens, top_k) % num_experts)
        for topk_idx in routings:
            for align in (1, 256):
                weights = torch.rand(tokens, top_k, requires_grad=True)
                mine = x.clone().requires_grad_()
                out: Any = buffer.dispatch(mine, topk_idx, weights, align=align)
                y = buffer.combine(out.x * 2, out.handle, bias=x)
                y.sum().backward()
                assert mine.grad is not None and weights.grad is not None
            if config.reduce == "rank":
                out = buffer.dispatch(x.clone().requires_grad_(), topk_idx, weights, layout="rank")
                (buffer.combine(out.x, out.handle).sum() + out.topk_weights.sum()).backward()
            packed = x.view(torch.uint8)[:, : config.hidden].contiguous()
            room = config.row_bytes - config.hidden
            buffer.dispatch((packed, torch.zeros(tokens, room, dtype=torch.uint8)), topk_idx, weights.detach())
        world.meet("filled")
        return int(buffer.stats()["dispatches"])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("reduce", ["rank", "source"])
def test_the_worst_case_fits(nursery: Nursery, size: int, reduce: str) -> None:
    for shape in (
        {
            "reduce": reduce,
            "max_tokens_per_rank": 7,
            "top_k": 5,
            "num_experts": 3,
            "hidden": 1,
            "dtype": torch.bfloat16,
        },
        {"reduce": reduce, "max_tokens_per_rank": 64, "top_k": 8, "num_experts": 12, "hidden": 64},
    ):
        transport = {"transport": "local"} if size == 1 else {}
        assert min(results_of(nursery.run(fill_up, size, shape | transport))) >= 4
