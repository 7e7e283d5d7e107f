"""Every method of the catalogue passes the generic battery, and the battery finds what is wrong."""

from __future__ import annotations

import pytest
from battery import Check, check_method

import rankfold as rf


def _parameters(checks: list[Check]) -> list[pytest.param]:
    return [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if c.is_slow else []) for c in checks]


@pytest.mark.parametrize(
    "check", [p for m in rf.methods("structure") for p in _parameters(check_method(m.name))]
)
def test_every_method_keeps_its_promises(check: Check) -> None:
    check()
