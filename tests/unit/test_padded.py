"""Layout "padded" in one process: what the hot path costs, whose memory it is, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import moecomm
from moecomm.quant import QuantSpec, dequantize, error_bound, quantize
from moecomm.testing import assert_bitwise
from moecomm.transport.base import as_bytes

T, H, K, E, M = 5, 256, 2, 4, 8


def make_buffer(**changes: Any) -> moecomm.Buffer:
    given: dict[str, Any] = {
        "num_experts": E,
        "hidden": H,
        "top_k": K,
        "max_tokens_per_rank": M,
        "dtype": torch.float32,
    }
    return moecomm.Buffer(**(given | changes))


def inputs(seed: int = 0, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    idx = torch.rand(tokens, E, generator=generator).topk(K).indices
    return torch.randn(tokens, H, generator=generator), idx, torch.rand(tokens, K, generator=generator)


class Functions(TorchFunctionMode):
    """Counts every call of torch from Python, getters of attributes included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__qualname__", str(func)))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Collects operators that make tensors with memory of their own, or that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def spans(out: moecomm.Dispatched) -> Tensor:
    """The rows that arrived, in the order of layout "expert"."""
    assert out.ranges is not None
    return torch.cat([out.x[e, a:b] for e, of_rank in enumerate(out.ranges.tolist()) for a, b in of_rank])


def step(
    buffer: moecomm.Buffer, given: tuple[Tensor, Tensor, Tensor], y: Tensor, quant: str | QuantSpec | None = None
) -> None:
    out = buffer.dispatch(*given, layout="padded", quant=quant)
    buffer.combine(buffer.combine_input(out.handle), out.handle, out=y, quant=quant)


@pytest.mark.parametrize("transport", ["local", "symmetric"])
@pytest.mark.parametrize("quant", [None, "fp8", QuantSpec(scales="ue8m0"), "int8"], ids=str)
def test_torch_calls_on_the_hot_path(quant: str | QuantSpec | None, transport: str) -> None:
    """At most 25 calls from Python per operation; no operator at all, so no allocation and nothing to wait for."""
    with make_buffer(transport=transport) as buffer, torch.no_grad():
        given, y = inputs(), torch.empty(T, H)
        for _ in range(3):
            step(buffer, given, y, quant)
        with Functions() as out_calls:
            out = buffer.dispatch(*given, layout="padded", quant=quant)
        rows = buffer.combine_input(out.handle)
        with Functions() as home_calls:
            buffer.combine(rows, out.handle, out=y, quant=quant)
        assert 0 < len(out_calls.names) <= 25, out_calls.names
        assert 0 < len(home_calls.names) <= 25, home_calls.names
        with Operators() as seen:
            for _ in range(4):
                step(buffer, given, y, quant)
        assert not seen.names, seen.names
        with Operators() as seen:  # the counter counts
            buffer.combine(rows.clone(), buffer.dispatch(*given, layout="padded").handle)
        assert any("clone" in name for name in seen.names)


def test_memory_after_warm_up() -> None:
    """The same tensors again and again, two generations of them, whatever the routing."""
    with make_buffer() as buffer, torch.no_grad():
        places = set()
        for seed in range(6):
            given = inputs(seed)
            out = buffer.dispatch(*given, layout="padded")
            assert out.ranges is not None
            tensors = out.x, out.tokens_per_expert, out.ranges, out.handle.topk_idx, out.handle.places
            places.add(tuple(tensor.data_ptr() for tensor in tensors))
            buffer.combine(out.x, out.handle)
        assert len(places) == 2


def test_generations() -> None:
    """A handle lives for one dispatch more; then rows, routing and replay are refused, and nothing is sent."""
    with make_buffer() as buffer:
        first = buffer.dispatch(*inputs(0), layout="padded")
        kept = first.x.clone()
        second = buffer.dispatch(*inputs(1), layout="padded")
        assert_bitwise(first.x[0, : first.tokens_per_expert[0]], kept[0, : first.tokens_per_expert[0]], "rows")
        y = buffer.combine(kept, first.handle)
        assert y.isfinite().all()
        third = buffer.dispatch(*inputs(2), layout="padded")
        counted = buffer.stats()
        for call in (
            lambda: buffer.combine(kept, first.handle),
            lambda: buffer.dispatch(inputs(0)[0], handle=first.handle),
            lambda: buffer.combine_input(first.handle),
        ):
            with pytest.raises(moecomm.StaleHandleError, match=r"padded dispatch 0 was overwritten: .* got 2 disp"):
                call()
        assert buffer.stats()["bytes_local"] == counted["bytes_local"]
        for out in (second, third):
            buffer.combine(out.x, out.handle)


