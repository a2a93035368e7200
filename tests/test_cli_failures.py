"""What goes wrong under `kvlink` is one line that says what and what to do, before hours of work where it can be."""

from __future__ import annotations

import json

import pytest
from tiny_models import build_hf, byte_tokenizer

TOO_LONG = "x" * 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random model."""
    folder = tmp_path_factory.mktemp("tiny")
    build_hf("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """A file of one question."""
    row = {"question": "Where?", "answers": ["here"], "documents": [{"text": "It is here.", "is_gold": True}]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    return path


def is_one_line(err):
    return err.startswith("error: ") and len(err.strip().splitlines()) == 1


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_measured(kvlink, tmp_path):
    """A model that is not there would be the next thing to be said."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    for plot, reason in (
        (tmp_path / "nowhere" / "times.svg", "No such file or directory"),
        (tmp_path / "file" / "times.svg", "Not a directory"),
        (tmp_path / f"{TOO_LONG}.svg", "File name too long"),
        (tmp_path / "folder.svg", "Is a directory"),
        (tmp_path / "times.tex", "times.tex"),
    ):
        code, out, err = kvlink("bench", "ttft", "--plot", plot, "--model", tmp_path / "none")
        assert code == 1 and out == "" and is_one_line(err) and str(plot) in err and reason in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.svg"]


@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_folder_of_results_that_cannot_be_made_is_refused_before_a_model_is_loaded(kvlink, tmp_path, data, command):
    for out, reason in (
        (data, "Not a directory"),
        (data / "below", "Not a directory"),
        (tmp_path / TOO_LONG, "File name too long"),
        (tmp_path / "new" / TOO_LONG, "File name too long"),
    ):
        code, text, err = kvlink(command, "--data", data, "--out", out, "--model", tmp_path / "none")
        assert code == 1 and text == "" and is_one_line(err) and f"{out} cannot be" in err and reason in err
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_a_store_under_a_name_too_long_is_refused_in_one_line(kvlink, tmp_path, data):
    code, out, err = kvlink("add", data, "--store", tmp_path / TOO_LONG)
    assert code == 1 and out == "" and is_one_line(err) and "File name too long; choose another folder" in err
