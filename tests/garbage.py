"""What tests import stays until the end: nobody need look through it for garbage."""

from __future__ import annotations

import gc
import sys

import pytest

MANY_MODULES = 200

_modules_seen = 0


@pytest.fixture(autouse=True)
def modules_are_no_garbage():
    """After a test that imported much. Full collections of torch and its like take a sixth of the tests' time."""
    yield
    global _modules_seen
    if len(sys.modules) >= _modules_seen + MANY_MODULES:
        _modules_seen = len(sys.modules)
        gc.collect()
        gc.freeze()
