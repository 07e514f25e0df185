"""Bad input is refused with an error that says what was got, what was expected, the remedy and the rank.

One rank; every wrong argument of every call. After each refused call the same buffer dispatches and combines as
before, bit for bit. What several ranks do about a wrong argument is in tests/faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moecomm
from moecomm import errors
from moecomm.testing import assert_bitwise

T, K, H, E, M = 5, 2, 8, 4, 6
TOPK_IDX = torch.tensor([[0, 3], [1, 2], [-1, 2], [3, 3], [-1, -1]])
EXPERT_ORDER = [0, 1, 1, 2, 0, 3, 3]  # token of every row that arrives, by (expert, token, k)


@dataclass(frozen=True)
class Given:
    """One buffer of each kind, and good arguments for it."""

    buffer: moecomm.Buffer
    source: moecomm.Buffer
    fp8: moecomm.Buffer
    foreign: moecomm.Buffer
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    out: Any
    out_rank: Any

    def dispatch(self, **changed: Any) -> Any:
        """A dispatch that is right but for what is changed."""
        good: dict[str, Any] = {"x": self.x, "topk_idx": self.topk_idx, "topk_weights": self.topk_weights}
        return self.buffer.dispatch(**(good | changed))

    def replay(self, **changed: Any) -> Any:
        return self.buffer.dispatch(**({"x": self.x, "handle": self.out.handle} | changed))

    def combine(self, **changed: Any) -> Any:
        return self.buffer.combine(**({"rows": self.out.x, "handle": self.out.handle} | changed))


def make(reduce: str = "rank", dtype: torch.dtype = torch.float32, **changed: Any) -> moecomm.Buffer:
    good: dict[str, Any] = {
        "num_experts": E,
        "hidden": H,
        "top_k": K,
        "max_tokens_per_rank": M,
        "dtype": dtype,
        "reduce": reduce,
    }
    return moecomm.Buffer(**(good | changed))


@pytest.fixture(scope="module")
def given() -> Iterator[Given]:
    """One for all tests: each must leave the buffers as it found them."""
    x = torch.arange(T * H, dtype=torch.float32).view(T, H)
    weights = torch.full((T, K), 0.5)
    with make() as buffer, make("source") as source, make(dtype=torch.float8_e4m3fn) as fp8, make() as foreign:
        out: Any = buffer.dispatch(x, TOPK_IDX, weights)
        yield Given(
            buffer=buffer,
            source=source,
            fp8=fp8,
            foreign=foreign,
            x=x,
            topk_idx=TOPK_IDX,
            topk_weights=weights,
            out=out,
            out_rank=buffer.dispatch(x, TOPK_IDX, weights, layout="rank"),
        )


def assert_works(buffer: moecomm.Buffer) -> None:
    """Dispatch and combine new rows in every way; halves and small integers make every sum exact."""
    x = torch.randint(-64, 64, (T, H)).to(torch.float32)
    expected = x * 0.5 * (TOPK_IDX >= 0).sum(1, keepdim=True)
    out: Any = buffer.dispatch(x, TOPK_IDX, torch.full((T, K), 0.5))
    assert_bitwise(out.x, x[EXPERT_ORDER], "dispatched rows")
    assert_bitwise(buffer.combine(out.x, out.handle), expected + 0.0, "combined rows")
    replayed: Any = buffer.dispatch_async(-x, handle=out.handle).wait()
    assert_bitwise(replayed.x, -x[EXPERT_ORDER], "replayed rows")


@dataclass(frozen=True)
class Refusal:
    """A wrong call: what it raises, and the whole message after the rank, as a regular expression."""

    name: str
    call: Callable[[Given], Any]
    kind: type[moecomm.MoECommError]
    what: str
    got: str
    expected: str
    remedy: str = ".{8,}"

    def check(self, error: moecomm.MoECommError, rank: int = 0) -> None:
        assert type(error) is self.kind, f"{type(error).__name__} instead of {self.kind.__name__}: {error}"
        pattern = f"rank {rank}: {self.what}: got {self.got}; expected {self.expected}; {self.remedy}"
        assert re.fullmatch(pattern, str(error)), f"\n{error}\ndoes not match\n{pattern}"
        assert error.rank == rank and error.remedy


def tensor_refusals(
    argument: str,
    call: Callable[[Given, Any], Any],
    good: Callable[[Given], Tensor],
    *,
    kind: type[moecomm.MoECommError] = errors.ConfigError,
    wrong_dtypes: tuple[torch.dtype, ...],
    dtypes: str,
) -> list[Refusal]:
    """What every tensor argument has in common: no tensor, wrong shapes, wrong dtypes, wrong device, sparse."""
    name = re.escape(argument)

    def refusal(label: str, change: Callable[[Tensor], Any], what: str, got: str, expected: str) -> Refusal:
        return Refusal(f"{argument} {label}", lambda g: call(g, change(good(g))), kind, f"{name} {what}", got, expected)

    shape, tensor = r"\((\d+, )*(\d+,?)?\)", r"a torch\.Tensor"
    wanted = r"\((any|\d+), \d+\)"
    refusals = [
        refusal("no tensor", lambda t: t.tolist() if argument != "x" else "x", "is no tensor", "(list|str)", tensor),
        refusal("numpy", lambda t: np.zeros(tuple(t.shape), np.float32), "is no tensor", "ndarray", tensor),
        refusal("flat", lambda t: t.flatten(), "has the wrong shape", shape, wanted),
        refusal("one axis more", lambda t: t[None], "has the wrong shape", shape, wanted),
        refusal("scalar", lambda t: t.flatten()[0], "has the wrong shape", r"\(\)", wanted),
        refusal("one column more", lambda t: torch.cat([t, t[:, :1]], 1), "has the wrong shape", shape, wanted),
        refusal("one column less", lambda t: t[:, 1:], "has the wrong shape", shape, wanted),
        refusal("no columns", lambda t: t[:, :0], "has the wrong shape", shape, wanted),
        refusal("elsewhere", lambda t: t.to("meta"), "is in the wrong place", "a .* on meta", "a torch.strided .*cpu"),
        refusal("sparse", lambda t: t.to_sparse(), "is in the wrong place", "a torch.sparse.*", "a torch.strided .*"),
    ]
    if argument != "x":
        refusals += [
            refusal("one row more", lambda t: torch.cat([t, t[:1]]), "has the wrong shape", shape, wanted),
            refusal("one row less", lambda t: t[1:], "has the wrong shape", shape, wanted),
            refusal("empty", lambda t: t[:0], "has the wrong shape", shape, wanted),
        ]
    for dtype in wrong_dtypes:
        convert = partial(Tensor.to, dtype=dtype)
        refusals.append(refusal(str(dtype), convert, "has the wrong dtype", re.escape(str(dtype)), dtypes))
    return refusals


def wrong_id(value: int, where: tuple[int, int], dtype: torch.dtype = torch.int64) -> Callable[[Given], Any]:
    def call(given: Given) -> Any:
        topk_idx = given.topk_idx.to(dtype).clone()
        topk_idx[where] = value
        return given.dispatch(topk_idx=topk_idx)

    return call


FLOAT: dict[str, Any] = {
    "wrong_dtypes": (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool),
    "dtypes": "torch.float32",
}
IDS: dict[str, Any] = {
    "wrong_dtypes": (torch.int16, torch.uint8, torch.float32, torch.bool),
    "dtypes": "torch.int32 or torch.int64",
}
C, R, CAPACITY = errors.ConfigError, errors.RoutingError, errors.CapacityError
UNSUPPORTED, STALE = errors.UnsupportedError, errors.StaleHandleError
ID_RANGE = "0 to 3, or -1 for none"

REFUSALS = [
    # x
    *tensor_refusals("x", lambda g, bad: g.dispatch(x=bad), lambda g: g.x, **FLOAT),
    *tensor_refusals("x", lambda g, bad: g.replay(x=bad), lambda g: g.x, **FLOAT),
    Refusal("x None", lambda g: g.dispatch(x=None), C, "x is no tensor", "NoneType", r"a torch\.Tensor"),
    Refusal(
        "too many tokens",
        lambda g: g.dispatch(x=torch.zeros(M + 1, H), topk_idx=torch.zeros(M + 1, K).long(), topk_weights=None),
        CAPACITY,
        "too many tokens",
        "7",
        "at most max_tokens_per_rank=6",
        ".*split the batch",
    ),
    Refusal("more rows than ids", lambda g: g.dispatch(x=g.x[1:]), R, "topk_idx has .*", r"\(5, 2\)", r"\(4, 2\)"),
    # a (rows, scales) pair
    Refusal("single", lambda g: g.dispatch(x=(g.x,)), C, r"x is no \(rows, scales\) pair", "1 items", "2 items"),
    Refusal("triple", lambda g: g.dispatch(x=(g.x,) * 3), C, r"x is no \(rows, scales\) pair", "3 items", "2 items"),
    Refusal("pair of None", lambda g: g.dispatch(x=(g.x, None)), C, r"x\[1\] is no tensor", "NoneType", ".*Tensor"),
    Refusal(
        "pair rows", lambda g: g.dispatch(x=(g.x[:, 1:], g.x)), C, r"x\[0\] has .*shape", r"\(5, 7\)", r"\(any, 8\)"
    ),
    Refusal(
        "pair scales",
        lambda g: g.dispatch(x=(g.x.half(), g.x[1:, 0])),
        C,
        r"x\[1\] has the wrong shape",
        r"\(4,\)",
        r"\(5, \.\.\.\)",
    ),
    Refusal(
        "pair scalar scales",
        lambda g: g.dispatch(x=(g.x.half(), g.x[0, 0])),
        C,
        r"x\[1\] has the wrong shape",
        r"\(\)",
        r"\(5, \.\.\.\)",
    ),
    Refusal(
        "pair elsewhere",
        lambda g: g.dispatch(x=(g.x.half(), g.x[:, :1].to("meta"))),
        C,
        r"x\[1\] is in the wrong place",
        "a .* on meta",
        ".*cpu",
    ),
    Refusal(
        "pair too long",
        lambda g: g.dispatch(x=(g.x, g.x[:, :1])),
        CAPACITY,
        r"a row of the \(rows, scales\) pair is too long",
        "36 bytes",
        "at most 32",
        ".*more beside_bytes",
    ),
    Refusal(
        "pair with gradient",
        lambda g: g.dispatch(x=(g.x.half().requires_grad_(), g.x[:, :1])),
        UNSUPPORTED,
        r"a \(rows, scales\) pair has no gradient",
        "one that requires grad",
        "one that does not",
        ".*detach.*",
    ),
    # topk_idx and topk_weights
    *tensor_refusals("topk_idx", lambda g, bad: g.dispatch(topk_idx=bad), lambda g: g.topk_idx, kind=R, **IDS),
    Refusal("no topk_idx", lambda g: g.buffer.dispatch(g.x), R, "topk_idx is no tensor", "NoneType", ".*Tensor"),
    Refusal("id E", wrong_id(E, (2, 1)), R, r"topk_idx\[2, 1\] names no expert", "4", ID_RANGE),
    Refusal("id -2", wrong_id(-2, (4, 0)), R, r"topk_idx\[4, 0\] names no expert", "-2", ID_RANGE),
    Refusal("id 2**40", wrong_id(2**40, (0, 0)), R, r"topk_idx\[0, 0\] names no expert", str(2**40), ID_RANGE),
    Refusal("id -2**63", wrong_id(-(2**63), (0, 0)), R, r"topk_idx\[0, 0\] names.*", str(-(2**63)), ID_RANGE),
    Refusal("int32 id", wrong_id(2**31 - 1, (1, 0), torch.int32), R, r"topk_idx\[1, 0\].*", str(2**31 - 1), ID_RANGE),
    *tensor_refusals("topk_weights", lambda g, bad: g.dispatch(topk_weights=bad), lambda g: g.topk_weights, **FLOAT),
    *tensor_refusals("topk_weights", lambda g, bad: g.replay(topk_weights=bad), lambda g: g.topk_weights, **FLOAT),
    # layout, align, quant
    Refusal("layout", lambda g: g.dispatch(layout="experts"), C, "layout is unknown", "'experts'", "one of .*rank.*"),
    Refusal("layout None", lambda g: g.dispatch(layout=None), C, "layout is unknown", "None", "one of .*expert.*"),
    Refusal("layout list", lambda g: g.dispatch(layout=["rank"]), C, "layout is unknown", ".*", "one of .*expert.*"),
    Refusal(
        "align in padded",
        lambda g: g.dispatch(layout="padded", align=8),
        UNSUPPORTED,
        ".*no groups.*",
        "align=8",
        "align=1",
    ),
    Refusal(
        "padded gradient",
        lambda g: g.dispatch(x=g.x.clone().requires_grad_(), layout="padded"),
        UNSUPPORTED,
        'layout "padded" has no gradient',
        ".* requires grad",
        "none",
    ),
    Refusal(
        "padded id",
        lambda g: g.dispatch(topk_idx=g.topk_idx + E, layout="padded"),
        R,
        ".*names no expert",
        ".*",
        ID_RANGE,
    ),
    Refusal(
        "padded x", lambda g: g.dispatch(x=g.x.half(), layout="padded"), C, "x has the wrong dtype", ".*16", ".*32"
    ),
    Refusal(
        "padded replay of another layout",
        lambda g: g.replay(layout="padded"),
        C,
        'layout "padded" replays handles of its own',
        "DispatchHandle",
        "a PaddedHandle",
    ),
    Refusal(
        "rank and source",
        lambda g: g.source.dispatch(g.x, g.topk_idx, layout="rank"),
        UNSUPPORTED,
        '.*reduce="source" rules out',
        "'rank'",
        'layout "expert"',
        '.*reduce="rank".*',
    ),
    *(
        Refusal(
            f"align {bad!r}",
            partial(Given.dispatch, align=bad),
            C,
            "align is no count",
            ".*",
            ".* from 1 to 256, or a negative one",
        )
        for bad in (0, 1.5, 8.0, True, "8", None)
    ),
    Refusal("align 257", lambda g: g.dispatch(align=257), UNSUPPORTED, "align is too large", "257", "at most 256"),
    Refusal(
        "align in rank",
        lambda g: g.dispatch(layout="rank", align=8),
        UNSUPPORTED,
        ".*no groups.*",
        "align=8",
        "align=1",
    ),
    Refusal("quant", lambda g: g.dispatch(quant="fp4"), C, "no such format.*", "'fp4'", "one of .*"),
    Refusal(
        "gradient through quant",
        lambda g: g.dispatch(x=g.x.clone().requires_grad_(), quant="fp8"),
        UNSUPPORTED,
        "quantised rows have no gradient",
        ".* requires grad",
        "none",
    ),
    Refusal("out", lambda g: g.dispatch(out=g.x), UNSUPPORTED, 'out is for layout "padded".*', "a Tensor", "None"),
    Refusal(
        "quant home",
        lambda g: g.combine(quant="fp8"),
        UNSUPPORTED,
        "quant is for rows that go home one by one",
        "layout 'expert', reduce='rank'",
        '.*reduce="source".*',
    ),
    # replay
    Refusal("handle type", lambda g: g.replay(handle=g.out), C, "handle is no DispatchHandle", "Dispatched", ".*"),
    Refusal(
        "foreign handle",
        lambda g: g.foreign.dispatch(g.x, handle=g.out.handle),
        STALE,
        "the handle belongs to another buffer",
        "a handle of buffer [0-9a-f]+",
        "one of buffer [0-9a-f]+",
    ),
    Refusal(
        "handle and ids", lambda g: g.replay(topk_idx=g.topk_idx), C, "a handle replays.*", "topk_idx too", ".*alone"
    ),
    Refusal("fewer tokens", lambda g: g.replay(x=g.x[1:]), C, "x does not fit the handle", "4 tokens", "5 tokens"),
    Refusal("other layout", lambda g: g.replay(layout="rank"), C, ".* its own layout", "'rank'", "'expert'"),
    Refusal("other align", lambda g: g.replay(align=4), C, "a handle replays its own align", "4", "1"),
    # combine
    *tensor_refusals("rows", lambda g, bad: g.combine(rows=bad), lambda g: g.out.x, **FLOAT),
    *tensor_refusals("bias", lambda g, bad: g.combine(bias=bad), lambda g: g.x, **FLOAT),
    Refusal("rows None", lambda g: g.combine(rows=None), C, "rows is no tensor", "NoneType", ".*Tensor"),
    Refusal("no handle", lambda g: g.combine(handle=None), C, "handle is no DispatchHandle", "NoneType", ".*"),
    Refusal("a tuple", lambda g: g.combine(handle=(1, 2)), C, "handle is no DispatchHandle", "tuple", ".*"),
    Refusal(
        "foreign combine",
        lambda g: g.foreign.combine(g.out.x, g.out.handle),
        STALE,
        "the handle belongs to another buffer",
        "a handle of buffer [0-9a-f]+",
        "one of buffer [0-9a-f]+",
    ),
    Refusal("weighted 1", lambda g: g.combine(weighted=1), C, "weighted is no truth value", "1", "True, False or None"),
    Refusal(
        "weighted in rank",
        lambda g: g.combine(rows=g.out_rank.x, handle=g.out_rank.handle, weighted=True),
        UNSUPPORTED,
        'rows of layout "rank" .*',
        "weighted=True",
        "False or None",
        ".*topk_weights.*",
    ),
    Refusal(
        "rows of the other layout",
        lambda g: g.combine(handle=g.out_rank.handle),
        C,
        "rows has the wrong shape",
        r"\(7, 8\)",
        r"\(4, 8\)",
    ),
    Refusal(
        "combine in fp8",
        lambda g: g.fp8.combine(g.x, g.fp8.dispatch(g.x.to(torch.float8_e4m3fn), g.topk_idx).handle),
        UNSUPPORTED,
        "rows of this dtype cannot be summed",
        "a buffer of torch.float8_e4m3fn",
        "float32, float16 or bfloat16",
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_a_wrong_call_is_refused_and_the_buffer_works_on(given: Given, refusal: Refusal) -> None:
    counted = str(given.buffer.stats())
    with pytest.raises(moecomm.MoECommError) as caught:
        refusal.call(given)
    refusal.check(caught.value)
    assert str(given.buffer.stats()) == counted, "a refused call must not count, send or wait"
    for buffer in (given.buffer, given.source, given.foreign):
        assert_works(buffer)
    assert_bitwise(given.out.x, given.x[EXPERT_ORDER], "what was handed out before")


@pytest.mark.parametrize("operation", ["dispatch_async", "combine_async"])
def test_the_async_twin_refuses_at_once(given: Given, operation: str) -> None:
    good: dict[str, Any] = {"x": given.x, "topk_idx": given.topk_idx}
    wrong = good | {"x": given.x.half()}
    if operation == "combine_async":
        wrong = {"rows": given.out.x.half(), "handle": given.out.handle}
    with pytest.raises(moecomm.ConfigError, match=r"rank 0: (x|rows) has the wrong dtype: got torch.float16; "):
        getattr(given.buffer, operation)(**wrong)
    assert_works(given.buffer)


def test_a_refusal_leaves_what_is_under_way_alone(given: Given) -> None:
    pending = given.buffer.dispatch_async(given.x, given.topk_idx)
    with pytest.raises(moecomm.RoutingError):
        given.dispatch(topk_idx=given.topk_idx + 9)
    out: Any = pending.wait()
    assert_bitwise(out.x, given.x[EXPERT_ORDER], "the dispatch that was under way")


def test_a_handle_of_another_process_is_nobodys(given: Given) -> None:
    stranger = replace(given.out.handle, buffer_id=0)
    with pytest.raises(moecomm.StaleHandleError, match="belongs to another buffer"):
        given.combine(handle=stranger)
    assert given.out.handle.buffer_id > 1 << 20, "ids must not begin at the same number in every process"


# -- unusual, but right ----------------------------------------------------------------------------------------------


def test_a_replay_may_say_what_its_handle_says(given: Given) -> None:
    aligned = given.dispatch(align=4)
    assert_bitwise(given.replay(handle=aligned.handle, align=4, layout="expert").x, aligned.x, "aligned replay")
    by_rank = given.replay(handle=given.out_rank.handle, layout="rank")
    assert_bitwise(by_rank.x, given.out_rank.x, "replay in layout rank")
