"""What goes wrong under `kvlink` is one line that says what and what to do, before hours of work where it can be."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from contextlib import closing

import pytest

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.errors import BadInput
from kvlink_rag.index import VectorIndex
from kvlink_rag.loading import load
from kvlink_rag.store.folder import open_folder

TOO_LONG = "x" * 300


@pytest.fixture
def data(tmp_path):
    """A file of one question."""
    row = {"question": "Where?", "answers": ["here"], "documents": [{"text": "It is here.", "is_gold": True}]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    return path


@pytest.fixture
def store_of(smollm, embedder, tmp_path):
    """Makes a store of documents whose texts are also their ids; its folder."""

    def make(*texts):
        with KVLinkRAG(smollm, embedder, tmp_path / "store") as rag:
            rag.add(*(Document(text, id=text) for text in texts))
        return tmp_path / "store"

    return make


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_without_room_for_the_plot_is_one_line_behind_the_figures(kvlink, tmp_path, base):
    plot = tmp_path / "times.svg"
    plot.symlink_to("/dev/full")
    code, out, err = kvlink(
        "bench", "ttft", "--contexts", 1200, "--repeats", 1, "--model", base, "--plot", plot, "--json"
    )
    assert code == 1 and json.loads(out)[0]["context_tokens"] <= 1200
    assert err.splitlines()[-1].startswith("error: ") and "No space left on device" in err.splitlines()[-1]


def test_what_the_system_refuses_is_one_line_with_the_file(kvlink, tmp_path, data):
    """As a name too long where a file is read; and a table that SQLite does not find in a store's index."""
    code, out, err = kvlink("eval", "--data", tmp_path / TOO_LONG)
    assert code == 1 and out == "" and is_one_line(err) and f"{tmp_path / TOO_LONG}: File name too long" in err
    index = VectorIndex(open_folder(tmp_path / "store"))
    index.close()
    with closing(sqlite3.connect(tmp_path / "store" / "index.sqlite")) as database:
        database.execute("ALTER TABLE documents RENAME COLUMN id TO name")
        database.commit()
    code, out, err = kvlink("store", "list", "--store", tmp_path / "store")
    assert code == 1 and out == "" and is_one_line(err) and "no such column: id" in err


def test_ids_that_no_document_has_are_named_and_the_others_deleted(kvlink, store_of):
    store = store_of("one", "two", "three")
    code, out, err = kvlink("store", "delete", "text-none", "one", "none.md", "--store", store, "--json")
    assert code == 1 and json.loads(out) == {"deleted": 1} and is_one_line(err)
    assert f"not in {store}: text-none, none.md;" in err
    assert json.loads(kvlink("store", "list", "--store", store, "--json")[1]) == ["three", "two"]


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_a_store_whose_manifest_is_damaged_or_gone_says_how_to_get_its_documents_back(kvlink, data, store_of, harm):
    """Every command says the same, and what it says to do helps."""
    store = store_of("one", "two")
    manifest = store / "store.json"
    manifest.write_text('{"kvlink_st') if harm == "damaged" else manifest.unlink()
    for command in (["store", "stats"], ["ask", "Why?"], ["add", data]):
        code, out, err = kvlink(*command, "--store", store)
        assert code == 1 and out == "" and is_one_line(err) and harm in err and "make one with" not in err
        assert '{"kvlink_store": 1}' in err
    manifest.write_text('{"kvlink_store": 1}')
    assert json.loads(kvlink("store", "list", "--store", store, "--json")[1]) == ["one", "two"]
    assert json.loads(kvlink("store", "verify", "--store", store, "--json")[1]) == {"sound": 2, "dropped": 0}


def test_a_damaged_index_is_one_line(kvlink, store_of):
    store = store_of("one")
    whole = (store / "index.sqlite").read_bytes()
    (store / "index.sqlite").write_bytes(whole[:4096] + b"\xff" * 4096 + whole[8192:])
    code, out, err = kvlink("store", "stats", "--store", store)
    assert code == 1 and out == "" and is_one_line(err) and "index.sqlite is damaged (" in err


def test_the_questions_that_come_along_are_not_to_be_learnt_from(kvlink, tmp_path):
    code, out, err = kvlink("train", "--data", "sample", "--out", tmp_path / "out")
    assert code == 1 and out == "" and is_one_line(err) and "--data sample is for eval and check" in err


def test_training_tells_no_loss_before_there_is_one(kvlink, tmp_path, data, base):
    options = ("--data", data, "--model", base, "--batch", 1, "--min-docs", 1)
    code, out, err = kvlink("train", *options, "--steps", 1, "--out", tmp_path / "one")
    assert code == 0 and "step 1 of 1: " in err and "tokens/s" in err and "nan" not in err + out
    code, out, err = kvlink("train", *options, "--steps", 2, "--out", tmp_path / "two")
    assert code == 0 and "step 2 of 2: loss " in err


def test_names_that_are_allowed_are_all_told(kvlink, tmp_path, store_of, smollm, embedder):
    """auto where a linking may be left to the checkpoint, not where linkings are compared; k where chunks are found."""
    for command, told in (
        (["check"], "auto, full"),
        (["ask", "Why?", "--store", store_of("one")], "auto, full"),
        (["eval", "--data", "sample"], "full"),
    ):
        code, out, err = kvlink(*command, "--linking", "foo")
        assert code == 1 and out == "" and f"linking 'foo' is not one of {told}, plain, " in err.replace("\n", " ")
    with KVLinkRAG(smollm, embedder, tmp_path / "store") as rag:
        with pytest.raises(TypeError, match=r"unknown options foo; known are .*seed, k$"):
            rag.ask("Why?", foo=1)
        with pytest.raises(BadInput, match="'foo' is not one of auto, full"):
            rag.ask("Why?", linking="foo")


def test_a_folder_without_files_is_said_to_have_none(kvlink, tmp_path):
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden.txt").write_text("hidden")
    code, out, err = kvlink("add", tmp_path / "empty", "--store", tmp_path / "store", "--json")
    assert code == 1 and json.loads(out)["documents"] == 0
    assert f"nothing was added: there is no file in {tmp_path / 'empty'}" in err.splitlines()[-1]


def test_a_broken_pdf_is_told_by_us_alone(kvlink, tmp_path, caplog):
    """The library logs what it tries before it gives up."""
    pytest.importorskip("pypdf")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\n1 0 obj\n<<>>\nno end")
    code, _, err = kvlink("add", tmp_path / "broken.pdf", "--store", tmp_path / "store")
    lines = [line for line in err.splitlines() if "to encode" not in line]
    assert code == 1 and len(lines) == 2 and not caplog.records
    assert (
        lines[0].startswith(f"skipped {tmp_path / 'broken.pdf'}: not a PDF that can be read") and "error:" in lines[1]
    )


def test_a_port_in_use_is_one_line(kvlink, store_of, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = kvlink("serve", "--store", store_of("one"), "--port", port)
    assert code == 1 and out == "" and is_one_line(err) and not caplog.records
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in err


def test_htm_and_markdown_files_are_read_as_html_and_md(tmp_path):
    (tmp_path / "a.htm").write_text("<html><head><title>Horns</title></head><body><p>Bertha</p></body></html>")
    (tmp_path / "b.markdown").write_text("# Trams\n\nGreen ones.")
    first, second = load([tmp_path], 1000)
    assert (first.title, first.text.strip()) == ("Horns", "Bertha")
    assert (second.title, second.text.strip()) == ("Trams", "Green ones.")
