"""Layout "padded" by kernels: two launches per operation, no host, no memory, graphs, and what is found wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import moecomm
from moecomm.errors import MoECommError, StaleHandleError, StallError, UnsupportedError
from moecomm.testing import CASES, RankPool, assert_bitwise
from moecomm.testing.conformance import ConformanceResult, run_conformance
from tests.conformance.test_conformance import demand
from tests.kernels.prepared import INTERPRETED, PRELOAD, prepare
from tests.kernels.test_conformance import DEADLINE_S
from tests.kernels.test_static import build, inputs, without_host

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.timeout(DEADLINE_S + 30)

VIEWS = ("view", "slice", "alias", "_unsafe_view", "detach", "select")
LAUNCHES = (["_padded_send_kernel", "_padded_receive_kernel"], ["_padded_return_kernel", "_padded_sum_kernel"])


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with RankPool(2, env=INTERPRETED, timeout_s=DEADLINE_S, preload=PRELOAD) as pool:
        yield pool


def conform(rank: int, name: str, rounds: int) -> list[ConformanceResult]:
    prepare()
    given: dict[str, Any] = {"rounds": rounds, "layouts": ["padded"], "reduces": ["rank"], "timeout_s": DEADLINE_S}
    return run_conformance(None, "symmetric", [CASES[name]], **given)


@pytest.mark.parametrize(("name", "rounds"), [("masked", 2), ("duplicate_expert", 1), ("quantised_pair", 1)])
def test_two_ranks_against_the_oracle(pair: RankPool, name: str, rounds: int) -> None:
    demand(pair.run(conform, name, rounds), 2, 1)


@pytest.mark.parametrize(("world_size", "name", "rounds"), [(1, "tiny_hidden", 7), (4, "ragged_tokens", 2)])
def test_other_sizes_against_the_oracle(world_size: int, name: str, rounds: int) -> None:
    with RankPool(world_size, env=INTERPRETED, timeout_s=DEADLINE_S, preload=PRELOAD) as pool:
        demand(pool.run(conform, name, rounds), world_size, 1)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects operators of torch that are more than another view of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def noted_launches(run: bool = True) -> Iterator[list[Any]]:
    """Note what is launched, and run it or not; torch does not see what the interpreter does."""
    from moecomm.kernels import _launch

    noted: list[Any] = []

    def launched(kernel: Any, grid: Any, *args: Any, num_warps: int = 4, **constexprs: Any) -> None:
        noted.append(_launch.Launch(kernel, grid, args, constexprs, num_warps))
        if run:
            replay(noted[-1:])

    with pytest.MonkeyPatch.context() as patch:
        for module in ("padded", "padded_home", "sync"):
            __import__(f"moecomm.kernels.{module}")
            patch.setattr(f"moecomm.kernels.{module}.launch", launched)
        yield noted


def replay(steps: list[Any]) -> None:
    """Run launches, and whatever was put between them, as a CUDA graph would."""
    with torch.utils._python_dispatch._disable_current_modes():
        for step in steps:
            if callable(step):
                step()
            else:
                options = {"num_warps": step.num_warps, "enable_fp_fusion": False}
                step.kernel[step.grid](*step.args, **step.constexprs, **options)


def hot_path(rank: int, quant: str | None) -> list[tuple[list[str], list[str]]]:
    """Launches and operators of a dispatch and a combine, once everything is warm; nothing may ask the host."""
    prepare()
    found = []
    with build() as buffer, torch.no_grad():
        given, y = inputs(rank, 0), torch.empty(len(inputs(rank, 0)[0]), 6)

        def step() -> None:
            out = buffer.dispatch(*given, layout="padded", quant=quant)
            rows = buffer.combine_input(out.handle)
            buffer.combine(rows, out.handle, out=y, quant=quant)

        for _ in range(2):
            step()
        with pytest.MonkeyPatch.context() as patch, noted_launches() as noted, Operators() as seen:
            patch.setattr(buffer._core.padded.mover, "_check_waits", lambda _: None)  # which a GPU does not do
            patch.setattr(buffer._core.transport, "read", lambda _: pytest.fail("the host reads"))
            for _ in range(2):
                out = buffer.dispatch(*given, layout="padded", quant=quant)
                found.append(([launch.kernel.fn.__name__ for launch in noted], list(seen.names)))
                noted.clear()
                buffer.combine(buffer.combine_input(out.handle), out.handle, out=y, quant=quant)
                found.append(([launch.kernel.fn.__name__ for launch in noted], list(seen.names)))
                noted.clear()
        without_host(buffer, lambda: None)
    return found


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_two_launches_no_host_and_no_memory(pair: RankPool, quant: str | None) -> None:
    for found in pair.run(hot_path, quant):
        assert [launches for launches, _ in found] == [*LAUNCHES, *LAUNCHES]
        assert [names for _, names in found] == [[]] * 4


def receive_hook(rank: int) -> list[str]:
    """`dispatch_async` sends, and `wait` receives: two may be under way, and are waited for in any order."""
    prepare()
    with build() as buffer, build() as exact, noted_launches() as noted:
        sent = [inputs(rank, round) for round in range(2)]
        pending = [buffer.dispatch_async(*given, layout="padded") for given in sent]
        names = [launch.kernel.fn.__name__ for launch in noted]
        outs = [one.wait() for one in reversed(pending)][::-1]
        for given, out in zip(sent, outs, strict=True):
            y = buffer.combine(out.x, out.handle)
            wanted = exact.dispatch(*given)
            assert out.ranges is not None
            rows = [out.x[e, a:b] for e, of_rank in enumerate(out.ranges.tolist()) for a, b in of_rank]
            assert_bitwise(torch.cat(rows), wanted.x, "rows")
            assert y.isfinite().all()
        return names


def test_between_send_and_receive_nothing_runs(pair: RankPool) -> None:
    assert pair.run(receive_hook) == [["_padded_send_kernel"] * 2] * 2


def captured(rank: int) -> str:
    """A step is noted once and run again and again, as in a CUDA graph; then handles from outside of it are used."""
    prepare()
    with build() as buffer, build(reduce="source") as exact, torch.no_grad():
        x, ids, weights = inputs(rank, 0)
        y = torch.empty_like(x)
        warm = buffer.dispatch(x, ids, weights, layout="padded")
        buffer.combine(warm.x, warm.handle, out=y)
        with noted_launches(run=False) as steps:  # one dispatch: every replay uses the same generation
            out = buffer.dispatch(x, ids, weights, layout="padded")
            home = buffer.combine_input(out.handle)
            steps.append(lambda: torch.mul(out.x, 3, out=home))
            buffer.combine(home, out.handle, out=y)
        for round in range(5):
            for kept, fresh in zip((x, ids, weights), inputs(rank + 2 * round, 0), strict=True):
                kept.copy_(fresh)
            if round == 2 or (round == 1 and rank == 0):
                ids.fill_(-1)  # an empty batch on all ranks, or on one
            replay(steps)
            wanted = exact.dispatch(x, ids, weights)
            assert_bitwise(out.expert_counts_L, wanted.tokens_per_expert, f"counts of replay {round}")
            assert_bitwise(y, exact.combine(wanted.x * 3, wanted.handle), f"sums of replay {round}")
        return _strangers(buffer, steps, (x, ids, weights))


def _strangers(buffer: moecomm.Buffer, steps: list[Any], given: tuple[Tensor, Tensor, Tensor]) -> str:
    """A handle whose rows a replay overwrote, and a replay over rows that are in use: told, and nothing is mixed up."""
    told: list[str] = []
    for _ in range(2):
        mine = buffer.dispatch(*given, layout="padded")  # the second one lies where the graph's lies
        y = buffer.combine(mine.x, mine.handle)
    replay(steps)
    again = buffer.combine(mine.x, mine.handle)
    assert again.isnan().all() and y.isfinite().all(), "sums of other rows"
    _expect(told, StaleHandleError, buffer.synchronize)
    assert_bitwise(buffer.combine(*_made(buffer, given)), y, "the buffer goes on")
    for _ in range(2):
        mine = buffer.dispatch(*given, layout="padded")
    kept = mine.x.clone()
    replay(steps)
    assert_bitwise(mine.x, kept, "rows in use")
    _expect(told, UnsupportedError, buffer.synchronize)
    _expect(told, UnsupportedError, lambda: buffer.combine(mine.x, mine.handle))
    return "; ".join(told)


def _made(buffer: moecomm.Buffer, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Any]:
    out = buffer.dispatch(*given, layout="padded")
    return out.x, out.handle


def _expect(told: list[str], kind: type[MoECommError], call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    told.append(str(caught.value))


def test_a_graph_with_changing_routings(pair: RankPool) -> None:
    for message in pair.run(captured):
        assert "was overwritten: its sums are NaN" in message and "was never combined" in message
        assert "this buffer failed earlier" in message


def skip_a_step(rank: int) -> tuple[str, tuple[int, ...]]:
    prepare()
    buffer = build(timeout_s=0.3)
    given = inputs(rank, 0)
    out = buffer.dispatch(*given, layout="padded")
    buffer.combine(out.x, out.handle)
    told: tuple[str, tuple[int, ...]] = "", ()
    if rank == 0:
        with pytest.raises(StallError) as caught:
            buffer.dispatch(*given, layout="padded")
        told = str(caught.value), caught.value.peers
    torch.distributed.barrier()
    buffer.close()
    return told


def test_a_rank_that_skips_a_step_is_named(pair: RankPool) -> None:
    (message, peers), _ = pair.run(skip_a_step)
    assert peers == (1,) and "rank 1" in message and "dispatch" in message


def copies(rank: int) -> str:
    prepare()
    with build(engine="copy") as buffer, pytest.raises(UnsupportedError) as caught:
        buffer.dispatch(*inputs(rank, 0), layout="padded")
    return str(caught.value)


def test_copy_engines_refuse_it(pair: RankPool) -> None:
    assert all('engine="copy"' in message for message in pair.run(copies))
