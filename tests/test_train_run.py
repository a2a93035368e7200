"""From files to a checkpoint that answers: training learns, resumes, repeats itself, and refuses what is wrong."""

from __future__ import annotations

import pytest
import torch
from boxes import COLOURS, examples, run, settings
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvlink_rag import KVLinkEngine, LanguageModel
from kvlink_rag.errors import BadInput, CheckpointMismatch, Diverged
from kvlink_rag.links import Checkpoint, LinkTokens
from kvlink_rag.questions import Example
from kvlink_rag.training import objectives
from kvlink_rag.training.learner import TRAINABLE
from kvlink_rag.training.trainer import TrainSettings


def has_learnt(losses):
    return sum(losses[step] for step in range(17, 21)) < 0.95 * sum(losses[step] for step in range(1, 5))


@pytest.mark.parametrize("trainable", ["links", "reader", "lora", "full"])
def test_twenty_steps_lower_the_loss(trainable, base, tmp_path):
    losses = run(base, tmp_path / "out", trainable=trainable)
    assert len(losses) == 20
    assert has_learnt(losses)


@pytest.mark.parametrize("trainable", ["links", "reader", "lora"])
def test_twenty_steps_in_bfloat16_do_too(trainable, base, tmp_path):
    assert has_learnt(run(base, tmp_path / "out", trainable=trainable, dtype="bfloat16"))


@pytest.mark.parametrize(("trainable", "dtype"), [("full", "bfloat16"), ("reader", "float16")])
def test_a_dtype_that_rounds_steps_away_is_refused(trainable, dtype, base, tmp_path):
    with pytest.raises(BadInput, match=rf"is in {dtype}.*load it in float32"):
        run(base, tmp_path / "out", trainable=trainable, dtype=dtype)


def test_the_whole_model_learns_at_the_paper_s_rate_unless_told_otherwise():
    assert [TrainSettings(trainable=each).learning_rate for each in ("reader", "full")] == [5e-4, 5e-6]


def test_a_run_keeps_what_it_saved_last_and_before_and_no_more(base, tmp_path):
    run(base, tmp_path / "out", trainable="links", save_minutes=0)
    kept = sorted(path.name for path in (tmp_path / "out" / "run" / "trainer").glob("checkpoint-*"))
    assert kept == ["checkpoint-19", "checkpoint-20"]


def test_an_example_without_an_answer_is_refused_by_name(base, tmp_path):
    data = [*examples(2), Example("What is red?", (), examples(1)[0].documents)]
    with pytest.raises(BadInput, match="boxes: example 3 has no answer"):
        run(base, tmp_path / "out", trainable="links", data=data)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_plain_instructions_are_learnt_beside_questions(trainable, base, tmp_path):
    """The paper's mixture: over documents alone a model would forget the rest."""
    plain = [Example(f"Say {colour}.", (colour,), ()) for colour in COLOURS]
    losses = run(base, tmp_path / "out", trainable=trainable, data=plain + examples(4), causal_share=0.5)
    assert has_learnt(losses)


@pytest.mark.parametrize("trainable", ["links", "reader"])
def test_plain_instructions_are_refused_where_nothing_is_learnt_from_them(trainable, base, tmp_path):
    data = [*examples(2), Example("Say red.", ("red",), ())]
    with pytest.raises(BadInput, match=r"without documents in boxes \(1\).*untouched model"):
        run(base, tmp_path / "out", trainable=trainable, data=data)


@pytest.mark.parametrize("num_soft_tokens", [0, 3], ids=["", "soft_tokens"])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_gradient_checkpointing_learns_the_same(trainable, num_soft_tokens, base, tmp_path):
    changes = {"steps": 4, "trainable": trainable, "num_soft_tokens": num_soft_tokens, "objective": "mixed"}
    kept = run(base, tmp_path / "a", **changes)
    computed_again = run(base, tmp_path / "b", **changes, gradient_checkpointing=True)
    assert computed_again == pytest.approx(kept, rel=1e-4)


