"""A checkpoint is one run's, whole, for its own base, and can be had before the run's end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from boxes import run
from tiny_models import build_hf, byte_tokenizer

from kvlink_rag import KVLinkEngine, LanguageModel
from kvlink_rag.errors import BadInput, CheckpointMismatch
from kvlink_rag.links import Checkpoint
from kvlink_rag.training.export import export_saved


def stop_at_5(figures):
    if figures["step"] == 5:
        raise KeyboardInterrupt


def test_a_checkpoint_names_no_place_on_this_machine(base, tmp_path):
    run(base, tmp_path / "ckpt", trainable="reader", steps=1)
    for name in ("kvlink.json", "reader/adapter_config.json"):
        assert str(base.parent) not in (tmp_path / "ckpt" / name).read_text("utf-8")


@pytest.mark.parametrize("trainable", ["links", "reader", "lora", "full"])
def test_a_stopped_run_is_exported_as_it_stands_and_can_go_on(trainable, base, tmp_path):
    """And what is exported at its end is what it has written itself, to the last bit."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(base, out, trainable=trainable, steps=8, report=stop_at_5)
    about = export_saved(LanguageModel.load(base, dtype="float32"), out)
    assert about["step"] == 5
    assert [entry["step"] for entry in about["log"]] == [1, 2, 3, 4]  # the fifth's is not known when it is stopped
    model = out / "model" if trainable == "full" else base
    with KVLinkEngine.load(model, tmp_path / "store", links=out, dtype="float32") as engine:
        assert engine.ask("Box 1?", documents=["Box 1: red."], max_new_tokens=4).linking == "link_tokens"
    run(base, out, trainable=trainable, steps=8, resume=True)
    finished = contents(out)
    assert len(finished) == {"links": 1, "reader": 3, "lora": 3, "full": 2}[trainable]
    assert export_saved(LanguageModel.load(base, dtype="float32"), out)["step"] == 8
    assert contents(out) == finished


def contents(folder: Path) -> dict[str, bytes]:
    """Of a checkpoint's files, by path."""
    weights = [*folder.glob("model/*.safetensors"), *(folder / name for name in Checkpoint.open(folder).about["files"])]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in weights}


def test_what_has_saved_nothing_cannot_be_exported(base, tmp_path):
    def stop(figures):
        raise BadInput("stop")

    with pytest.raises(BadInput, match="no run of this version"):
        export_saved(LanguageModel.load(base, dtype="float32"), tmp_path / "out")
    with pytest.raises(BadInput, match="stop"):
        run(base, tmp_path / "out", report=stop)
    with pytest.raises(BadInput, match="saved nothing yet"):
        export_saved(LanguageModel.load(base, dtype="float32"), tmp_path / "out")


