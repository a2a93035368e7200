"""Several contexts decoded at once: each step brings one token more to every one of them.

`width` rows share a product with the weights, which always has that many rows, empty ones included; each row's
attention runs over its own buffer alone. So no number of an answer depends on its company, and an answer is the same,
to the last bit, whoever is asked beside it. That a model computes rows so is tried, not believed: where it does not,
as with experts that share out the rows, the width is 1.

A product of four rows takes hardly longer than one of a single row, on a CPU as long as it is asked for the right way
(`products`): eight streams of the default model bring 2.6 times the tokens a second of one (tests/measure_server.py).
Where a CPU only emulates the dtype of the weights, each row costs as much as the first, and the width is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvlink_rag.compute import compute
from kvlink_rag.config import GenerationSettings
from kvlink_rag.context import Context, RowsLayer
from kvlink_rag.generation import AnswerText, Generation, Sampler, generate
from kvlink_rag.model import LanguageModel, has_native_bfloat16

NUM_ROWS = 4  # answers under way at once, of which at most `width` share a product


class Decoding:
    """One answer on its way, over a context whose first logits are known."""

    def __init__(
        self, model: LanguageModel, context: Context, settings: GenerationSettings, emit: Callable[[str], None]
    ):
        pending = context.pending
        assert pending is not None
        self.context, self.by_reader, self.last_id = context, pending.by_reader, pending.last_id
        self._last_position = int(pending.rope_positions[-1])
        self._max_new_tokens = settings.max_new_tokens
        self._text = AnswerText(model, settings.stop, emit)
        self._sampler = Sampler(model, settings, pending.last_id)

    @property
    def record(self) -> Generation:
        return self._text.record

    @property
    def position(self) -> int:
        """Where the newest token is turned to."""
        return self._last_position + len(self.record.token_ids)

    @property
    def place(self) -> int:
        """Where the newest token's KV goes."""
        return self.context.num_tokens + len(self.record.token_ids) - 1

    def take(self, logits: Tensor) -> bool:
        """Choose the next token from logits [vocabulary]; whether the answer goes on."""
        self.last_id = self._sampler.choose(logits)
        self._text.take(self.last_id)
        if not self._text.is_ended and len(self.record.token_ids) < self._max_new_tokens:
            return True
        self._text.end()
        return False


D = TypeVar("D", bound=Decoding)


class RowDecoder:
    """Computes the newest tokens of several answers of one model in one forward, on the compute thread alone."""

    def __init__(self, model: LanguageModel, width: int | None = None):
        self._model = model
        self.width = width or (NUM_ROWS if compute.run(lambda job: _gains(model) and _keeps_rows_apart(model)) else 1)

    def takes(self, context: Context) -> bool:
        """Whether a context can be a row: not where attention is not ours, or a linking wants another."""
        return self._model.can_batch and not context.tempering

    def shares(self, answers: Sequence[D]) -> Iterator[list[D]]:
        """The answers in groups that one forward computes: by the same weights, `width` at most."""
        for by_reader in (True, False):
            some = [answer for answer in answers if answer.by_reader is by_reader]
            for start in range(0, len(some), self.width):
                yield some[start : start + self.width]

    @torch.inference_mode()
    def forward(self, rows: Sequence[Decoding]) -> Tensor:
        """Logits [width, vocabulary] behind the newest token of each of one share; rows beyond them mean nothing."""
        model = self._model
        empty = [0] * (self.width - len(rows))
        ids = torch.tensor([row.last_id for row in rows] + empty, device=model.device)[:, None]
        positions = torch.tensor([row.position for row in rows] + empty, device=model.device)[:, None]
        buffers = [row.context.layers() for row in rows]
        layers = [
            RowsLayer([(*own[layer], row.place) for own, row in zip(buffers, rows, strict=True)], model.window(layer))
            for layer in range(model.kv_shape.num_layers)
        ]
        seen = torch.ones(self.width, 1, 1, dtype=torch.bool, device=model.device)
        output = (model.reader if rows[0].by_reader else model.hf)(
            input_ids=ids,
            position_ids=positions,
            attention_mask=model.mask_from(seen, torch.zeros_like(seen, dtype=torch.long)),
            use_cache=True,
            **{model.cache_argument: Cache(layers=layers)},
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def answers(
        self, contexts: Sequence[Context], first_logits: Sequence[Tensor], settings: GenerationSettings
    ) -> list[tuple[str, list[int]]]:
        """Text and token ids over each context, whose pending token is its last and has been computed.

        first_logits [vocabulary]: behind that token.
        """
        pieces: list[list[str]] = [[] for _ in contexts]
        records, going = [], []
        for context, logits, own in zip(contexts, first_logits, pieces, strict=True):
            if not self.takes(context):
                records.append(generate(self._model, context, settings, own.append))
                continue
            row = Decoding(self._model, context, settings, own.append)
            records.append(row.record)
            if row.take(logits):
                going.append(row)
        while going:
            steps = [pair for some in self.shares(going) for pair in zip(some, self.forward(some), strict=False)]
            going = [row for row, logits in steps if row.take(logits)]
        return [("".join(own), record.token_ids) for own, record in zip(pieces, records, strict=True)]


def _gains(model: LanguageModel) -> bool:
    """Whether rows that share a product take less time than one after another."""
    if model.device.type != "cpu" or model.dtype == torch.float32:
        return True
    return model.dtype == torch.bfloat16 and has_native_bfloat16(model.device)


@torch.inference_mode()
def _keeps_rows_apart(model: LanguageModel) -> bool:
    """Whether tokens, each a row of its own, get the same logits to the last bit in any order and company."""
    ids = torch.arange(1, NUM_ROWS + 1, device=model.device) * 7919 % (model.hf.config.get_text_config().vocab_size - 1)
    places = torch.zeros(NUM_ROWS, 1, dtype=torch.long, device=model.device)
    mask = model.mask_from(torch.ones(NUM_ROWS, 1, 1, dtype=torch.bool, device=model.device), places[..., None])

    weights = dict.fromkeys((model.hf, model.reader))  # which may lie differently in memory

    def logits(ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids[:, None], "position_ids": places, "attention_mask": mask, "use_cache": False}
        return torch.cat([hf(**inputs).logits for hf in weights], -1)

    apart = logits(ids)
    return torch.equal(apart, logits(ids.flip(0)).flip(0)) and torch.equal(
        apart[:1].expand_as(apart), logits(ids[:1].expand_as(ids))
    )