def test_a_dispatch_that_nobody_waited_for() -> None:
    with make_buffer() as buffer:
        pending = [buffer.dispatch_async(*inputs(seed), layout="padded") for seed in range(3)]
        with pytest.raises(moecomm.StaleHandleError, match=r"padded dispatch 0 was never waited for"):
            pending[0].wait()
        for seed, one in enumerate(pending[1:], 1):
            out = one.wait()
            wanted = buffer.dispatch(*inputs(seed)[:2]).x
            assert_bitwise(spans(out), wanted, f"dispatch {seed}")


def test_too_many() -> None:
    """More tokens than M, or more entries for one expert: refused before anything is sent."""
    with make_buffer() as buffer:
        x, idx, weights = inputs(tokens=M + 1)
        with pytest.raises(moecomm.CapacityError, match=r"too many tokens: got 9; expected at most"):
            buffer.dispatch(x, idx, weights, layout="padded")
        with pytest.raises(moecomm.CapacityError, match=r"topk_idx\[4, 0\] finds no slot: got more than 8 entries for"):
            buffer.dispatch(x[:M], torch.zeros(M, K, dtype=torch.int64), layout="padded")
        assert buffer.stats()["bytes_local"] == 0
        step(buffer, inputs(), torch.empty(T, H))


def test_nothing_to_send() -> None:
    with make_buffer() as buffer:
        for tokens in (0, 3, 0, 0):
            out = buffer.dispatch(*inputs(tokens=tokens), layout="padded", quant="fp8" if tokens else None)
            assert int(out.tokens_per_expert.sum()) == tokens * K
            y = buffer.combine(torch.zeros(E, M, H), out.handle, bias=torch.ones(tokens, H))
            assert_bitwise(y, torch.ones(tokens, H), "bias")


def test_bytes_of_quantised_rows() -> None:
    """FP8 moves at most 0.53 of what bfloat16 moves, and a combine in it as well."""
    moved = {}
    for quant in (None, "fp8", "logfmt10"):
        with make_buffer(hidden=7168, dtype=torch.bfloat16) as buffer:
            _, idx, weights = inputs()
            x = torch.randn(T, 7168).bfloat16()
            out = buffer.dispatch(x, idx, weights, layout="padded", quant=quant)
            sent = buffer.stats()["bytes_local"]
            buffer.combine(torch.ones(E, M, 7168, dtype=torch.bfloat16), out.handle, quant=quant)
            moved[quant] = sent, buffer.stats()["bytes_local"] - sent
    for operation in range(2):
        assert moved["fp8"][operation] <= 0.53 * moved[None][operation], moved
        assert moved["logfmt10"][operation] <= 0.65 * moved[None][operation], moved


@pytest.mark.parametrize("quant", ["fp8", "logfmt10", "int8"])
def test_error_of_a_quantised_combine(quant: str) -> None:
    """Within the sum of the bounds of the rows, each times its weight, and one rounding; on heavy-tailed rows."""
    with make_buffer(hidden=384) as buffer:
        x, idx, weights = torch.ones(T, 384), *inputs()[1:]
        out = buffer.dispatch(x, idx, weights, layout="padded")
        generator = torch.Generator().manual_seed(1)
        tails = torch.empty(E, M, 384).exponential_(generator=generator)
        rows = torch.randn(E, M, 384, generator=generator) / tails.sqrt()
        y = buffer.combine(rows, out.handle, quant=quant)
        at = out.handle.places.long()
        mine = rows.flatten(0, 1)[at].double()  # (T, K, 384)
        exact = (mine * weights.double()[..., None]).sum(1)
        bounds = error_bound(rows.flatten(0, 1)[at], quant) * weights.double()[..., None].abs()
        slack = 2.0**-20 * (mine.abs() * weights.double()[..., None].abs()).sum(1)
        error = (y.double() - exact).abs()
        assert (error <= bounds.sum(1) + slack).all(), (error / bounds.sum(1)).max()
        assert error.max() > 0.05 * bounds.sum(1).max(), "the bound says nothing"


