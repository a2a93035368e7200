"""A run's folder from its beginning to its checkpoint: what it was begun with, and what it has learnt, written down."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from kvlink_rag.compute import Job, compute
from kvlink_rag.errors import BadInput
from kvlink_rag.links import Checkpoint, holds_parts
from kvlink_rag.model import LanguageModel, weights_digest
from kvlink_rag.outputs import check_folder
from kvlink_rag.questions import Example
from kvlink_rag.training.learner import Learner
from kvlink_rag.training.start import copy_checkpoint, make_learner
from kvlink_rag.training.trainer import TrainSettings, load_last

log = logging.getLogger(__name__)

ABOUT = "about.json"  # in OUT/run: what the checkpoint will say besides step and log
START = "start"  # in OUT/run: the checkpoint that the run starts from


def check_out(out: Path, resume: bool) -> None:
    """Raise BadInput where `out` cannot be made, or holds something else than is asked for; nothing is computed yet."""
    check_folder(out)
    if resume:
        begun_with(out)
    elif has_begun(out) or (out / "run" / "trainer").exists():
        raise BadInput(f"{out} holds a run already; give --resume to go on with it, or choose another folder")
    elif holds_parts(out):
        raise BadInput(f"{out} holds a checkpoint already; choose another folder")


def has_begun(out: Path) -> bool:
    """Whether there is a run to be resumed."""
    return (out / "run" / ABOUT).exists()


def begin(out: Path, about: Mapping[str, Any], resume: bool, start: Checkpoint | None) -> None:
    """Make `out` ready for a run. Raises BadInput where another lies there, or not the one to be resumed.

    Resuming reads pickles of the library's, so it reads none but those of a run that this folder began.
    """
    check_out(out, resume)
    run = out / "run"
    if resume:
        # an earlier version noted no digests: what is not known is taken to be the same
        known = {**{name: about[name] for name in ("data_digests", "left_out")}, **begun_with(out)}
        if other := _differing(known, about):
            raise BadInput(
                f"the run in {out} was begun with {_told(known, other)}, now it is {_told(about, other)}; give the "
                f"same, or another folder"
            )
        return
    run.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run / START, ignore_errors=True)  # of a run that came no further
    if start:
        copy_checkpoint(start, run / START)  # to be resumed and exported without the original
    (run / ABOUT).write_text(json.dumps(about, indent=2), "utf-8")


def begun_with(out: Path) -> dict[str, Any]:
    """What the run in `out` trains, and on what, settings of later versions at their defaults. Raises BadInput."""
    path = out / "run" / ABOUT
    if not has_begun(out):
        raise BadInput(f"{out} holds no run of this version; begin one, without --resume and --export")
    try:
        about: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return {"start": None, "processes": 1, **about, "settings": asdict(TrainSettings(**about["settings"]))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} cannot be read ({error}); begin a run in another folder") from error


def data_digest(examples: Sequence[Example]) -> str:
    """What tells a file's examples from others: 16 hex digits over all that is learnt from them, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        documents = [(document.title, document.text) for document in example.documents]
        told = [example.question, example.answers, documents, sorted(example.gold), example.is_whole]
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()[:16]


def started_from(out: Path) -> Checkpoint | None:
    """The checkpoint that the run in `out` starts from, as it was then. Raises BadInput, CheckpointMismatch."""
    return Checkpoint.open(out / "run" / START) if begun_with(out)["start"] else None


def base(model: LanguageModel) -> dict[str, Any]:
    """What a run goes on with, and nothing else."""
    return {
        "base_name": model.public_name,
        "base_weights": model.weights,
        "base_origin": model.origin,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def export_saved(model: LanguageModel, out: str | Path) -> dict[str, Any]:
    """Write the checkpoint of what the run in `out` last saved, finished or not; it can be resumed afterwards.

    `model` is the run's, in the run's dtype; it is changed and must not be used afterwards. Returns what `kvlink.json`
    says. Raises BadInput.
    """
    out = Path(out)
    about = begun_with(out)
    if other := _differing(about, base(model)):
        raise BadInput(f"the run in {out} trains {_told(about, other)}; this is {_told(base(model), other)}")
    settings = TrainSettings(**about["settings"])

    def work(job: Job) -> dict[str, Any]:
        learner = make_learner(model, None, settings, started_from(out))
        step, curve, seconds = load_last(learner, out / "run" / "trainer")
        took = {} if seconds is None else {"seconds": round(seconds)}
        return export(learner, out, {**about, **took}, step, curve)

    return compute.run(work)


def export(
    learner: Learner, out: Path, about: Mapping[str, Any], step: int, curve: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write what was learnt up to a step as a checkpoint that `KVLinkRAG.load(links=...)` takes."""
    about = {
        **about,
        "step": step,
        "log": [{key: row[key] for key in ("step", "loss")} for row in curve if "loss" in row],
    }
    if learner.trainable == "full":
        learner.hf.save_pretrained(out / "model")
        learner.model.tokenizer.hf.save_pretrained(out / "model")
        about = {**about, "base_name": "model", "base_weights": weights_digest(out / "model"), "base_origin": ""}
    if learner.peft is not None:
        folder = out / ("reader" if learner.trainable == "reader" else "adapter")
        learner.peft.save_pretrained(str(folder), safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # a model card full of blanks
        adapter = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        adapter["base_model_name_or_path"] = learner.model.public_name
        if isinstance(adapter["target_modules"], list):
            adapter["target_modules"].sort()
        (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2, sort_keys=True) + "\n", "utf-8")
        weights = folder / "adapter_model.safetensors"
        halved = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
        save_file(halved, weights, metadata={"format": "pt"})
    elif (start := started_from(out)) is not None:
        copy_checkpoint(start, out, only="reader/")  # which the links were learnt for
    if learner.num_reached < learner.num_slots:
        log.warning(
            "no context has reached slots %d to %d: they are left out, and slot %d serves all further documents",
            learner.num_reached + 1, learner.num_slots, learner.num_reached,
        )  # fmt: skip
    learner.link_tokens(str(out)).save(out, learner.model, about)
    return dict(about)


def _differing(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two runs differ, settings one by one; how often it is saved is nothing, nor is a model's name."""
    one, other = _flat(known), _flat(now)
    return sorted(name for name in other if name not in ("base_name", "save_minutes") and one.get(name) != other[name])


def _told(about: Mapping[str, Any], names: Sequence[str]) -> str:
    names = ["base_name", *names] if "base_weights" in names else names
    values = {**_flat(about), "start": _first_digits(about.get("start"))}
    return ", ".join(f"{name} {str(values.get(name))[:60]}" for name in names)


def _first_digits(start: Mapping[str, Any] | None) -> str:
    """By which one checkpoint is told from another, in a line."""
    return (
        "from nothing"
        if start is None
        else ", ".join(f"{name} {digest[:12]}" for name, digest in start["files"].items())
    )


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and all else by name; data in their order, which decides what a step draws."""
    flat = {**about.get("settings", {}), **about}
    if "data" in flat:
        flat["data"] = ", ".join(f"{name} ({number})" for name, number in about["data"].items())
    digests = flat.pop("data_digests", {})
    flat.pop("settings", None)
    return {**flat, **{f"data digest of {name}": digest for name, digest in digests.items()}}
