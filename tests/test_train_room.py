"""What is taught fits: with its evidence into max_tokens, and with all around it into the model's window."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
from boxes import examples, settings

from kvlink_rag import LanguageModel
from kvlink_rag.chunking import chunk_text
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.questions import Example
from kvlink_rag.training.lessons import make_lessons
from kvlink_rag.training.steps import Pool, Steps, StepSettings
from kvlink_rag.training.train import train
from kvlink_rag.types import Document

LONG = Document("Box 500: red. " + "word " * 600)  # some 3,000 tokens, beyond the tiny model's 2,048


def steps_of(encoder, lessons, *, size=8, max_tokens=2048, causal_share=0.0):
    chosen = StepSettings(
        num_links=2,
        num_slots=2,
        min_documents=2,
        max_documents=10,
        max_tokens=max_tokens,
        causal_share=causal_share,
        with_teacher=False,
    )
    return Steps([Pool(lessons, 1.0)], encoder, chosen, size=size, seed=0)


def texts(encoder, step):
    """What a step's documents and turns say."""
    decode, layout = encoder.model.tokenizer.decode, step.linked
    turns = [layout.ids[layout.turn == turn].tolist() for turn in range(int(layout.turn.max()) + 1)]
    return [decode(list(ids)) for ids in step.chunk_ids], [decode(ids) for ids in turns]


def trained(base, out, data, **changes):
    model = LanguageModel.load(base, dtype="float32")
    return train(model, data, out, settings(steps=4, trainable="links", **changes))


@pytest.mark.parametrize(
    ("max_tokens", "boxes", "asked"),
    [
        (2048, "8 6 7, 1 2, 4 5, 10 8 9, 7 8 9, 3 4, 4 2 3, 12 11 13", "7, 1, 5 4, 9 8, 8, 4, 3, 12 11"),
        (50, "8 7, 1 2, 4 5, 9, 7 8, 3 4, 4 3, 12 11", "7, 1, 5 4, 9, 8, 4, 3, 12 11"),
    ],
)
def test_the_steps_of_a_seed_are_those_of_earlier_versions(max_tokens, boxes, asked, tiny):
    """By the numbers of the boxes: the documents of each step in order, and what is asked of them."""
    encoder = Encoder(tiny)
    lessons = make_lessons(examples(), max_turns=16)
    steps = steps_of(encoder, lessons, max_tokens=max_tokens, causal_share=0.5)
    found = [texts(encoder, steps[number]) for number in range(len(steps))]
    assert ", ".join(" ".join(re.findall(r"Box (\d+):", "".join(documents))) for documents, _ in found) == boxes
    assert ", ".join(" ".join(re.findall(r"Box (\d+)\?", "".join(turns))) for _, turns in found) == asked


def test_what_needs_more_than_fits_is_left_out_counted_and_said_once(base, tmp_path, caplog):
    """Of two files: the documents together too long, one alone too long, and a question too long for the window."""
    boxes = examples()
    needy = replace(boxes[0], documents=tuple(Document(f"{d.text} {'word ' * 150}") for d in boxes[0].documents))
    needy = replace(needy, gold=frozenset({0, 1, 2}))
    data = {
        "boxes": [needy, *boxes],
        "more": [replace(boxes[1], documents=(LONG,), gold=frozenset({0})), replace(boxes[2], question="why " * 600)],
        "fine": boxes[:4],
    }
    with caplog.at_level(logging.WARNING):
        about = trained(base, tmp_path / "out", data)
    assert about["left_out"] == {"boxes": 1, "more": 2}
    assert about["data"] == {"boxes": 13, "more": 2, "fine": 4}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "left out, 1 of 13 in boxes, 2 of 2 in more: what each needs" in said and "max_tokens 2048 or" in said


def test_where_nothing_fits_there_is_no_run(base, tmp_path):
    with pytest.raises(BadInput, match=r"none of the examples fits.*max_tokens 5 .*window of 2048.*shorter documents"):
        trained(base, tmp_path / "out", {"boxes": examples()}, max_tokens=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gold", [frozenset({0}), frozenset()], ids=["known", "unknown"])
def test_a_document_longer_than_a_context_is_in_none(gold, base, tmp_path):
    """Alone it had been let in, however long."""
    long = Example("Box 500?", ("red",), (LONG,), gold)
    with pytest.raises(BadInput, match="none of the examples fits"):
        trained(base, tmp_path / "out", {"long": [long]})


def test_no_question_is_taught_without_its_evidence(tiny):
    """One that does not fit beside what another needs is not asked there, and leads no context."""
    encoder = Encoder(tiny)
    documents = tuple(Document(f"Text {number} " + "word " * 20) for number in range(4))
    own = Example("Own?", ("one",), documents, frozenset({3}))
    greedy = Example("All?", ("four",), documents, frozenset({0, 1, 2, 3}))
    (lesson, _) = make_lessons([own, greedy], max_turns=2)
    assert [item.question for item in lesson.asked] == ["Own?", "All?"]
    room = 2 * len(encoder.token_ids(chunk_text(documents[0].text, None)))
    steps = steps_of(encoder, [lesson], size=1, max_tokens=room)
    for asked in (lesson.asked, lesson.asked[::-1]):  # drawn in either order
        found, turns = texts(encoder, steps.step(replace(lesson, asked=asked)))
        assert len(found) == 2 and "Text 3" in found[1]
        assert [turn.split("?")[0] for turn in turns] == ["Own"]


@pytest.mark.parametrize("max_tokens", [2048, 10_000])
def test_no_position_is_beyond_the_window(max_tokens, tiny):
    """Whatever max_tokens allows: documents and questions that are too much stay out."""
    encoder = Encoder(tiny)
    documents = tuple(Document(f"Text {number} " + "word " * 80) for number in range(8))
    asked = [
        Example(f"{number}? {'why ' * (150 * (number % 2))}", ("x",), documents, frozenset({number}))
        for number in range(8)
    ]
    steps = steps_of(encoder, make_lessons(asked, max_turns=8), size=32, max_tokens=max_tokens)
    longest = 0
    for number in range(len(steps)):
        layout = steps[number].linked
        longest = max(longest, int(layout.position.max()) + 1)
        assert steps[number].chunk_ids and int(layout.turn.max()) >= 0
    assert 0.7 * tiny.max_positions < longest <= tiny.max_positions
