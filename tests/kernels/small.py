"""The named cases with three tenths of their tokens: interpreting takes its time per row."""

from __future__ import annotations

import dataclasses

from moecomm.testing.cases import CASES, Case


def small(name: str) -> Case:
    """A named case, smaller."""
    case = CASES[name]
    return dataclasses.replace(case, tokens=tuple(-(-3 * tokens // 10) for tokens in case.tokens))
