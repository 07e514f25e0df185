"""Ranks that disagree find out (promise 7): constructors field by field, each kind of operation against another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moecomm
from tests.faults._ranks import Nursery, World, results_of
from tests.faults._scenes import TRANSPORTS, Caught, H, K, build, catch, patience, right_step, tokens_of

# field -> (what the odd rank says, how it is printed, how that of the others is printed)
ODD_ARGUMENTS: dict[str, tuple[Any, str, str]] = {
    "num_experts": (12, "12", "6"),
    "hidden": (17, "17", "16"),
    "top_k": (3, "3", "2"),
    "max_tokens_per_rank": (9, "9", "8"),
    "dtype": (torch.bfloat16, "torch.bfloat16", "torch.float32"),
    "transport": ("auto", "auto", "symmetric"),
    "placement": ([[5, 4], [3, 2], [1, 0]], "ExpertPlacement.*", "ExpertPlacement.*"),
    "reduce": ("source", "source", "rank"),
    "timeout_s": (19, "19", "20.0"),
    "num_segments": (3, "3", "8"),
    "device": ("meta", "meta", "cpu"),
}


def disagree(world: World) -> list[dict[str, str]]:
    """Rank 1 differs in one field after the other; then all differ; then nobody does."""
    told = []
    for field, (odd, _, _) in ODD_ARGUMENTS.items():
        changed = {field: odd} if world.rank == 1 else {}
        caught = catch(lambda changed=changed: build(**changed))  # type: ignore[misc]
        assert caught.error.peers == ((0, 2) if world.rank == 1 else (1,)), caught.text
        told.append({field: caught.text})
    told.append({"three": catch(lambda: build(hidden=20 + world.rank)).text})
    odd_two: dict[str, Any] = {"top_k": 1, "hidden": 32} if world.rank == 2 else {}
    told.append({"two fields": catch(lambda: build(**odd_two)).text})
    wrong: dict[str, Any] = {"hidden": -1} if world.rank == 1 else {}
    told.append({"refused on one": catch(lambda: build(**wrong)).text})
    with build(timeout_s=20 if world.rank else 20.0) as buffer:
        right_step(buffer, world)
    return told


def test_constructors_that_disagree_are_reported_on_every_rank(nursery: Nursery) -> None:
    for rank, told in enumerate(results_of(nursery.run(disagree, 3))):
        texts = {name: text for entry in told for name, text in entry.items()}
        start = f"rank {rank}: Buffer\\(\\): the ranks were given different arguments: got "
        end = "; expected the same on every rank; .+"
        for field, (_, odd, others) in ODD_ARGUMENTS.items():
            pattern = f"{start}{field}: {others} on ranks \\[0, 2\\], {odd} on ranks \\[1\\]{end}"
            assert re.fullmatch(pattern, texts[field]), texts[field]
        three = "hidden: 20 on ranks \\[0\\], 21 on ranks \\[1\\], 22 on ranks \\[2\\]"
        assert re.fullmatch(start + three + end, texts["three"]), texts["three"]
        two = "hidden: 16 on ranks \\[0, 1\\], 32 on ranks \\[2\\]; top_k: 2 on ranks \\[0, 1\\], 1 on ranks \\[2\\]"
        assert re.fullmatch(start + two + end, texts["two fields"]), texts["two fields"]
        refused = "hidden is no count: got -1; expected an integer of at least 1; .+"
        if rank != 1:
            refused = f"other ranks were given arguments that are refused: got rank 1: Buffer\\(\\): {refused}"
        assert re.fullmatch(f"rank {rank}: Buffer\\(\\): {refused}", texts["refused on one"]), texts["refused on one"]


def absent(world: World) -> Caught | None:
    if world.rank == 1:
        world.wait_for("told", 0, 2)
        return None
    caught = catch(lambda: build(timeout_s=1.0))
    world.mark("told")
    return caught


def test_a_rank_that_builds_no_buffer_is_named(nursery: Nursery) -> None:
    for rank, caught in enumerate(results_of(nursery.run(absent, 3))):
        if rank != 1:
            assert isinstance(caught.error, moecomm.StallError) and caught.error.peers == (1,), caught.text
            assert re.match(rf"rank {rank}: Buffer\(\): ranks \[1\] did not arrive in time: .*timeout_s", caught.text)
            assert caught.seconds < patience(4.0)


# -- operations ------------------------------------------------------------------------------------------------------


class Step:
    """What a rank can call, on a buffer that has two handles with different routings."""

    def __init__(self, buffer: moecomm.Buffer, world: World) -> None:
        self.buffer = buffer
        self.x, self.topk_idx, self.weights = tokens_of(world.rank, 0)
        self.first: Any = right_step(buffer, world, 0)
        self.second: Any = right_step(buffer, world, 1)
        self.same_again: Any = buffer.dispatch(self.x, self.topk_idx, self.weights)
        self.bytes = self.x.to(torch.int8)

    def dispatch(self, **changed: Any) -> Any:
        good: dict[str, Any] = {"x": self.x, "topk_idx": self.topk_idx, "topk_weights": self.weights}
        return self.buffer.dispatch(**(good | changed))

    def combine(self, **changed: Any) -> Any:
        return self.buffer.combine(**({"rows": self.first.x, "handle": self.first.handle} | changed))

    def replay(self, **changed: Any) -> Any:
        return self.dispatch(**({"topk_idx": None, "topk_weights": None, "handle": self.first.handle} | changed))

    def combine_second(self) -> Any:
        return self.combine(rows=self.second.x, handle=self.second.handle)

    def replay_second(self) -> Any:
        return self.replay(x=torch.zeros(self.second.handle.num_tokens, H), handle=self.second.handle)

    def pair(self, scale_columns: int = 2, dtype: torch.dtype = torch.int8) -> Any:
        return self.dispatch(x=(self.x.to(dtype), torch.ones(len(self.x), scale_columns)))

    def backward(self, weights_need_grad: bool) -> Any:
        weights = self.weights.clone().requires_grad_(weights_need_grad)
        out: Any = self.buffer.dispatch(self.x.clone().requires_grad_(), self.topk_idx, weights)
        (out.x.sum() + out.row_weights.sum()).backward()


# name -> (what the others call, what the odd rank calls, words for both)
ODD_STEPS: dict[str, tuple[Callable[[Step], Any], Callable[[Step], Any], str, str]] = {
    "combine": (Step.dispatch, Step.combine, "dispatch layout", "combine layout"),
    "dispatch": (Step.combine, Step.dispatch, "combine layout", "dispatch layout"),
    "layout": (Step.dispatch, lambda s: s.dispatch(layout="rank"), "layout=expert", "layout=rank"),
    "align": (Step.dispatch, lambda s: s.dispatch(align=4), "align=1", "align=4"),
    "weights": (Step.dispatch, lambda s: s.dispatch(topk_weights=None), "weights=given", "weights=none"),
    "pair": (Step.dispatch, Step.pair, r"payload=float32\[16\]", r"payload=int8\[16\],float32\[2\]"),
    "pair dtype": (Step.pair, lambda s: s.pair(dtype=torch.uint8), "payload=int8", "payload=uint8"),
    "scales": (Step.pair, lambda s: s.pair(3), r"float32\[2\]", r"float32\[3\]"),
    "replay": (Step.dispatch, Step.replay, "dispatch layout", "replay"),
    "no replay": (Step.replay, Step.dispatch, "replay", "dispatch layout"),
    "replay of another handle": (Step.replay, Step.replay_second, "routing=", "routing="),
    "weighted": (Step.combine, lambda s: s.combine(weighted=False), "weighted=True", "weighted=False"),
    "another handle": (
        Step.combine,
        lambda s: s.combine(rows=s.second.x, handle=s.second.handle),
        "routing",
        "routing",
    ),
    "async": (lambda s: s.buffer.dispatch_async(s.x, s.topk_idx).wait(), Step.combine, "dispatch", "combine"),
    "skipped dispatch": (lambda s: (s.dispatch(), s.combine()), Step.combine, "dispatch", "combine"),
    "skipped combine": (lambda s: (s.combine(), s.dispatch()), Step.dispatch, "combine", "dispatch"),
    "gradient": (lambda s: s.backward(True), lambda s: s.backward(False), r"carries=rows\+weights", "carries=rows"),
}


def go_astray(world: World, transport: str, odd_rank: int) -> dict[str, Caught]:
    """In each turn one rank calls something else; the next turn has a new buffer."""
    caught = {}
    for name, (usual, odd, _, _) in ODD_STEPS.items():
        buffer = build(transport)
        step = Step(buffer, world)
        call = odd if world.rank == odd_rank else usual
        caught[name] = catch(lambda call=call, step=step: call(step), buffer=buffer)  # type: ignore[misc]
        world.meet(f"caught {name}")
        buffer.close()
    with build(transport) as buffer:
        right_step(buffer, world)
    return caught


@pytest.mark.parametrize(("size", "odd_rank"), [(3, 1), (2, 0)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_calls_something_else_is_named(nursery: Nursery, transport: str, size: int, odd_rank: int) -> None:
    caught = results_of(nursery.run(go_astray, size, transport, odd_rank, timeout_s=90.0))
    for name, (_, _, usual, odd) in ODD_STEPS.items():
        for rank, of_rank in enumerate(caught):
            this: Caught = of_rank[name]
            assert isinstance(this.error, moecomm.DesyncError), f"{name}: {this.text}"
            assert this.error.operation in ("dispatch", "combine") and this.error.rank == rank
            assert "the ranks do not do the same" in this.text and "call the same operations" in this.text
            if rank == odd_rank:
                assert re.search(f"rank [0-2] called .*{usual}.*this rank called .*{odd}", this.text), (
                    f"{name}: {this.text}"
                )
                assert set(this.error.peers) <= set(range(size)) - {rank} and this.error.peers
            else:
                assert re.search(f"rank {odd_rank} called .*{odd}.*this rank called .*{usual}", this.text), (
                    f"{name}: {this.text}"
                )
                assert this.error.peers == (odd_rank,), f"{name}: {this.text}"
            assert this.seconds < patience(5.0), f"{name}: {this.seconds} s"
            assert this.afterwards is not None and "failed earlier and cannot go on" in str(this.afterwards)


# -- a refused call is no disagreement -------------------------------------------------------------------------------


def refuse_then_go_on(world: World, transport: str) -> int:
    """Rank 1 calls wrongly before every right call; the others notice nothing."""
    with build(transport) as buffer:
        for round in range(4):
            x, topk_idx, _ = tokens_of(world.rank, round)
            wrong: list[Callable[[], Any]] = [
                lambda x=x, i=topk_idx: buffer.dispatch(x.half(), i),  # type: ignore[misc]
                lambda x=x, i=topk_idx: buffer.dispatch(x, i[:, :1]),  # type: ignore[misc]
                lambda i=topk_idx: buffer.dispatch_async(torch.zeros(9, H), i),  # type: ignore[misc]
                lambda x=x, i=topk_idx: buffer.dispatch(x.half(), i, layout="padded"),  # type: ignore[misc]
                lambda: buffer.dispatch(torch.zeros(1, H), torch.full((1, K), 6)),
                lambda: buffer.dispatch(torch.zeros(1, H), torch.full((1, K), -2)),
                lambda: buffer.combine(torch.zeros(1, H), "handle"),  # type: ignore[arg-type]
            ]
            if world.rank == 1:
                assert [catch(call).error.rank for call in wrong] == [1] * len(wrong)
            out = right_step(buffer, world, round)
            if world.rank == 1:
                assert catch(lambda out=out: buffer.combine(out.x.half(), out.handle)).error.rank == 1  # type: ignore[misc]
        return int(buffer.stats()["dispatches"])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_call_refused_on_one_rank_disturbs_nobody(nursery: Nursery, transport: str, size: int) -> None:
    assert results_of(nursery.run(refuse_then_go_on, size, transport)) == [4] * size
