"""From files of questions to a checkpoint."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvlink_rag.compute import Job, compute
from kvlink_rag.config import GIB
from kvlink_rag.encoding import Encoder
from kvlink_rag.encoding_prefix import DEFAULT_ENCODING_PREFIX
from kvlink_rag.errors import BadInput
from kvlink_rag.kv_source import KVSource
from kvlink_rag.links import Checkpoint
from kvlink_rag.model import LanguageModel
from kvlink_rag.questions import Example
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.training.export import base, begin, check_out, data_digest, export
from kvlink_rag.training.learner import OVER_STORED
from kvlink_rag.training.lessons import asked_of, make_lessons
from kvlink_rag.training.processes import is_first, join_in, num_processes, wait_for_all
from kvlink_rag.training.start import check_start, initial_links, make_learner, provenance
from kvlink_rag.training.steps import Pool, Room, Steps, StepSettings
from kvlink_rag.training.trainer import Report, TrainSettings, run

log = logging.getLogger(__name__)


def train(
    model: LanguageModel,
    data: Mapping[str, Sequence[Example]],
    out: str | Path,
    settings: TrainSettings | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    start: str | Path | None = None,
    resume: bool = False,
    kv_folder: str | Path | None = None,
    kv_gib: float = 10.0,
    encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
    report: Report = lambda figures: None,
) -> dict[str, Any]:
    """Train links for `model`, with an adapter if the settings say so, and write the checkpoint to `out`.

    data: examples by name; weights: how often each is drawn, 1 where not given. Those without documents (plain
    instructions) keep an adapter for documents, or all weights, from forgetting the rest; others learn nothing of
    them. start: folder or hub id of a checkpoint to go on from, with its links, and its reader, with which `model`
    must be loaded; the model as it is given is the teacher of "distill" and "mixed". What resuming needs is kept in
    `out`/run. kv_folder keeps the documents' KV between epochs and runs, up to kv_gib; by default in `out`/run too.
    encoding_prefix: what documents are read behind, as `KVLinkRAG.load` of the same is to serve them. The model is
    changed and must not be used afterwards: load it with the checkpoint. Returns what `kvlink.json` says. Several
    processes call it alike, each with a model on its `processes.own_device`. Raises BadInput.
    """
    settings, out = settings or TrainSettings(), Path(out)
    weights = weights or {}
    check_out(out, resume)
    if not resume:
        check_dtype(model, settings)
    if bad := [name for name, weight in weights.items() if not 0 < weight < math.inf]:
        raise BadInput(f"the weight of {bad[0]} must be a positive number, got {weights[bad[0]]}")
    unknown = sorted(set(weights) - set(data))
    if unknown or not any(data.values()):
        raise BadInput(f"weights for unknown data: {', '.join(unknown)}" if unknown else "the data hold no example")
    alone = {name: sum(not example.documents for example in examples) for name, examples in data.items()}
    if settings.trainable in OVER_STORED and any(alone.values()):
        found = ", ".join(f"{name} ({number})" for name, number in alone.items() if number)
        raise BadInput(
            f"examples without documents in {found}: trainable {settings.trainable!r} learns nothing from them, since "
            f"plain prompts are answered by the untouched model; leave them out, or train 'lora' or 'full'"
        )
    for name, examples in data.items():
        if nameless := [number for number, example in enumerate(examples, 1) if not example.answers]:
            raise BadInput(
                f"{name}: example {nameless[0]} has no answer to learn along; give one, or let the model ask and "
                f"answer about your own documents (kvlink train --store, or training.study)"
            )
        if silent := [number for number, each in enumerate(examples, 1) if not each.answers[0] and not each.is_whole]:
            raise BadInput(
                f"{name}: example {silent[0]} has an empty answer that was cut off: nothing to learn; leave it out"
            )
    checkpoint = None if start is None else Checkpoint.open(start)
    if checkpoint:
        check_start(checkpoint, settings)
    folder = Path(kv_folder) if kv_folder is not None else out / "run" / "kv"

    def work(job: Job) -> dict[str, Any]:
        links = initial_links(model, settings, checkpoint)
        encoder = Encoder(model, soft_tokens=links.soft_tokens, encoding_prefix=encoding_prefix)
        if checkpoint:
            links.check_recipe(encoder.recipe)
        return _train(
            encoder,
            data,
            out,
            settings,
            weights,
            checkpoint,
            resume,
            folder,
            int(kv_gib * GIB),
            job.checked(report),
            job,
        )

    return compute.run(work)


def check_dtype(model: LanguageModel, settings: TrainSettings) -> None:
    """Raise BadInput where steps would be lost by rounding."""
    if model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and settings.trainable != "full"):
        return
    has = str(model.dtype).removeprefix("torch.")
    good = "float32" if settings.trainable == "full" else "float32 or bfloat16"
    raise BadInput(
        f"{model.name} is in {has}, in which what trainable {settings.trainable!r} learns in a step is rounded away; "
        f"load it in {good} (--dtype)"
    )


def _train(
    encoder: Encoder,
    data: Mapping[str, Sequence[Example]],
    out: Path,
    settings: TrainSettings,
    weights: Mapping[str, float],
    start: Checkpoint | None,
    resume: bool,
    kv_folder: Path,
    kv_bytes: int,
    report: Report,
    job: Job,
) -> dict[str, Any]:
    started = time.monotonic()
    model = encoder.model
    join_in(model.device)
    step_settings = StepSettings(
        num_links=settings.num_link_tokens,
        num_slots=settings.slots,
        num_soft=settings.num_soft_tokens,
        min_documents=settings.min_docs,
        max_documents=settings.max_docs,
        max_tokens=settings.max_tokens,
        causal_share=settings.causal_share,
        with_teacher=settings.with_teacher,
    )
    fitting = _fitting(data, Room(encoder, step_settings), job)
    pools = [
        Pool(make_lessons(examples, max_turns=settings.max_turns), weights.get(name, 1.0))
        for name, examples in fitting.items()
        if examples
    ]
    size = settings.steps * settings.batch * settings.accumulate * num_processes()
    steps = Steps(pools, encoder, step_settings, size=size, seed=settings.seed)
    about = {
        **base(model),
        "trainable": settings.trainable,
        "chunk_template": encoder.recipe.chunk_template,
        "encoding_prefix": encoder.recipe.encoding_prefix,
        "data": {name: len(examples) for name, examples in data.items()},
        "data_digests": {name: data_digest(examples) for name, examples in data.items()},
        "left_out": {name: num for name, found in fitting.items() if (num := len(data[name]) - len(found))},
        "weights": dict(weights),
        "settings": asdict(settings),
        "processes": num_processes(),
        "start": provenance(start) if start else None,
    }
    torch.manual_seed(settings.seed)
    with closing(DiskStore(kv_folder, max_bytes=kv_bytes)) as entries:
        # under a name of its own: encoded in any company, so never to be served
        kvs = KVStore(entries, hashlib.sha256(f"training {encoder.fingerprint}".encode()).hexdigest(), model.kv_shape)
        learner = make_learner(model, KVSource(encoder, kvs), settings, start)  # what it refuses occupies no folder
        if resume or is_first():
            begin(out, about, resume, start)
        wait_for_all()
        curve, seconds = run(
            learner, steps, settings, out / "run" / "trainer", started=started, resume=resume, report=report
        )
    took = {} if seconds is None else {"seconds": round(seconds)}
    if is_first():
        export(learner, out, {**about, **took}, settings.steps, curve)
    wait_for_all()
    return dict(Checkpoint.open(out).about)


def _fitting(data: Mapping[str, Sequence[Example]], room: Room, job: Job) -> dict[str, list[Example]]:
    """The examples that there is room for; the others are said. Raises BadInput where none is left."""

    def fits(example: Example) -> bool:
        job.check()
        return room.fits(asked_of(example), example.documents)

    fitting = {name: list(filter(fits, examples)) for name, examples in data.items()}
    missing = ", ".join(
        f"{len(data[name]) - len(found)} of {len(data[name])} in {name}"
        for name, found in fitting.items()
        if len(found) < len(data[name])
    )
    why = f"{missing}: what each needs, with question and answer, goes beyond {room}"
    if not any(fitting.values()):
        raise BadInput(f"none of the examples fits, {why}; give shorter documents, or a larger max_tokens")
    if missing:
        log.warning("examples left out, %s", why)
    return fitting
