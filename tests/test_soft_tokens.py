"""Soft tokens: trained embeddings before each chunk, seen while it is encoded and by nobody else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from boxes import examples, run, settings
from oracle import masked_logits
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build

from kvlink_rag import KVLinkEngine, LanguageModel
from kvlink_rag.encoding import Encoder
from kvlink_rag.encoding_prefix import CHUNK_TEMPLATE, STAND_IN
from kvlink_rag.errors import BadInput, CheckpointMismatch
from kvlink_rag.evaluation.answers import Arm
from kvlink_rag.evaluation.check import _fits, check, exactness
from kvlink_rag.evaluation.forced import Forcing
from kvlink_rag.evaluation.ttft import words_per_chunk
from kvlink_rag.joining import LinkRequest
from kvlink_rag.linking import get_linking
from kvlink_rag.links import Checkpoint, LinkTokens, checkpoint_digest
from kvlink_rag.prompt import build_prompt
from kvlink_rag.questions import Example, own_questions
from kvlink_rag.recipe import embeddings_digest
from kvlink_rag.training.layout import Turn, lay_out
from kvlink_rag.training.learner import Learner, Step
from kvlink_rag.training.start import initial_links, make_learner
from kvlink_rag.training.train import train
from kvlink_rag.training.trainer import _optimizer
from kvlink_rag.types import Document

TEXTS = ["The horn can be heard for miles.", "A ferry leaves at noon.", "Sand."]
NUM_LINKS, NUM_SOFT = 2, 5
CHUNKS = ["Box 1: red.", "Box 2: blue."]


def random_links(model):
    torch.manual_seed(1)
    links, soft_tokens = torch.randn(1, NUM_LINKS, model.hidden_size), torch.randn(NUM_SOFT, model.hidden_size)
    return LinkTokens(links * 0.2, "random", soft_tokens=soft_tokens * 0.2)


def prompt_for(model, encoder):
    chunk_ids = [encoder.token_ids(text) for text in TEXTS]
    return build_prompt(model.tokenizer, [{"role": "user", "content": "When?"}], chunk_ids, system="Be brief.")


def expected_logits(model, prompt, encoder, links):
    """Of the question, by one forward over all, each chunk behind a copy of its own of what stands before it."""
    before = torch.cat((model.embed(encoder.prefix_ids), links.soft_tokens))
    runs, spans, place = [model.embed(prompt.prefix_ids)], [], len(prompt.prefix_ids)
    for ids in prompt.chunk_ids:
        runs += [before, model.embed(ids), links.embeddings[0]]
        spans.append((place, place + len(before) + len(ids)))
        place = spans[-1][1] + NUM_LINKS
    embeds = torch.cat((*runs, model.embed(prompt.question_ids)))
    return masked_logits(model.hf, embeds, spans, len(before), len(prompt.question_ids))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("encoding_prefix", ["Answer. ", ""], ids=["behind a prefix", "alone"])
def test_chunks_encoded_behind_soft_tokens_are_those_of_one_masked_forward(family, encoding_prefix):
    """Served: encoded, moved, linked."""
    model = build(family)
    links = random_links(model)
    encoder = Encoder(model, encoding_prefix=encoding_prefix, soft_tokens=links.soft_tokens)
    prompt = prompt_for(model, encoder)
    kvs = [kv for _, kv in sorted(encoder.encode(prompt.chunk_ids))]
    prefix = encoder.encode_alone(prompt.prefix_ids)
    context = get_linking("link_tokens").link(LinkRequest(model, prompt, prefix, kvs, links, room=1))
    pending = context.pending
    mask = model.position_mask(pending.positions, context.num_tokens)
    linked = model.logits(pending.embeds, pending.positions, mask, context.to_cache())[-len(prompt.question_ids) :]
    assert (linked - expected_logits(model, prompt, encoder, links)).abs().max() < 1e-4


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("trainable", ["links", "full"])
def test_a_training_step_predicts_what_is_served(family, trainable):
    """Documents read by the base with gradients, or all at once: what is served, and gradients reach what is learnt."""
    model = build(family)
    links = random_links(model)
    encoder = Encoder(model, encoding_prefix="Answer. ", soft_tokens=links.soft_tokens)
    prompt = prompt_for(model, encoder)
    expected = expected_logits(model, prompt, encoder, links)[-1]
    layout = lay_out(
        prompt.prefix_ids,
        prompt.chunk_ids,
        [Turn(prompt.question_ids, (7,))],
        num_links=NUM_LINKS,
        encoding_prefix=encoder.prefix_ids,
        num_soft=NUM_SOFT,
    )
    learner = Learner(model, None, links, trainable=trainable).train()
    step = Step(prompt.prefix_ids, prompt.chunk_ids, layout, None)
    logits = learner.logits(step, layout, (layout.predicts >= 0).nonzero()[:, 0])[0]
    assert (logits.detach() - expected).abs().max() < 1e-4
    logits[7].backward()
    if any(model.window(layer) is None for layer in range(model.num_layers)):  # else the documents are out of sight
        assert (learner.soft_tokens.grad.abs().sum(1) > 0).all() and (learner.links.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("trainable", ["links", "reader", "lora"])
@pytest.mark.parametrize("num_link_tokens", [0, 2])
def test_twenty_steps_lower_the_loss(trainable, num_link_tokens, base, tmp_path):
    changes = {"trainable": trainable, "num_link_tokens": num_link_tokens, "num_soft_tokens": 4}
    losses = run(base, tmp_path / "out", **changes)
    assert sum(losses[step] for step in range(17, 21)) < 0.98 * sum(losses[step] for step in range(1, 5))
    learnt = load_file(tmp_path / "out" / "link.safetensors")["soft_tokens"]
    begun = initial_links(LanguageModel.load(base, dtype="float32"), settings(**changes), None).soft_tokens
    assert learnt.shape == begun.shape and (learnt - begun).abs().max() > 0.01


def test_the_base_stays_as_it_is(base, tmp_path):
    """What links learn over documents behind soft tokens changes nothing of how these are read."""
    model = LanguageModel.load(base, dtype="float32")
    before = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    train(model, {"boxes": examples()}, tmp_path / "out", settings(trainable="links", num_soft_tokens=4, steps=2))
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.named_parameters())


def test_they_begin_as_the_last_words_of_a_made_up_document(tiny):
    ids = tiny.tokenizer.plain_ids(CHUNK_TEMPLATE.format(text=STAND_IN))
    newline = tiny.tokenizer.plain_ids("\n")[-1:]
    for num, expected in ((3, ids[-3:]), (len(ids) + 2, (*newline, *newline, *ids))):
        found = initial_links(tiny, settings(num_soft_tokens=num), None).soft_tokens
        assert torch.equal(found, tiny.embed(expected))
    assert initial_links(tiny, settings(), None).soft_tokens is None


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Four soft tokens, two links and a reader of 20 steps."""
    out = tmp_path_factory.mktemp("soft") / "checkpoint"
    run(base, out, trainable="reader", num_soft_tokens=4)
    return Checkpoint.open(out)


