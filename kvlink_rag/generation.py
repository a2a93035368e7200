"""From context to text: one forward over what is pending, then decoding by Hugging Face `generate`.

`generate` is called with the prompt's last id and the filled cache. A forward hook hands its first
step all pending inputs with their positions and mask, so links, question and first token cost one
forward, and sampling, stopping and streaming stay the library's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvlink_rag.attention import tempered
from kvlink_rag.config import GenerationSettings
from kvlink_rag.context import Context
from kvlink_rag.model import LanguageModel


@dataclass
class Generation:
    """What a generation leaves behind; filled in while it runs."""

    token_ids: list[int] = field(default_factory=list)
    first_token_at: float | None = None  # time.perf_counter()
    finish_reason: str = "length"


def generate(
    model: LanguageModel, context: Context, settings: GenerationSettings, emit: Callable[[str], None]
) -> Generation:
    """Generate an answer over `context`, handing each token's text to `emit` (empty where it completes no character).

    Stop strings are not part of the text. What `emit` raises ends the generation and is raised here.
    """
    pending = context.pending
    assert pending is not None
    first_inputs = _pending_inputs(model, context)

    def hand_over(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        handle.remove()
        return args, {**kwargs, **first_inputs, "logits_to_keep": 1}

    hf = model.reader if pending.by_reader else model.hf
    handle = hf.register_forward_pre_hook(hand_over, with_kwargs=True)
    device = pending.positions.device
    answer = AnswerText(model, settings.stop, emit)
    try:
        with torch.inference_mode(), tempered(context.tempering), _seeded(device, settings.seed):
            hf.generate(
                input_ids=torch.tensor([[pending.last_id]], device=device),
                attention_mask=torch.ones(1, context.num_tokens, dtype=torch.long, device=device),
                position_ids=pending.rope_positions[-1:][None],
                generation_config=_config(model, settings),
                streamer=answer,
                stopping_criteria=StoppingCriteriaList([_Stopped(answer)]),
                **{model.cache_argument: context.to_cache()},
            )
    finally:
        handle.remove()
    return answer.record


@contextmanager
def _seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Draws on the device go by the seed, if any; afterwards its random numbers go on as if nothing had been drawn.

    Hugging Face's `generate` takes no generator; the device's own is lent, and no other device's is touched.
    """
    if seed is None:
        yield
        return
    random: Any = torch.random if device.type == "cpu" else torch.get_device_module(device)
    which = () if device.type == "cpu" else (device,)
    before = random.get_rng_state(*which)
    random.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), *which)
    try:
        yield
    finally:
        random.set_rng_state(before, *which)


class Sampler:
    """Chooses the next id as `generate` does, by the same processors and draws, for one row of a batch."""

    def __init__(self, model: LanguageModel, settings: GenerationSettings, last_id: int):
        hf, device = model.hf, model.device
        config, _ = hf._prepare_generation_config(_config(model, settings))
        hf._prepare_special_tokens(config, device=device, batch_size=1)
        self._processors = hf._get_logits_processor(config, input_ids_seq_length=1, device=str(device))
        self._is_greedy = not config.do_sample
        self._ids = torch.tensor([[last_id]], device=device)  # the prompt as `generate` knows it, then the answer
        self._generator = torch.Generator(device)
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The id that follows, from its logits [vocabulary]."""
        scores = self._processors(self._ids, logits[None].to(copy=True, dtype=torch.float32))
        if self._is_greedy:
            chosen = scores.argmax(dim=-1, keepdim=True)
        else:
            chosen = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)
        self._ids = torch.cat([self._ids, chosen], dim=1)
        return int(chosen)


def predict(model: LanguageModel, context: Context, num_last: int) -> torch.Tensor:
    """Compute what is pending; logits [num_last, vocabulary] behind the last so many tokens."""
    pending = context.pending
    assert pending is not None
    hf = model.reader if pending.by_reader else model.hf
    inputs = {**_pending_inputs(model, context), "use_cache": True, model.cache_argument: context.to_cache()}
    with torch.inference_mode(), tempered(context.tempering):
        return hf(**inputs, logits_to_keep=num_last).logits[0]  # type: ignore[no-any-return]


def _config(model: LanguageModel, settings: GenerationSettings) -> GenerationConfig:
    sampling = not settings.is_greedy
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=sampling,
        temperature=settings.temperature if sampling else None,
        top_p=settings.top_p if sampling else None,
        top_k=0 if sampling else None,
        eos_token_id=list(model.end_ids) or None,
        pad_token_id=model.end_ids[0] if model.end_ids else 0,
        use_cache=True,
    )


def _pending_inputs(model: LanguageModel, context: Context) -> dict[str, Any]:
    pending = context.pending
    assert pending is not None
    inputs: dict[str, Any] = {"position_ids": pending.rope_positions[None], "attention_mask": None}
    if pending.ids is not None:
        inputs["input_ids"] = pending.ids
    else:
        inputs.update(input_ids=None, inputs_embeds=pending.embeds)
    if context.num_placed:
        inputs["attention_mask"] = model.position_mask(pending.positions, context.num_tokens)
    return inputs


class AnswerText(BaseStreamer):  # type: ignore[misc]
    """Receives generated ids from `generate`, records them and emits their text."""

    def __init__(self, model: LanguageModel, stop: tuple[str, ...], emit: Callable[[str], None]):
        self.record = Generation()
        self.is_stopped = False  # at a stop string
        self.is_ended = False  # there or at an end token
        self._decoder, self._held = model.tokenizer.decode_stream(), _HeldBack(stop)
        self._end_ids, self._emit = model.end_ids, emit
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # the first call brings the prompt, which is known
            self._prompt_seen = True
            return
        for token_id in value.reshape(-1).tolist():
            self.take(token_id)

    def take(self, token_id: int) -> None:
        """The next generated id."""
        if self.record.first_token_at is None:
            self.record.first_token_at = time.perf_counter()
        self.record.token_ids.append(token_id)
        if token_id in self._end_ids:
            self.record.finish_reason = "stop"
            self.is_ended = True
            return
        text = self._held.push(self._decoder.step(token_id))
        if self._held.stopped:
            self.record.finish_reason = "stop"
            self.is_stopped = self.is_ended = True
        self._emit(text)

    def end(self) -> None:
        if not self.is_stopped:
            self._emit(self._held.rest())


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends generation at a stop string."""

    def __init__(self, answer: AnswerText):
        self._answer = answer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._answer.is_stopped, dtype=torch.bool, device=input_ids.device)


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
