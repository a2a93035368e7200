"""From context to text: one forward over what is pending, then decoding by Hugging Face `generate`.

`generate` is called with the prompt's last id and the filled cache. A forward hook hands its first
step all pending inputs with their positions and mask, so links, question and first token cost one
forward, and sampling, stopping and streaming stay the library's.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvlink_rag.config import GenerationSettings
from kvlink_rag.context import Context
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import stop_ids


@dataclass
class Generation:
    """What a generation leaves behind; filled in while it runs."""

    token_ids: list[int]
    first_token_at: float | None = None  # time.perf_counter()
    finish_reason: str = "length"


def generate(model: LanguageModel, context: Context, settings: GenerationSettings, record: Generation) -> Iterator[str]:
    """Yield the answer's text as it comes; `record` holds ids, times and why it ended.

    Stop strings are not part of the text. Closing the iterator stops the model.
    """
    arrived: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()
    worker = threading.Thread(
        target=_run, args=(model, context, settings, arrived, cancelled), name="kvlink-generate", daemon=True
    )
    worker.start()
    decoder, held = model.tokenizer.decode_stream(), _HeldBack(settings.stop)
    end_ids = set(_end_ids(model))
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if record.first_token_at is None:
                record.first_token_at = time.perf_counter()
            record.token_ids.append(item)
            if item in end_ids:
                record.finish_reason = "stop"
                continue
            if text := held.push(decoder.step(item)):
                yield text
            if held.stopped:
                record.finish_reason = "stop"
                return
        if text := held.rest():
            yield text
    finally:
        cancelled.set()
        worker.join()


def _run(
    model: LanguageModel,
    context: Context,
    settings: GenerationSettings,
    arrived: queue.SimpleQueue[int | BaseException | None],
    cancelled: threading.Event,
) -> None:
    try:
        with model.lock, torch.inference_mode():
            _generate(model, context, settings, _QueueStreamer(arrived), cancelled)
    except BaseException as error:  # handed to the reader, who raises it
        arrived.put(error)
    else:
        arrived.put(None)


def _generate(
    model: LanguageModel,
    context: Context,
    settings: GenerationSettings,
    streamer: BaseStreamer,
    cancelled: threading.Event,
) -> None:
    pending = context.pending
    assert pending is not None
    first_inputs: dict[str, Any] = {"position_ids": pending.positions[None], "attention_mask": None}
    if pending.ids is not None:
        first_inputs["input_ids"] = pending.ids
    else:
        first_inputs.update(input_ids=None, inputs_embeds=pending.embeds)
        first_inputs["attention_mask"] = model.position_mask(pending.positions, context.num_tokens)

    def hand_over(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        handle.remove()
        return args, {**kwargs, **first_inputs, "logits_to_keep": 1}

    handle = model.hf.register_forward_pre_hook(hand_over, with_kwargs=True)
    sampling = settings.temperature > 0
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=sampling,
        temperature=settings.temperature if sampling else None,
        top_p=settings.top_p if sampling else None,
        top_k=0 if sampling else None,
        eos_token_id=_end_ids(model) or None,
        pad_token_id=_end_ids(model)[0] if _end_ids(model) else 0,
        use_cache=True,
    )
    device = pending.positions.device
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    try:
        model.hf.generate(
            input_ids=torch.tensor([[pending.last_id]], device=device),
            attention_mask=torch.ones(1, context.num_tokens, dtype=torch.long, device=device),
            position_ids=torch.tensor([[context.num_tokens - 1]], device=device),
            past_key_values=context.to_cache(),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Cancelled(cancelled)]),
        )
    finally:
        handle.remove()


def _end_ids(model: LanguageModel) -> list[int]:
    """Ids that end an answer: the model's own and the chat template's."""
    own = model.hf.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*ids, *stop_ids(model.tokenizer)})


class _QueueStreamer(BaseStreamer):  # type: ignore[misc]
    """Passes generated ids on; the first call brings the prompt, which is known."""

    def __init__(self, arrived: queue.SimpleQueue[Any]):
        self._arrived = arrived
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token_id in value.reshape(-1).tolist():
            self._arrived.put(token_id)

    def end(self) -> None:
        """Nothing to do: the end is put by `_run`, after errors had their chance."""


class _Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends generation when nobody reads any more."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


class _HeldBack:
    """Lets text through up to the first stop string, holding back what may become one."""

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._text = ""
        self.stopped = False

    def push(self, text: str) -> str:
        self._text += text
        found = [index for index in (self._text.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped = True
            return self._text[: min(found)]
        keep = max((_overlap(self._text, stop) for stop in self._stop), default=0)
        passed, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        return passed

    def rest(self) -> str:
        return self._text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return max((n for n in range(1, min(len(text), len(stop) - 1) + 1) if text.endswith(stop[:n])), default=0)
