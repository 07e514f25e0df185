"""The API is the one of the contract, and docs/deep_ep.md says so."""

from __future__ import annotations

import inspect

from tests.deep_ep import contract


def test_no_row_is_unexplained() -> None:
    rows = contract.rows()
    assert len(rows) > 80
    assert not [(row.name, row.status) for row in rows if not row.is_explained]


def test_the_page_is_in_step() -> None:
    page = contract.PAGE.read_text(encoding="utf-8")
    assert contract.with_tables(page) == page, "run python -m tests.deep_ep.contract --write"


def test_the_comparison_can_fail() -> None:
    for line, status in [
        ("Buffer.dispatch(x, handles=None)", "no handles"),
        ("Buffer.combine(x, handle, topk_weights=1)", "topk_weights=None"),
        ("Buffer.combine(handle, x)", "another order"),
        ("Buffer.unheard_of()", "missing"),
    ]:
        row = contract.compare(line)
        assert row.status == status and not row.is_explained


def test_what_has_no_effect_can_be_given() -> None:
    for where, named in contract.NO_EFFECT.items():
        known = inspect.signature(contract.find(where)).parameters
        assert not set(named) - set(known), where
    raised = {name for names in contract.UNSUPPORTED.values() for name in names.split(", ")}
    assert {name for name in vars(contract.NotThere) if not name.startswith("__")} <= raised
