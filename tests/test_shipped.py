"""The checkpoint that comes with the package serves the default model, and only where documents are asked."""

from __future__ import annotations

import pytest

from kvlink_rag import KVLinkEngine
from kvlink_rag.default_models import DEFAULT_MODEL
from kvlink_rag.errors import CheckpointMismatch
from kvlink_rag.links import SHIPPED, Checkpoint

DOCUMENTS = ["The fog horn of the lighthouse is called Old Bertha.", "The ferry leaves at nine in the morning."]


def test_it_is_small_and_says_what_it_is():
    checkpoint = Checkpoint.shipped_for(DEFAULT_MODEL)
    assert checkpoint is not None
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    card = (checkpoint.folder / "README.md").read_text("utf-8")
    for name in checkpoint.about["data"]:
        assert name.split(".")[0] in card


def test_it_says_what_was_measured_and_its_card_says_the_same():
    """Over all sets, as `kvlink eval` gives it; link tokens within two points of a full prefill by the same weights."""
    checkpoint = Checkpoint.shipped_for(DEFAULT_MODEL)
    evaluation = checkpoint.about["evaluation"]
    means = {arm: found["mean"] for arm, found in evaluation["arms"].items()}
    assert set(means) == {"full", "link_tokens", "plain", "control without links, plain", "untouched base, full"}
    for found in evaluation["arms"].values():
        assert found.keys() - {"mean"} == evaluation["questions"].keys()
        for metric in ("accuracy", "exact_match", "f1", "nll"):
            each = [found[name][metric][0] for name in evaluation["questions"]]
            assert found["mean"][metric][0] == pytest.approx(sum(each) / len(each), abs=1e-4)
            assert all(low <= mean <= high for mean, low, high in (of_set[metric] for of_set in found.values()))
    assert abs(means["full"]["accuracy"][0] - means["link_tokens"]["accuracy"][0]) < 0.02
    card = (checkpoint.folder / "README.md").read_text("utf-8")
    assert f"{sum(evaluation['questions'].values()):,} questions of six sets" in card
    for arm in ("full", "link_tokens", "control without links, plain", "untouched base, full"):
        assert f"{100 * means[arm]['accuracy'][0]:.1f} %" in card


def test_the_default_model_answers_with_it_unless_told_otherwise(tmp_path, loaded_once):
    """Same store, same KV; and without documents the answer is the untouched model's."""
    question = "What is the fog horn called?"
    with KVLinkEngine.load(store=tmp_path) as engine:
        assert engine.links.about["base_name"] == DEFAULT_MODEL
        answer = engine.ask(question, documents=DOCUMENTS, max_new_tokens=16)
        plain = engine.ask("Name a colour.", max_new_tokens=8)
        fingerprint = engine.fingerprint
    assert "Old Bertha" in answer.text and len(answer.text.split()) < 8
    with KVLinkEngine.load(store=tmp_path, links="untrained") as engine:
        assert engine.fingerprint == fingerprint
        untrained = engine.ask(question, documents=DOCUMENTS, max_new_tokens=16)
        assert all(source.reused for source in untrained.sources)
        assert engine.ask("Name a colour.", max_new_tokens=8).text == plain.text


def test_it_is_for_no_other_model(tiny):
    checkpoint = Checkpoint.shipped_for(DEFAULT_MODEL)
    assert not checkpoint.is_for(tiny.weights, tiny.origin)
    with pytest.raises(CheckpointMismatch, match="trained for"):
        checkpoint.links(tiny)
