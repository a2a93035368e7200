"""The examples run as they stand, on a few documents of the sample corpus, offline; the swaps reuse what they read."""

from __future__ import annotations

import re
import runpy
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
    for path in (ROOT / "examples").glob("*.*"):
        shutil.copy(path, folder / path.name)
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quickstart", r"Bertha(.|\n)*, [1-9]\d\d tokens reused"),
        ("persist_and_reload", r"first run: [1-9] chunks read(.|\n)*restart: 0 chunks read, [1-9] known"),
        ("step_by_step", r"\d+ tokens placed, \d+ to compute\n.*\w"),
        ("chat_folder", r"2 documents: [1-9] chunks read(.|\n)*lighthouse.md.* [1-9]\d\d tokens reused"),
        ("chat_pdf", r"ferry.pdf: [1-9]\d tokens(.|\n)*nine(.|\n)* [1-9]\d tokens reused"),
        ("own_model", r"proven movable(.|\n)*[1-9]\d* tokens reused; the same answer read afresh: True"),
    ],
)
def test_an_example_runs_as_it_stands(name, says, examples, monkeypatch, capsys):
    """In this process, so that torch and the models' libraries are loaded but once."""
    lines = iter(["What is the fog horn of the lighthouse called?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    path = examples / f"{name}.py"
    assert len(path.read_text("utf-8").splitlines()) <= 60
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(says, out := capsys.readouterr().out), out


def test_the_server_example_speaks_with_openai_s_client(examples):
    result = subprocess.run([sys.executable, str(examples / "server_openai.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"lighthouse.md: [1-9] chunks read\n(.|\n)*[1-9]\d\d of \d+ tokens reused", result.stdout)
