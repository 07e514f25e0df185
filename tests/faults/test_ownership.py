"""Results belong to the caller (promise 9): nothing that was handed out ever changes, however it is kept."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.testing import assert_bitwise
from tests.faults._ranks import Nursery, World, results_of
from tests.faults._scenes import TRANSPORTS, E, H, K, build, right_step, rows_for, tokens_of

ROUNDS = 24


def given_numbers(world: World, round: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `tokens_of`, but with numbers and weights whose sums need rounding."""
    generator = torch.Generator().manual_seed(1000 * round + world.rank + 77)
    num_tokens = (5, 7, 0, 8)[(world.rank + round) % 4]
    topk_idx = torch.randint(-1, E, (num_tokens, K), generator=generator)
    x = torch.randn(num_tokens, H, generator=generator)
    return x, topk_idx, torch.rand(num_tokens, K, generator=generator)


class Album:
    """Pictures of tensors, and what keeps each of them alive."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, Any, Callable[[Any], Tensor], Tensor]] = []

    def keep(self, name: str, keeper: Any, look: Callable[[Any], Tensor] = lambda keeper: keeper) -> None:
        """Keep only `keeper`; `look` gives the tensor that must not change."""
        self._kept.append((name, keeper, look, look(keeper).detach().clone()))

    def compare(self) -> int:
        """Look at all of them again."""
        for name, keeper, look, picture in self._kept:
            assert_bitwise(look(keeper).detach(), picture, name)
        return len(self._kept)


class Saved(torch.autograd.Function):
    """Keeps its input for backward and gives it back as the gradient: what autograd saved can be looked at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def saved_by_autograd(rows: Tensor) -> Tensor:
    """A scalar whose graph alone holds the rows."""
    return Saved.apply(rows.detach().requires_grad_())


def look_at_saved(loss: Tensor) -> Tensor:
    assert loss.grad_fn is not None
    return loss.grad_fn.saved_tensors[0]  # type: ignore[attr-defined]


def keep_everything(album: Album, out: Any, y: Tensor, round: int) -> None:
    """Each round keeps the rows in another way; tables and sums always."""
    keepers: list[tuple[str, Any, Callable[[Any], Tensor]]] = [
        ("tensor", out.x, lambda kept: kept),
        ("view", out.x[1:, 2:5], lambda kept: kept),
        ("detached", out.x.detach().view(-1), lambda kept: kept),
        ("bits", out.x.view(torch.int32), lambda kept: kept),
        ("split", out.x.split(2)[-1] if len(out.x) else out.x, lambda kept: kept),
        ("numpy", out.x.numpy(), torch.from_numpy),
        ("storage", out.x.untyped_storage(), lambda kept: torch.empty(0, dtype=torch.uint8).set_(kept)),
        ("autograd", saved_by_autograd(out.x), look_at_saved),
        ("dataclass", out, lambda kept: kept.x),
        ("closure", (lambda: out.x), lambda kept: kept()),
        ("alias", torch.utils.dlpack.from_dlpack(out.x), lambda kept: kept),
    ]
    name, keeper, look = keepers[round % len(keepers)]
    album.keep(f"rows of round {round} kept as {name}", keeper, look)
    album.keep(f"sums of round {round}", y)
    for field in ("expert_offsets", "tokens_per_expert", "row_weights"):
        album.keep(f"{field} of round {round}", getattr(out, field))
    for tensor in out.handle.tensors():
        album.keep(f"handle of round {round}", tensor)


def hoard(world: World, transport: str, num_segments: int) -> dict[str, float]:
    """Keep all results of many operations, more than there are segments, also past the end of the buffer."""
    album = Album()
    with build(transport, num_segments=num_segments) as buffer:
        for round in range(ROUNDS):
            out: Any = buffer.dispatch(*given_numbers(world, round))
            y = buffer.combine(out.x, out.handle, bias=torch.ones(out.handle.num_tokens, H))
            keep_everything(album, out, y, round)
            del out, y
            album.compare()
        stats = buffer.stats()
    for round in range(2):
        with build(transport, num_segments=num_segments) as other:
            right_step(other, world, round)
    del buffer, other
    gc.collect()
    assert album.compare() > 8 * ROUNDS
    return stats


