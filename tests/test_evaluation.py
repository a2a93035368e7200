"""Scores mean what they say, runs resume, and the arms of an evaluation answer as the product does."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import build, build_hf, byte_tokenizer

from kvlink_rag import Document, KVLinkEngine, LanguageModel, linking
from kvlink_rag.config import DEFAULT_SYSTEM
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.evaluation.agreement import agreement
from kvlink_rag.evaluation.answers import AnswerRun, Arm, summary
from kvlink_rag.evaluation.forced import Forcing
from kvlink_rag.evaluation.report import plot_ttft, table, write_report
from kvlink_rag.evaluation.scores import interval, score, score_summary
from kvlink_rag.links import LinkTokens
from kvlink_rag.prompt import build_prompt
from kvlink_rag.questions import SUMMARY, Example
from kvlink_rag.rows import NUM_ROWS

DOCUMENTS = (Document("The horn is called Old Bertha."), Document("The ferry leaves at nine.", title="Ferry"))
EXAMPLES = [
    Example("What is the horn called?", ("Old Bertha", "Bertha"), DOCUMENTS),
    Example("When does it leave?", ("nine",), DOCUMENTS),
]
LINKINGS = ["full", "plain", "link_tokens"]


@pytest.fixture(scope="module")
def with_reader():
    """A tiny model whose reader differs from what reads its documents in all but its embeddings."""
    hf, reader = build_hf("llama"), build_hf("llama", seed=3)
    reader.set_input_embeddings(hf.get_input_embeddings())
    return LanguageModel(hf, byte_tokenizer(), reader=reader)


def arm_of(model, label="untrained"):
    return Arm(model, LinkTokens.untrained(model), label)


def ask(engine, example, linking):
    return engine.ask(
        example.question, documents=example.documents, system=DEFAULT_SYSTEM, linking=linking, max_new_tokens=8
    ).text


@pytest.mark.parametrize("has_reader", [False, True])
def test_every_arm_answers_as_the_product_does(has_reader, tiny, with_reader, tmp_path):
    model = with_reader if has_reader else tiny
    run = AnswerRun([arm_of(model)], tmp_path / "out", max_new_tokens=8)
    run.run({"data": EXAMPLES}, list(linking.LINKINGS), lambda stage, done, total: None)
    with KVLinkEngine(model, tmp_path / "store") as engine:
        for row in run.rows:
            assert row["prediction"] == ask(engine, EXAMPLES[row["number"]], row["linking"])


def test_examples_answered_together_are_answered_as_each_is_alone(with_reader, tmp_path):
    """Answers of different lengths, from two files; linkings that join no others; a question without documents, which
    another model reads than the others."""
    questions = ["Leaves?", "When does it leave?", "What is it called?", "Why?", "Bertha?"]
    examples = [Example(question, ("nine",), DOCUMENTS[: 1 + n % 2]) for n, question in enumerate(questions)]
    data = {"a": examples, "b": [Example("Who?", ("nine",), ()), Example("Where is it?", ("nine",), DOCUMENTS)]}
    linkings = ["plain", "full", "parallel"]
    arm = arm_of(with_reader)
    assert arm.decoder.width == NUM_ROWS
    shares = []
    arm.decoder.forward = lambda rows, ask=arm.decoder.forward: shares.append(len(rows)) or ask(rows)
    together = AnswerRun([arm], tmp_path / "together", max_new_tokens=24)
    together.run(data, linkings, lambda stage, done, total: None)
    assert max(shares) == 3  # of the first four, one is read by another model
    for name, each in data.items():
        for number, example in enumerate(each):
            alone = AnswerRun([arm_of(with_reader)], tmp_path / f"{name}{number}", max_new_tokens=24)
            alone.run({name: [example]}, linkings, lambda stage, done, total: None)
            rows = [row for row in together.rows if (row["data"], row["number"]) == (name, number)]
            assert rows == [{**row, "number": number} for row in alone.rows]
    assert len({row["prediction"] for row in together.rows}) > len(examples)


def test_several_checkpoints_over_one_base_answer_as_each_does_alone(tiny, with_reader, tmp_path):
    """Their documents are read once, alone and in full, by the base that they share."""
    reader = with_reader.reader
    base, read = (LanguageModel(tiny.hf, byte_tokenizer(), reader=each) for each in (None, reader))
    arms = [arm_of(base, "base"), arm_of(read, "reader")]
    encoded, again = [], []
    for arm in arms:
        arm.forcing.encoded = lambda prompt, read=arm.forcing.encoded: encoded.append(prompt) or read(prompt)
        arm.forcing.again = lambda *given, ask=arm.forcing.again: again.append(given) or ask(*given)
    together = AnswerRun(arms, tmp_path / "together", max_new_tokens=8)
    together.run({"data": EXAMPLES}, LINKINGS, lambda stage, done, total: None)
    assert len(encoded) == len(again) == len(EXAMPLES)
    for label, model in (("base", base), ("reader", read)):
        alone = AnswerRun([arm_of(model, label)], tmp_path / label, max_new_tokens=8)
        alone.run({"data": EXAMPLES}, LINKINGS, lambda stage, done, total: None)
        assert alone.rows == [row for row in together.rows if row["links"] == label]
    assert together.rows[0]["nll"] != together.rows[3]["nll"]


def test_several_precisions_share_what_the_model_computed(tiny, tmp_path):
    links = LinkTokens.untrained(tiny)
    arms = [Arm(tiny, links, "a", precision) for precision in ("model", "int8", "int4")]
    encoded = []
    for arm in arms:
        arm.forcing.encoded = lambda prompt, read=arm.forcing.encoded: encoded.append(prompt) or read(prompt)
    together = AnswerRun(arms, tmp_path / "together", max_new_tokens=4)
    together.run({"data": EXAMPLES}, ["plain"], lambda stage, done, total: None)
    assert len(encoded) == len(EXAMPLES)
    nlls = [row["nll"] for row in together.rows if row["number"] == 0]
    assert len(set(nlls)) == 3
    alone = AnswerRun([Arm(tiny, links, "a", "int4")], tmp_path / "alone", max_new_tokens=4)
    alone.run({"data": EXAMPLES}, ["plain"], lambda stage, done, total: None)
    assert alone.rows == [row for row in together.rows if row["links"] == "a, int4"]


def test_an_arm_may_have_linkings_of_its_own(tiny, tmp_path):
    arms = [arm_of(tiny, "a"), Arm(tiny, LinkTokens.untrained(tiny), "b", linkings=["parallel"])]
    run = AnswerRun(arms, tmp_path, max_new_tokens=2)
    run.run({"data": EXAMPLES[:1]}, ["full", "plain"], lambda stage, done, total: None)
    assert [(row["links"], row["linking"]) for row in run.rows] == [("a", "full"), ("a", "plain"), ("b", "parallel")]


def test_nll_is_the_model_s_own_loss_on_the_answer(tiny):
    """Under full prefill it is what transformers computes from labels."""
    encoder = Encoder(tiny)
    chunk_ids = [encoder.token_ids("The horn is called Old Bertha.")]
    prompt = build_prompt(tiny.tokenizer, [{"role": "user", "content": "Called?"}], chunk_ids, system="Be brief.")
    answer = tiny.tokenizer.plain_ids("Old Bertha")
    _, logits = Forcing(encoder, LinkTokens.untrained(tiny)).logits(prompt, [], "full", answer)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    ids = torch.tensor([[*prompt.ids, *answer]])
    labels = ids.clone()
    labels[:, : len(prompt.ids)] = -100
    with torch.inference_mode():
        expected = tiny.hf(ids, labels=labels).loss
    assert abs(float(nll) - float(expected)) < 1e-4


def test_full_prefill_with_a_reader_reads_documents_without_it(with_reader):
    """Prefix and documents by one model, the question by the other, as transformers does it in two calls."""
    encoder = Encoder(with_reader)
    chunk_ids = [encoder.token_ids("The horn is called Old Bertha.")]
    prompt = build_prompt(with_reader.tokenizer, [{"role": "user", "content": "Called?"}], chunk_ids, system="Short.")
    _, logits = Forcing(encoder, LinkTokens.untrained(with_reader)).logits(prompt, [], "full", [5, 6, 7])
    read = torch.tensor([[*prompt.prefix_ids, *chunk_ids[0]]])
    asked = torch.tensor([[*prompt.question_ids, 5, 6]])
    with torch.inference_mode():
        cache = with_reader.hf(read, use_cache=True)[1]
        expected = with_reader.reader(asked, **{with_reader.cache_argument: cache}).logits[0, -3:]
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("cut", ['\n{"data": "da', ""])
def test_a_run_goes_on_where_it_was_cut_off(cut, tiny, tmp_path):
    links = LinkTokens.untrained(tiny)

    def run(data, linkings):
        found = AnswerRun([Arm(tiny, links, "untrained")], tmp_path, max_new_tokens=2)
        found.run({"data": data}, linkings, lambda stage, done, total: None)
        return found.rows

    first = run(EXAMPLES[:1], ["plain"])
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text("utf-8").rstrip() + cut, "utf-8")  # killed while writing
    rows = run(EXAMPLES, ["plain", "full"])
    assert rows[0] == first[0]
    assert sorted((row["number"], row["linking"]) for row in rows) == [
        (0, "full"), (0, "plain"), (1, "full"), (1, "plain")
    ]  # fmt: skip
    more = run(EXAMPLES, ["plain", "full", "fixed_positions"])[len(rows) :]
    assert [row["linking"] for row in more] == ["fixed_positions"] * 2
    assert all("top1" in row for row in [*rows[1:], *more])  # held against a full prefill that was there already
    rows += more
    assert run(EXAMPLES, ["plain", "full"]) == rows


def test_a_run_that_begins_while_another_writes_takes_none_of_its_rows(tiny, tmp_path):
    path = tmp_path / "results.jsonl"
    AnswerRun([arm_of(tiny)], tmp_path, max_new_tokens=2).run({"a": EXAMPLES}, ["plain"], lambda *_: None)
    lines = path.read_text("utf-8")
    path.unlink()
    with path.open("a", encoding="utf-8") as other:
        other.write(lines[:-40])
        other.flush()
        run = AnswerRun([arm_of(tiny)], tmp_path, max_new_tokens=2)
        other.write(lines[-40:])
    run.run({"b": EXAMPLES}, ["plain"], lambda *_: None)
    assert [(row["data"], row["number"]) for row in run.rows] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_a_run_does_not_go_on_from_answers_that_were_made_otherwise(tiny, with_reader, tmp_path):
    """Of another dtype, checkpoint, length, or of other questions under the same name."""

    def run(model, name="data", max_new_tokens=2, examples=EXAMPLES):
        found = AnswerRun([arm_of(model)], tmp_path, max_new_tokens=max_new_tokens)
        found.run({name: examples}, ["plain"], lambda stage, done, total: None)
        return found.rows

    rows = run(tiny)
    halved = LanguageModel(build("llama").hf.to(torch.bfloat16), byte_tokenizer())
    trained = LanguageModel(with_reader.hf, byte_tokenizer(), reader=with_reader.reader, reader_adapter="its digest")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "friend")
    told_otherwise = LanguageModel(tiny.hf, tokenizer)
    others = [
        (lambda: run(halved), "with made_by float32, .* would be bfloat16, "),
        (lambda: run(halved, "more"), "with made_by float32, .* would be bfloat16, "),  # means over sets would mix them
        (lambda: run(trained), "with made_by float32, weights"),
        (lambda: run(told_otherwise), r"prompt \w+; of this run it would be .*prompt"),
        (lambda: run(tiny, max_new_tokens=3), "with at_most 2; of this run it would be 3"),
        (lambda: run(tiny, examples=EXAMPLES[::-1]), "number 0, with asked "),
    ]
    for other, said in others:
        with pytest.raises(BadInput, match=said):
            other()
    assert run(tiny) == rows
    assert len(run(tiny, "more", max_new_tokens=3)) == 2 * len(rows)


def test_an_arm_of_another_name_answers_the_same_questions_in_the_same_way(tiny, tmp_path):
    """Arms are held against each other by the number of a question in a file of that name."""

    def run(label, examples=EXAMPLES, max_new_tokens=2, model=tiny):
        found = AnswerRun([arm_of(model, label)], tmp_path, max_new_tokens=max_new_tokens)
        found.run({"data": examples}, ["plain"], lambda stage, done, total: None)
        return found.rows

    run("one")
    halved = LanguageModel(build("llama").hf.to(torch.bfloat16), byte_tokenizer())
    for other, said in (
        (lambda: run("two", EXAMPLES[::-1]), "number 0, with asked "),
        (lambda: run("two", max_new_tokens=3), "with at_most 2; of this run it would be 3"),
        (lambda: run("two", model=halved), "with made_by float32, .* would be bfloat16"),
    ):
        with pytest.raises(BadInput, match=said):
            other()
    assert len(run("two")) == 2 * len(EXAMPLES)


def test_rows_that_two_runs_made_are_counted_once(tiny, tmp_path):
    first, second = (AnswerRun([arm_of(tiny)], tmp_path, max_new_tokens=2) for _ in range(2))
    for run in (first, second):
        run.run({"data": EXAMPLES}, ["plain"], lambda stage, done, total: None)
    assert len((tmp_path / "results.jsonl").read_text("utf-8").splitlines()) == 4
    assert len(second.rows) == len(AnswerRun([arm_of(tiny)], tmp_path, max_new_tokens=2).rows) == 2


def test_an_example_without_an_accepted_answer_is_named(tiny, tmp_path):
    run = AnswerRun([arm_of(tiny)], tmp_path, max_new_tokens=2)
    with pytest.raises(BadInput, match="data: example 2 has no accepted answer"):
        run.run({"data": [EXAMPLES[0], Example("Why?", (), DOCUMENTS)]}, ["plain"], lambda stage, done, total: None)


def test_of_two_runs_into_one_folder_the_last_to_end_knows_all_rows(tiny, tmp_path):
    first, second = (AnswerRun([arm_of(tiny)], tmp_path, max_new_tokens=2) for _ in range(2))
    for run, name in ((first, "a"), (second, "b")):
        run.run({name: EXAMPLES}, ["plain"], lambda stage, done, total: None)
    assert [row["data"] for row in second.rows] == ["a", "a", "b", "b"]


def test_agreement_is_whole_with_a_full_prefill_itself(tiny, tmp_path):
    questions = [(example.question, example.documents) for example in EXAMPLES]
    with KVLinkEngine(tiny, tmp_path) as engine:
        same = agreement(engine, questions, "full")
        linked = agreement(engine, questions, "link_tokens")
    assert same.top1 == 1.0 and abs(same.kl) < 1e-5
    assert linked.top1 <= 1.0 and linked.kl > 1e-3
    assert same.num_tokens == linked.num_tokens > 0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It is the Old Bertha!", ["old bertha"], (1, 0, 0.67)),
        ("Old Bertha.", ["the old bertha", "x"], (1, 1, 1)),
        ("Young", ["old bertha"], (0, 0, 0)),
        ("Yes, it is known.", ["yes"], (1, 0, 0.4)),
        ("Nobody knows", ["no"], (0, 0, 0)),
        ("", ["yes"], (0, 0, 0)),
    ],
)
def test_scores(prediction, answers, expected):
    """Substring accuracy, but the first word where the answer is yes or no."""
    found = score(prediction, answers)
    assert (found.accuracy, found.exact_match) == expected[:2]
    assert found.f1 == pytest.approx(expected[2], abs=0.01)


def test_an_interval_holds_the_mean_and_narrows_with_more_values():
    few, many = interval([0, 1] * 10), interval([0, 1] * 1000)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert interval([0.25] * 7) == (0.25, 0.25)


def test_a_summary_has_a_row_per_data_set_and_arm_and_their_mean():
    def row(data, linking, accuracy):
        scores = {"accuracy": accuracy, "exact_match": 0.0, "f1": 0.0, "nll": 1.0}
        return {"data": data, "number": 0, "links": "x", "linking": linking, "num_documents": 1, "gold": 1, **scores}

    rows = summary([row("a", "full", 1.0), row("a", "plain", 0.0), row("b", "full", 0.0), row("b", "plain", 0.0)])
    assert [(r["data"], r["linking"], r["accuracy"]) for r in rows] == [
        ("a", "full", 1.0), ("a", "plain", 0.0), ("b", "full", 0.0), ("b", "plain", 0.0),
        ("mean of 2", "full", 0.5), ("mean of 2", "plain", 0.0),
    ]  # fmt: skip
    assert json.loads(json.dumps(rows)) == rows


def test_every_arm_is_held_against_the_full_prefill(tiny, tmp_path):
    """Along its first answer tokens: it agrees with itself wholly, others less, as `agreement` says too."""
    run = AnswerRun([arm_of(tiny)], tmp_path / "out", max_new_tokens=16)
    run.run({"data": EXAMPLES}, ["plain", "full"], lambda stage, done, total: None)
    of_full, of_plain = ([row for row in run.rows if row["linking"] == name] for name in ("full", "plain"))
    assert all(row["top1"] == 1.0 and abs(row["kl"]) < 1e-4 for row in of_full)
    with KVLinkEngine(tiny, tmp_path / "store") as engine:
        for example, row in zip(EXAMPLES, of_plain, strict=True):
            found = agreement(engine, [(example.question, example.documents)], "plain")
            assert row["top1"] == pytest.approx(found.top1, abs=1e-4) and row["kl"] == pytest.approx(found.kl, abs=1e-3)


def test_what_does_not_fit_the_window_is_counted_and_never_cut(tmp_path):
    model = build("llama", max_position_embeddings=400)
    long = Example("Called?", ("Bertha",), (Document("The horn is called Bertha. " * 20),))
    run = AnswerRun([arm_of(model)], tmp_path, max_new_tokens=8)
    run.run({"data": [EXAMPLES[1], long]}, ["full", "plain"], lambda stage, done, total: None)
    assert [row.get("too_long") is not None for row in run.rows] == [False, False, True, True]
    assert {(row["examples"], row["too_long"]) for row in summary(run.rows)} == {(1, 1)}
    assert "| too long |" in table(summary(run.rows))


def test_summaries_are_scored_by_rouge(tiny, tmp_path):
    assert score_summary("the cat sat on the mat", ["a dog", "the cat lay on the mat"]) == pytest.approx(
        5 / 6, abs=1e-3
    )
    asked = Example("Summarize.", ("They meet at nine.",), DOCUMENTS[:1], frozenset(), SUMMARY)
    run = AnswerRun([arm_of(tiny)], tmp_path, max_new_tokens=4)
    run.run({"news": [asked], "qa": EXAMPLES}, ["full"], lambda stage, done, total: None)
    of_news, of_qa, mean = summary(run.rows)
    assert "rouge_l" in of_news and "accuracy" not in of_news and "rouge_l" not in of_qa
    assert mean["accuracy"] == of_qa["accuracy"] and mean["rouge_l"] == of_news["rouge_l"]


def test_times_are_plotted_by_context(tmp_path):
    rows = [{"context_tokens": n, "full_s": n / 500, "linked_s": 0.3, "floor_s": 0.2} for n in (1000, 2000)]
    text = plot_ttft(rows, tmp_path / "ttft.svg").read_text("utf-8")
    assert all(f"<!-- {label} -->" in text for label in ("full prefill", "from stored KV", "tokens of context"))


def test_a_report_has_figures_a_table_and_plots(tmp_path):
    def row(number, linking, gold, accuracy):
        about = {"data": "a.jsonl", "number": number, "links": "x", "linking": linking, "num_documents": 3 + number}
        return {**about, "gold": gold, "accuracy": accuracy, "exact_match": 0.0, "f1": 0.0, "nll": 1.0}

    rows = [row(n, linking, n + 1, float(n % 2)) for n in range(4) for linking in ("full", "plain")]
    names = [path.name for path in write_report(rows, tmp_path)]
    assert names == [
        "summary.json",
        "summary.md",
        "paired.json",
        "paired.md",
        "accuracy.svg",
        "accuracy_by_gold.svg",
        "accuracy_by_num_documents.svg",
    ]
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == summary(rows)
    assert "| a.jsonl | x | plain | 4 | 50.0 (" in (tmp_path / "summary.md").read_text("utf-8")
    for name in names[4:]:
        assert "</svg>" in (tmp_path / name).read_text("utf-8")


def test_families_agree_on_what_is_forced():
    """Feeding an answer through linked chunks, windows or not, is what decoding it word by word would predict."""
    model = build("gemma3-window")
    encoder = Encoder(model)
    chunk_ids = [encoder.token_ids(document.text) for document in DOCUMENTS]
    prompt = build_prompt(model.tokenizer, [{"role": "user", "content": "Called?"}], chunk_ids, system="Be brief.")
    forcing = Forcing(encoder, LinkTokens.untrained(model))
    kvs = forcing.chunks(prompt)
    _, at_once = forcing.logits(prompt, kvs, "link_tokens", [5, 6, 7, 8])
    for length in (1, 2, 3):
        _, step = forcing.logits(prompt, kvs, "link_tokens", [5, 6, 7, 8][:length])
        assert (step[-1] - at_once[length - 1]).abs().max() < 1e-4