def test_a_checkpoint_says_that_it_has_them(trained, base, tmp_path):
    """In a format that an earlier version, which would leave them out, refuses to read."""
    about = json.loads((trained.folder / "kvlink.json").read_text("utf-8"))
    assert (about["format"], about["num_soft_tokens"]) == (2, 4)
    run(base, tmp_path / "without", steps=1)
    about = json.loads((tmp_path / "without" / "kvlink.json").read_text("utf-8"))
    assert about["format"] == 1 and "num_soft_tokens" not in about


def test_documents_read_without_them_are_never_answered_from(trained, base, tmp_path):
    """One store, two readings of the same chunks: each is read once, and kept beside the other."""
    reused = []
    for links in ("untrained", trained.folder, trained.folder, "untrained"):
        with KVLinkEngine.load(base, tmp_path / "store", links=links, dtype="float32") as engine:
            answer = engine.ask("Box 1?", documents=CHUNKS, max_new_tokens=2)
            reused.append([source.reused for source in answer.sources])
    assert reused == [[False, False], [False, False], [True, True], [True, True]]


def test_a_linked_answer_begins_as_the_masked_forward_says(trained, base):
    """From the files of a checkpoint to `kvlink check`'s arithmetic."""
    model = LanguageModel.load(base, dtype="float32")
    arm = Arm(model, trained.links(model), "trained")
    found = exactness(arm.encoder, trained.links(model), own_questions()[0])
    assert arm.encoder.soft_tokens is not None and found.max_difference < 1e-3 and found.is_exact


def test_links_are_refused_over_chunks_that_were_encoded_without_them(tiny):
    links = random_links(tiny)
    links.check_recipe(Encoder(tiny, soft_tokens=links.soft_tokens).recipe)
    other = Encoder(tiny, soft_tokens=links.soft_tokens + 1)
    for encoder in (Encoder(tiny), other):
        with pytest.raises(CheckpointMismatch, match="trained with 5 soft tokens before each chunk"):
            links.check_recipe(encoder.recipe)
    with pytest.raises(CheckpointMismatch, match="trained without soft tokens"):
        replace(links, soft_tokens=None).check_recipe(other.recipe)


