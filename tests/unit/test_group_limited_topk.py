"""`group_limited_topk` against a slow reading of the same sentences, and what it does to the number of nodes."""

from __future__ import annotations

import random

import pytest
import torch

from moecomm import ConfigError
from moecomm.nn import group_limited_topk


def slowly(scores: list[float], top_k: int, groups: list[int], max_groups: int, bias: list[float]) -> list[int]:
    """One token, in Python floats."""
    compared = [score + offset for score, offset in zip(scores, bias, strict=True)]
    sums = []
    for group in range(max(groups) + 1):
        best = sorted((value for value, of in zip(compared, groups, strict=True) if of == group), reverse=True)
        sums.append(sum(best[:2]))
    allowed = sorted(range(len(sums)), key=lambda group: -sums[group])[:max_groups]
    experts = [expert for expert, group in enumerate(groups) if group in allowed]
    return sorted(experts, key=lambda expert: -compared[expert])[:top_k]


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_a_slow_reading(seed: int) -> None:
    draw = random.Random(seed)
    num_groups = draw.randint(1, 5)
    groups = [*range(num_groups), *(draw.randrange(num_groups) for _ in range(draw.randint(0, 12)))]
    draw.shuffle(groups)
    max_groups = draw.randint(1, num_groups)
    smallest = sorted(groups.count(group) for group in range(num_groups))[:max_groups]
    top_k = draw.randint(1, sum(smallest))
    # Multiples of 1/4: sums are exact, and many of them equal.
    scores = [[draw.randint(-3, 3) / 4 for _ in groups] for _ in range(draw.randint(0, 9))]
    bias = [draw.randint(-2, 2) / 4 for _ in groups] if draw.random() < 0.5 else None
    given = None if bias is None else torch.tensor(bias)
    table = torch.tensor(scores).reshape(len(scores), len(groups))
    idx, values = group_limited_topk(table, top_k, groups=groups, max_groups=max_groups, bias=given)
    assert idx.dtype == torch.int64 and idx.shape == values.shape == (len(scores), top_k)
    for token, row in enumerate(scores):
        assert idx[token].tolist() == slowly(row, top_k, groups, max_groups, bias or [0.0] * len(groups))
        assert values[token].tolist() == [row[expert] for expert in idx[token].tolist()]


def test_a_token_uses_no_more_groups_than_allowed() -> None:
    groups = [expert // 16 for expert in range(64)]
    scores = torch.rand(500, 64, generator=torch.Generator().manual_seed(0))
    for limit in (1, 2, 4):
        idx, _ = group_limited_topk(scores, 8, groups=groups, max_groups=limit)
        used = [len({groups[expert] for expert in row}) for row in idx.tolist()]
        assert max(used) == limit
        assert all(len(set(row)) == 8 for row in idx.tolist())
    assert torch.equal(idx, scores.sort(dim=1, descending=True, stable=True).indices[:, :8]), "4 of 4 is no limit"


def test_gradients_reach_the_chosen_scores_only() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.6]], requires_grad=True)
    _, values = group_limited_topk(scores, 2, groups=[0, 0, 1, 1], max_groups=1, bias=torch.zeros(4))
    (grad,) = torch.autograd.grad(values.sum(), scores)
    assert grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3, "groups": [0, 0, 1, 1], "max_groups": 1}, "fewer than top_k"),
        ({"top_k": 1, "groups": [0, 0, 1], "max_groups": 1}, "groups do not fit"),
        ({"top_k": 1, "groups": [0, 0, 2, 2], "max_groups": 1}, "groups do not fit"),
        ({"top_k": 1, "groups": [0, 0, 1, 1], "max_groups": 3}, "groups do not fit"),
        ({"top_k": 0, "groups": [0, 0, 1, 1], "max_groups": 1}, "top_k is no count"),
        ({"top_k": 1, "groups": [0, 0, 1, 1], "max_groups": 0}, "max_groups is no count"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group_limited_topk(torch.zeros(2, 4), **options)  # type: ignore[arg-type]
