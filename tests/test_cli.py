"""The `kvlink` command as people and scripts meet it: output, JSON forms, exit codes, one clear line per failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, excerpt
from tiny_models import build_hf, byte_tokenizer

from kvlink_rag import KVLinkRAG, LanguageModel, LinkTokens
from kvlink_rag.console import read_line
from kvlink_rag.store.folder import open_folder

CORPUS = ROOT / "examples" / "corpus"


@pytest.fixture(scope="module")
def store(smollm, embedder, tmp_path_factory):
    """A store of three documents."""
    folder, texts = tmp_path_factory.mktemp("cli") / "store", tmp_path_factory.mktemp("texts")
    with KVLinkRAG(smollm, embedder, folder) as rag:
        rag.add(
            excerpt("lighthouse.md", texts, 1, 4), excerpt("bakery.md", texts, 1), excerpt("tram-line.md", texts, 1)
        )
    return folder


def test_ask_answers_with_sources_and_times(kvlink, store):
    code, out, err = kvlink("ask", "What is the fog horn called?", "--store", store, "--max-new-tokens", 8)
    assert code == 0 and out.strip()
    assert "lighthouse.md" in err and "first token after" in err and "reused" in err


def test_ask_prints_its_json_form(kvlink, store):
    code, out, _ = kvlink(
        "ask", "When does the bakery open?", "--store", store, "--json", "-k", 2, "--max-new-tokens", 4
    )
    answer = json.loads(out)
    assert code == 0 and len(answer["sources"]) == 2 and all(source["reused"] for source in answer["sources"])
    assert answer["tokens"]["generated"] <= 4 and answer["linking"] == "link_tokens"


def test_chat_remembers_and_ends_with_the_input(kvlink, store, monkeypatch):
    lines = iter(["Who keeps the lighthouse?", "And since when?"])

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    code, out, _ = kvlink("chat", "--store", store, "--json", "-k", 1)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["question"] for answer in answers] == ["Who keeps the lighthouse?", "And since when?"]


def test_chat_asks_for_words_on_stderr_where_its_answers_go_to_a_file(monkeypatch, capsys):
    """stdin is a terminal, stdout is none: the answers there stay JSON lines."""
    terminal, ours = pytest.importorskip("pty").openpty()
    with open(terminal, "w", encoding="utf-8") as keyboard, open(ours, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        keyboard.write("Who keeps the lighthouse?\n")
        keyboard.flush()
        assert read_line() == "Who keeps the lighthouse?"
    out, err = capsys.readouterr()
    assert out == "" and err == "> "


def test_an_answer_cut_off_names_an_option_that_the_command_has(kvlink, store, monkeypatch):
    lines = iter(["Who keeps the lighthouse?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    for words in (["ask", "Who keeps the lighthouse?"], ["chat"]):
        code, _, err = kvlink(*words, "--store", store, "-k", 1, "--max-new-tokens", 2)
        assert code == 0 and "cut off at --max-new-tokens" in err


def test_the_store_is_looked_after_without_loading_a_model(kvlink, store):
    code, out, _ = kvlink("store", "stats", "--store", store, "--json")
    numbers = json.loads(out)
    assert code == 0 and numbers["documents"] == 3 and numbers["entries"] == numbers["chunks"]
    assert json.loads(kvlink("store", "list", "--store", store, "--json")[1])[0].endswith("bakery.md")
    assert json.loads(kvlink("store", "verify", "--store", store, "--json")[1])["dropped"] == 0
    assert json.loads(kvlink("store", "prune", "--store", store, "--json")[1])["pruned"] == 0
    code, _, err = kvlink("store", "delete", "never.md", "--store", store)
    assert code == 1 and "not in" in err


def test_delete_then_add_again(kvlink, store):
    _, horn, tram = json.loads(kvlink("store", "list", "--store", store, "--json")[1])
    path = Path(tram)
    assert kvlink("store", "delete", path, "--store", store)[0] == 0
    code, out, _ = kvlink("add", path, "--store", store, "--json")
    assert code == 0 and json.loads(out)["encoded_chunks"] == json.loads(out)["chunks"]
    report = json.loads(kvlink("add", horn, "--store", store, "--json")[1])
    assert report["encoded_chunks"] == 0 and report["reused_chunks"] == report["chunks"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["add", "nowhere.md"], "nowhere.md: no such file"),
        (["ask", "Why?"], "no store in"),
        (["ask", "  "], "question is empty"),
        (["store", "stats"], "no store in"),
        (["bench", "ttft", "--contexts", "many"], "--contexts takes numbers"),
        (["bench", "growth", "--chunks", "0"], "--chunks takes numbers"),
        (["add", "x" * 300], "no such file"),
        (["ask", "Why?", "--store", "x" * 300], "no store in"),
        *((["add", __file__, "--max-gib", size], "--max-gib") for size in ("inf", "nan", "-5", "0", "1e-12", "1e300")),
        (["add", __file__, "--device", "gpu"], "device 'gpu' is not available here; try auto, cpu"),
        (["add", __file__, "--device", "cuda:99"], "device 'cuda:99' is not available here; try auto, cpu"),
        (["add", __file__, "--device", "meta"], "device 'meta' is not available here; try auto, cpu"),
    ],
)
def test_bad_input_gets_one_clear_line_and_code_1(kvlink, tmp_path, arguments, line):
    where = [] if arguments[0] == "bench" or "--store" in arguments else ["--store", tmp_path / "new"]
    code, out, err = kvlink(*arguments, *where)
    assert code == 1 and out == "" and line in err and len(err.strip().splitlines()) == 1


def test_wrong_usage_is_code_2(kvlink):
    assert kvlink("add")[0] == 2
    assert kvlink("ask", "Why?", "-k", "0")[0] == 2
    assert kvlink("nonsense")[0] == 2


def test_files_that_give_no_document_are_named_and_counted(kvlink, store, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    (tmp_path / "picture.jpg").write_bytes(b"x")
    (tmp_path / "huge.txt").write_bytes(b"word " * 10_500_000)
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("words")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    code, out, err = kvlink("add", tmp_path, "--store", store, "--json")
    assert code == 1 and json.loads(out)["skipped_files"] == 7
    for reason in (
        "holds no text",
        "binary",
        "UTF-8",
        "not one of",
        "the limit is",
        "Unicode",
        "symbolic links",
        "nothing was added",
    ):
        assert reason in err


def test_a_file_that_can_no_longer_be_read_is_said_to_be_answered_from_as_it_was(kvlink, store, tmp_path):
    path = tmp_path / "prices.txt"
    path.write_text("Bread costs 5 crowns.")
    assert kvlink("add", path, "--store", store)[0] == 0
    path.write_bytes("Bröd kostar 9 kronor.".encode("latin-1"))
    code, _, err = kvlink("add", path, "--store", store)
    assert code == 1 and "UTF-8" in err and "its earlier version stays in the store" in err
    assert kvlink("store", "delete", path, path, "--store", store)[0] == 0


def test_a_file_that_its_folder_no_longer_holds_is_named(kvlink, tmp_path):
    """It is still answered from; one of another folder is not meant."""
    for name in ("a/one.txt", "a/two.txt", "ab/three.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"The box of {name} is red.")
    store = ("--store", tmp_path / "store")
    kvlink("add", tmp_path / "a", tmp_path / "ab", *store)
    for name in ("a/two.txt", "ab/three.txt"):
        (tmp_path / name).unlink()
    code, _, err = kvlink("add", tmp_path / "a", *store)
    gone = "no such file any more; delete it from the store, too (kvlink store delete); its earlier version stays"
    assert code == 0 and f"{tmp_path / 'a/two.txt'}: {gone}" in err and "three" not in err
    kvlink("store", "delete", tmp_path / "a/two.txt", *store)
    assert "no such file" not in kvlink("add", tmp_path / "a", *store)[2]


def test_questions_to_nobodys_documents_are_told_so(kvlink, store, tmp_path):
    """A mistyped namespace is an error and is not made; a store without documents answers with a word on it."""
    code, out, err = kvlink("ask", "Why?", "--store", store, "--namespace", "typo")
    assert code == 1 and out == "" and "no namespace 'typo'" in err
    assert list(json.loads(kvlink("store", "stats", "--store", store, "--json")[1])["namespaces"]) == ["public"]
    open_folder(tmp_path / "empty")
    code, _, err = kvlink("ask", "Why?", "--store", tmp_path / "empty", "--max-new-tokens", 1)
    assert code == 0 and "holds no documents" in err.replace("\n", "")
    assert kvlink("store", "list", "--store", tmp_path / "empty")[1] == ""


def test_a_chat_that_fills_the_window_goes_on_without_its_first_turn(kvlink, store, monkeypatch):
    lines = iter(["Who keeps the lighthouse?", "word " * 8300, "And since when?"])

    def read(prompt=""):
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    code, out, err = kvlink("chat", "--store", store, "--json", "-k", 1, "--max-new-tokens", 2)
    assert code == 0 and len(out.splitlines()) == 2 and "the first question and its answer are forgotten" in err


def test_a_folder_that_is_no_store_is_refused_before_any_model_loads(kvlink, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    code, _, err = kvlink("add", CORPUS / "lighthouse.md", "--store", tmp_path)
    assert code == 1 and "no kvlink store" in err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_budget_too_small_stops_before_anything_is_written(kvlink, tmp_path):
    code, _, err = kvlink("add", CORPUS / "lighthouse.md", "--store", tmp_path / "s", "--max-gib", "0.001")
    assert code == 1 and "are free" in err.replace("\n", " ")
    assert json.loads(kvlink("store", "stats", "--store", tmp_path / "s", "--json")[1])["documents"] == 0


def test_ctrl_c_in_the_middle_of_add_loses_nothing(kvlink, tmp_path):
    """Interrupted while entries are being written; the same command then finishes the job."""
    folder = tmp_path / "store"
    # A background shell starts its children with SIGINT ignored; a terminal does not.
    as_in_a_terminal = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import kvlink_rag.cli as c; c.main()"
    )
    paths = [str(excerpt(path.name, tmp_path, 1)) for path in sorted(CORPUS.glob("*.md"))[:12]]
    command = [sys.executable, "-c", as_in_a_terminal, "add", *paths, "--store", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(folder.glob("kv/??/*.kv"))) < 3 and process.poll() is None:
        time.sleep(0.01)  # until it is well under way
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 1 and "Run the same command again" in err
    code, out, err = kvlink("add", *paths, "--store", folder, "--json")
    report = json.loads(out)
    assert report.keys() >= {
        "documents", "chunks", "tokens", "encoded_chunks", "reused_chunks", "skipped_files", "bytes", "seconds",
        "tokens_per_s", "ids",
    }  # fmt: skip
    assert "MiB" in err  # what it will cost is said first
    assert code == 0 and 0 < report["encoded_chunks"] <= report["chunks"] - 3
    assert json.loads(kvlink("store", "stats", "--store", folder, "--json")[1])["entries"] == report["chunks"]


def test_eval_reads_questions_and_names_a_bad_line(kvlink, tmp_path):
    rows = [
        {
            "question": "Where is the tower?",
            "answers": ["on the hill"],
            "documents": [{"title": "T", "text": "It is on the hill."}],
        }
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    code, out, _ = kvlink("eval", "--data", path, "--linking", "full,link_tokens", "--max-new-tokens", 8, "--json")
    form = json.loads(out)
    assert code == 0 and [row["linking"] for row in form] == ["full", "link_tokens"]
    path.write_text(path.read_text() + "\n{}\n")
    code, _, err = kvlink("eval", "--data", path)
    assert code == 1 and f"{path}:2" in err.replace("\n", "")


def test_eval_takes_links_of_a_folder_with_an_equals_sign_and_linkings_behind_one(kvlink, tmp_path):
    base, data, links = tiny_folder(tmp_path), tmp_path / "data.jsonl", tmp_path / "rate=3"
    row = {"question": "Where?", "answers": ["here"], "documents": [{"text": "It is here.", "is_gold": True}]}
    data.write_text(json.dumps(row) + "\n", "utf-8")
    model = LanguageModel.load(base)
    LinkTokens.untrained(model, 2).save(links, model)
    options = ("eval", "--data", data, "--model", base, "--linking", "plain", "--max-new-tokens", 2, "--json")
    code, text, _ = kvlink(*options, "--links", links, "--links", "untrained=full,link_tokens")
    found = [(row["links"], row["linking"]) for row in json.loads(text)]
    assert code == 0 and found == [("rate=3", "plain"), ("untrained", "full"), ("untrained", "link_tokens")]


def tiny_folder(folder):
    """A tiny random model, saved."""
    build_hf("llama").save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    return folder / "tiny"


def test_train_writes_a_checkpoint_and_says_how_to_use_it(kvlink, tmp_path):
    base, data, out = tiny_folder(tmp_path), tmp_path / "data.jsonl", tmp_path / "out"
    row = {"question": "Where?", "answers": ["here"], "documents": [{"text": "It is here.", "is_gold": True}]}
    data.write_text(json.dumps(row) + "\n", "utf-8")
    options = ("--model", base, "--steps", 2, "--batch", 1, "--min-docs", 1, "--out", out)
    code, text, err = kvlink("train", "--data", f"{data}=2", *options)
    assert code == 0 and "1 examples, 2 steps; loss" in text and f"--links {out}" in text
    assert "step 2 of 2" in err and (out / "link.safetensors").exists()
    code, _, err = kvlink("train", "--data", data, *options)
    assert code == 1 and "--resume" in err
    options = (*options[:-1], tmp_path / "other")
    code, _, err = kvlink("train", *options)
    assert code == 1 and "--data" in err and "--store" in err
    code, _, err = kvlink("train", "--data", f"{data}=much", *options)
    assert code == 1 and "FILE=WEIGHT" in err


def test_train_goes_on_from_a_checkpoint(kvlink, tmp_path):
    """With as many links and slots as it has, unless told otherwise."""
    base, data, first = tiny_folder(tmp_path), tmp_path / "data.jsonl", tmp_path / "first"
    documents = [{"text": f"It is {place}."} for place in ("there", "here", "nowhere")]
    row = {"question": "Where?", "answers": ["here"], "documents": documents}
    data.write_text(json.dumps(row) + "\n", "utf-8")
    options = ("train", "--data", data, "--model", base, "--steps", 1, "--batch", 1, "--min-docs", 1)
    code, _, _ = kvlink(*options, "--num-link-tokens", 2, "--slots", 3, "--out", first)
    assert code == 0
    code, text, _ = kvlink(
        *options, "--start-from", first, "--trainable", "links", "--out", tmp_path / "second", "--json"
    )
    about = json.loads(text)
    assert code == 0 and [about["settings"][name] for name in ("num_link_tokens", "slots")] == [2, 3]
    assert (tmp_path / "second" / "reader" / "adapter_config.json").exists()
    shutil.rmtree(first)
    code, _, _ = kvlink(*options, "--trainable", "links", "--out", tmp_path / "second", "--resume")
    assert code == 0
    code, text, _ = kvlink("train", "--model", base, "--out", tmp_path / "second", "--export", "--json")
    assert code == 0 and json.loads(text)["start"]["files"]
    code, _, err = kvlink(*options, "--start-from", "untrained", "--out", tmp_path / "third")
    assert code == 1 and "names no checkpoint" in err
    code, _, err = kvlink(*options, "--start-from", "shipped", "--out", tmp_path / "third")
    assert code == 1 and "no checkpoint comes along for" in err.replace("\n", " ")


def test_documents_are_read_for_a_checkpoint_with_soft_tokens(kvlink, tmp_path):
    """Training says how; an example that there is no room for is not said to have been learnt."""
    base, data, out = tiny_folder(tmp_path), tmp_path / "data.jsonl", tmp_path / "out"
    texts = "It is here.", "It is not here. " * 200
    rows = [{"question": "Where?", "answers": ["here"], "documents": [{"text": text}]} for text in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = ("--model", base, "--steps", 1, "--batch", 1, "--min-docs", 1, "--max-tokens", 200)
    code, text, _ = kvlink("train", "--data", data, *options, "--num-soft-tokens", 3, "--out", out)
    told = text.replace("\n", " ")
    assert code == 0 and "1 examples, 1 steps" in told
    assert f"kvlink add FILES --model {base} --links {out}" in told
    (tmp_path / "a.txt").write_text("The tower stands on the hill.")
    store = ("--store", tmp_path / "store", "--model", base, "--links", out)
    code, text, _ = kvlink("add", tmp_path / "a.txt", *store)
    assert code == 0 and "1 encoded, 0 reused" in text
    code, text, _ = kvlink("ask", "Where is the tower?", *store, "--max-new-tokens", 2, "--json")
    assert code == 0 and [source["reused"] for source in json.loads(text)["sources"]] == [True]


def test_bench_ttft_prints_its_json_form(kvlink):
    code, out, _ = kvlink("bench", "ttft", "--contexts", "200", "--repeats", 1, "--json")
    (row,) = json.loads(out)
    assert code == 0 and set(row) >= {
        "context_tokens", "full_s", "linked_s", "floor_s", "reduction", "linked_over_floor", "kv_bytes_per_token",
        "encode_tokens_per_s",
    }  # fmt: skip
    assert 180 <= row["context_tokens"] <= 200


def test_help_is_there_for_every_command(kvlink):
    for command in (
        [],
        ["add"],
        ["ask"],
        ["chat"],
        ["eval"],
        ["train"],
        ["serve"],
        ["store"],
        ["bench"],
        ["store", "prune"],
    ):
        code, out, _ = kvlink(*command, "--help")
        assert code == 0 and "Usage: kvlink" in out


def test_check_fails_with_its_own_exit_code(kvlink, tmp_path):
    """A tiny random model passes no check; the figures are printed all the same."""
    documents = [{"text": f"Boat {number} leaves at {number}."} for number in range(1, 5)]
    rows = [{"question": f"When does boat {n} leave?", "answers": [f"at {n}"], "documents": documents} for n in (1, 3)]
    (tmp_path / "boats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    few = ["--data", tmp_path / "boats.jsonl", "--repeats", 1, "--contexts", "1200,1400"]
    few += ["--model", tiny_folder(tmp_path)]
    code, out, err = kvlink("check", "--linking", "fixed_positions", *few, "--json")
    found = json.loads(out)
    assert code == 3 and not found["safe"] and "fixed_positions differs too much" in err
    assert {row["linking"] for row in found["linkings"]} == {"fixed_positions", "plain", "recompute_first"}
    assert found["exactness"]["top1"] == 1.0 and len(found["full_ttft_s"]) == 2 and found["lengths"] == [1200, 1400]


def test_check_says_what_it_cannot_check(kvlink, tmp_path):
    code, _, err = kvlink("check", "--data", tmp_path / "none.jsonl")
    assert code == 1 and "none.jsonl" in err
    code, _, err = kvlink("check", "--linking", "magic")
    assert code == 1 and "magic" in err
    code, _, err = kvlink("check", "--linking", "full")
    assert code == 1 and "holds the others against" in err
    code, _, err = kvlink("check", "--contexts", "long")
    assert code == 1 and "--contexts takes numbers like 1000,2000" in err
    code, _, err = kvlink("check", "--namespace", "rome", "--embedder", "other")
    assert code == 1 and "--embedder and --namespace: of a store's documents; give --store" in err.replace("\n", " ")
