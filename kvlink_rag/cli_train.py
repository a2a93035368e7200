"""`kvlink train`: link tokens and adapters for a model, from files of questions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvlink_rag.cli_options import (
    DEFAULT_EMBEDDER_NAME,
    DEFAULT_MODEL_NAME,
    Device,
    Dtype,
    Embedder,
    Json,
    Model,
    loaded,
    loaded_model,
    options_given,
)
from kvlink_rag.config import UNTRAINED
from kvlink_rag.console import progress_bar, training_bar
from kvlink_rag.errors import BadInput, KVLinkError
from kvlink_rag.evaluation.datasets import SAMPLE

if TYPE_CHECKING:
    from kvlink_rag.links import Checkpoint

SHIPPED = "shipped"  # as --start-from: the checkpoint that comes along


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder of the checkpoint.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Question files (.jsonl, .jsonl.gz), each FILE or FILE=WEIGHT; repeatable."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Learn from this store's documents; the model asks the questions.")
    ] = None,
    questions: Annotated[int, typer.Option("--questions", help="How many to ask about --store.", min=1)] = 100,
    model: Model = DEFAULT_MODEL_NAME,
    embedder: Embedder = DEFAULT_EMBEDDER_NAME,
    passages: Annotated[
        list[Path] | None,
        typer.Option("--passages", help="Files with the passages that questions name by id; repeatable."),
    ] = None,
    trainable: Annotated[str, typer.Option("--trainable", help="links, reader, lora or full.")] = "reader",
    objective: Annotated[str, typer.Option("--objective", help="answers, distill or mixed.")] = "answers",
    start_from: Annotated[
        str | None,
        typer.Option(
            "--start-from",
            help="Go on from this checkpoint's links and reader: a folder, a hub id, or shipped; with links or reader.",
        ),
    ] = None,
    num_link_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-link-tokens",
            help="Link tokens behind each document; 0: none. Default: those of --start-from, else 5.",
            min=0,
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            "--slots",
            help="Sets of links, by a document's place; the last serves the rest. Default: as above, else 1.",
            min=1,
        ),
    ] = None,
    num_soft_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-soft-tokens",
            help="Trained tokens that each document is read behind: anew, for them. Default: as above, else 0.",
            min=0,
        ),
    ] = None,
    min_docs: Annotated[
        int,
        typer.Option("--min-docs", help="Fewest documents in a context, where is_gold tells which are needed.", min=1),
    ] = 2,
    max_docs: Annotated[
        int, typer.Option("--max-docs", help="Most documents in a context, where is_gold tells.", min=1)
    ] = 10,
    max_turns: Annotated[int, typer.Option("--max-turns", help="Most questions asked of one context.", min=1)] = 16,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Most tokens of a context's documents.", min=1)
    ] = 2048,
    causal_share: Annotated[
        float, typer.Option("--causal-share", help="Part of the contexts read by a full prefill.", min=0, max=1)
    ] = 0.0,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.", min=1)] = 400,
    batch: Annotated[int, typer.Option("--batch", help="Contexts whose gradients are in memory at once.", min=1)] = 4,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Batches per optimiser step.", min=1)] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Of weights and adapters. Default: 5e-4, with full the paper's 5e-6."),
    ] = None,
    link_learning_rate: Annotated[float, typer.Option("--link-learning-rate", help="Of the links.")] = 5e-3,
    lora_rank: Annotated[
        int | None,
        typer.Option("--lora-rank", help="Rank of the adapter. Default: that of --start-from, else 16.", min=1),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a little more time.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Examples per file.", min=1)] = None,
    save_minutes: Annotated[float, typer.Option("--save-minutes", help="A crash loses no more than this.")] = 5.0,
    kv: Annotated[Path | None, typer.Option("--kv", help="Folder in which documents' KV is kept between runs.")] = None,
    kv_gib: Annotated[float, typer.Option("--kv-gib", help="Budget of that folder in GiB.")] = 10.0,
    export: Annotated[
        bool, typer.Option("--export", help="Only write the checkpoint of what the run in --out last saved.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --out holds.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of data order and initial weights.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train link tokens for a model, and with --trainable reader, lora or full what reads them."""
    from kvlink_rag.adapters import plain_rank
    from kvlink_rag.questions import read_examples, read_passages
    from kvlink_rag.training.export import begun_with, check_out, export_saved, has_begun, started_from
    from kvlink_rag.training.learner import OVER_STORED
    from kvlink_rag.training.processes import is_first, num_processes, own_device
    from kvlink_rag.training.start import check_start
    from kvlink_rag.training.study import studied
    from kvlink_rag.training.train import check_dtype
    from kvlink_rag.training.train import train as run_training
    from kvlink_rag.training.trainer import TrainSettings

    if export:
        _refuse_all_but(context, "out", "export", "model", "dtype", "device", "as_json")
        begun = begun_with(out)
        dtype = begun["dtype"] if dtype == "auto" else dtype
        language_model, _ = loaded_model(model, dtype, device, links=_links(started_from(out)))
        _say(export_saved(language_model, out), model, out, as_json)
        return
    check_out(out, resume)
    device = own_device(device)
    if store is not None and num_processes() > 1:
        raise BadInput(
            f"--store asks its questions in one process, not in {num_processes()}; begin a run of one, stop it, and "
            f"give what it asked, {out / 'run' / 'questions.jsonl'}, as --data to a run in another folder"
        )
    if dtype == "auto" and (resume or trainable == "full"):
        dtype = begun_with(out)["dtype"] if resume else "float32"
    start = started_from(out) if resume and start_from is None else _start(start_from, model)
    settings = TrainSettings(
        trainable=trainable,
        objective=objective,
        num_link_tokens=_first(num_link_tokens, start.shape[1] if start else None, TrainSettings.num_link_tokens),
        slots=_first(slots, start.shape[0] if start else None, TrainSettings.slots),
        num_soft_tokens=_first(
            num_soft_tokens, start.num_soft_tokens if start else None, TrainSettings.num_soft_tokens
        ),
        min_docs=min_docs,
        max_docs=max_docs,
        max_turns=max_turns,
        max_tokens=max_tokens,
        causal_share=causal_share,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        link_learning_rate=link_learning_rate,
        lora_rank=_first(
            lora_rank, plain_rank(start.reader) if start and start.reader else None, TrainSettings.lora_rank
        ),
        gradient_checkpointing=gradient_checkpointing,
        save_minutes=save_minutes,
        seed=seed,
    )
    idle = options_given(context, "kv", "kv_gib")
    if idle and (trainable not in OVER_STORED or settings.num_soft_tokens):
        raise BadInput(
            f"{' and '.join(idle)}: documents are read anew at each step here, so none is kept; leave it out"
        )
    if start:
        check_start(start, settings)
    if not data and store is None:
        raise BadInput("nothing to learn from: give question files (--data) or a store of documents (--store)")
    files = [_file_and_weight(given) for given in data or ()]
    known = read_passages(passages or [])
    examples = {path.name: read_examples(path, limit, known) for path, _ in files}
    if len(examples) < len(files):
        raise BadInput("two data files have the same name; rename one")
    if store is None:
        language_model, _ = loaded_model(model, dtype, device, links=_links(start))
    else:
        with (
            loaded(store, model, embedder, must_exist=True, links=_links(start), dtype=dtype, device=device) as rag,
            progress_bar() as progress,
        ):
            if not resume:
                check_dtype(rag.model, settings)  # before questions are asked that nothing is learnt from
            kept = out / "run" / "questions.jsonl"
            examples["store"] = studied(rag, kept, questions, seed, progress, resume=resume)
            language_model = rag.model
    try:
        with training_bar(shown=is_first()) as report:
            about = run_training(
                language_model,
                examples,
                out,
                settings,
                weights={path.name: weight for path, weight in files},
                start=start.folder if start else None,
                resume=resume,
                kv_folder=kv,
                kv_gib=kv_gib,
                report=report,
            )
    except KeyboardInterrupt:
        how = f"with --resume to go on with {out}" if has_begun(out) else "again: nothing was trained yet"
        raise KVLinkError(f"stopped; give the same command {how}") from None
    if is_first():
        _say(about, model, out, as_json)