@pytest.mark.parametrize(("transport", "num_segments"), [("symmetric", 2), ("symmetric", 8), ("collective", 8)])
def test_results_never_change(nursery: Nursery, transport: str, num_segments: int) -> None:
    for stats in results_of(nursery.run(hoard, 2, transport, num_segments)):
        assert stats["dispatches"] == stats["combines"] == ROUNDS
        if transport == "symmetric":
            # Of n segments one waits for the next operation and one is in use: the rest can be kept, then rows move.
            assert 0 < stats["leases"] <= num_segments - 2 or num_segments == 2
            assert stats["copies"] > 0 and stats["free_segments"] >= 1


def count_leases(world: World) -> list[list[float]]:
    """Leases are given while there are segments, copies after that; what is dropped comes back."""
    buffer = build("symmetric", num_segments=4)
    x, topk_idx = torch.ones(4, H), torch.arange(4)[:, None].expand(4, K) % E
    counted: list[list[float]] = []

    def count() -> None:
        stats = buffer.stats()
        counted.append([stats["leases"], stats["copies"], stats["free_segments"]])

    count()
    kept: list[Any] = []
    for _ in range(4):
        kept.append(buffer.dispatch(x, topk_idx).x)
        count()
    view = kept[0][1:].detach()
    kept.clear()
    count()  # the view still holds one
    del view
    count()
    buffer.dispatch(x, topk_idx)
    count()
    world.meet("counted")
    buffer.close()
    return counted


def test_stats_count_leases_and_copies(nursery: Nursery) -> None:
    for counted in results_of(nursery.run(count_leases, 2)):
        leases, copies, free = zip(*counted, strict=True)
        assert leases[:5] == (0, 1, 2, 2, 2) and leases[7] == 3, counted
        assert copies == (0, 0, 0, 1, 2, 2, 2, 2), counted
        assert free == (3, 2, 1, 1, 1, 2, 3, 3), counted


def train_deep(world: World, transport: str, num_segments: int) -> list[Tensor]:
    """Eight layers before the first backward: what autograd saved outlives many operations."""
    with build(transport, num_segments=num_segments) as buffer:
        x, topk_idx, weights = given_numbers(world, 0)
        x.requires_grad_()
        weights.requires_grad_()
        scale = torch.linspace(0.5, 1.5, H).requires_grad_()
        y = x
        for _ in range(8):
            out: Any = buffer.dispatch(y, topk_idx, weights)
            y = buffer.combine(torch.tanh(out.x * scale), out.handle) + 0.5 * y
        y.square().sum().backward()
        grads = [x.grad, weights.grad, scale.grad]
        assert all(grad is not None for grad in grads)
        return [y.detach(), *grads]  # type: ignore[list-item]


def test_gradients_do_not_depend_on_the_number_of_segments(nursery: Nursery) -> None:
    many = results_of(nursery.run(train_deep, 2, "symmetric", 32))
    for transport, num_segments in (("symmetric", 2), ("symmetric", 5), ("collective", 2)):
        for rank, tensors in enumerate(results_of(nursery.run(train_deep, 2, transport, num_segments))):
            for name, tensor, expected in zip(("y", "x", "weights", "scale"), tensors, many[rank], strict=True):
                assert_bitwise(tensor, expected, f"{name} on rank {rank}, {transport}, {num_segments} segments")


# -- several at once -------------------------------------------------------------------------------------------------


def cross(world: World, transport: str, num_segments: int) -> int:
    """Several live handles; Pending results waited for in another order than started, on each rank in its own."""
    with build(transport, num_segments=num_segments) as buffer:
        album = Album()
        handles: dict[int, Any] = {}
        for turn in range(4):
            rounds = [6 * turn + i for i in range(6)]
            pending = {round: buffer.dispatch_async(*tokens_of(world.rank, round)) for round in rounds}
            order = torch.randperm(6, generator=torch.Generator().manual_seed(turn * 10 + world.rank)).tolist()
            for i in order:
                out: Any = pending[rounds[i]].wait()
                assert out is pending[rounds[i]].wait()
                assert_bitwise(out.x, rows_for(buffer, world, rounds[i]), f"rows of round {rounds[i]}")
                album.keep(f"round {rounds[i]}", out.x)
                handles[rounds[i]] = out
            homes = {round: buffer.combine_async(handles[round].x, handles[round].handle) for round in reversed(rounds)}
            for i in order:
                x, topk_idx, _ = tokens_of(world.rank, rounds[i])
                y = homes[rounds[i]].wait()
                assert_bitwise(y, 0.5 * x * (topk_idx >= 0).sum(1, keepdim=True) + 0.0, f"sums of round {rounds[i]}")
                album.keep(f"sums {rounds[i]}", y)
        for round, out in sorted(handles.items()):  # the oldest handle is as good as the newest
            x = tokens_of(world.rank, round)[0]
            again: Any = buffer.dispatch(-x, handle=out.handle)
            assert_bitwise(again.x, -rows_for(buffer, world, round), f"replay of round {round}")
        return album.compare()