def test_checkpoints_are_told_apart_by_them(tiny):
    links = random_links(tiny)
    digests = {checkpoint_digest(tiny, each) for each in (links, replace(links, soft_tokens=links.soft_tokens + 1))}
    assert len(digests | {checkpoint_digest(tiny, replace(links, soft_tokens=None))}) == 3


@pytest.mark.parametrize("change", ["gone", "cut", "too many"])
def test_a_file_without_those_that_kvlink_json_names_is_refused(change, trained, base, tmp_path):
    model = LanguageModel.load(base, dtype="float32")
    links = trained.links(model)
    links.save(tmp_path, model)
    about = json.loads((tmp_path / "kvlink.json").read_text("utf-8"))
    tensors = load_file(tmp_path / "link.safetensors")
    soft_tokens = tensors.pop("soft_tokens")
    if change == "cut":
        tensors["soft_tokens"] = soft_tokens[1:].contiguous()
    if change == "too many":
        tensors["soft_tokens"] = soft_tokens
        about["format"] = 1
    save_file(tensors, tmp_path / "link.safetensors")
    (tmp_path / "kvlink.json").write_text(json.dumps({**about, "files": None}), "utf-8")
    with pytest.raises(CheckpointMismatch, match=r"[04] soft tokens by kvlink.json, .* in the file"):
        Checkpoint.open(tmp_path).links(model)


def test_a_run_that_starts_from_a_checkpoint_goes_on_with_its_own(trained, base, tmp_path):
    model = LanguageModel.load(base, reader=trained.reader, dtype="float32")
    chosen = settings(trainable="reader", num_soft_tokens=4, steps=1)
    assert torch.equal(initial_links(model, chosen, trained).soft_tokens, trained.links(model).soft_tokens)
    about = train(model, {"boxes": examples()}, tmp_path / "out", chosen, start=trained.folder)
    assert about["log"][0]["loss"] < 0.9 * trained.about["log"][0]["loss"]
    again = LanguageModel.load(base, reader=trained.reader, dtype="float32")
    with pytest.raises(BadInput, match="has 4 soft tokens, and 0 were asked for; give as many"):
        train(again, {"boxes": examples()}, tmp_path / "other", settings(trainable="reader"), start=trained.folder)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(base, tmp_path):
    def stop(figures):
        if figures["step"] == 3:
            raise KeyboardInterrupt

    changes = {"trainable": "links", "num_soft_tokens": 4, "steps": 6, "save_minutes": 0}
    whole = run(base, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "cut", report=stop, **changes)
    resumed = run(base, tmp_path / "cut", resume=True, **changes)
    assert [resumed[step] for step in (4, 5, 6)] == pytest.approx([whole[step] for step in (4, 5, 6)], rel=1e-4)


