"""The benchmark of rivals asks all of them the same, and says what it measured and what it could not."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from kvlink_rag.default_models import default_model_folder

sys.path.insert(0, str(ROOT / "benchmarks"))

import prompts
import rivals
import table

NUM_DOCUMENTS, TOKENS = 3, 60


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(default_model_folder(), local_files_only=True)


@pytest.fixture(scope="module")
def round_(tokenizer):
    return next(prompts.rounds(tokenizer, NUM_DOCUMENTS, TOKENS, 1))


def test_documents_have_the_same_length_wherever_they_stand(tokenizer, round_):
    """Chunks of that length fall on the documents, in every order."""
    for ask in round_:
        _, *documents, after = ask.parts
        ids = tokenizer("".join((*documents, after)), add_special_tokens=False)["input_ids"]
        starts = range(0, NUM_DOCUMENTS * TOKENS, TOKENS)
        assert [tokenizer.decode(ids[start : start + TOKENS]) for start in starts] == documents


def test_a_round_asks_anew_about_the_same_documents(tokenizer, round_):
    cold, same, shuffled = round_
    assert (cold.case, same.case, shuffled.case) == prompts.CASES
    assert same.documents == cold.documents != shuffled.documents
    assert sorted(shuffled.documents) == sorted(cold.documents) and shuffled.documents[0] != cold.documents[0]
    assert len({ask.question for ask in round_}) == 3
    assert all(ask.question in ask.parts[-1] and ask.system in ask.parts[0] for ask in round_)
    assert next(prompts.rounds(tokenizer, NUM_DOCUMENTS, TOKENS, 1)) == round_


def test_a_text_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no document of 60 tokens"):
        prompts.cut("A few words.", TOKENS, tokenizer)


def run(rival, case, seconds, number=0, **more):
    return {"rival": rival, "case": case, "round": number, "tokens_per_document": 100, "first_token_s": seconds, **more}


def test_the_table_holds_medians_and_their_shares_of_both_prefills():
    runs = [run(table.FULL, "cold", seconds, number) for number, seconds in enumerate((4.0, 100.0, 3.0))]
    runs += [run(table.VLLM, "cold", 2.0), run("ours", "shuffled", 0.5, own_clock_s=0.25, reused_tokens=7.0)]
    text = table.markdown({"runs": runs, "rivals": [table.FULL, "ours"], "failed": {}, "num_documents": 10})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ours")]
    assert rows[0] == ["ours", "", "", "0.500", "", "", "0.12", "", "", "0.25"]
    assert "medians of 3 rounds" in text


def test_the_table_names_what_did_not_run():
    results = {"runs": [run("ours", "cold", 1.0)], "rivals": ["ours", "theirs"], "failed": {"theirs": "no AVX"}}
    text = table.markdown({**results, "num_documents": 10})
    assert "| theirs | did not run |" in text and "**theirs** did not run, or not to the end: no AVX" in text


def test_first_tokens_are_held_against_an_exact_computation():
    runs = [run(table.EXACT, "cold", 1.0, first_token=" The"), run(table.EXACT, "shuffled", 1.0, first_token="A")]
    runs += [run("ours", "cold", 1.0, first_token="The"), run("ours", "shuffled", 1.0, first_token="It")]
    text = table.markdown({"runs": runs, "rivals": ["ours"], "failed": {}, "num_documents": 10})
    assert "| 1 of 2 |" in text


def test_a_rival_without_environment_or_that_dies_says_why(tmp_path):
    with pytest.raises(rivals.Failed, match="make rivals builds it"):
        rivals.Worker(rivals.Arm("none", "no-such", ("rival_none.py",)), (), 1, tmp_path / "log")
    with pytest.raises(rivals.Failed, match=r"No such file or directory \(exit code 2\)"):
        rivals.Worker(rivals.Arm("none", "", ("rival_none.py",)), (), 1, tmp_path / "log")


def test_our_own_arm_answers_from_what_it_stored(round_, tmp_path):
    """The worker as it is started for a measurement, on the default model."""
    arms = [arm for arm in rivals.ARMS if arm.name == "kvlink_rag"]
    shared = ("--model", str(default_model_folder()), "--max-tokens", "512", "--store", str(tmp_path / "store"))
    worker = rivals.Worker(arms[0], shared, 1, tmp_path / "log")
    try:
        runs = list(rivals.measure({arms[0].name: worker}, round_, 0, {}))
    finally:
        worker.close()
    assert [found["case"] for found in runs] == list(prompts.CASES)
    assert runs[0]["reused_tokens"] < TOKENS < NUM_DOCUMENTS * (TOKENS - 1) <= runs[2]["reused_tokens"]
    assert all(0 < found["own_clock_s"] <= found["first_token_s"] for found in runs)
