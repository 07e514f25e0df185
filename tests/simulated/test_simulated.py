"""The whole `Buffer` in a simulated world: large jobs, any order of messages, lost ones, deaths; all from one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import moecomm
from moecomm import reference
from moecomm.errors import ConfigError, DesyncError, MoECommError, PeerLostError, StallError
from moecomm.testing import CASES, Case, assert_bitwise, random_case
from moecomm.testing.conformance import ConformanceResult, run_conformance
from moecomm.testing.simulated import Faults, Outcome, results_of, simulate


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Ranks are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conform(group: Any, case: Case, layout: str = "expert", reduce: str = "rank") -> list[ConformanceResult]:
    return run_conformance(group, "simulated", [case], rounds=2, layouts=[layout], reduces=[reduce], timeout_s=60.0)


def demand(outcomes: list[Outcome]) -> None:
    for results in results_of(outcomes):
        for result in results:
            assert result.ok and result.num_checks > 0, f"rank {result.rank}: {result.message}"


def test_64_ranks_and_256_experts() -> None:
    tokens, hidden, top_k, size = 3, 16, 8, 64

    def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(rank)
        topk_idx = torch.rand(tokens, 256, generator=generator).topk(top_k).indices
        return (
            torch.randn(tokens, hidden, generator=generator),
            topk_idx,
            torch.rand(tokens, top_k, generator=generator),
        )

    def step(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shape: dict[str, Any] = {"num_experts": 256, "hidden": hidden, "top_k": top_k, "max_tokens_per_rank": tokens}
        with moecomm.Buffer(group, **shape, dtype=torch.float32) as buffer:
            out = buffer.dispatch(*inputs(group.rank))
            return out.x, buffer.combine(out.x, out.handle)

    xs, idxs, weights = map(list, zip(*map(inputs, range(size)), strict=True))
    placement = moecomm.ExpertPlacement.uniform(256, size)
    expected = reference.dispatch(xs, idxs, weights, placement=placement)
    sums = reference.combine([e.x for e in expected], expected, reduce="rank")
    for rank, (rows, y) in enumerate(results_of(simulate(step, size, seed=64))):
        assert_bitwise(rows, expected[rank].x, f"rows of rank {rank}")
        assert_bitwise(y, sums[rank], f"sums of rank {rank}")


@pytest.mark.parametrize("name", ["ragged_tokens", "odd_align", "quantised_pair", "rank_without_experts", "all_empty"])
def test_named_cases(name: str) -> None:
    demand(simulate(conform, 3, CASES[name], seed=5, faults=Faults(fragments=4, duplicate=0.3)))


SCHEDULES = st.builds(
    Faults,
    delay_s=st.sampled_from([0.0, 0.001, 1.0]),
    fragments=st.integers(1, 4),
    duplicate=st.sampled_from([0.0, 0.5]),
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, database=None)
@given(
    size=st.integers(1, 5),
    number=st.integers(0, 10**6),
    seed=st.integers(0, 10**6),
    faults=SCHEDULES,
    shape=st.sampled_from([("expert", "rank"), ("rank", "rank"), ("expert", "source")]),
)
@example(size=5, number=0, seed=0, faults=Faults(fragments=4, duplicate=1.0), shape=("expert", "rank"))
def test_any_case_on_any_schedule(size: int, number: int, seed: int, faults: Faults, shape: tuple[str, str]) -> None:
    """Hypothesis shrinks a failure to the smallest numbers, and these reproduce it."""
    demand(simulate(conform, size, random_case(number), *shape, seed=seed, faults=faults))


def steps(group: Any, rounds: int = 3) -> list[torch.Tensor]:
    """Some dispatches and combines whose sums are known: twice x, whatever the routing."""
    shape: dict[str, Any] = {"num_experts": 6, "hidden": 4, "top_k": 2, "max_tokens_per_rank": 8, "timeout_s": 30.0}
    sums = []
    with moecomm.Buffer(group, **shape, dtype=torch.float32) as buffer:
        for round in range(rounds):
            generator = torch.Generator().manual_seed(10 * round + group.rank)
            x = torch.randint(1, 50, (8, 4), generator=generator).float()
            out: Any = buffer.dispatch(x, torch.randint(0, 6, (8, 2), generator=generator))
            y = buffer.combine(out.x, out.handle)
            assert_bitwise(y, 2 * x, f"sums of round {round}")
            sums.append(y)
    return sums


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, database=None)
@given(
    size=st.integers(2, 5),
    seed=st.integers(0, 10**6),
    drop=st.sampled_from([0.0, 0.02, 0.2]),
    victims=st.dictionaries(st.integers(0, 4), st.integers(1, 60), max_size=2),
    notice_s=st.sampled_from([None, 0.001, 100.0]),
)
def test_lost_messages_and_deaths_never_give_wrong_rows_nor_hangs(
    size: int, seed: int, drop: float, victims: dict[int, int], notice_s: float | None
) -> None:
    outcomes = simulate(steps, size, seed=seed, faults=Faults(drop=drop, kills=victims, notice_s=notice_s))
    for rank, outcome in enumerate(outcomes):
        assert outcome.went_well or outcome.killed or isinstance(outcome.error, (PeerLostError, StallError)), (
            f"rank {rank}: {outcome.trace}"
        )
        assert not outcome.killed or rank in victims


def story(seed: int) -> list[str]:
    faults = Faults(drop=0.05, duplicate=0.2, fragments=3, kills={1: 40})
    return [f"{o.killed} {o.error}" for o in simulate(steps, 4, seed=seed, faults=faults)]


def test_the_same_seed_tells_the_same_story() -> None:
    assert story(7) == story(7)
    assert len({tuple(story(seed)) for seed in range(6)}) > 1


def test_the_dead_are_named_and_the_living_do_not_wait_for_the_deadline() -> None:
    outcomes = simulate(steps, 3, 50, seed=3, faults=Faults(kills={2: 70}))
    assert outcomes[2].killed
    for rank in (0, 1):
        error = outcomes[rank].error
        assert isinstance(error, PeerLostError) and error.peers == (2,) and error.rank == rank, outcomes[rank].trace


def test_what_is_lost_for_good_ends_as_a_stall_that_names_the_sender() -> None:
    (first, second) = simulate(steps, 2, seed=0, faults=Faults(drop=1.0))
    assert isinstance(first.error, StallError) and isinstance(second.error, StallError)
    assert {first.error.peers, second.error.peers} <= {(0,), (1,)} and "30.0 s" in str(first.error)


def test_a_changed_byte_is_seen_by_the_payload() -> None:
    seen = []
    for seed in range(5):
        outcomes = simulate(conform, 2, CASES["plain"], seed=seed, faults=Faults(corrupt=0.05))
        seen.append(any(not result.ok for outcome in outcomes for result in outcome.result or []))
    assert any(seen), "the payload says where every byte comes from"


def refused(call: Callable[[], Any], kind: type[MoECommError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_ranks_that_disagree_find_out() -> None:
    def disagree(group: Any) -> str:
        with moecomm.Buffer(group, num_experts=2, hidden=4, top_k=1, max_tokens_per_rank=2) as buffer:
            x, idx = torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
            return refused(lambda: buffer.dispatch(x, idx, align=1 + group.rank % 2), DesyncError)

    told = results_of(simulate(disagree, 3))
    assert "rank 1 called dispatch layout=expert align=2" in told[0] and "rank 0 called" in told[1]


def test_only_its_own_transport_works_in_a_simulated_world() -> None:
    def ask(group: Any) -> str:
        shape: dict[str, Any] = {"num_experts": 2, "hidden": 4, "top_k": 1, "max_tokens_per_rank": 2}
        with moecomm.Buffer(group, **shape) as buffer:
            assert buffer.transport == "simulated" and "2 ranks simulated" in buffer.explain()
        return refused(lambda: moecomm.Buffer(group, **shape, transport="symmetric"), ConfigError)

    assert "auto or one of ('simulated',)" in results_of(simulate(ask, 2))[0]


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    def fail(group: Any) -> None:
        raise ValueError("on purpose")

    with pytest.raises(AssertionError, match=r"(?s)simulated rank 0 of 2 failed.*on purpose"):
        results_of(simulate(fail, 2))
