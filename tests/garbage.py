"""What tests import stays until the end: nobody need look through it for garbage.

Full collections of torch and its like take a sixth of the tests' time. A conftest imports all of this by name.
"""

from __future__ import annotations

import gc
import sys

import pytest

MANY_MODULES = 200

_modules_kept = 0

gc.disable()  # until everything is collected


def _keep_modules() -> None:
    global _modules_kept
    if len(sys.modules) >= _modules_kept + MANY_MODULES:
        _modules_kept = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    _keep_modules()
    gc.enable()


@pytest.fixture(autouse=True)
def modules_are_no_garbage():
    """Nor those that a test was the first to import."""
    yield
    _keep_modules()