@pytest.mark.parametrize(("quant", "hidden"), [("logfmt10", 200), ("fp8", 256), ("logfmt10", 1)])
def test_a_quantised_combine_of_rows_in_groups(quant: str, hidden: int) -> None:
    """Layout "expert" with reduce="source" gives the same bits as layout "padded", for fewer bytes."""
    with make_buffer(hidden=hidden, reduce="source") as buffer:
        x, idx, weights = torch.randn(T, hidden), *inputs()[1:]
        padded, grouped = (buffer.dispatch(x, idx, weights, layout=name) for name in ("padded", "expert"))
        y = buffer.combine(padded.x, padded.handle, quant=quant)
        moved = []
        for how in (None, quant):
            before = buffer.stats()["bytes_local"]
            got = buffer.combine(grouped.x, grouped.handle, quant=how)
            moved.append(buffer.stats()["bytes_local"] - before)
        assert_bitwise(got, y, "sums")
        assert moved[1] * x.nbytes == moved[0] * T * QuantSpec.of(quant).row_bytes(hidden)
        with pytest.raises(moecomm.UnsupportedError, match="quantised rows have no gradient"):
            buffer.combine(grouped.x.clone().requires_grad_(), grouped.handle, quant=quant)


def test_one_graph_with_the_whole_step() -> None:
    """Router, dispatch, grouped GEMM and combine compile without a graph break, and give what they give without."""
    generator = torch.Generator().manual_seed(0)
    router, weights = torch.randn(H, E, generator=generator), torch.randn(E, H, H, generator=generator) / 16
    with make_buffer() as buffer, torch.no_grad():

        def layer(x: Tensor) -> Tensor:
            scores, idx = torch.softmax(x @ router, 1).topk(K)
            out = buffer.dispatch(x, idx, scores, layout="padded")
            return buffer.combine(torch.bmm(out.x, weights), out.handle, bias=x)

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # any backend: the graph is what counts
        for seed in range(4):
            x = inputs(seed)[0]
            assert_bitwise(compiled(x), layer(x), f"step {seed}")
        torch._dynamo.reset()


FORMS = {"float32": QuantSpec(), "power_of_two": QuantSpec(scales="power_of_two"), "int8": QuantSpec(format="int8")}
FORMS["ue8m0"] = QuantSpec(scales="ue8m0")


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [1, 130, 384])
def test_machine_code_that_quantises(form: str, dtype: torch.dtype, hidden: int) -> None:
    """The bits of `moecomm.quant`, both ways: heavy tails, all exponents, NaN, infinities, zeros, subnormal numbers."""
    jit = pytest.importorskip("moecomm._quant_jit", reason="llvmlite is not installed")
    generator = torch.Generator().manual_seed(hidden)
    most = 14 if dtype == torch.float16 else 126
    octaves = torch.randint(-most, most, (40, 1), generator=generator)
    x = torch.ldexp(torch.randn(40, hidden, generator=generator) * torch.logspace(0, -3, hidden), octaves).to(dtype)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-42, torch.finfo(dtype).max)):
        x[row, row % 2 * -1] = value
        x[row + 7] = value
    codes, scales = quantize(x, FORMS[form])
    area = torch.zeros(codes.numel() + scales.numel() * scales.element_size() + 64, dtype=torch.uint8)
    offset, name = codes.numel(), str(dtype).removeprefix("torch.")
    jit.encode_kernel(name, form)(40, x.data_ptr(), hidden, area.data_ptr(), area.data_ptr() + offset)
    wanted = torch.cat([as_bytes(part).flatten() for part in (codes, scales)])
    assert_bitwise(area[: len(wanted)], wanted, "codes and scales")
    zero, areas, out = torch.zeros(1, dtype=torch.int64), torch.tensor([area.data_ptr()]), torch.zeros(40, hidden)
    places, homes = torch.arange(39, -1, -1, dtype=torch.int32), torch.zeros(40, dtype=torch.int64)
    places[3] = -1
    tables = torch.zeros(40, dtype=torch.int64), places, zero, zero, areas
    jit.decode_kernel(form)(40, *(t.data_ptr() for t in tables), offset, hidden, out.data_ptr(), homes.data_ptr())
    decoded = dequantize(codes, scales, torch.float32, hidden).flip(0)
    decoded[3] = 0.0
    assert_bitwise(out, decoded, "decoded rows")
    assert homes[3] == -1 and homes[4] == out[4].data_ptr()
