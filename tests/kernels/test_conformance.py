"""The conformance suite of the foundation on the kernels themselves: the whole stack, interpreted, rank by process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moecomm
from moecomm.errors import ConfigError, StallError, UnsupportedError
from moecomm.group import Group
from moecomm.memory.device import device_memory_support, moves_by_kernels, unreachable_peers
from moecomm.testing import CASES, Case, RankPool
from moecomm.testing.conformance import ConformanceResult, run_conformance, run_in_turn
from moecomm.testing.planted import find_planted
from moecomm.testing.planted_kernels import PLANTED_IN_KERNELS
from tests.conformance.test_conformance import demand
from tests.kernels.prepared import INTERPRETED, PRELOAD, prepare
from tests.kernels.small import small

pytest.importorskip("triton", reason="triton is not installed")

DEADLINE_S = 240.0
# Rounds in turn of layout "expert" with both ways to reduce and layout "rank": three are one of each.
ROUNDS = 3
LAYOUTS = ("expert", "rank")  # the third has tests of its own
# World size: cases. Interpreting takes half a second per round and rank.
RUNS = {
    1: ("masked", "quantised_pair", "odd_align", "more_choices_than_experts", "extreme_values"),
    2: tuple(CASES),
    4: ("ragged_tokens", "rank_without_experts", "duplicate_expert"),
}


def run_in_turn_on_rank(rank: int, case: Case, rounds: int) -> list[ConformanceResult]:
    import triton

    assert triton.knobs.runtime.interpret
    prepare()
    return run_in_turn(None, "symmetric", [case], rounds=rounds, layouts=LAYOUTS, timeout_s=DEADLINE_S)


def run_with_options(rank: int, case: Case, options: dict[str, object]) -> list[ConformanceResult]:
    prepare()
    given: dict[str, Any] = {"rounds": 1, "layouts": LAYOUTS, "timeout_s": DEADLINE_S, "options": options}
    return run_conformance(None, "symmetric", [case], **given)


def choices_of_a_layer(rank: int) -> tuple[list[int], list[int]]:
    from moecomm.nn import MoELayer

    prepare()
    shape: dict[str, Any] = {
        "num_experts": 4,
        "hidden": 8,
        "top_k": 2,
        "max_tokens_per_rank": 5,
        "dtype": torch.float32,
    }
    with moecomm.Buffer(**shape, transport="symmetric", timeout_s=DEADLINE_S) as buffer:
        layer, x = MoELayer(buffer, intermediate=4), torch.randn(5, 8, generator=torch.Generator().manual_seed(rank))
        layer(x)
        own = torch.bincount(layer.router(x).topk_idx.flatten(), minlength=4)
        assert layer.expert_counts is not None
        return own.tolist(), layer.expert_counts.tolist()


@pytest.fixture(scope="module")
def pool_of() -> Iterator[Callable[[int], RankPool]]:
    """Pools by size, started when first asked for and kept."""
    with contextlib.ExitStack() as stack:
        given: dict[str, Any] = {"env": INTERPRETED, "timeout_s": DEADLINE_S, "preload": PRELOAD}
        yield functools.cache(lambda world_size: stack.enter_context(RankPool(world_size, **given)))


@pytest.mark.timeout(DEADLINE_S + 30)
def test_a_layer_knows_the_choices_of_all_ranks(pool_of: Callable[[int], RankPool]) -> None:
    """Which the handle of kernels does not: a rank has the counts of what it sends or receives."""
    results = pool_of(4).run(choices_of_a_layer)
    total = [sum(counts) for counts in zip(*(own for own, _ in results), strict=True)]
    assert [known for _, known in results] == [total] * 4


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, names in RUNS.items() for name in names])
def test_named_case(pool_of: Callable[[int], RankPool], world_size: int, name: str) -> None:
    demand(pool_of(world_size).run(run_in_turn_on_rank, small(name), ROUNDS), world_size, 1)


@pytest.mark.timeout(DEADLINE_S + 30)
def test_many_rounds(pool_of: Callable[[int], RankPool]) -> None:
    demand(pool_of(2).run(run_in_turn_on_rank, small("tiny_hidden"), 2 * ROUNDS), 2, 1)


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(
    ("world_size", "name", "options"),
    [
        (2, "duplicate_expert", {"engine": "copy"}),
        (2, "quantised_pair", {"engine": "copy", "num_sms": 1}),
    ],
)
def test_copy_engines_and_budgets_change_nothing(
    pool_of: Callable[[int], RankPool], world_size: int, name: str, options: dict[str, object]
) -> None:
    demand(pool_of(world_size).run(run_with_options, small(name), options), world_size, 4)


# -- faults inside kernels ------------------------------------------------------------------------------------------

MUTANT_CASE = Case(
    name="kernel_mutants",
    why="sums of three rows show their order, and some choices are none",
    num_experts=3,
    hidden=4,
    top_k=3,
    tokens=(3,),
    pattern="masked",
    dtype=torch.float32,
)


def plant(rank: int) -> dict[str, str]:
    prepare()
    given: dict[str, Any] = {"rounds": 2, "layouts": ["expert"], "reduces": ["rank"], "timeout_s": 0.3}
    return find_planted(lambda: run_conformance(None, "symmetric", [MUTANT_CASE], **given), PLANTED_IN_KERNELS)


def test_every_fault_planted_in_a_kernel_is_found(pool_of: Callable[[int], RankPool]) -> None:
    (found,) = pool_of(1).run(plant)
    assert len(found) == len(PLANTED_IN_KERNELS) >= 11
    assert [name for name, message in found.items() if not message] == []
    assert "StallError" in found["lost signal"] and "combine" in found["wrong reduce order"], found


# -- it is the kernels that run, and waits end ---------------------------------------------------------------------


def count_launches(rank: int) -> dict[str, list[str]]:
    """Names of the kernels that each operation launches."""
    prepare()
    from moecomm.kernels import _launch

    plain, names = _launch.launch, list[str]()

    def counted(kernel: object, *args: object, **options: object) -> None:
        names.append(getattr(kernel, "fn").__name__)  # noqa: B009
        plain(kernel, *args, **options)

    for module in ("layout", "push", "receive", "combine", "reduce", "permute"):
        __import__(f"moecomm.kernels.{module}")
        getattr(moecomm.kernels, module).launch = counted
    found = {}
    with moecomm.Buffer(
        num_experts=4, hidden=8, top_k=2, max_tokens_per_rank=4, dtype=torch.float32, transport="symmetric"
    ) as buffer:
        assert "by kernels" in buffer.explain()
        x, ids = torch.randn(3, 8), torch.tensor([[0, 3], [1, 2], [2, -1]])
        out = buffer.dispatch(x, ids)
        found["dispatch"], names[:] = list(names), []
        again = buffer.dispatch(x, handle=out.handle)
        found["replay"], names[:] = list(names), []
        assert torch.equal(again.x, out.x)
        buffer.combine(out.x, out.handle)
        found["combine"], names[:] = list(names), []
        stats = buffer.stats()
        assert stats["rows_local"] + stats["rows_remote"] > 0 and stats["operations_sent"] == 3
    return found


def test_every_operation_is_two_or_three_launches(pool_of: Callable[[int], RankPool]) -> None:
    for found in pool_of(2).run(count_launches):
        assert found == {
            "dispatch": ["_layout_kernel", "_push_kernel", "_receive_kernel"],
            "replay": ["_push_kernel", "_permute_kernel"],
            "combine": ["_push_reduced_kernel", "_reduce_kernel"],
        }


def one_stays_away(rank: int, operation: str) -> tuple[str, tuple[int, ...], str]:
    """The last of three ranks takes no part in an operation; what the others are told, and what comes after."""
    prepare()
    buffer = moecomm.Buffer(
        num_experts=3,
        hidden=4,
        top_k=1,
        max_tokens_per_rank=4,
        dtype=torch.float32,
        transport="symmetric",
        timeout_s=3.0,
    )
    x, ids = torch.ones(2, 4), torch.tensor([[0], [2]])
    out = buffer.dispatch(x, ids)
    if rank == 2:
        torch.distributed.barrier()
        return "", (), ""
    try:
        buffer.dispatch(x, ids) if operation == "dispatch" else buffer.combine(out.x, out.handle)
    except StallError as error:
        try:
            buffer.dispatch(x, ids)
        except StallError as later:
            torch.distributed.barrier()
            return str(error), error.peers, str(later)
    raise AssertionError("nobody was missed")


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_who_stays_away_is_named(operation: str) -> None:
    with RankPool(3, env=INTERPRETED, timeout_s=100.0, preload=PRELOAD) as pool:
        *told, _ = pool.run(one_stays_away, operation)
    for message, peers, later in told:
        assert peers == (2,) and "waiting for rank 2" in message and operation in message
        assert "failed earlier" in later


def refuse(rank: int) -> list[str]:
    """What a wrong argument is told; the buffer goes on."""
    prepare()
    found = []
    with moecomm.Buffer(
        num_experts=2, hidden=4, top_k=1, max_tokens_per_rank=2, dtype=torch.float32, transport="symmetric"
    ) as buffer:
        for x, ids in ((torch.ones(3, 4), [[0]] * 3), (torch.ones(2, 5), [[0]] * 2), (torch.ones(1, 4), [[7]])):
            try:
                buffer.dispatch(x, torch.tensor(ids))
            except moecomm.MoECommError as error:
                found.append(str(error))
        assert buffer.dispatch(torch.ones(1, 4), torch.tensor([[1]])).handle.num_tokens == 1
    return found


def test_a_refused_call_leaves_the_buffer_usable(pool_of: Callable[[int], RankPool]) -> None:
    for tokens, shape, expert in pool_of(2).run(refuse):
        assert "too many tokens" in tokens and "wrong shape" in shape and "names no expert" in expert


def differ(rank: int) -> str:
    prepare()
    try:
        moecomm.Buffer(num_experts=2, hidden=4, top_k=1, max_tokens_per_rank=2 + rank, transport="symmetric")
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_different_max_tokens_are_refused_on_every_rank(pool_of: Callable[[int], RankPool]) -> None:
    assert all("max_tokens_per_rank" in message for message in pool_of(2).run(differ))


# -- where kernels cannot run ---------------------------------------------------------------------------------------


def test_without_the_interpreter_the_cpu_has_no_kernels() -> None:
    cpu = torch.device("cpu")
    assert not moves_by_kernels(cpu)
    assert "TRITON_INTERPRET" in (device_memory_support(Group.resolve(), cpu) or "")


def test_rows_on_a_gpu_are_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert moves_by_kernels(torch.device("cuda"))
    assert "rows are on cuda" in (device_memory_support(Group.resolve(), torch.device("cuda")) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_buffer_for_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="symmetric: torch sees no cuda device"):
        moecomm.Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1, device="cuda", transport="symmetric")


def test_ranks_whose_devices_cannot_reach_each_other_are_named() -> None:
    assert unreachable_peers(["a", "b", "c"], [{"b": True, "c": True}, {"a": True, "c": False}, {}]) == (
        "the device of rank 1 (b) has no peer access to that of rank 2 (c)"
    )
    assert unreachable_peers(["a", "a"], [{}, {}]) is None, "ranks on one device reach each other"


def share_one_device(rank: int) -> str:
    """Pretend that every rank has the same GPU, and that torch was not told to allow that."""
    from moecomm.memory import device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_identity", lambda *_: ("gpu-0", False, {}))
        try:
            device._check_peers(Group.resolve(), torch.device("cuda:0"), 30.0)
        except UnsupportedError as error:
            return str(error)
    return "accepted"


def test_sharing_a_device_has_to_be_allowed(pool_of: Callable[[int], RankPool]) -> None:
    for message in pool_of(2).run(share_one_device):
        assert "rank 0, rank 1 share a device" in message and "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1" in message
