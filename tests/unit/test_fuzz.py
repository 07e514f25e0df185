"""Whatever is passed to the public calls is refused with a message of moecomm, or works; and the buffer goes on."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import moecomm

with warnings.catch_warnings(action="ignore"):
    NESTED = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(1, 4)])
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    2**70,
    1.5,
    float("nan"),
    "expert",
    "\ud800",
    np.zeros((3, 4)),
    np.int64(3),
    b"",
    [],
    (),
    [1, 2],
    {},
    object(),
    torch.float32,
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(3),
    torch.zeros(3, 4),
    torch.zeros(3, 2).long(),
    torch.full((3, 2), 99),
    torch.zeros(3, 2),
    torch.zeros(3, 4, dtype=torch.int8),
    torch.zeros(3, 4, dtype=torch.complex64),
    torch.zeros(3, 4).to_sparse(),
    NESTED,
    torch.zeros(3, 4, device="meta"),
    torch.zeros(1 << 12, 4),
    (torch.zeros(3, 4), torch.zeros(3, 1)),
    (torch.zeros(3, 4), torch.zeros(2, 1)),
]
SHAPE: dict[str, Any] = {"num_experts": 4, "hidden": 4, "top_k": 2, "max_tokens_per_rank": 8, "dtype": torch.float32}
X, IDX = torch.arange(12.0).view(3, 4), torch.tensor([[0, 1], [2, -1], [3, 3]])


def right_step(buffer: moecomm.Buffer) -> Any:
    out: Any = buffer.dispatch(X, IDX)
    expected = X * (IDX >= 0).sum(1, keepdim=True)
    assert torch.equal(buffer.combine(out.x, out.handle), expected)
    return out


def arguments_of_dispatch(pick: random.Random, out: Any) -> dict[str, Any]:
    good = {
        "x": X,
        "topk_idx": IDX,
        "topk_weights": None,
        "layout": "expert",
        "align": 1,
        "handle": None,
        "quant": None,
        "out": None,
    }
    if pick.random() < 0.3:
        good["layout"] = "padded"
    for name in pick.sample(sorted(good), pick.randint(1, 2)):
        good[name] = pick.choice([*ODD, out.handle])
    return good


def arguments_of_combine(pick: random.Random, out: Any) -> dict[str, Any]:
    good = {"rows": out.x, "handle": out.handle, "weighted": None, "bias": None, "quant": None, "out": None}
    for name in pick.sample(sorted(good), pick.randint(1, 2)):
        good[name] = pick.choice(ODD)
    return good


@pytest.mark.parametrize("seed", range(4))
def test_odd_arguments_of_operations(seed: int) -> None:
    pick = random.Random(seed)
    buffer = moecomm.Buffer(**SHAPE)
    out = right_step(buffer)
    for _ in range(150):
        is_dispatch = pick.random() < 0.6
        given = (arguments_of_dispatch if is_dispatch else arguments_of_combine)(pick, out)
        refusal = None
        try:
            (buffer.dispatch if is_dispatch else buffer.combine)(**given)
        except moecomm.MoECommError as error:
            refusal = error
            assert error.what and str(error)
        except Exception as error:
            raise AssertionError(f"{'dispatch' if is_dispatch else 'combine'}({given}) raised {error!r}") from error
        try:
            out = right_step(buffer)
        except moecomm.CapacityError as error:  # groups of a fixed size that were too small: it says that it is over
            assert isinstance(refusal, moecomm.CapacityError) and "build a new Buffer" in str(error), given
            buffer = moecomm.Buffer(**SHAPE)
            out = right_step(buffer)


def test_odd_arguments_of_the_constructor() -> None:
    pick = random.Random(0)
    names = [*SHAPE, "transport", "placement", "reduce", "timeout_s", "num_segments", "device", "topology", "check"]
    for _ in range(250):
        given = SHAPE | {name: pick.choice(ODD) for name in pick.sample(names, pick.randint(1, 2))}
        try:
            moecomm.Buffer(None, **given).close()
        except moecomm.MoECommError as error:
            assert error.what and str(error)
        except Exception as error:
            raise AssertionError(f"Buffer({given}) raised {error!r}") from error


def test_any_order_of_calls() -> None:
    pick = random.Random(1)
    for _ in range(30):
        buffer, out = moecomm.Buffer(**SHAPE), None
        for _ in range(8):
            call = pick.choice(
                ["dispatch", "combine", "replay", "close", "abort", "shrink", "admit", "stats", "explain"]
            )
            try:
                if call == "dispatch":
                    out = buffer.dispatch(X, IDX)
                elif call == "combine" and out is not None:
                    buffer.combine(out.x, out.handle)
                elif call == "replay" and out is not None:
                    buffer.dispatch(X, handle=out.handle)
                elif call in ("close", "abort", "shrink", "admit", "stats", "explain"):
                    getattr(buffer, call)()
            except moecomm.MoECommError as error:
                assert str(error)
        buffer.close()


def test_odd_handles_and_reasons() -> None:
    for odd in ODD:
        buffer = moecomm.Buffer(**SHAPE)
        with pytest.raises(moecomm.ConfigError, match="handle is no PaddedHandle"):
            buffer.combine_input(odd)
        buffer.abort(odd)
        with pytest.raises(moecomm.AbortedError):
            right_step(buffer)
