"""The named cases with two fifths of their tokens: interpreting takes its time per row."""

from __future__ import annotations

import dataclasses

from moecomm.testing.cases import CASES, Case


def small(name: str) -> Case:
    """A named case, smaller."""
    case = CASES[name]
    return dataclasses.replace(case, tokens=tuple(-(-2 * tokens // 5) for tokens in case.tokens))
