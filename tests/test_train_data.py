"""From data files to what a step teaches: bad lines are named, lessons keep what their questions need."""

from __future__ import annotations

import gzip
import json
import math
import random

import pytest
import torch
from boxes import examples, run, settings

from kvlink_rag import LanguageModel
from kvlink_rag.chunking import chunk_text
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.questions import Example, read_examples, read_passages
from kvlink_rag.training import objectives
from kvlink_rag.training.lessons import draw, make_lessons
from kvlink_rag.training.steps import Pool, Steps, StepSettings
from kvlink_rag.training.train import train
from kvlink_rag.types import Document


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ('{"question": "q", "answers": ["a"]}', "not an example"),
        ('{"question": "q", "answers": ["a"], "documents": [{"passage": "p-9"}]}', "passage 'p-9'"),
        ('["q"]', "not an example"),
        ('{"question": 5, "answers": ["a"], "documents": []}', "question must be a text, not 5"),
        ('{"question": "q", "answers": ["a"], "documents": [{"text": null}]}', "text must be a text, not None"),
        (
            '{"question": "q", "answers": ["a"], "documents": [{"text": "t", "title": 3}]}',
            "title must be a text, not 3",
        ),
        ('{"question": "q", "answers": "Paris", "documents": []}', "answers must be a list of texts, not 'Paris'"),
    ],
)
def test_a_bad_line_is_named(line, words, tmp_path):
    good = json.dumps({"question": "q", "answers": ["a"], "documents": [{"text": "t"}]})
    path = tmp_path / "data.jsonl"
    path.write_text(f"{good}\n{line}\n", "utf-8")
    with pytest.raises(BadInput, match=words) as error:
        read_examples(path)
    assert f"{path}:2" in str(error.value)


def test_a_file_that_was_cut_off_is_named(tmp_path):
    whole = gzip.compress(json.dumps({"question": "q", "answers": ["a"], "documents": []}).encode())
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(whole[:-12])
    with pytest.raises(BadInput, match=r"data.jsonl.gz cannot be read: .*ended"):
        read_examples(path)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight, base, tmp_path):
    model = LanguageModel.load(base, dtype="float32")
    with pytest.raises(BadInput, match="weight of boxes must be a positive number"):
        train(model, {"boxes": examples()}, tmp_path / "out", settings(), weights={"boxes": weight})


def test_an_answer_of_no_token_is_refused_by_name(base, tmp_path):
    data = [*examples(2), Example("?", ("",), examples(1)[0].documents, is_whole=False)]
    with pytest.raises(BadInput, match="boxes: example 3 has an empty answer"):
        run(base, tmp_path / "out", data=data)


def test_the_teacher_s_words_count_by_how_likely_it_says_them():
    """KL of teacher from student, not the other way round."""
    says = {"student": torch.tensor([[0.5, 0.5]]), "teacher": torch.tensor([[0.9, 0.1]])}
    found = objectives.distill(says["student"].log(), torch.tensor([0]), says["teacher"].log())
    assert float(found) == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    both = objectives.mixed(says["student"].log(), torch.tensor([0]), says["teacher"].log())
    assert float(both) == pytest.approx((float(found) + math.log(2)) / 2)


def test_documents_may_be_named_instead_of_repeated(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "p-1", "title": "T", "text": "text"}\n', "utf-8")
    row = {"question": "q", "answers": ["a"], "documents": [{"passage": "p-1", "is_gold": True}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    found = read_examples(tmp_path / "d.jsonl", None, read_passages([tmp_path / "p.jsonl"]))
    assert found == [Example("q", ("a",), (Document("text", title="T"),), frozenset({0}))]


def test_questions_are_shared_only_where_their_documents_are_all_there():
    documents = [Document(text) for text in ("one", "two", "three")]
    one = Example("1?", ("1",), tuple(documents[:2]), frozenset({0}))
    both = Example("1 and 2?", ("12",), tuple(documents[:2]), frozenset({0, 1}))
    three = Example("3?", ("3",), tuple(documents), frozenset({2}))
    unknown = Example("what?", ("x",), tuple(documents), frozenset())
    lessons = make_lessons([one, both, three, unknown], max_turns=9)
    asked = [{item.question for item in lesson.asked} for lesson in lessons]
    assert asked == [{"1?", "1 and 2?"}] * 2 + [{"1?", "1 and 2?", "3?"}, {"1?", "1 and 2?", "3?", "what?"}]
    assert [len(lesson.asked) for lesson in make_lessons([one, both, three], max_turns=2)] == [2, 2, 2]
    assert lessons[3].asked[0].question == "what?"


def test_documents_beyond_the_limit_go_but_for_those_that_a_question_needs(tiny):
    documents = tuple(Document(f"text {number} " + "word " * 20) for number in range(6))
    (lesson,) = make_lessons([Example("5?", ("five",), documents, frozenset({4}))], max_turns=1)
    encoder = Encoder(tiny)
    ids = [encoder.token_ids(chunk_text(document.text, None)) for document in documents]
    settings = StepSettings(
        num_links=1,
        num_slots=1,
        min_documents=1,
        max_documents=6,
        max_tokens=3 * len(ids[0]),
        causal_share=0.0,
        with_teacher=False,
    )
    step = Steps([Pool([lesson], 1.0)], encoder, settings, size=1, seed=0).step(lesson)
    assert list(step.chunk_ids) == [ids[place] for place in (0, 1, 4)]


def test_an_answer_that_was_cut_off_is_not_taught_to_end_there(tiny):
    encoder = Encoder(tiny)
    settings = StepSettings(
        num_links=1,
        num_slots=1,
        min_documents=1,
        max_documents=1,
        max_tokens=999,
        causal_share=0.0,
        with_teacher=False,
    )
    learnt = []
    for is_whole in (True, False):
        example = Example("?", ("nine",), (Document("At nine."),), frozenset({0}), is_whole=is_whole)
        lessons = make_lessons([example], max_turns=1)
        layout = Steps([Pool(lessons, 1.0)], encoder, settings, size=1, seed=0).step(lessons[0]).linked
        learnt.append(layout.ids.tolist())
    whole, cut = learnt
    assert whole[: len(cut)] == cut and 0 < len(whole) - len(cut) <= 2


def test_a_drawn_lesson_keeps_what_its_questions_need():
    """Numbers of documents vary evenly between the bounds, and their order too."""
    documents = tuple(Document(f"text {number}") for number in range(8))
    lessons = make_lessons(
        [Example(f"{number}?", (str(number),), documents, frozenset({number})) for number in range(8)], max_turns=8
    )
    counts, firsts = set(), set()
    for seed in range(200):
        drawn = draw(lessons[3], random.Random(seed), min_documents=2, max_documents=5)
        texts = {document.text for document in drawn.documents}
        assert all(item.needs <= texts for item in drawn.asked)
        assert "3?" in {item.question for item in drawn.asked}
        assert len(drawn.asked) == len(texts)
        counts.add(len(texts))
        firsts.add(drawn.documents[0].text)
    assert counts == {2, 3, 4, 5}
    assert len(firsts) == 8
