"""Answers made together are those made alone, whatever their company."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tiny_models import build, build_hf, byte_tokenizer

from kvlink_rag import Document, LanguageModel
from kvlink_rag.batching import Batch
from kvlink_rag.compute import compute
from kvlink_rag.rows import NUM_ROWS

DOCUMENTS = [Document(f"Tower {n} stands on hill {n * 7}; its keeper is K{n}.", id=str(n)) for n in range(8)]
QUESTIONS = [f"Who keeps tower {n}?" for n in range(8)]
OPTIONS = [
    {"k": 1, "max_new_tokens": 9},
    {"k": 3, "max_new_tokens": 24},
    {"k": 2, "max_new_tokens": 1},
    {"documents": [], "max_new_tokens": 12},
    {"linking": "full", "k": 2, "max_new_tokens": 15},
    {"k": 2, "temperature": 0.8, "top_p": 0.9, "seed": 5, "max_new_tokens": 20},
    {"linking": "plain", "k": 3, "max_new_tokens": 17},
    {"k": 1, "linking": "fixed_positions", "temperature": 1.5, "seed": 1, "stop": ["e"], "max_new_tokens": 40},
]


def answers(rag, width, *, at_once):
    """All questions through one batch, up to so many at once."""
    batch, pieces, ends = Batch(rag.model, width), [[] for _ in QUESTIONS], []

    def work(job):
        todo = list(zip(QUESTIONS, OPTIONS, pieces, strict=True))
        while todo or batch.num_rows:
            while todo and batch.has_room and batch.num_rows < at_once:
                question, options, own = todo.pop(0)
                rag.begin(batch, question, own.append, ends.append, **options)
            batch.step()

    compute.run(work)
    assert ends == [None] * len(QUESTIONS)
    return [own[-1].answer for own in pieces]


@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
def test_an_answer_does_not_depend_on_its_company(family, open_rag):
    rag = open_rag(build(family))
    rag.add(DOCUMENTS)
    expected = [rag.ask(question, **options) for question, options in zip(QUESTIONS, OPTIONS, strict=True)]
    for width in (1, 4):
        alone = answers(rag, width, at_once=1)
        together = answers(rag, width, at_once=4)
        assert [a.text for a in together] == [a.text for a in alone] == [a.text for a in expected]
        assert [a.tokens.generated for a in together] == [a.tokens.generated for a in expected]
        assert [a.finish_reason for a in together] == [a.finish_reason for a in expected]
    assert len({a.text for a in expected}) >= 5  # the questions are not all answered alike


@pytest.mark.parametrize(("family", "width"), [("llama", NUM_ROWS), ("gemma3-window", NUM_ROWS), ("mixtral", 1)])
def test_only_a_model_whose_rows_do_not_touch_each_other_shares_products(family, width):
    """Experts share out the rows: how many of them get the same expert decides how each is rounded."""
    assert Batch(build(family)).width == width


def test_rows_of_the_default_model_are_the_same_to_the_last_bit_in_any_company(smollm):
    assert Batch(smollm).width == NUM_ROWS


def test_products_are_not_shared_in_a_dtype_that_the_processor_only_emulates(monkeypatch):
    """There every row costs as much as the first."""
    hf = build_hf("llama").to(torch.bfloat16)
    for is_native, width in ((True, NUM_ROWS), (False, 1)):
        monkeypatch.setattr("kvlink_rag.rows.has_native_bfloat16", lambda device, found=is_native: found)
        assert Batch(LanguageModel(hf, byte_tokenizer())).width == width


def test_an_answer_that_fails_takes_no_other_with_it(rag):
    rag.add(DOCUMENTS)
    expected = rag.ask(QUESTIONS[0], k=1, max_new_tokens=12).text
    batch, pieces, ends = Batch(rag.model), [], []

    def give_up(piece):
        raise KeyError("gone")

    def work(job):
        rag.begin(batch, QUESTIONS[0], pieces.append, ends.append, k=1, max_new_tokens=12)
        rag.begin(batch, QUESTIONS[1], give_up, lambda error: ends.append(error), k=1, max_new_tokens=12)
        while batch.num_rows:
            batch.step()

    compute.run(work)
    assert isinstance(ends[0], KeyError) and ends[1:] == [None]
    assert pieces[-1].answer.text == expected


def test_long_work_lets_others_through_between_its_steps():
    """What is asked for while long work is under way is done before that work ends."""
    order, is_asked = [], threading.Event()

    def long(job):
        is_asked.wait()
        compute.give_way()
        order.append("long")

    compute.submit(long)
    compute.submit(lambda job: order.append("short"))
    is_asked.set()
    compute.run(lambda job: None)
    assert order == ["short", "long"]


def test_giving_way_comes_to_an_end():
    """Work that asks for itself again and again cannot keep the other from going on."""
    turns = []

    def again(job):
        turns.append(time.monotonic())
        if len(turns) < 10**6:
            compute.submit(again)

    def long(job):
        compute.submit(again)
        compute.give_way(0.01)
        return len(turns)

    assert 0 < compute.run(long) < 10**6
    turns.extend([0.0] * 10**6)
    compute.run(lambda job: None)


def test_a_linking_under_its_own_attention_is_answered_alike(rag):
    """Tempered attention cannot be shared: such an answer is made in one go, and is the same."""
    rag.add(DOCUMENTS)
    expected = rag.ask(QUESTIONS[1], linking="parallel", max_new_tokens=9).text
    batch, pieces, ends = Batch(rag.model), [], []
    compute.run(
        lambda job: rag.begin(batch, QUESTIONS[1], pieces.append, ends.append, linking="parallel", max_new_tokens=9)
    )
    assert ends == [None] and batch.num_rows == 0 and pieces[-1].answer.text == expected
