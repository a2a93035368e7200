"""Several answers at once: each step brings one token more for every one of them, over its own context.

Rows join and leave between steps. `width` rows share a product with the weights, which always has that many rows,
empty ones included; each row's attention runs over its own buffer alone. So no number of an answer depends on its
company, and an answer is the same, to the last bit, whoever is asked beside it. That a model computes rows so is tried,
not believed: where it does not, as with experts that share out the rows, the width is 1.

A product of four rows takes hardly longer than one of a single row, on a CPU as long as it is written weights first
(`products`): eight streams of the default model bring 2.6 times the tokens a second of one (tests/measure_server.py).
Weights on a CPU that are not float32 are not multiplied so, and there the width is 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from kvlink_rag.answering import AnswerMaker, Prepared, Request
from kvlink_rag.compute import Emit
from kvlink_rag.context import RowsLayer
from kvlink_rag.generation import AnswerText, Sampler, predict
from kvlink_rag.model import LanguageModel
from kvlink_rag.types import Piece

NUM_ROWS = 4  # answers under way at once


class _Row:
    """One answer on its way."""

    def __init__(self, model: LanguageModel, prepared: Prepared, emit: Emit[Piece]):
        self.prepared, self._model, self._emit = prepared, model, emit
        self._pieces: list[str] = []
        self._text = AnswerText(model, prepared.request.settings.stop, self._keep)
        pending = prepared.context.pending
        assert pending is not None
        self.by_reader = pending.by_reader
        self.last_id = pending.last_id
        self._last_position = int(pending.rope_positions[-1])
        self._sampler = Sampler(model, prepared.request.settings, pending.last_id)

    def _keep(self, text: str) -> None:
        self._pieces.append(text)
        self._emit(Piece(text))

    @property
    def position(self) -> int:
        """Where the newest token is turned to."""
        return self._last_position + len(self._text.record.token_ids)

    @property
    def place(self) -> int:
        """Where the newest token's KV goes."""
        return self.prepared.context.num_tokens + len(self._text.record.token_ids) - 1

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token from logits [vocabulary]; whether the answer goes on."""
        self.last_id = self._sampler.choose(logits)
        self._text.take(self.last_id)
        if not self._text.is_ended and len(self._text.record.token_ids) < self.prepared.request.settings.max_new_tokens:
            return True
        self._text.end()
        self._emit(Piece("", self.prepared.answer("".join(self._pieces), self._text.record, self._model.name)))
        return False


def _gains(model: LanguageModel) -> bool:
    """Whether rows that share a product take less time than one after another."""
    return model.device.type != "cpu" or model.dtype == torch.float32


@torch.inference_mode()
def _keeps_rows_apart(model: LanguageModel) -> bool:
    """Whether tokens, each a row of its own, get the same logits to the last bit in any order and company."""
    ids = torch.arange(1, NUM_ROWS + 1, device=model.device) * 7919 % (model.hf.config.get_text_config().vocab_size - 1)
    places = torch.zeros(NUM_ROWS, 1, dtype=torch.long, device=model.device)
    mask = model.mask_from(torch.ones(NUM_ROWS, 1, 1, dtype=torch.bool, device=model.device), places[..., None])

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model.hf(input_ids=ids[:, None], position_ids=places, attention_mask=mask, use_cache=False).logits  # type: ignore[no-any-return]

    apart = logits(ids)
    return torch.equal(apart, logits(ids.flip(0)).flip(0)) and torch.equal(
        apart[:1].expand_as(apart), logits(ids[:1].expand_as(ids))
    )


_Pair = tuple[_Row, Callable[[BaseException | None], None]]


class Batch:
    """Up to NUM_ROWS answers of one model. To be used on the compute thread alone.

    A model whose attention is not ours, or a linking that wants another, is answered as a whole in `begin`.
    """

    def __init__(self, model: LanguageModel, width: int | None = None):
        self.model = model
        self.width = width or (NUM_ROWS if _gains(model) and _keeps_rows_apart(model) else 1)
        self._rows: list[_Pair] = []

    @property
    def num_rows(self) -> int:
        """Answers under way."""
        return len(self._rows)

    @property
    def has_room(self) -> bool:
        return len(self._rows) < NUM_ROWS

    def begin(
        self,
        maker: AnswerMaker,
        request: Request,
        emit: Emit[Piece],
        on_end: Callable[[BaseException | None], None],
        on_prepared: Callable[[Prepared], None] = lambda prepared: None,
    ) -> None:
        """Compute a question's context and let its answer join.

        What `emit` raises ends that answer alone; on_end gets it, or None after a whole answer.
        """
        try:
            prepared = maker.prepare(request)
            on_prepared(prepared)
            if not self.model.can_batch or prepared.context.tempering:
                maker.complete(prepared, emit)
                on_end(None)
                return
            row = _Row(self.model, prepared, emit)
            goes_on = row.take(predict(self.model, prepared.context, 1)[-1])
        except BaseException as error:  # handed to whoever waits for this answer
            on_end(error)
            return
        if goes_on:
            self._rows.append((row, on_end))
        else:
            prepared.context.release()
            on_end(None)

    def step(self) -> None:
        """One token more for every answer."""
        for by_reader in (True, False):
            rows = [pair for pair in self._rows if pair[0].by_reader is by_reader]
            for start in range(0, len(rows), self.width):
                self._step(rows[start : start + self.width], by_reader)

    def _step(self, rows: list[_Pair], by_reader: bool) -> None:
        try:
            logits = self._forward([row for row, _ in rows], by_reader)
        except BaseException as error:  # these answers do not survive it, the thread does
            for pair in rows:
                self._end(pair, error)
            return
        for pair, row_logits in zip(rows, logits, strict=False):
            self._advance(pair, row_logits)

    def _advance(self, pair: _Pair, logits: torch.Tensor) -> None:
        try:
            if pair[0].take(logits):
                return
        except BaseException as error:  # handed to whoever waits for this answer
            self._end(pair, error)
        else:
            self._end(pair, None)

    def _end(self, pair: _Pair, error: BaseException | None) -> None:
        self._rows.remove(pair)
        pair[0].prepared.context.release()
        pair[1](error)

    @torch.inference_mode()
    def _forward(self, rows: list[_Row], by_reader: bool) -> torch.Tensor:
        """Logits [width, vocabulary] behind each row's newest token; rows beyond the given ones mean nothing."""
        model = self.model
        empty = [0] * (self.width - len(rows))
        ids = torch.tensor([row.last_id for row in rows] + empty, device=model.device)[:, None]
        positions = torch.tensor([row.position for row in rows] + empty, device=model.device)[:, None]
        buffers = [row.prepared.context.layers() for row in rows]
        layers = [
            RowsLayer([(*own[layer], row.place) for own, row in zip(buffers, rows, strict=True)], model.window(layer))
            for layer in range(model.kv_shape.num_layers)
        ]
        seen = torch.ones(self.width, 1, 1, dtype=torch.bool, device=model.device)
        output = (model.reader if by_reader else model.hf)(
            input_ids=ids,
            position_ids=positions,
            attention_mask=model.mask_from(seen, torch.zeros_like(seen, dtype=torch.long)),
            use_cache=True,
            **{model.cache_argument: Cache(layers=layers)},
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]
