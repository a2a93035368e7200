"""The README's code runs, offline, on the default models."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def test_readme_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", (PACKAGE / "README.md").read_text("utf-8"), re.M | re.S):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "lighthouse 0 True" in printed or "lighthouse 1 True" in printed
    assert "\n3\n2\n" in printed
