"""Shapes of published models, and a small one for a laptop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """The mixture-of-experts layer of a model.

    hidden: H; experts: E; top_k: K; intermediate: inner size of one expert; layers: of the model that have experts.
    """

    hidden: int
    experts: int
    top_k: int
    intermediate: int
    layers: int


PRESETS: dict[str, Preset] = {
    "tiny": Preset(hidden=512, experts=16, top_k=4, intermediate=256, layers=4),
    "mixtral-8x7b": Preset(hidden=4096, experts=8, top_k=2, intermediate=14336, layers=32),
    "gpt-oss-120b": Preset(hidden=2880, experts=128, top_k=4, intermediate=2880, layers=36),
    "qwen3-235b": Preset(hidden=4096, experts=128, top_k=8, intermediate=1536, layers=94),
    "deepseek-v3": Preset(hidden=7168, experts=256, top_k=8, intermediate=2048, layers=58),
    "kimi-k2": Preset(hidden=7168, experts=384, top_k=8, intermediate=2048, layers=60),
}


def preset_of(hidden: int, experts: int, top_k: int) -> str:
    """Name the preset with this shape, or "custom".

    >>> preset_of(7168, 256, 8), preset_of(1, 2, 1)
    ('deepseek-v3', 'custom')
    """
    shape = (hidden, experts, top_k)
    return next((name for name, p in PRESETS.items() if (p.hidden, p.experts, p.top_k) == shape), "custom")
