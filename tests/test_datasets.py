"""Question files in their authors' forms are read as they are published; what cannot be read is named by place."""

from __future__ import annotations

import gzip
import json

import pytest

from kvlink_rag import Document
from kvlink_rag.errors import BadInput
from kvlink_rag.evaluation.datasets import arranged, read_data
from kvlink_rag.questions import SUMMARY, Example

HOTPOT = {
    "_id": "1",
    "question": "Which horn is older?",
    "answer": "Bertha",
    "supporting_facts": [["Horns", 0]],
    "context": [["Ferries", ["One leaves at nine.", " One at ten."]], ["Horns", ["Bertha is the older."]]],
}
MUSIQUE = {
    "id": "2hop__1",
    "question": "Who cast the horn?",
    "answer": "Wendle",
    "answer_aliases": ["J. Wendle"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Horns", "paragraph_text": "Wendle cast it.", "is_supporting": True},
        {"idx": 1, "title": "Trams", "paragraph_text": "Blue.", "is_supporting": False},
    ],
}
NQ = {
    "question": "when was it lit",
    "answers": ["1874"],
    "ctxs": [
        {"title": "Tram", "text": "Blue.", "isgold": False},
        {"title": "Light", "text": "Lit in 1874.", "isgold": True},
    ],
}
SQUAD = {
    "title": "Marrow_Bay",
    "paragraphs": [
        {
            "context": "Lit in 1874.",
            "qas": [
                {"question": "When?", "answers": [{"text": "1874"}, {"text": "in 1874"}, {"text": "1874"}]},
                {"question": "Why?", "answers": [], "is_impossible": True},
            ],
        }
    ],
}
TRIVIA = {
    "Question": "Who cast it?",
    "Answer": {"Value": "Wendle", "Aliases": ["Wendle", "Josiah Wendle"]},
    "EntityPages": [{"Title": "Horns", "Filename": "Horns.txt"}, {"Title": "Gone", "Filename": "Gone.txt"}],
}


def test_hotpotqa_and_2wikimultihopqa(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([HOTPOT]), "utf-8")
    (example,) = read_data(path)
    assert example.answers == ("Bertha",) and example.gold == {1}
    assert example.documents == (
        Document("One leaves at nine. One at ten.", title="Ferries"),
        Document("Bertha is the older.", title="Horns"),
    )


def test_sentences_without_spaces_between_them_get_one(tmp_path):
    """As 2WikiMultihopQA publishes them."""
    path = tmp_path / "dev.json"
    context = [["Ferries", ["One leaves at nine.", "One at ten.", " And one at noon."]], ["Horns", ["Bertha."]]]
    path.write_text(json.dumps([{**HOTPOT, "context": context}]), "utf-8")
    (example,) = read_data(path)
    assert example.documents[0].text == "One leaves at nine. One at ten. And one at noon."


def test_musique_leaves_out_what_has_no_answer(tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (MUSIQUE, {**MUSIQUE, "answerable": False})), "utf-8")
    (example,) = read_data(path)
    assert example.answers == ("Wendle", "J. Wendle") and example.gold == {0}


def test_natural_questions_compressed(tmp_path):
    path = tmp_path / "nq.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(NQ).encode()))
    (example,) = read_data(path)
    assert example.answers == ("1874",) and example.gold == {1} and example.documents[1].title == "Light"


def test_squad_asks_what_can_be_answered(tmp_path):
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [SQUAD]}), "utf-8")
    (example,) = read_data(path)
    assert example.answers == ("1874", "in 1874") and example.documents == (
        Document("Lit in 1874.", title="Marrow Bay"),
    )


def test_triviaqa_reads_its_pages_from_the_evidence_folder(tmp_path):
    for name in ("qa", "evidence/wikipedia"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "evidence/wikipedia/Horns.txt").write_text("Wendle cast it.\n" + "word " * 900, "utf-8")
    path = tmp_path / "qa" / "wikipedia-dev.json"
    path.write_text(json.dumps({"Data": [TRIVIA]}), "utf-8")
    (example,) = read_data(path)
    assert example.answers == ("Wendle", "Josiah Wendle")
    assert [document.title for document in example.documents] == ["Horns"]
    assert len(example.documents[0].text.split()) == 500
    (tmp_path / "evidence/wikipedia/Horns.txt").unlink()
    with pytest.raises(BadInput, match="evidence"):
        read_data(path)


