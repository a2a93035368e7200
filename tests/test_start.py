"""A run can start from a checkpoint: its links and reader are trained further, and the model as it was then teaches."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from boxes import examples, settings

from kvlink_rag import KVLinkEngine, LanguageModel
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.links import Checkpoint, LinkTokens
from kvlink_rag.training.export import export_saved
from kvlink_rag.training.layout import Turn, lay_out
from kvlink_rag.training.learner import Step
from kvlink_rag.training.objectives import distill
from kvlink_rag.training.start import make_learner
from kvlink_rag.training.train import train

CHUNKS = ["Box 1: red.", "Box 2: blue."]


@pytest.fixture(scope="module")
def started(base, tmp_path_factory):
    """A reader of 20 steps with two slots of two links."""
    out = tmp_path_factory.mktemp("started") / "ckpt"
    train(LanguageModel.load(base, dtype="float32"), {"boxes": examples()}, out, settings(trainable="reader"))
    return Checkpoint.open(out)


def go_on(base, start, out, *, resume=False, report=lambda figures: None, **changes):
    """Train from `start`; the losses by step."""
    model = LanguageModel.load(base, reader=start.reader, dtype="float32")
    about = train(
        model, {"boxes": examples()}, out, settings(**changes), start=start.folder, resume=resume, report=report
    )
    return {entry["step"]: entry["loss"] for entry in about["log"]}


def losses_of(checkpoint):
    return {entry["step"]: entry["loss"] for entry in checkpoint.about["log"]}


def test_what_was_learnt_is_where_it_begins(base, started, tmp_path):
    """The same contexts as the first run's, whose first loss was that of an untrained reader."""
    again = go_on(base, started, tmp_path / "out", trainable="reader", steps=1)
    assert again[1] < 0.8 * losses_of(started)[1]


def test_links_are_learnt_for_a_reader_that_stays_as_it_is(base, started, tmp_path):
    go_on(base, started, tmp_path / "out", trainable="links", objective="distill", steps=4)
    after = Checkpoint.open(tmp_path / "out")
    reader = "reader/adapter_model.safetensors"
    assert after.digests[reader] == started.digests[reader]
    assert after.digests["link.safetensors"] != started.digests["link.safetensors"]
    said = []
    for checkpoint in (started, after):
        with KVLinkEngine.load(base, tmp_path / "store", links=checkpoint.folder, dtype="float32") as engine:
            said.append(engine.ask("Box 1?", documents=CHUNKS, linking="full", max_new_tokens=8).text)
    assert said[0] == said[1]


def learner_and_step(base, tmp_path, start, trainable):
    """A learner, and a step in which a full prefill is held against a full prefill."""
    model = LanguageModel.load(base, reader=start.reader, dtype="float32")
    learner = make_learner(model, _source(model, tmp_path), settings(trainable=trainable), start)
    prefix, *chunks = [tuple(model.tokenizer.plain_ids(text)) for text in ("Be brief. ", *CHUNKS)]
    turn = Turn(tuple(model.tokenizer.plain_ids("Box 1?")), tuple(model.tokenizer.plain_ids("red")))
    layout = lay_out(prefix, chunks, [turn], causal=True)
    return learner, Step(prefix, tuple(chunks), layout, layout)


def _source(model, folder):
    from kvlink_rag.kv_source import KVSource
    from kvlink_rag.store.disk import DiskStore
    from kvlink_rag.store.kv_store import KVStore

    encoder = Encoder(model)
    return KVSource(encoder, KVStore(DiskStore(folder / "kv", max_bytes=2**30), "test", model.kv_shape))


@pytest.mark.parametrize("trainable", ["links", "reader"])
def test_the_teacher_is_the_model_that_the_run_starts_from(trainable, base, started, tmp_path):
    """Not the base: that says something else. And what is learnt changes nothing of it."""
    learner, step = learner_and_step(base, tmp_path, started, trainable)
    assert abs(float(learner([step], distill)["loss"].detach())) < 1e-5
    places = (step.linked.predicts >= 0).nonzero()[:, 0]
    with torch.no_grad():
        taught = learner.logits(step, step.teacher, places, by_teacher=True)
        by_base = learner.model.hf(input_ids=step.linked.ids[None]).logits[0, places] if trainable == "links" else None
        if trainable == "reader":
            with learner.peft.disable_adapter():
                by_base = learner.hf(input_ids=step.linked.ids[None]).logits[0, places]
            for name, parameter in learner.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
            assert (learner.logits(step, step.linked, places) - taught).abs().max() > 1e-2
    assert (taught - by_base).abs().max() > 1e-2
    assert torch.equal(learner.logits(step, step.teacher, places, by_teacher=True).detach(), taught)


