"""The examples run as they stand, on a few documents of the sample corpus, offline; the swaps reuse what they read."""

from __future__ import annotations

import gc
import re
import runpy
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

EXAMPLES = ["langchain_chain", "langchain_agent", "llama_index_query", "llama_index_chat"]


@pytest.fixture
def run(examples, monkeypatch, capsys):
    """Runs an example in this process, so that torch and the libraries are loaded but once; gives what it printed."""

    def run_(name, *arguments):
        monkeypatch.chdir(examples)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
        with warnings.catch_warnings():  # LlamaIndex's chat memory leaves its database open, as any program that ends
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        return capsys.readouterr().out

    return run_


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_one_line_swap_answers_from_stored_kv(name, run, loaded_once):
    assert len((ROOT / "examples" / f"{name}.py").read_text("utf-8").splitlines()) <= 40
    out = run(name)
    reused = [int(a or b) for a, b in re.findall(r"reused (\d+) tokens|(\d+) tokens reused", out)]
    assert len(reused) == 2 and all(count > 100 for count in reused), out
    assert out.count("first token after") + out.count("TTFT") == 2


def test_links_are_trained_on_a_store_without_labels(run):
    """One question and one step: enough to see every stage run, not to learn anything."""
    out = run("train_links", "1", "1", "1")
    said = re.findall(r"(before|after|recompute_first) +same word as full prefill \d+\.\d%, KL \d", out)
    assert said == ["before", "after", "recompute_first"]
    assert re.search(r"after - before +[+-].*% to [+-].*%, KL [+-]0\.\d+ to [+-]0\.\d+ \(95 %", out)


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
def test_an_example_runs_as_it_stands(name, says, run, loaded_once, monkeypatch):
    lines = iter(["What is the fog horn of the lighthouse called?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert len((ROOT / "examples" / f"{name}.py").read_text("utf-8").splitlines()) <= 60
    assert re.search(says, out := run(name)), out


def test_the_server_example_speaks_with_openai_s_client(examples):
    result = subprocess.run([sys.executable, str(examples / "server_openai.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"lighthouse.md: [1-9] chunks read\n(.|\n)*[1-9]\d\d of \d+ tokens reused", result.stdout)
