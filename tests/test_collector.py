"""The garbage collector is out of the way while things are loaded, and as it was afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from kvlink_rag import collector


@pytest.fixture(params=[True, False], ids=["on", "off"])
def as_it_was(request):
    """The collector is on, or off, before; and on after the test."""
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


def test_it_is_off_meanwhile_and_as_it_was_afterwards(as_it_was):
    with collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled() == as_it_was


def test_a_failure_leaves_it_as_it_was(as_it_was):
    with pytest.raises(OSError, match="no such model"), collector.paused():
        raise OSError("no such model")
    assert gc.isenabled() == as_it_was


def test_only_what_is_kept_for_good_is_not_looked_through_again():
    kept = gc.get_freeze_count()
    with collector.paused():
        pass
    assert gc.get_freeze_count() == kept
    program = (
        "import gc, kvlink_rag.collector as c\nwith c.paused(for_good=True): x = [[]]\nprint(gc.get_freeze_count())"
    )
    assert int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout) > 1000


def test_importing_a_class_by_name_leaves_it_on():
    program = "import gc\nfrom kvlink_rag import Embedder\nprint(gc.isenabled(), gc.get_freeze_count())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True 0\n"