def test_more_links_than_the_start_has_begin_as_new_ones(base, started, tmp_path):
    """Known links keep their places, and a new slot begins as the one that served it so far."""
    model = LanguageModel.load(base, reader=started.reader, dtype="float32")
    known = started.links(model).embeddings
    learner = make_learner(model, None, settings(trainable="reader", num_link_tokens=3, slots=3), started)
    links = learner.links.detach().view(3, 3, -1)
    assert torch.equal(links[:2, :2], known)
    assert torch.equal(links[2, :2], known[1])
    assert torch.equal(links[:, 2:], LinkTokens.untrained(model, 1, num_slots=3).embeddings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_link_tokens": 1}, r"has 2 link tokens and 2 slots, more than the 1 and 2 asked for"),
        ({"slots": 1}, r"more than the 2 and 1 asked for"),
        ({"trainable": "lora"}, r"trainable 'lora'.*trains links or reader"),
        ({"trainable": "full"}, r"trainable 'full'.*trains links or reader"),
        ({"trainable": "reader", "lora_rank": 4}, r"has rank 16, and 4 was asked for"),
    ],
)
def test_what_cannot_go_on_from_a_checkpoint_is_refused(changes, said, base, started, tmp_path):
    with pytest.raises(BadInput, match=said):
        go_on(base, started, tmp_path / "out", steps=1, **changes)
    assert not (tmp_path / "out").exists()


def test_a_model_with_another_reader_than_the_start_s_is_refused(base, started, tmp_path):
    go_on(base, started, tmp_path / "other", steps=1, trainable="reader")
    other = tmp_path / "other"
    for reader, start, said in (
        (None, other, "without a reader, the run starts with one"),
        (started.reader, other, "with a reader, the run starts with another"),
        (started.reader, None, "with a reader, the run starts with none"),
    ):
        model = LanguageModel.load(base, reader=reader, dtype="float32")
        with pytest.raises(BadInput, match=said):
            train(model, {"boxes": examples()}, tmp_path / "out" / said, settings(), start=start)


def test_a_reader_that_is_no_plain_lora_keeps_to_itself(base, started, tmp_path):
    """PEFT would write its biases into the model that reads documents: links can be learnt for it, itself not."""
    own = tmp_path / "own"
    shutil.copytree(started.folder, own)
    path = own / "reader" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "bias": "all"}), "utf-8")
    about = json.loads((own / "kvlink.json").read_text("utf-8"))
    about.pop("files")
    (own / "kvlink.json").write_text(json.dumps(about), "utf-8")
    with pytest.raises(BadInput, match="no plain LoRA adapter; train links for it"):
        go_on(base, Checkpoint.open(own), tmp_path / "out", steps=1, trainable="reader")
    go_on(base, Checkpoint.open(own), tmp_path / "out", steps=1, trainable="links")


def test_an_adapter_for_documents_cannot_be_gone_on_from(base, tmp_path):
    train(
        LanguageModel.load(base, dtype="float32"),
        {"b": examples()},
        tmp_path / "a",
        settings(trainable="lora", steps=1),
    )
    with pytest.raises(BadInput, match="with an adapter for documents"):
        go_on(base, Checkpoint.open(tmp_path / "a"), tmp_path / "out", steps=1)


@pytest.mark.parametrize("trainable", ["links", "reader"])
def test_a_stopped_run_needs_nothing_of_the_checkpoint_it_started_from(trainable, base, started, tmp_path):
    """It goes on to where it would have come, and can be exported, when that is gone."""
    whole = go_on(base, started, tmp_path / "whole", trainable=trainable, steps=6)

    def stop_at_3(figures):
        if figures["step"] == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    shutil.copytree(started.folder, tmp_path / "gone")
    with pytest.raises(KeyboardInterrupt):
        go_on(base, Checkpoint.open(tmp_path / "gone"), out, trainable=trainable, steps=6, report=stop_at_3)
    shutil.rmtree(tmp_path / "gone")
    model = LanguageModel.load(base, reader=started.reader, dtype="float32")
    assert export_saved(model, out)["step"] == 3
    resumed = go_on(base, started, out, trainable=trainable, steps=6, resume=True)
    assert {step: resumed[step] for step in (4, 5, 6)} == pytest.approx(
        {step: whole[step] for step in (4, 5, 6)}, rel=0.01
    )
    for name in started.digests:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() or name == "link.safetensors"


def test_a_checkpoint_says_what_its_run_started_from(base, started, tmp_path):
    go_on(base, started, tmp_path / "out", steps=1)
    about = json.loads((tmp_path / "out" / "kvlink.json").read_text("utf-8"))
    assert about["start"]["files"] == started.digests
    assert about["start"]["data"] == {"boxes": 12}
    assert "log" not in about["start"]


def test_a_run_is_resumed_from_no_other_start(base, started, tmp_path):
    go_on(base, started, tmp_path / "out", steps=1)
    with pytest.raises(BadInput, match=r"begun with start link.safetensors [0-9a-f]{12}.*now it is start from nothing"):
        train(
            LanguageModel.load(base, dtype="float32"),
            {"boxes": examples()},
            tmp_path / "out",
            settings(steps=1),
            resume=True,
        )