def test_training_that_diverges_stops_and_says_so(base, tmp_path):
    with pytest.raises(Diverged, match=r"loss of step [23] is (nan|inf).*lower learning rate"):
        run(base, tmp_path / "out", trainable="full", steps=8, learning_rate=1e35)
    assert not (tmp_path / "out" / "kvlink.json").exists()


@pytest.mark.parametrize("changes", [{"steps": 8, "save_minutes": 0}, {"steps": 1}], ids=["at a save", "at the end"])
def test_weights_that_are_no_numbers_are_not_saved(changes, base, tmp_path, monkeypatch):
    """A loss may be a number and its gradients none."""

    def answers_and_a_root(logits, expected, teacher):
        return objectives.answers(logits, expected, teacher) + (logits.sum() * 0).sqrt()

    monkeypatch.setitem(objectives.OBJECTIVES, "answers", answers_and_a_root)
    with pytest.raises(Diverged, match="after step 1 not all that is trained are numbers"):
        run(base, tmp_path / "out", trainable="full", **changes)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(("trainable", "objective"), [("links", "distill"), ("reader", "distill"), ("reader", "mixed")])
def test_a_teacher_s_words_can_be_learnt(trainable, objective, base, tmp_path):
    assert has_learnt(run(base, tmp_path / "out", trainable=trainable, objective=objective))


def test_the_same_seed_gives_the_same_curve(base, tmp_path):
    first, second = (run(base, tmp_path / name, steps=6) for name in ("a", "b"))
    assert first == pytest.approx(second, rel=0.01)
    assert run(base, tmp_path / "c", steps=6, seed=1) != pytest.approx(first, rel=0.01)


def test_batches_that_are_accumulated_learn_what_one_of_their_size_learns(base, tmp_path):
    """One context in memory at a time, the same curve."""
    at_once = run(base, tmp_path / "a", steps=6, batch=4)
    in_turn = run(base, tmp_path / "b", steps=6, batch=1, accumulate=4)
    assert in_turn == pytest.approx(at_once, rel=1e-3)
    assert run(base, tmp_path / "c", steps=6, batch=1) != pytest.approx(at_once, rel=1e-3)


def test_a_stopped_run_goes_on_where_it_stood(base, tmp_path):
    """Ctrl-C in the middle loses nothing, and the curve is that of a run that was never stopped."""
    whole = run(base, tmp_path / "whole", steps=8)

    def stop_at_5(figures):
        if figures["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", steps=8, report=stop_at_5)
    assert not (tmp_path / "out" / "kvlink.json").exists()
    steps, told = [], []

    def hear(figures):
        steps.append(figures["step"])
        told.append(figures["loss"])

    resumed = run(base, tmp_path / "out", steps=8, resume=True, report=hear)
    assert steps == [6, 7, 8]
    assert told[0] == resumed[4]  # the last that was known
    assert {step: resumed[step] for step in steps} == pytest.approx({step: whole[step] for step in steps}, rel=0.01)


def test_progress_tells_tokens_and_time(base, tmp_path):
    """Rates are of all tokens run so far, and what is left shrinks to nothing."""
    told = []
    run(base, tmp_path / "out", steps=4, report=told.append)
    assert [figures["step"] for figures in told] == [1, 2, 3, 4]
    assert all(figures["steps"] == 4 and figures["tokens_per_s"] > 0 for figures in told)
    assert told[-1]["seconds_left"] == 0 < told[0]["seconds_left"]


def test_slots_that_no_context_reaches_are_left_out(base, tmp_path, caplog):
    """Boxes come in threes: five more slots would be served untrained to late documents."""
    run(base, tmp_path / "out", trainable="links", slots=8, steps=6)
    assert Checkpoint.open(tmp_path / "out").shape == (3, 2)
    assert "reached slots 4 to 8" in caplog.text
    loaded = LinkTokens.load(tmp_path / "out", LanguageModel.load(base, dtype="float32"))
    newline = LinkTokens.untrained(LanguageModel.load(base, dtype="float32"), 2).embeddings[0]
    assert all(not torch.equal(loaded.for_chunk(place), newline) for place in range(12))