@pytest.mark.parametrize("value", ["four", [4], None, -4, 0, 4.0, True])
def test_a_number_of_them_that_is_none_is_refused(value, trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    path = tmp_path / "copy" / "kvlink.json"
    path.write_text(json.dumps({**trained.about, "num_soft_tokens": value}), "utf-8")
    with pytest.raises(CheckpointMismatch, match="soft tokens, which is no number of them"):
        Checkpoint.open(path.parent)


def test_what_is_written_says_them_whatever_else_is_said(tiny, tmp_path):
    random_links(tiny).save(tmp_path, tiny, {"format": 1, "num_soft_tokens": 0})
    assert torch.equal(Checkpoint.open(tmp_path).links(tiny).soft_tokens, random_links(tiny).soft_tokens)


def test_encoder_and_links_that_do_not_belong_together_are_refused_where_they_are_measured(tiny):
    with pytest.raises(CheckpointMismatch, match="these chunks are encoded without"):
        exactness(Encoder(tiny), random_links(tiny), own_questions()[0])


def test_a_check_encodes_chunks_behind_them(tiny, monkeypatch):
    """All of it: what is held against the full prefill, and what is timed."""
    seen = set()
    encode = Encoder.encode

    def noted(encoder, chunks):
        seen.add(encoder.recipe.soft_tokens)
        return encode(encoder, chunks)

    monkeypatch.setattr(Encoder, "encode", noted)
    links = random_links(tiny)
    example = Example("When?", ("at noon",), tuple(map(Document, TEXTS)))
    check(tiny, links, [example], ["plain"], lengths=(1900,), repeats=1)
    assert seen == {embeddings_digest(links.soft_tokens)}


def test_more_of_them_than_the_window_holds_are_refused(tiny):
    """At once, and not when no chunk can be encoded any more."""
    with pytest.raises(BadInput, match=rf"the model's window of {tiny.max_positions} must hold a chunk behind them"):
        Encoder(tiny, soft_tokens=torch.ones(tiny.max_positions, tiny.hidden_size))
    for shape in ((0, tiny.hidden_size), (3, 7), (tiny.hidden_size,)):
        with pytest.raises(BadInput, match=r"soft tokens are embeddings \[1 or more, 64\]"):
            Encoder(tiny, soft_tokens=torch.ones(shape))


def test_they_are_counted_to_the_window(tiny, tmp_path):
    """A chunk that has no room behind them is not stored, not answered from, not checked with and not trained on."""
    links = LinkTokens(random_links(tiny).embeddings, "many", soft_tokens=torch.ones(1500, tiny.hidden_size) * 0.1)
    text = "It is here. " * 50
    with KVLinkEngine(tiny, tmp_path / "store", links=links) as engine:
        room = tiny.max_positions - 1500 - len(engine.encoder.prefix_ids)
        assert len(engine.encoder.token_ids(text)) > room
        assert f"the model's window has {room} for it" in engine.add_chunks({"long": text}).skipped[0]
        answer = engine.ask("Where?", documents=[text], max_new_tokens=1)
        assert not answer.sources and len(answer.left_out) == 1
        example = Example("Where?", ("here",), (Document(text),))
        assert not _fits(engine.encoder, links, example) and _fits(Encoder(tiny), random_links(tiny), example)
        with pytest.raises(BadInput, match="none of the examples fits"):
            train(tiny, {"one": [example]}, tmp_path / "out", settings(num_soft_tokens=1500))
    with pytest.raises(BadInput, match="too short for 10 chunks, or beyond"):
        words_per_chunk(Encoder(tiny, soft_tokens=torch.ones(1850, tiny.hidden_size)), links, 1900)


def test_who_opens_a_store_that_was_read_otherwise_is_told(trained, base, tmp_path, caplog):
    """And by adding them again reads them for it."""
    for links, said in (("untrained", 0), ("untrained", 0), (trained.folder, 1), (trained.folder, 0)):
        caplog.clear()
        with KVLinkEngine.load(base, tmp_path / "store", links=links, dtype="float32") as engine:
            assert caplog.text.count("read by another recipe") == said
            engine.add_chunks({"1": CHUNKS[0]})


def test_they_learn_at_the_rate_of_links(tiny):
    chosen = settings(trainable="links", num_soft_tokens=3, learning_rate=1e-9, link_learning_rate=0.5)
    learner = Learner(tiny, None, initial_links(tiny, chosen, None), trainable="links")
    (group,) = _optimizer(learner, chosen).param_groups
    assert group["lr"] == 0.5 and [len(parameter) for parameter in group["params"]] == [4, 3]


@pytest.mark.parametrize("causal_share", [0.0, 0.5])
def test_a_teacher_and_full_prefills_need_none_of_them(causal_share, base, tmp_path):
    losses = run(
        base, tmp_path / "out", trainable="reader", objective="mixed", num_soft_tokens=4, causal_share=causal_share
    )
    assert sum(losses[step] for step in range(17, 21)) < 0.98 * sum(losses[step] for step in range(1, 5))


def test_a_reader_reads_over_documents_that_the_base_read(trained, base, tmp_path):
    """In training as in serving, the reader being another model by then."""
    model = LanguageModel.load(base, reader=trained.reader, dtype="float32")
    links = trained.links(model)
    encoder = Encoder(model, soft_tokens=links.soft_tokens)
    prompt = prompt_for(model, encoder)
    logits = Forcing(encoder, links).logits(prompt, Forcing(encoder, links).chunks(prompt), "link_tokens", (7,))[1]
    layout = lay_out(
        prompt.prefix_ids,
        prompt.chunk_ids,
        [Turn(prompt.question_ids, (7,))],
        num_links=2,
        num_slots=2,
        encoding_prefix=encoder.prefix_ids,
        num_soft=4,
    )
    learner = make_learner(model, None, settings(trainable="reader", num_soft_tokens=4), trained)
    step = Step(prompt.prefix_ids, prompt.chunk_ids, layout, None)
    found = learner.logits(step, layout, (layout.predicts >= 0).nonzero()[:, 0])
    assert (found - logits).detach().abs().max() < 1e-2  # the checkpoint's adapter is in bfloat16, merged in float32


def test_neither_links_nor_soft_tokens_is_nothing_to_train():
    with pytest.raises(BadInput, match="nothing to train"):
        settings(trainable="links", num_link_tokens=0)
    with pytest.raises(BadInput, match="must not be negative"):
        settings(num_soft_tokens=-1)
