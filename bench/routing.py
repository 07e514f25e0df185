"""Routings with a known skew: the same on every machine and for every version of torch and numpy, and with a hash.

    uniform      every expert is as likely as any other
    zipf:S       the expert of popularity i is chosen in proportion to 1 / i**S (default 1)
    hot:P        a share P of the tokens (default 1) has one expert in common; their other choices are uniform
    ratio:R      the most loaded expert gets exactly R times the mean, to the nearest token; the others get equal shares

Numbers come from the raw bits of a Philox generator, which numpy keeps stable; its distributions are not used. Which
experts are popular is drawn too, so that they do not all lie on rank 0.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_TRADES_PER_CHOICE = 4  # rounds that mix an exact routing, per top-k; the loads stay
_DEFAULTS = {"uniform": 0.0, "zipf": 1.0, "hot": 1.0, "ratio": 2.0}


@dataclass(frozen=True, slots=True)
class Skew:
    """How unequally the experts are loaded: a kind and its number, as `--skew` takes them.

    >>> Skew.parse("zipf"), str(Skew.parse("ratio:2.5"))
    (Skew(kind='zipf', value=1.0), 'ratio:2.5')
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Skew:
        """Read "uniform", "zipf:1.2", "hot:0.5", "ratio:4"; argparse shows the message if it is none of them."""
        kind, _, number = text.partition(":")
        try:
            value = float(number) if number else _DEFAULTS[kind]
        except (KeyError, ValueError):
            value = float("nan")
        good = {"uniform": not number, "zipf": value >= 0, "hot": 0 <= value <= 1, "ratio": value >= 1}
        if not good.get(kind, False) or value == float("inf"):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no skew: give uniform, zipf:S (S >= 0), hot:P (P from 0 to 1) or ratio:R (R >= 1)"
            )
        return cls(kind, value)

    def __str__(self) -> str:
        return self.kind if self.kind == "uniform" else f"{self.kind}:{self.value:g}"


def make_routing(skew: Skew, *, tokens: int, experts: int, top_k: int, world: int, seed: int = 0) -> list[np.ndarray]:
    """Draw of every rank (T, K) int64 global expert ids, K different ones per token.

    Raises:
        ValueError: the skew cannot be had with these numbers.

    >>> make_routing(Skew.parse("uniform"), tokens=2, experts=4, top_k=2, world=2)[1].tolist()
    [[0, 1], [0, 1]]
    >>> np.bincount(np.concatenate(make_routing(Skew.parse("ratio:2"), tokens=4, experts=4, top_k=1, world=2)).ravel())
    array([4, 1, 1, 2])
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"--top-k {top_k} is not between 1 and --experts {experts}")
    rng = np.random.Generator(np.random.Philox(seed))
    if skew.kind == "ratio":
        ids = _exact(skew.value, tokens * world, experts, top_k, rng)
    else:
        popular = np.argsort(_uniform(rng, experts), kind="stable")
        ids = _weighted(skew, tokens * world, popular, top_k, rng)
    return [np.ascontiguousarray(part) for part in ids.reshape(world, tokens, top_k)]


def expected_rows(skew: Skew, *, tokens: int, experts: int, top_k: int, world: int) -> int:
    """Rows that the most loaded rank gets in layout "expert", about, without drawing anything.

    >>> expected_rows(Skew.parse("ratio:3"), tokens=100, experts=8, top_k=2, world=2)  # 3 + 1 + 1 + 1 means of 50
    300
    """
    most = experts / top_k  # an expert gets a token once
    over_mean = {
        "uniform": 1.0,
        "zipf": experts / float((np.arange(1, experts + 1) ** -skew.value).sum()),
        "hot": 1.0 + skew.value * most,
        "ratio": skew.value,
    }[skew.kind]
    held = -(-experts // world)
    return round((min(over_mean, most) + held - 1) * world * tokens * top_k / experts)


def routing_hash(ids_of_rank: Sequence[np.ndarray]) -> str:
    """Twelve hexadecimal digits that stand for the ids of all ranks.

    >>> routing_hash([np.array([[0, 1]]), np.array([[1, 0]])])
    '6b18f9d3fc77'
    """
    digest = hashlib.sha256()
    for ids in ids_of_rank:
        digest.update(repr(ids.shape).encode() + np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()[:12]


def max_over_mean(ids_of_rank: Sequence[np.ndarray], experts: int) -> float:
    """Load of the most loaded expert over the mean load; 0 without any token.

    >>> max_over_mean([np.array([[0, 1], [0, 2]])], experts=4)
    2.0
    """
    ids = np.concatenate([ids.ravel() for ids in ids_of_rank])
    ids = ids[ids >= 0]
    return float(np.bincount(ids, minlength=experts).max() * experts / len(ids)) if len(ids) else 0.0


def _uniform(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers between 0 and 1, exclusive, with 53 random bits."""
    raw = rng.bit_generator.random_raw(int(np.prod(shape)))
    return (((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).reshape(shape)


def _weighted(skew: Skew, tokens: int, popular: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Choose K different experts per token, each in proportion to its weight: the first K in a race of exponentials."""
    experts = len(popular)
    time = -np.log(_uniform(rng, tokens, experts))
    if skew.kind == "zipf":
        weight = np.empty(experts)
        weight[popular] = np.arange(1, experts + 1, dtype=np.float64) ** -skew.value
        time /= weight
    if skew.kind == "hot":
        shared = np.arange(tokens) < round(skew.value * tokens)
        time[shared[np.argsort(_uniform(rng, tokens), kind="stable")], popular[0]] = 0.0
    return np.argsort(time, axis=1, kind="stable")[:, :top_k]


def _exact(ratio: float, tokens: int, experts: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Give one expert `ratio` times the mean load and the others equal shares, then mix without changing a load."""
    entries = tokens * top_k
    most = round(ratio * entries / experts)
    if most > tokens or (experts == 1 and ratio > 1):
        raise ValueError(
            f"--skew ratio:{ratio:g} cannot be had: an expert gets a token once, "
            f"so with {experts} experts and top-{top_k} the ratio is at most {experts / top_k:g}"
        )
    if experts > 1:
        share, more = divmod(entries - most, experts - 1)
        loads = [most, *(share + (i < more) for i in range(experts - 1))]
    else:
        loads = [entries]
    named = np.argsort(_uniform(rng, experts), kind="stable")
    # Entry i goes to token i mod T: no load exceeds T, so no token meets an expert twice.
    ids = np.repeat(named, loads).reshape(top_k, tokens).T.copy()
    for _ in range(_TRADES_PER_CHOICE * top_k):
        _trade(ids, rng)
    return ids


def _trade(ids: np.ndarray, rng: np.random.Generator) -> None:
    """Pair the tokens; each pair trades one choice where both still have K different ones afterwards."""
    half = len(ids) // 2
    order = np.argsort(_uniform(rng, len(ids)), kind="stable")
    a, b = order[:half], order[half : 2 * half]
    of_a, of_b = ((_uniform(rng, half) * ids.shape[1]).astype(np.int64) for _ in range(2))
    given, taken = ids[a, of_a], ids[b, of_b]
    good = ~((ids[b] == given[:, None]).any(1) | (ids[a] == taken[:, None]).any(1))
    ids[a[good], of_a[good]], ids[b[good], of_b[good]] = taken[good], given[good]