def test_what_is_refused_occupies_no_folder(base, tmp_path, monkeypatch):
    """The same folder may be given again, with what was told."""
    with monkeypatch.context() as patch:
        patch.setattr("kvlink_rag.training.recomputing.GradientCheckpointingLayer", torch.nn.Bilinear)
        with pytest.raises(BadInput, match="gradient checkpointing"):
            run(base, tmp_path / "out", trainable="lora", steps=1, gradient_checkpointing=True)
    run(base, tmp_path / "out", trainable="lora", steps=1)


def test_links_may_be_trained_for_another_encoding_prefix(base, tmp_path):
    """And serve no other."""
    run(base, tmp_path / "ckpt", trainable="links", steps=1, encoding_prefix="Look:")
    with KVLinkEngine.load(
        base, tmp_path / "store", links=tmp_path / "ckpt", encoding_prefix="Look:", dtype="float32"
    ) as engine:
        assert engine.ask("Box 1?", documents=["Box 1: red."], max_new_tokens=2).text
    with pytest.raises(CheckpointMismatch, match="another encoding prefix"):
        KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "ckpt", dtype="float32")
    with pytest.raises(BadInput, match="encoding_prefix"):
        run(base, tmp_path / "ckpt", trainable="links", steps=1, resume=True)


def test_only_the_same_run_is_resumed(base, tmp_path):
    with pytest.raises(BadInput, match="no run of this version"):
        run(base, tmp_path / "out", steps=1, resume=True)
    run(base, tmp_path / "out", steps=1)
    with pytest.raises(BadInput, match="holds a run already"):
        run(base, tmp_path / "out", steps=1)
    with pytest.raises(BadInput, match="begun with seed 0, now it is seed 5"):
        run(base, tmp_path / "out", steps=1, resume=True, seed=5)


def test_a_reader_answers_over_a_store_that_was_filled_without_it(base, tmp_path):
    """Documents are read by the base's weights, so training empties no store; plain prompts are the base's too."""
    run(base, tmp_path / "ckpt", trainable="reader")
    texts = {"a": "Box 1: red.", "b": "Box 2: blue."}
    with KVLinkEngine.load(base, tmp_path / "store", dtype="float32") as untrained:
        untrained.add_chunks(texts)
        before = untrained.ask("Box 1?", documents=list(texts.values()), max_new_tokens=8)
        plain = untrained.ask("Box 1?", max_new_tokens=8)
        full = untrained.ask("Box 1?", documents=list(texts.values()), linking="full", max_new_tokens=8)
        fingerprint = untrained.fingerprint
    with KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "ckpt", dtype="float32") as trained:
        assert trained.fingerprint == fingerprint
        after = trained.ask("Box 1?", documents=list(texts.values()), max_new_tokens=8)
        assert all(source.reused for source in after.sources)
        assert after.text != before.text
        assert trained.ask("Box 1?", documents=list(texts.values()), linking="full", max_new_tokens=8).text != full.text
        assert trained.ask("Box 1?", max_new_tokens=8).text == plain.text
        assert trained.links.num_per_chunk == 2


def test_the_control_without_links_is_trained_and_answers_the_same_with_them_and_plain(base, tmp_path):
    run(base, tmp_path / "control", trainable="reader", steps=2, num_link_tokens=0)
    with KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "control", dtype="float32") as engine:
        assert engine.links.num_per_chunk == 0
        said = [
            engine.ask("Box 1?", documents=["Box 1: red."], linking=linking, max_new_tokens=8).text
            for linking in ("link_tokens", "plain")
        ]
    assert said[0] == said[1] != ""


