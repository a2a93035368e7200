"""Several processes train one model together: what they learn is what one learns from as many contexts a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from boxes import examples
from safetensors.torch import load_file

from kvlink_rag.errors import BadInput
from kvlink_rag.training.processes import join_in, own_device


@pytest.fixture
def command(base, tmp_path):
    """`kvlink train` on the boxes with further options, as arguments behind `python -m`."""
    data = tmp_path / "data.jsonl"
    rows = [
        {
            "question": each.question,
            "answers": list(each.answers),
            "documents": [
                {"text": document.text, "is_gold": place in each.gold} for place, document in enumerate(each.documents)
            ],
        }
        for each in examples()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shared = (
        "--data",
        data,
        "--model",
        base,
        "--batch",
        2,
        "--steps",
        4,
        "--learning-rate",
        5e-3,
        "--dtype",
        "float32",
    )
    return lambda *more: ["kvlink_rag.cli", "train", *map(str, (*shared, "--save-minutes", 0, *more))]


def run(*arguments, **more):
    """What it printed, and its errors; more: variables of its environment."""
    environment = {**os.environ, **more, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def together(arguments):
    return run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments)


def losses(out):
    return [entry["loss"] for entry in json.loads((out / "kvlink.json").read_text("utf-8"))["log"]]


@pytest.mark.parametrize("trainable", ["reader", "full"])
def test_two_processes_learn_what_one_learns_by_accumulating(trainable, command, tmp_path):
    """Every other context is read by a full prefill, so that a process may have a step without links."""
    options = ("--trainable", trainable, "--causal-share", 0.5)
    text, err = together(command(*options, "--out", tmp_path / "two"))
    run(*command(*options, "--accumulate", 2, "--out", tmp_path / "one"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert json.loads((tmp_path / "two" / "kvlink.json").read_text("utf-8"))["processes"] == 2
    assert text.count("answer with it") == 1 and err.count("step 4 of 4") == 1
    assert sorted(path.name for path in (tmp_path / "two" / "run" / "trainer").glob("*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_a_run_of_two_processes_is_resumed_by_two(command, tmp_path):
    out = tmp_path / "out"
    together(command("--out", out))
    (out / "kvlink.json").unlink()
    whole = json.loads((out / "run" / "trainer" / "checkpoint-4" / "trainer_state.json").read_text("utf-8"))
    learnt = load_file(out / "run" / "trainer" / "checkpoint-4" / "trained.safetensors")
    for path in (out / "run" / "trainer" / "checkpoint-4").iterdir():
        path.unlink()
    together(command("--out", out, "--resume"))
    assert losses(out) == pytest.approx([entry["loss"] for entry in whole["log_history"] if "loss" in entry], rel=1e-3)
    again = load_file(out / "run" / "trainer" / "checkpoint-4" / "trained.safetensors")
    assert all(torch.allclose(again[name], tensor, atol=1e-6) for name, tensor in learnt.items())
    with pytest.raises(AssertionError, match="processes 2, now it is processes 1"):
        run(*command("--out", out, "--resume"))


STOPPED = """
import os, sys
from boxes import run

def report(figures):
    if os.environ["RANK"] == "1" and figures["step"] == 2:
        raise KeyboardInterrupt

try:
    run(sys.argv[1], sys.argv[2], steps=8, batch=1, report=report)
except BaseException as error:
    print("stopped by", type(error).__name__)
"""


def test_all_processes_stop_when_one_is_stopped(base, tmp_path):
    """After the same step, of which nothing is lost."""
    (tmp_path / "stopped.py").write_text(STOPPED, "utf-8")
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    text, _ = run(*torchrun, str(tmp_path / "stopped.py"), str(base), str(tmp_path / "out"), **here)
    assert text.splitlines() == ["stopped by KeyboardInterrupt"] * 2
    saved = tmp_path / "out" / "run" / "trainer" / "checkpoint-2"
    assert {"trained.safetensors", "trainer_state.json"} <= {path.name for path in saved.iterdir()}


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("auto") == "auto"
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert own_device("auto") == own_device("cuda") == "cuda:3"
    assert own_device("cpu") == "cpu"
    with pytest.raises(BadInput, match="4 processes cannot all train on cuda:1"):
        own_device("cuda:1")
    with pytest.raises(BadInput, match="this one trains on cuda:3; load it there"):
        join_in(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="4 processes and 2 GPUs"):
        own_device("auto")


def test_one_process_trains_on_the_first_gpu_that_it_sees():
    join_in(torch.device("cuda"))
    join_in(torch.device("cuda:0"))
    with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES"):
        join_in(torch.device("cuda:1"))
