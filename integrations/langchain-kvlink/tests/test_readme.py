"""The README's code and the examples run, offline, on the default models."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = Path(__file__).parents[1]


def test_readme_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", (PACKAGE / "README.md").read_text("utf-8"), re.M | re.S):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "lighthouse 0 True" in printed or "lighthouse 1 True" in printed
    assert "\n3\n2\n" in printed


@pytest.mark.parametrize("name", ["langchain_chain.py", "langchain_agent.py"])
def test_examples_run(name, tmp_path):
    """In a new process and a new store."""
    shutil.copytree(ROOT / "examples" / "corpus", tmp_path / "examples" / "corpus")
    example = shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    assert len(Path(example).read_text("utf-8").splitlines()) <= 40
    paths = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, example], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert ran.returncode == 0, ran.stderr
    assert "Old Bertha" in ran.stdout
    assert all(int(number) > 0 for number in re.findall(r"TTFT \d+ ms, reused (\d+) tokens", ran.stdout))
    assert ran.stdout.count("TTFT") == 2