def test_a_run_goes_on_with_its_own_base_alone(base, tmp_path):
    """Resumed or exported, what was learnt for one model is never taken for another's."""
    other = tmp_path / "other"
    build_hf("llama", seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(base, out, trainable="links", steps=8, report=stop_at_5)
    with pytest.raises(BadInput, match=r"begun with base_name base0, base_weights \w+.*now it is base_name other"):
        run(other, out, trainable="links", steps=8, resume=True)
    with pytest.raises(BadInput, match=r"trains base_name base0, base_weights \w+; this is base_name other"):
        export_saved(LanguageModel.load(other, dtype="float32"), out)
    with pytest.raises(BadInput, match="trains dtype float32; this is dtype bfloat16"):
        export_saved(LanguageModel.load(base, dtype="bfloat16"), out)


def test_no_run_begins_where_a_checkpoint_lies(base, tmp_path):
    """What is left of the old one would be taken for a part of the new."""
    run(base, tmp_path / "out", trainable="reader", steps=1)
    shutil.rmtree(tmp_path / "out" / "run")
    with pytest.raises(BadInput, match="holds a checkpoint already"):
        run(base, tmp_path / "out", trainable="links", steps=1)
    (tmp_path / "out" / "kvlink.json").unlink()
    with pytest.raises(BadInput, match="holds a checkpoint already"):
        run(base, tmp_path / "out", trainable="links", steps=1)


def test_links_saved_again_elsewhere_are_a_checkpoint_of_their_own(two_checkpoints, base, tmp_path):
    model = LanguageModel.load(base, dtype="float32")
    links = Checkpoint.open(two_checkpoints / "a").links(model)
    links.save(tmp_path / "again", model, links.about)
    again = Checkpoint.open(tmp_path / "again")
    assert list(again.about["files"]) == ["link.safetensors"] and again.reader is None
    assert (again.links(model).embeddings == links.embeddings).all()


def test_the_command_exports_a_run_in_its_own_precision_and_takes_nothing_else(base, tmp_path, kvlink):
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", trainable="links", steps=8, report=stop_at_5)
    command = ["train", "--out", tmp_path / "out", "--export", "--model", base]
    code, _, said = kvlink(*command, "--steps", 8, "--resume")
    assert code == 1 and "the run's own settings; leave out --steps, --resume" in said
    code, said, _ = kvlink(*command)
    assert code == 0 and "out: 12 examples, step 5 of 8; loss " in said
    assert f"kvlink ask QUESTION --model {base} --links {tmp_path / 'out'}" in said
    assert json.loads((tmp_path / "out" / "kvlink.json").read_text("utf-8"))["dtype"] == "float32"


@pytest.fixture(scope="session")
def two_checkpoints(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name, seed in (("a", 0), ("b", 1)):
        run(base, folder / name, trainable="reader", steps=1, seed=seed)
    return folder


@pytest.mark.parametrize(
    ("mix_up", "words"),
    [
        (lambda a, b: shutil.copy(b / "link.safetensors", a), "link.safetensors has other content"),
        (lambda a, b: shutil.copytree(b / "reader", a / "reader", dirs_exist_ok=True), "adapter_.* has other content"),
        (lambda a, b: shutil.rmtree(a / "reader"), "reader/adapter_config.json is missing"),
        (lambda a, b: shutil.copytree(b / "reader", a / "adapter"), "adapter/adapter_config.json is too much"),
    ],
    ids=["links", "reader", "no reader", "an adapter too"],
)
def test_parts_of_two_checkpoints_are_never_taken_for_one(mix_up, words, two_checkpoints, base, tmp_path):
    shutil.copytree(two_checkpoints / "a", tmp_path / "a")
    Checkpoint.open(tmp_path / "a")
    mix_up(tmp_path / "a", two_checkpoints / "b")
    with pytest.raises(CheckpointMismatch, match=words):
        KVLinkEngine.load(base, tmp_path / "store", links=tmp_path / "a", dtype="float32")


def test_a_checkpoint_is_loaded_by_hub_id(two_checkpoints, base, tmp_path, monkeypatch):
    """From the hub's own folder of what was downloaded before; and what is nowhere is said."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--links"
    shutil.copytree(two_checkpoints / "a", repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123", "utf-8")
    with KVLinkEngine.load(base, tmp_path / "store", links="somebody/links", dtype="float32") as engine:
        assert engine.links.num_per_chunk == 2 and engine.model.reader is not engine.model.hf
        assert engine.links.name == "somebody/links"
    with pytest.raises(BadInput, match=r"no checkpoint 'somebody/else': not a folder here, and not to be had"):
        KVLinkEngine.load(base, tmp_path / "store", links="somebody/else", dtype="float32")

    (tmp_path / "somebody").mkdir()
    with pytest.raises(
        CheckpointMismatch, match="somebody/else is no link checkpoint"
    ):  # a folder of that name is here
        KVLinkEngine.load(base, tmp_path / "store", links="somebody/else", dtype="float32")
    with pytest.raises(CheckpointMismatch, match="nobody/else is no link checkpoint"):  # a Path is a place
        KVLinkEngine.load(base, tmp_path / "store", links=Path("nobody/else"), dtype="float32")
