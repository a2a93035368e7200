"""The README's code blocks run, in order, as one program on the default models."""

from __future__ import annotations

import gc
import re
import warnings
from pathlib import Path

import pytest
from llama_index.core import Settings
from llama_index.llms.kvlink import watch_reuse

README = Path(__file__).resolve().parent.parent / "README.md"
SHORTER = ("max_new_tokens=24", "max_new_tokens=6")  # what is said does not matter here


def test_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader copies works in a folder of their own, and every chunk comes from stored KV."""
    monkeypatch.chdir(tmp_path)
    for name in ("_node_parser", "_transformations"):  # as in a new process; what the README sets is put back
        monkeypatch.setattr(Settings, name, None)
    program = "".join(re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL))
    assert program.count(SHORTER[0]) == 1
    namespace: dict[str, object] = {}
    with watch_reuse() as reports:
        exec(compile(program.replace(*SHORTER), "README.md", "exec"), namespace)
    namespace["llm"].engine.close()  # type: ignore[attr-defined]
    namespace.clear()
    with warnings.catch_warnings():  # LlamaIndex's chat memory leaves its database open, as any program that ends
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert len(reports) == program.count(".query(") + program.count(".chat(") == 5
    assert all(document["reused"] for report in reports for document in report["documents"])
    assert all(report["documents"] for report in reports)
