"""Buffer() refuses wrong arguments, a closed buffer refuses everything; each message says what and what to do.

What several ranks do when their arguments differ is in tests/faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import moecomm
from moecomm import errors
from moecomm.testing import assert_bitwise

T, K, H, E, M = 5, 2, 8, 4, 6
TOPK_IDX = torch.tensor([[0, 3], [1, 2], [-1, 2], [3, 3], [-1, -1]])
EXPERT_ORDER = [0, 1, 1, 2, 0, 3, 3]  # token of every row that arrives, by (expert, token, k)


def make(**changed: Any) -> moecomm.Buffer:
    good: dict[str, Any] = {"num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": M, "dtype": torch.float32}
    return moecomm.Buffer(**(good | changed))


@dataclass(frozen=True)
class WrongBuffer:
    """Wrong arguments of Buffer()."""

    changed: dict[str, Any]
    what: str
    got: str
    expected: str
    remedy: str = ".+"
    kind: type[moecomm.MoECommError] = errors.ConfigError


COUNTS = ("num_experts", "hidden", "top_k", "max_tokens_per_rank", "num_segments")
WRONG_BUFFERS = [
    *(
        WrongBuffer({name: bad}, f"{name} is no count", re.escape(repr(bad)), r"an integer of at least [12]")
        for name in COUNTS
        for bad in (0, -1, 2.0, True, "4", None)
    ),
    WrongBuffer({"num_segments": 1}, "num_segments is no count", "1", "an integer of at least 2"),
    *(
        WrongBuffer({"dtype": bad}, "dtype is no torch dtype", ".*", ".*bfloat16")
        for bad in ("float32", None, 4, float)
    ),
    *(WrongBuffer({"reduce": bad}, "reduce is unknown", ".*", "one of .*source.*") for bad in ("sum", None, ["rank"])),
    *(
        WrongBuffer({"timeout_s": bad}, "timeout_s is no deadline", ".*", "a positive number of seconds")
        for bad in (0, -1.0, float("nan"), float("inf"), "60", True)
    ),
    WrongBuffer(
        {"transport": "carrier pigeon"}, "transport is unknown", "'carrier pigeon'", "auto or one of .*local.*"
    ),
    WrongBuffer({"transport": None}, "transport is no name", "None", ".*auto.*"),
    WrongBuffer({"transport": ["local"]}, "transport is no name", ".*", ".*auto.*"),
    WrongBuffer({"device": "abacus"}, "device is unknown", "'abacus'", ".*cpu.*"),
    WrongBuffer({"device": 1.5}, "device is unknown", "1.5", ".*cpu.*"),
    WrongBuffer({"placement": [[0, 1, 2]]}, "placement holds another number of experts", "3", "num_experts=4"),
    WrongBuffer({"placement": [[0, 1], [2, 3]]}, "placement is for another number of ranks", "2", "1"),
    WrongBuffer({"placement": [[0, 1, 1, 3]]}, "placement does not hold .*", ".*", "each id from 0 to 3 once"),
    WrongBuffer({"placement": 4}, "placement is no list of expert lists", "4", ".*"),
    WrongBuffer({"placement": [0, 1, 2, 3]}, "placement is no list of expert lists", ".*", ".*"),
    WrongBuffer({"placement": [["a", "b", "c", "d"]]}, "placement is no list of expert lists", ".*", ".*"),
    WrongBuffer({"placement": [[0, 1.5, 2, 3]]}, "placement is no list of expert lists", ".*", ".*"),
    WrongBuffer(
        {"transport": "collective"},
        "transport 'collective' does not work here",
        "collective: the group is not one of torch.distributed",
        r"one of \[.*'local'.*\]",
        kind=errors.UnsupportedError,
    ),
]


@pytest.mark.parametrize(
    "wrong", WRONG_BUFFERS, ids=lambda wrong: ", ".join(f"{k}={v}" for k, v in wrong.changed.items())
)
def test_a_wrong_buffer_is_refused(wrong: WrongBuffer) -> None:
    with pytest.raises(moecomm.MoECommError) as caught:
        make(**wrong.changed)
    assert type(caught.value) is wrong.kind
    pattern = f"rank 0: (Buffer\\(\\): )?{wrong.what}: got {wrong.got}; expected {wrong.expected}; {wrong.remedy}"
    assert re.fullmatch(pattern, str(caught.value)), f"\n{caught.value}\ndoes not match\n{pattern}"


@pytest.mark.parametrize("bad", ["x", 3, object()], ids=["str", "int", "object"])
def test_a_wrong_group_is_refused(bad: object) -> None:
    with pytest.raises(moecomm.ConfigError, match=r"group has a type .*: got .*; expected .*ProcessGroup.*; .+"):
        make(group=bad)


@pytest.mark.parametrize("name", ["num_experts", "hidden", "top_k", "max_tokens_per_rank", "num_segments", "num_ranks"])
def test_plan_memory_refuses_what_buffer_refuses(name: str) -> None:
    good: dict[str, Any] = {"num_ranks": 2, "num_experts": E, "hidden": H, "top_k": K, "max_tokens_per_rank": M}
    moecomm.Buffer.plan_memory(**good)
    with pytest.raises(moecomm.ConfigError, match=f"{name} is no count: got -1; expected an integer of at least [12]"):
        moecomm.Buffer.plan_memory(**(good | {name: -1}))


@pytest.mark.parametrize("text", ["0", "-3", "soon", "nan", "inf"])
def test_a_wrong_environment_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMM_TIMEOUT_S", text)
    with pytest.raises(moecomm.ConfigError, match=f"rank 0: .*MOECOMM_TIMEOUT_S is no deadline: got '{text}'; .*"):
        make()
    make(timeout_s=5.0).close()


# -- after close -----------------------------------------------------------------------------------------------------


def test_a_closed_buffer_refuses_everything_and_keeps_what_it_gave() -> None:
    buffer, x = make(), torch.randn(T, H)
    out: Any = buffer.dispatch(x.requires_grad_(), TOPK_IDX)
    pending = buffer.dispatch_async(x, TOPK_IDX)
    buffer.close()
    buffer.close()
    calls: list[Callable[[], Any]] = [
        lambda: buffer.dispatch(x, TOPK_IDX),
        lambda: buffer.dispatch(x, handle=out.handle),
        lambda: buffer.combine(out.x, out.handle),
        lambda: buffer.dispatch_async(x, TOPK_IDX),
        lambda: buffer.combine_async(out.x, out.handle),
        pending.wait,
        lambda: out.x.sum().backward(),
    ]
    for call in calls:
        with pytest.raises(moecomm.StaleHandleError, match="rank 0: the buffer is closed: build a new Buffer"):
            call()
    assert_bitwise(out.x, x[EXPERT_ORDER], "what was handed out before")
    assert buffer.stats()["dispatches"] == 2 and "local" in buffer.explain()


def test_backward_after_the_buffer_is_gone_says_so() -> None:
    buffer = make()
    x = torch.randn(T, H, requires_grad=True)
    out: Any = buffer.dispatch(x, TOPK_IDX).x
    del buffer
    with pytest.raises(moecomm.StaleHandleError, match="buffer"):
        out.sum().backward()


@pytest.mark.parametrize("device", ["meta", "xpu:7"])
def test_a_device_on_which_no_tensor_can_be_is_refused_by_every_transport(device: str) -> None:
    with pytest.raises(errors.UnsupportedError, match=f"local: no tensor can be on {device} here: .+; mpi: "):
        moecomm.Buffer(num_experts=1, hidden=1, top_k=1, max_tokens_per_rank=1, device=device)