def test_samsum_and_multi_news_want_summaries(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(
        json.dumps([{"id": "1", "dialogue": "A: Nine?\nB: Nine.", "summary": "They meet at nine."}]), "utf-8"
    )
    (example,) = read_data(path)
    assert example.wanted == SUMMARY and example.answers == ("They meet at nine.",)
    (tmp_path / "test.src").write_text("One.NEWLINE_CHAR Two. ||||| Three.\n", "utf-8")
    (tmp_path / "test.tgt").write_text("\u2013 All of it.\n", "utf-8")
    (example,) = read_data(tmp_path / "test.src")
    assert [document.text for document in example.documents] == ["One.\n Two.", "Three."]
    assert example.wanted == SUMMARY and example.answers == ("All of it.",)


def test_multi_news_as_it_is_published(tmp_path):
    """Articles cleaned, beside summaries that are not; signs within an article that end a line for Python alone."""
    (tmp_path / "test.src.cleaned").write_text("One.\u2028Two.\nThree.\n", "utf-8")
    (tmp_path / "test.tgt").write_text("First.\nSecond.\n", "utf-8")
    first, second = read_data(tmp_path / "test.src.cleaned")
    assert first.documents[0].text == "One.\u2028Two." and first.answers == ("First.",)
    assert second.documents[0].text == "Three." and second.answers == ("Second.",)


def test_the_own_form_knows_sets_that_want_summaries(tmp_path):
    row = {"question": "q", "answers": ["a"], "documents": [{"text": "t", "is_gold": True}]}
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({**row, "dataset": "samsum"}) + "\n" + json.dumps(row), "utf-8")
    assert [example.wanted for example in read_data(path)] == ["summary", "answer"]
    assert len(read_data(path, 1)) == 1
    assert len(read_data("sample", 5)) == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"question": "Why?"}',
            r"in no form known here: question, answers, documents \(its first record is without answers and doc",
        ),
        ("a.jsonl", '{"text": 1}', "in no form known here: question, answers, documents, or that of HotpotQA"),
        ("a.jsonl", "", "holds no question: it is empty"),
        ("a.json", "[]", "holds no question: it is empty"),
        ("a.json", "[", "cannot be read as JSON"),
        ("a.jsonl", json.dumps(NQ) + "\n{", r"a.jsonl:2: no JSON"),
        ("a.jsonl", json.dumps(NQ) + "\n" + json.dumps({"ctxs": []}), r"a.jsonl:2: not a record of NaturalQuestions"),
        ("a.json", json.dumps([HOTPOT, {**HOTPOT, "context": [["x"]]}]), "record 2: not a record of HotpotQA"),
        ("a.src", "One.", "a.tgt beside it cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(BadInput, match=message):
        read_data(tmp_path / name)
    with pytest.raises(BadInput, match="SQuAD"):
        read_data("trivia_qa_please")


EXAMPLE = Example("q", ("a",), tuple(Document(str(n)) for n in range(6)), frozenset({2, 4}))


def texts(example):
    return "".join(document.text for document in example.documents)


def test_documents_are_put_in_order():
    assert texts(arranged(EXAMPLE, order="original", num_documents=None, seed=0)) == "012345"
    shuffled = arranged(EXAMPLE, order="shuffled", num_documents=None, seed=0)
    assert sorted(texts(shuffled)) == list("012345") != list(texts(shuffled))
    assert shuffled == arranged(EXAMPLE, order="shuffled", num_documents=None, seed=0)
    assert {texts(shuffled)[place] for place in shuffled.gold} == {"2", "4"}
    first, last = (arranged(EXAMPLE, order=f"gold@{n}", num_documents=None, seed=0) for n in (1, 6))
    assert texts(first) == "201345" and texts(last) == "013452" and first.gold == {0, 4} and last.gold == {3, 5}
    for order, num in (("gold@7", None), ("gold@3", 2)):  # clamped, a table would say under gold@7 what is of gold@6
        with pytest.raises(BadInput, match=f"order {order}: there are {num or 6} documents of '{EXAMPLE.question}'"):
            arranged(EXAMPLE, order=order, num_documents=num, seed=0)
    for order in ("backwards", "gold@0", "gold@x"):
        with pytest.raises(BadInput, match="original, shuffled, gold@N"):
            arranged(EXAMPLE, order=order, num_documents=None, seed=0)


def test_of_fewer_documents_the_gold_ones_stay():
    few = arranged(EXAMPLE, order="original", num_documents=3, seed=0)
    assert texts(few) == "024" and few.gold == {1, 2}
    assert texts(arranged(EXAMPLE, order="original", num_documents=1, seed=0)) == "2"
    assert texts(arranged(EXAMPLE, order="original", num_documents=99, seed=0)) == "012345"
