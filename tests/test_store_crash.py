"""Processes killed at work: what they acknowledged is there, what they left half done is swept."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.endurance
def test_two_hundred_killed_writers_lose_nothing_they_acknowledged(quick_folder):
    """G12, G16: puts, deletes, evictions, checks, openings and rebuilding are cut short by SIGKILL at random moments.

    Afterwards each acknowledged entry is whole, nothing deleted is back, no byte lies about that is not accounted for.
    """
    command = [sys.executable, str(ROOT / "tests" / "store_kill_loop.py"), str(quick_folder), "200", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result.pop("kills") == 200 and result.pop("acknowledged") > 400
    assert set(result.values()) == {0}