@pytest.mark.parametrize(("transport", "num_segments"), [("symmetric", 2), ("symmetric", 8), ("collective", 8)])
def test_many_under_way_and_waited_for_in_any_order(nursery: Nursery, transport: str, num_segments: int) -> None:
    assert results_of(nursery.run(cross, 3, transport, num_segments)) == [48] * 3


def drop(world: World, transport: str) -> tuple[int, float]:
    """Pending results that nobody waits for: nothing else notices, and what they held comes back."""
    with build(transport, num_segments=3) as buffer:
        kept: deque[Any] = deque(maxlen=2)
        out = right_step(buffer, world, 0)
        for round in range(1, 20):
            buffer.dispatch_async(*tokens_of(world.rank, round))
            if round % 2:
                buffer.combine_async(out.x, out.handle)
            kept.append(buffer.dispatch_async(*tokens_of(world.rank, round)))  # dropped two rounds later
            right_step(buffer, world, round)
        kept.clear()
        started = len(buffer._core.started)
        right_step(buffer, world, 3)
        right_step(buffer, world, 4)
        return started, buffer.stats().get("free_segments", 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_pending_that_is_dropped_leaves_nothing_behind(nursery: Nursery, transport: str) -> None:
    for started, free in results_of(nursery.run(drop, 3, transport)):
        assert started == 0
        assert transport != "symmetric" or free >= 1


def reuse_inputs(world: World, transport: str) -> None:
    """The caller's tensors are his own again as soon as a call returns, also an asynchronous one."""
    with build(transport, reduce="source") as buffer:
        x, topk_idx, weights = tokens_of(world.rank, 0)
        expected = 0.5 * x * (topk_idx >= 0).sum(1, keepdim=True) + 0.0
        rows = rows_for(buffer, world, 0)
        mine = [x.clone(), topk_idx.clone(), weights.clone()]
        pending = buffer.dispatch_async(*mine)
        mine[0].fill_(float("nan"))
        out: Any = pending.wait()
        for tensor in mine:
            tensor.zero_()
        assert_bitwise(out.x, rows, "rows")
        given = out.x.clone()
        home = buffer.combine_async(given, out.handle)
        given.fill_(float("nan"))
        assert_bitwise(home.wait(), expected, "sums")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_inputs_may_be_used_again(nursery: Nursery, transport: str) -> None:
    results_of(nursery.run(reuse_inputs, 3, transport))


def write_into_results(world: World) -> None:
    """What was handed out may be written to: nobody else sees it, and nothing later is disturbed."""
    with build("symmetric", num_segments=4) as buffer:
        for round in range(8):
            out: Any = buffer.dispatch(*tokens_of(world.rank, round))
            rows = out.x.clone()
            out.x.fill_(float("nan"))
            world.meet(f"filled {round}")
            y = buffer.combine(rows, out.handle)
            x, topk_idx, _ = tokens_of(world.rank, round)
            assert_bitwise(y, 0.5 * x * (topk_idx >= 0).sum(1, keepdim=True) + 0.0, f"sums of round {round}")
            assert out.x.isnan().all()
            right_step(buffer, world, round + 1)


def test_results_may_be_written_to(nursery: Nursery) -> None:
    results_of(nursery.run(write_into_results, 3))


def test_local_results_never_change() -> None:
    album = Album()
    world: Any = type("World", (), {"rank": 1, "size": 1})()
    with moecomm.Buffer(num_experts=E, hidden=H, top_k=K, max_tokens_per_rank=8, dtype=torch.float32) as buffer:
        for round in range(ROUNDS):
            out: Any = buffer.dispatch(*given_numbers(world, round))
            keep_everything(album, out, buffer.combine(out.x, out.handle), round)
            del out
    assert album.compare() > 8 * ROUNDS
