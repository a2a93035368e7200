"""Where a run starts: from nothing, or from a checkpoint whose links and reader it goes on with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlink_rag.adapters import plain_rank
from kvlink_rag.encoding_prefix import CHUNK_TEMPLATE, STAND_IN
from kvlink_rag.errors import BadInput
from kvlink_rag.kv_source import KVSource
from kvlink_rag.links import Checkpoint, LinkTokens
from kvlink_rag.model import LanguageModel, adapter_digest_of
from kvlink_rag.training.learner import OVER_STORED, Learner
from kvlink_rag.training.trainer import TrainSettings


def check_start(start: Checkpoint, settings: TrainSettings) -> None:
    """Raise BadInput where a run of these settings cannot go on from a checkpoint."""
    if start.adapter or settings.trainable not in OVER_STORED:
        raise BadInput(
            f"trainable {settings.trainable!r}, and {start.name} {'with' if start.adapter else 'without'} an adapter "
            f"for documents: a run that starts from a checkpoint trains {' or '.join(OVER_STORED)}, over documents "
            f"that are read by the base"
        )
    slots, per_chunk = start.shape
    if settings.num_link_tokens < per_chunk or settings.slots < slots:
        raise BadInput(
            f"{start.name} has {per_chunk} link tokens and {slots} slots, more than the {settings.num_link_tokens} and "
            f"{settings.slots} asked for; give as many or more"
        )
    if start.num_soft_tokens and settings.num_soft_tokens != start.num_soft_tokens:
        raise BadInput(
            f"{start.name} has {start.num_soft_tokens} soft tokens, and {settings.num_soft_tokens} were asked for; "
            f"give as many"
        )
    if start.reader and settings.trainable == "reader":
        rank = plain_rank(start.reader)
        if rank is None:
            raise BadInput(f"the reader of {start.name} is no plain LoRA adapter; train links for it, not the reader")
        if rank != settings.lora_rank:
            raise BadInput(f"the reader of {start.name} has rank {rank}, and {settings.lora_rank} was asked for")


def copy_checkpoint(start: Checkpoint, folder: Path, *, only: str = "") -> None:
    """Copy its files, or those whose path in it begins so, into a folder."""
    for name in ("kvlink.json", *start.digests):
        if name.startswith(only):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(start.folder / name, folder / name)


def provenance(start: Checkpoint) -> dict[str, Any]:
    """What a run that starts there says of it: all it says of itself but curve and evaluation."""
    about = {key: value for key, value in start.about.items() if key not in ("log", "evaluation")}
    return {**about, "files": start.digests}


def make_learner(
    model: LanguageModel, source: KVSource | None, settings: TrainSettings, start: Checkpoint | None = None
) -> Learner:
    """`model` with what of it is to be trained, as it is before the first step.

    source: None where no step will run. model: loaded with the reader of `start`, if that has one. Raises BadInput.
    """
    reader = start.reader if start else None
    has_reader = model.reader is not model.hf
    if has_reader != bool(reader) or (reader and model.reader_adapter != adapter_digest_of(reader)):
        raise BadInput(
            f"{model.name} was loaded {'with a' if has_reader else 'without a'} reader, the run starts with "
            f"{'none' if not reader else 'another' if has_reader else 'one'}; load the model with the reader of the "
            f"checkpoint that the run starts from, and no other"
        )
    lora = None
    if settings.trainable in ("reader", "lora") and reader is None:
        from peft import LoraConfig

        rank = settings.lora_rank
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return Learner(
        model,
        source,
        initial_links(model, settings, start),
        trainable=settings.trainable,
        lora=lora,
        reader=reader,
        gradient_checkpointing=settings.gradient_checkpointing,
        num_given=start.shape[0] if start else 0,
    )


def initial_links(model: LanguageModel, settings: TrainSettings, start: Checkpoint | None) -> LinkTokens:
    """Those of `start`, with as many slots and links more as are asked for: new links begin as the newline token.

    Soft tokens begin as the last words of a made-up document, which as a whole brings untrained KV nearer to a full
    prefill's (docs/training-experiments.md).
    """
    new = LinkTokens.untrained(model, settings.num_link_tokens, num_slots=settings.slots)
    soft_tokens = _document(model, settings.num_soft_tokens) if settings.num_soft_tokens else None
    if start is None:
        return replace(new, soft_tokens=soft_tokens)
    links = start.links(model)
    slots, per_chunk, _ = links.embeddings.shape
    more = links.embeddings[-1:].expand(settings.slots - slots, -1, -1)  # the last slot served them so far
    embeddings = torch.cat((torch.cat((links.embeddings, more)), new.embeddings[:, per_chunk:]), 1)
    return LinkTokens(
        embeddings, start.name, start.about, soft_tokens if links.soft_tokens is None else links.soft_tokens
    )


def _document(model: LanguageModel, num_tokens: int) -> Tensor:
    """Embeddings [num_tokens, hidden] of the end of a made-up document, behind newlines where it is shorter."""
    ids = model.tokenizer.plain_ids(CHUNK_TEMPLATE.format(text=STAND_IN))[-num_tokens:]
    newlines = model.tokenizer.plain_ids("\n")[-1:] * (num_tokens - len(ids))
    return model.embed((*newlines, *ids))
