"""Static sizes: the same bits as exact ones, without the host; and what is found wrong then, and by whom."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.errors import (
    CapacityError,
    ConfigError,
    DesyncError,
    MoECommError,
    PeerLostError,
    RoutingError,
    UnsupportedError,
)
from moecomm.testing import RankPool, assert_bitwise
from tests.kernels.prepared import INTERPRETED, PRELOAD, prepare
from tests.kernels.test_conformance import DEADLINE_S

pytest.importorskip("triton", reason="triton is not installed")

T, K, H, E, M, ROOM = 5, 2, 6, 5, 6, 40
# What reads numbers from the device, or makes as many elements as a number on the device says.
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique", "is_nonzero", "equal")


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with RankPool(2, env=INTERPRETED, timeout_s=DEADLINE_S, preload=PRELOAD) as pool:
        yield pool


def build(**options: Any) -> moecomm.Buffer:
    given: dict[str, Any] = {"num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": M}
    return moecomm.Buffer(**(given | {"dtype": torch.float32, "transport": "symmetric"} | options))


def inputs(rank: int, round: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * round + rank)
    tokens = T - round * rank
    x, ids = torch.randn(tokens, H, generator=generator), torch.randint(-1, E, (tokens, K), generator=generator)
    return x, ids, torch.rand(tokens, K, generator=generator)


class NoHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuse every operator that would make the host wait for a GPU. Kernels are looked at by nobody."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        assert name not in HOST_READS and not by_mask, f"{name} reads from the device"
        return func(*args, **(kwargs or {}))


def without_host(buffer: moecomm.Buffer, work: Callable[[], Any]) -> Any:
    """Run operations with everything that reads from the device made to fail."""
    from moecomm.kernels import _launch

    plain = _launch.launch

    def launched(*args: Any, **options: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            plain(*args, **options)

    def read(*_: Any) -> None:
        raise AssertionError("the transport reads on the host")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer._core.transport, "read", read)
        for module in ("layout", "push", "receive", "combine", "reduce", "permute"):
            patch.setattr(f"moecomm.kernels.{module}.launch", launched)
        with NoHost():
            return work()


def one_step(buffer: moecomm.Buffer, rank: int, round: int, layout: str, reads: bool) -> dict[str, Tensor]:
    """Dispatch, replay, combine and all gradients."""
    x, ids, weights = inputs(rank, round)
    x.requires_grad_()
    weights.requires_grad_()

    def work() -> dict[str, Tensor]:
        out = buffer.dispatch(x, ids, weights, layout=layout, align=2 if layout == "expert" else 1)
        again = buffer.dispatch(x.detach() + 1, handle=out.handle)
        y = buffer.combine(out.x * 3, out.handle)
        y.sin().sum().backward()
        assert x.grad is not None
        found = {"x": out.x, "again": again.x, "y": y, "x.grad": x.grad, "tokens": out.tokens_per_expert}
        if layout == "expert":
            found |= {"weights": out.row_weights, "weights.grad": weights.grad}
            found |= {"offsets": out.expert_offsets, "replayed offsets": again.expert_offsets}
        else:
            found |= {"topk_idx": out.topk_idx, "topk_weights": out.topk_weights}
        return found

    found = work() if reads else without_host(buffer, work)
    return {name: value.detach().clone() for name, value in found.items()}


def compare_static_with_exact(rank: int, layout: str, reduce: str, rounds: int) -> int:
    """Everything of some rounds; how many values there were."""
    prepare()
    count = 0
    with build(reduce=reduce) as exact, build(reduce=reduce, max_recv_tokens=ROOM) as static:
        for round in range(rounds):
            wanted = one_step(exact, rank, round, layout, True)
            got = one_step(static, rank, round, layout, False)
            num_rows = len(wanted["x"])
            for name, value in wanted.items():
                rows = len(value) == num_rows and name in ("x", "again", "weights", "topk_idx", "topk_weights")
                part = got[name][:num_rows] if rows else got[name]
                assert_bitwise(part, value, f"{layout}, {reduce}, round {round}: {name}")
                if rows:
                    rest = got[name][num_rows:]
                    assert len(got[name]) == ROOM and (rest == (-1 if name == "topk_idx" else 0)).all(), name
                count += 1
        static.synchronize()
        assert exact.stats()["host_reads"] > 0
    return count


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(
    ("layout", "reduce", "rounds"), [("expert", "rank", 2), ("expert", "source", 1), ("rank", "rank", 1)]
)
def test_static_sizes_are_exact_ones_without_the_host(pair: RankPool, layout: str, reduce: str, rounds: int) -> None:
    counts = pair.run(compare_static_with_exact, layout, reduce, rounds)
    assert counts == [rounds * (9 if layout == "expert" else 7)] * 2


def read_something(rank: int) -> list[str]:
    """The proof can fail: a buffer with exact sizes reads, and so does a tensor that is asked for its value."""
    prepare()
    found = []
    works = (lambda b: b.dispatch(*inputs(0, 0)), lambda b: torch.ones(3)[torch.ones(3) > 0].sum().item())
    for work in works:
        with build() as buffer:
            try:
                without_host(buffer, functools.partial(work, buffer))
            except AssertionError as error:
                found.append(str(error))
            torch.distributed.barrier()
    return found


def test_a_read_would_be_noticed(pair: RankPool) -> None:
    for transport, operator in pair.run(read_something):
        assert "reads on the host" in transport and "reads from the device" in operator


# -- what is found wrong ---------------------------------------------------------------------------------------------


def too_many(rank: int) -> tuple[str, list[int], bool]:
    """More rows than there is room for: left out, within bounds, told by `synchronize`; the buffer goes on."""
    prepare()
    message = "accepted"
    with build(max_recv_tokens=3) as buffer:
        offsets = buffer.dispatch(torch.ones(T, H), torch.zeros(T, K, dtype=torch.int64)).expert_offsets
        assert offsets is not None
        try:
            buffer.synchronize()
        except CapacityError as error:
            message = str(error)
        out = buffer.dispatch(torch.ones(1, H), torch.full((1, K), -1))
        buffer.synchronize()
        return message, offsets.tolist(), not out.x.any()


def test_rows_beyond_the_room_are_left_out_and_told(pair: RankPool) -> None:
    (message, offsets, goes_on), (other, _, also) = pair.run(too_many)
    assert "max_recv_tokens=3" in message and "got 20" in message and offsets == [3, 3, 3] and goes_on and also
    assert other == "accepted", "rank 1 has no tokens to receive"


BAD_IDS = {E: f"got {E};", -(2**40): "got -2147483648 or less;"}


def bad_ids(rank: int) -> list[str]:
    """Ids out of range on rank 1 are the same as none, and that rank is told: by `synchronize`, or by the dispatch."""
    prepare()
    x, ids, weights = inputs(rank, 0)
    good, told = ids.clone(), []
    with build(max_recv_tokens=ROOM) as static, build() as exact:
        if rank == 1:
            good[3, 1] = -1
        wanted = exact.dispatch(x, good, weights)
        for bad in BAD_IDS:
            if rank == 1:
                ids[3, 1] = bad
            got = static.dispatch(x, ids, weights)
            assert_bitwise(got.x[: len(wanted.x)], wanted.x, f"rows with id {bad}")
            for call in (static.synchronize, lambda: exact.dispatch(x, ids, weights)):
                try:
                    call()
                except RoutingError as error:
                    told.append(str(error))
        sums = static.combine(got.x, got.handle), exact.combine(wanted.x, wanted.handle)
        assert_bitwise(*sums, "sums of a handle with an id that is none")
    return told


def test_ids_out_of_range_are_told_at_the_next_wait_of_the_host(pair: RankPool) -> None:
    fine, told = pair.run(bad_ids)
    assert fine == [] and len(told) == 2 * len(BAD_IDS)
    for number, text in enumerate(told):
        assert "rank 1: topk_idx[3, 1] names no expert" in text and list(BAD_IDS.values())[number // 2] in text


def do_different_things(rank: int, what: str) -> tuple[str, tuple[int, ...]]:
    """Rank 1 does something else than rank 0."""
    prepare()
    with build(timeout_s=60.0, **({"max_recv_tokens": ROOM} if what == "static" else {})) as buffer:
        x, ids, weights = inputs(rank, 0)
        out = buffer.dispatch(x, ids, weights)
        try:
            if rank == 0:
                buffer.dispatch(x, ids, weights)
            elif what == "weights":
                buffer.dispatch(x, ids)
            else:
                buffer.combine(out.x, out.handle)
            buffer.synchronize()
        except MoECommError as error:
            assert isinstance(error, DesyncError), error
            return str(error), error.peers
    return "accepted", ()


@pytest.mark.parametrize("what", ["operation", "weights", "static"])
def test_ranks_that_do_different_things_are_told_at_once(pair: RankPool, what: str) -> None:
    (zero, peers), (one, others) = pair.run(do_different_things, what)
    assert peers == (1,) and others == (0,)
    assert f"rank 1 called {'dispatch' if what == 'weights' else 'combine'}" in zero
    assert (
        "rank 0 called dispatch" in one and f"this rank called {'dispatch' if what == 'weights' else 'combine'}" in one
    )


def leave(rank: int, operation: str) -> tuple[str, tuple[int, ...], float]:
    """Rank 1 ends after its first dispatch; what rank 0 hears of it, and after how long."""
    prepare()
    with build(timeout_s=100.0) as buffer:
        x, ids, weights = inputs(rank, 0)
        out = buffer.dispatch(x, ids, weights)
        start = time.monotonic()
        if rank == 0:
            try:
                buffer.dispatch(x, ids) if operation == "dispatch" else buffer.combine(out.x, out.handle)
            except MoECommError as error:
                assert isinstance(error, PeerLostError), error
                return str(error), error.peers, time.monotonic() - start
    return "left", (), 0.0


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_a_rank_that_ends_is_named_long_before_the_deadline(pair: RankPool, operation: str) -> None:
    """Exact sizes wait on the host, a combine inside a kernel; what the rank sent before it ended has arrived."""
    (message, peers, waited), (left, *_) = pair.run(leave, operation)
    assert "rank 1 closed its buffer" in message and peers == (1,) and left == "left" and waited < 50.0


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"engine": "copy"}, {"num_sms": 4}, {"max_recv_tokens": 8}], ids=str)
def test_options_of_kernels_are_refused_without_them(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(UnsupportedError, match=f"{name}={value!r}.*TRITON_INTERPRET"):
        build(transport="auto", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "dma"}, "engine is unknown: got 'dma'"),
        ({"num_sms": 0}, "num_sms is no count: got 0"),
        ({"max_recv_tokens": True}, "max_recv_tokens is no count: got True"),
        ({"max_recv_tokens": 8, "engine": "copy"}, "the copy engines need the host"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)