def _start(name: str | None, model: str) -> Checkpoint | None:
    """The checkpoint that --start-from names."""
    from kvlink_rag.links import Checkpoint

    if name is None:
        return None
    if name == UNTRAINED:
        raise BadInput("--start-from untrained names no checkpoint; leave --start-from out")
    found = Checkpoint.find(model, None if name == SHIPPED else name)
    if found is None:
        raise BadInput(f"--start-from {name}: no checkpoint comes along for {model}; give a folder or a hub id")
    return found


def _links(start: Checkpoint | None) -> str:
    """What to load a model with for a run that starts there."""
    return str(start.folder.resolve()) if start else UNTRAINED


def _first(given: int | None, started_with: int | None, default: int) -> int:
    """An option as it was given, as it is in the checkpoint that is gone on from, or its default."""
    return next(value for value in (given, started_with, default) if value is not None)


def _refuse_all_but(context: typer.Context, *names: str) -> None:
    """Raise BadInput where another option was given."""
    if extra := options_given(context, *(name for name in context.params if name not in names)):
        raise BadInput(f"--export trains nothing and takes the run's own settings; leave out {', '.join(extra)}")


def _file_and_weight(given: str) -> tuple[Path, float]:
    """FILE or FILE=WEIGHT."""
    name, equals, weight = given.rpartition("=")
    if not equals or Path(given).exists():
        if given == SAMPLE and not Path(given).exists():
            raise BadInput(f"--data {SAMPLE} is for eval and check, which would ask what was learnt; give a file")
        return Path(given), 1.0
    try:
        found = float(weight)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise BadInput(f"--data takes FILE or FILE=WEIGHT, a positive number, got {given!r}")
    return Path(name), found


def _say(about: dict[str, Any], model: str, out: Path, as_json: bool) -> None:
    from kvlink_rag.training.learner import OVER_STORED

    if as_json:
        print(json.dumps(about))
        return
    losses = [entry["loss"] for entry in about["log"]]
    course = f"; loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
    num_examples, steps = (
        sum(about["data"].values()) - sum(about.get("left_out", {}).values()),
        about["settings"]["steps"],
    )
    reached = f"{steps} steps" if about["step"] == steps else f"step {about['step']} of {steps}"
    took = f"; {about['seconds']} s" if "seconds" in about else ""
    print(f"{out}: {num_examples:,} examples, {reached}{course}{took}")
    model = str(out / "model") if about["trainable"] == "full" else model
    answers = "" if model == DEFAULT_MODEL_NAME else f" --model {model}"
    if about["trainable"] not in OVER_STORED or about["settings"]["num_soft_tokens"]:
        print(f"read documents for it: kvlink add FILES{answers} --links {out}")
    print(f"answer with it: kvlink ask QUESTION{answers} --links {out}")
