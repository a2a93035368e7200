"""The examples run as they stand, on a few documents of the sample corpus, offline; the swaps reuse what they read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = ["langchain_chain", "langchain_agent", "llama_index_query", "llama_index_chat"]
CORPUS = ["lighthouse.md", "shipyard.md"]


@pytest.fixture
def examples(tmp_path):
    """A copy of the examples with a small corpus, so that their stores are new and quickly filled."""
    folder = tmp_path / "examples"
    (folder / "corpus").mkdir(parents=True)
    for name in CORPUS:
        shutil.copy(ROOT / "examples" / "corpus" / name, folder / "corpus" / name)
    for name in [*(f"{name}.py" for name in EXAMPLES), "train_links.py", "questions.jsonl"]:
        shutil.copy(ROOT / "examples" / name, folder / name)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_one_line_swap_answers_from_stored_kv(name, examples):
    assert len((examples / f"{name}.py").read_text("utf-8").splitlines()) <= 40
    script = [sys.executable, str(examples / f"{name}.py")]
    result = subprocess.run(script, capture_output=True, text=True, cwd=examples)
    assert result.returncode == 0, result.stderr
    reused = [int(a or b) for a, b in re.findall(r"reused (\d+) tokens|(\d+) tokens reused", result.stdout)]
    assert len(reused) == 2 and all(count > 100 for count in reused), result.stdout
    assert result.stdout.count("first token after") + result.stdout.count("TTFT") == 2


def test_links_are_trained_on_a_store_without_labels(examples):
    """A few questions and steps: enough to see every stage run, not to learn much."""
    script = [sys.executable, str(examples / "train_links.py"), "2", "2", "2"]
    result = subprocess.run(script, capture_output=True, text=True, cwd=examples)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"(before|after) +same word as full prefill \d+\.\d%, KL \d", result.stdout) == [
        "before",
        "after",
    ]
