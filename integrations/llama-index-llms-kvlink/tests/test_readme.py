"""The README's code blocks run, in order, as one program on the default models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEFORE = "from llama_index.llms.kvlink import watch_reuse as _watch\nwith _watch() as _reports:\n"
AFTER = "\nimport json\nprint(json.dumps(_reports))\n"


def test_python_blocks_of_the_readme_run(tmp_path: Path, environment: dict[str, str]) -> None:
    """What a reader copies works in a folder of their own, and every chunk comes from stored KV."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    program = BEFORE + "".join(f"    {line}\n" for block in blocks for line in block.splitlines()) + AFTER
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    assert len(reports) == program.count(".query(") + program.count(".chat(") == 5
    assert all(document["reused"] for report in reports for document in report["documents"])
    assert all(report["documents"] for report in reports)