def test_an_adapter_for_documents_is_another_model(base, tmp_path):
    """Its KV is kept apart from the base's."""
    run(base, tmp_path / "ckpt", trainable="lora", steps=2)
    with KVLinkEngine.load(base, tmp_path / "store", dtype="float32") as untrained:
        fingerprint = untrained.fingerprint
    with KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "ckpt", dtype="float32") as trained:
        assert trained.fingerprint != fingerprint
    with pytest.raises(BadInput, match="adapter of its own"):
        KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "ckpt", adapter=tmp_path / "ckpt" / "adapter")


def test_links_serve_only_chunks_encoded_as_in_training(base, tmp_path):
    run(base, tmp_path / "ckpt", trainable="links", steps=1)
    with pytest.raises(CheckpointMismatch, match="another encoding prefix"):
        KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "ckpt", encoding_prefix="Look:", dtype="float32")


def test_full_training_exports_a_model_of_its_own(base, tmp_path):
    run(base, tmp_path / "ckpt", trainable="full", steps=2)
    model = tmp_path / "ckpt" / "model"
    with KVLinkEngine.load(model, tmp_path / "store", links=tmp_path / "ckpt", dtype="float32") as trained:
        assert trained.ask("Box 1?", documents=["Box 1: red."], max_new_tokens=2).sources
    whole, begun = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, base))
    saved = load_file(sorted((tmp_path / "ckpt" / "run" / "trainer").glob("*"))[-1] / "trained.safetensors")
    learnt = {name.removeprefix("hf."): tensor for name, tensor in saved.items() if name.startswith("hf.")}
    assert learnt.keys() == dict(whole.named_parameters()).keys()
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, learnt[name]) and not torch.equal(tensor, begun.get_parameter(name))
    with pytest.raises(CheckpointMismatch, match="trained for"):
        KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "ckpt", dtype="float32")


def test_a_loaded_adapter_is_what_was_trained(base, tmp_path):
    """For documents too: it is merged into the model, which reads all by it."""
    run(base, tmp_path / "ckpt", trainable="lora")
    loaded = LanguageModel.load(base, adapter=tmp_path / "ckpt" / "adapter", dtype="float32")
    begun = AutoModelForCausalLM.from_pretrained(base)
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ckpt" / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert (loaded.hf(ids).logits - unmerged(ids).logits).abs().max() < 1e-4
        assert (loaded.hf(ids).logits - begun(ids).logits).abs().max() > 1e-2
    assert loaded.reader is loaded.hf


def test_a_loaded_reader_is_what_was_trained(base, tmp_path):
    """The adapter is shipped in bfloat16; nothing else is lost between the learner and the loaded model."""
    run(base, tmp_path / "ckpt", trainable="reader")
    loaded = LanguageModel.load(base, reader=tmp_path / "ckpt" / "reader", dtype="float32")
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ckpt" / "reader")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert (loaded.reader(ids).logits - unmerged(ids).logits).abs().max() < 1e-4
        assert (loaded.reader(ids).logits - loaded.hf(ids).logits).abs().max() > 1e-2
    embeddings = loaded.hf.get_input_embeddings().weight, loaded.reader.get_input_embeddings().weight
    assert embeddings[0].data_ptr() == embeddings[1].data_ptr()  # what the adapter leaves alone is held once


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": "everything"}, "not one of links"),
        ({"objective": "luck"}, "not one of answers"),
        ({"trainable": "links", "num_link_tokens": 0}, "nothing to train"),
        ({"min_docs": 5, "max_docs": 2}, "in order"),
        ({"steps": 0}, "at least 1"),
        ({"learning_rate": -1e-3}, "learning_rate must be a number, and not negative, got -0.001"),
        ({"link_learning_rate": float("nan")}, "link_learning_rate must be a number, and not negative"),
        ({"save_minutes": -1}, "save_minutes must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(BadInput, match=words):
        settings(**changes)


def test_no_example_is_said(base, tmp_path):
    with pytest.raises(BadInput, match="no example"):
        run(base, tmp_path / "out", data=[])
