"""A check passes what is as good as a full prefill, fails what is not, and a store remembers it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from test_exactness import model_of, random_links

from kvlink_rag import Document, KVLinkEngine, KVLinkRAG
from kvlink_rag.cli_check import report
from kvlink_rag.encoding import Encoder
from kvlink_rag.encoding_prefix import TASK, WITH_STAND_IN
from kvlink_rag.errors import BadInput
from kvlink_rag.evaluation import check as checking
from kvlink_rag.evaluation.agreement import compare
from kvlink_rag.evaluation.check import Exactness, LinkingCheck, Verdict, break_even, exactness
from kvlink_rag.evaluation.ttft import median_ttfts, run_ttft
from kvlink_rag.links import LinkTokens
from kvlink_rag.maintenance import remember_check, warnings
from kvlink_rag.questions import own_questions


def silent(stage, done, total):
    pass


def short_questions(number):
    """With two documents each, which fit the window of a model that reads bytes."""
    found = []
    for example in own_questions()[:number]:
        (gold,) = example.gold
        others = [document for place, document in enumerate(example.documents) if place != gold]
        found.append(replace(example, documents=(example.documents[gold], others[0]), gold=frozenset({0})))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3-window", "cohere2-nope"])
def test_stored_kv_is_held_against_a_masked_forward(family):
    model = model_of(family)
    found = exactness(Encoder(model), random_links(model, "link_tokens"), own_questions()[0])
    assert found.max_difference < 1e-3 and found.is_exact


def test_keys_at_wrong_positions_are_not_exact(monkeypatch):
    from kvlink_rag.context import Context

    place = Context.place
    monkeypatch.setattr(
        Context,
        "place",
        lambda context, kv, start, position=None: place(context, kv, start, position=max(0, start - 40)),
    )
    model = model_of("llama")
    found = exactness(Encoder(model), LinkTokens.untrained(model), own_questions()[0])
    assert found.max_difference > 0.1 and not found.is_exact


def test_a_full_prefill_agrees_with_itself_and_holds_answers_as_likely(tiny):
    found = compare(Encoder(tiny), LinkTokens.untrained(tiny), own_questions()[:2], ["full", "plain"], silent)
    assert found["full"].same == found["full"].tokens and max(map(abs, found["full"].gap)) < 1e-4
    assert len(found["plain"].gap) == 2 and max(map(abs, found["plain"].gap)) > 1e-3


def test_kv_comes_nearer_to_a_full_prefill_behind_what_stands_before_it_in_a_prompt(smollm):
    """The real model, its links untrained: what an encoding prefix is for."""
    examples, links = own_questions()[:6:3], LinkTokens.untrained(smollm)
    alone, task, document = (
        compare(Encoder(smollm, encoding_prefix=prefix), links, examples, ["plain"], silent)["plain"].agreement().kl
        for prefix in ("", TASK, WITH_STAND_IN)
    )
    assert max(task, document) < alone / 2


def test_every_question_that_comes_along_has_its_answer_in_the_documents():
    examples = own_questions()
    assert len(examples) == 24
    for example in examples:
        (gold,) = example.gold
        assert len(example.documents) == 5 and example.answers[0].lower() in example.documents[gold].text.lower()


def test_the_clock_runs_each_linking_over_one_context(tiny, embedder, tmp_path):
    runs = []
    with KVLinkRAG(tiny, embedder, tmp_path) as rag:
        found = median_ttfts(rag, ["full", "plain"], 900, 2, runs.append)
    assert set(found) == {"full", "plain"} and min(found.values()) > 0 and runs == [1, 2, 3]


@pytest.mark.parametrize(
    ("full", "linked", "expected"),
    [
        ((1.0, 2.0, 4.0), (0.5, 0.5, 0.5), 50),  # saves 0.5 at 100 and 1.5 at 200
        ((1.0, 2.0, 4.0), (1.5, 1.5, 1.5), 150),
        ((1.0, 2.0, 4.0), (3.0, 3.0, 3.0), 300),
        ((1.0, 2.0, 4.0), (5.0, 5.0, 5.0), None),
    ],
)
def test_it_pays_from_where_the_lines_cross(full, linked, expected):
    lengths = (100, 200, 400)
    assert break_even(lengths, full, linked) == expected


def verdict(**agreements):
    linkings = tuple(
        LinkingCheck(name, agreement, 0.1, gap, None, (0.1, seconds), 50)
        for name, (agreement, gap, seconds) in agreements.items()
    )
    return Verdict("m", "f" * 64, 2, Exactness(1e-5, 1.0), (500, 1000), (1.0, 2.0), linkings, 100)


def test_the_fastest_safe_linking_is_recommended():
    safe = verdict(link_tokens=(0.98, 0.01, 0.3), plain=(0.96, 0.02, 0.2), recompute_first=(0.2, 0.01, 0.1))
    assert safe.is_safe and safe.recommended == "plain" and "faster" in safe.advice
    assert verdict(link_tokens=(0.98, 0.01, 0.3)).advice == "link_tokens is safe to use for this model here"
    unsafe = verdict(link_tokens=(0.2, 0.01, 0.3), recompute_first=(0.98, 0.01, 0.5))
    assert not unsafe.is_safe and "recompute_first" in unsafe.advice
    assert verdict(link_tokens=(0.95, 9.0, 0.3)).recommended == "full"
    assert json.loads(json.dumps(safe.to_json()))["recommended"] == "plain"


def test_a_check_of_a_tiny_random_model_fails(tiny):
    """Its chunks depend on each other at random, and nothing has learnt to do without."""
    found = checking.check(tiny, LinkTokens.untrained(tiny), short_questions(2), ["fixed_positions"], repeats=1)
    assert found.exactness.is_exact and found.lengths and not found.is_safe
    assert found.linkings[0].linking == "fixed_positions" and len(found.full_ttft_s) == len(found.lengths)
    with pytest.raises(BadInput, match="no question"):
        checking.check(tiny, LinkTokens.untrained(tiny), [], ["plain"])
    with pytest.raises(BadInput, match="holds the others against"):
        checking.check(tiny, LinkTokens.untrained(tiny), short_questions(1), ["full"])
    with pytest.raises(BadInput, match="no context length to time: give one between 1 and 1,983"):
        checking.check(tiny, LinkTokens.untrained(tiny), short_questions(1), ["plain"], lengths=[0, 9999])


def test_questions_beyond_the_window_are_counted_and_not_asked(tiny):
    fitting = short_questions(1)[0]
    long = replace(fitting, documents=(*fitting.documents, Document("word " * tiny.max_positions)))
    found = checking.check(tiny, LinkTokens.untrained(tiny), [long, fitting], ["plain"], lengths=[900], repeats=1)
    assert (found.questions, found.too_long) == (1, 1)
    assert "1 questions (1 more are beyond the model's window)" in report(found)
    with pytest.raises(BadInput, match="all 1 questions with their documents are beyond 2,048 tokens"):
        checking.check(tiny, LinkTokens.untrained(tiny), [long], ["plain"])


def test_a_context_that_cannot_be_timed_is_refused_before_the_questions(tiny):
    stages = []
    with pytest.raises(BadInput, match="too short for 10 chunks"):
        checking.check(
            tiny,
            LinkTokens.untrained(tiny),
            short_questions(1),
            ["plain"],
            lengths=[100, 900],
            progress=lambda *stage: stages.append(stage),
        )
    with pytest.raises(BadInput, match="or beyond 2048"):
        run_ttft(tiny, LinkTokens.untrained(tiny), [900, 9999], 1, lambda *stage: stages.append(stage))
    assert not stages


def test_what_is_timed_is_read_from_disk_and_verified(tiny, monkeypatch):
    """Held in memory, loading would look cheaper than it is at the first question."""
    timed = []

    def watched(rag, *rest):
        timed.append((median_ttfts(rag, *rest), rag.stats()))
        return timed[-1][0]

    monkeypatch.setattr(checking, "median_ttfts", watched)
    checking.check(tiny, LinkTokens.untrained(tiny), short_questions(1), ["plain"], lengths=[900], repeats=1)
    ((_, stats),) = timed
    assert stats["hits"] >= 10 and stats["memory_hits"] == 0


def test_fewer_bits_at_rest_are_what_is_checked(tiny):
    def found(precision):
        return checking.check(
            tiny, LinkTokens.untrained(tiny), short_questions(1), ["plain"], precision=precision, repeats=1
        )

    whole, packed = found("model"), found("int4")
    assert packed.fingerprint != whole.fingerprint and packed.kv_bytes_per_token < whole.kv_bytes_per_token / 3
    assert packed.linkings[0].kl != whole.linkings[0].kl


def test_a_store_remembers_what_its_last_check_said(tiny, tmp_path, caplog):
    with KVLinkEngine(tiny, tmp_path, linking="plain") as engine:
        remember_check(engine.index, engine.checked_as, "plain", "plain differs too much", 2)
        for checked_as, linking in ((engine.checked_as, "link_tokens"), ("another recipe", "plain")):
            assert not list(warnings(engine.index, engine.fingerprint, checked_as, linking))
    with caplog.at_level(logging.WARNING):
        KVLinkEngine(tiny, tmp_path, linking="plain").close()
    assert [record.message for record in caplog.records] == [
        "the last kvlink check of this store (2 questions) failed: plain differs too much"
    ]
    with KVLinkEngine(tiny, tmp_path / "older", linking="plain") as engine:
        older = {"checked_as": engine.checked_as, "linking": "plain", "failure": "it differs"}  # without their number
        engine.index.set_meta("check", json.dumps(older))
        told = list(warnings(engine.index, engine.fingerprint, engine.checked_as, "plain"))
        assert told == ["the last kvlink check of this store failed: it differs"]
    caplog.clear()
    other = LinkTokens(torch.ones(1, 1, tiny.hidden_size), "other")
    KVLinkEngine(tiny, tmp_path, links=other, linking="plain").close()  # of which the check told nothing
    assert not caplog.records
    with KVLinkEngine(tiny, tmp_path, linking="full") as engine:
        remember_check(engine.index, engine.checked_as, "plain", None, 24)
    KVLinkEngine(tiny, tmp_path, linking="plain").close()
    assert not caplog.records
