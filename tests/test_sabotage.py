"""The sabotages of `make sabotage` still fit the code: each of them has exactly one place to strike."""

from __future__ import annotations

import pytest
from conftest import ROOT
from sabotage import SABOTAGES


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.name)
def test_a_sabotage_has_one_place_to_strike_and_a_test_that_is_there(sabotage):
    """Code that moves on takes its sabotages along."""
    assert (ROOT / "kvlink_rag" / sabotage.file).read_text("utf-8").count(sabotage.old) == 1
    assert (ROOT / "tests" / sabotage.tests[0]).exists()


def test_there_are_enough_of_them():
    """Q1: at least 25, all with names of their own."""
    assert len({sabotage.name for sabotage in SABOTAGES}) == len(SABOTAGES) >= 25
