"""Several questions at once: their answers join and leave between steps, each of which brings one token to all of them.

An answer is the same, to the last bit, whoever is asked beside it; see `rows`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvlink_rag.answering import AnswerMaker, Prepared, Request
from kvlink_rag.compute import Emit
from kvlink_rag.generation import predict
from kvlink_rag.model import LanguageModel
from kvlink_rag.rows import NUM_ROWS, Decoding, RowDecoder
from kvlink_rag.types import Piece

OnEnd = Callable[[BaseException | None], None]


class _Underway(Decoding):
    """A question whose answer is being made, and whom to tell of it."""

    def __init__(self, model: LanguageModel, prepared: Prepared, emit: Emit[Piece], on_end: OnEnd):
        super().__init__(model, prepared.context, prepared.request.settings, self._keep)
        self.on_end = on_end
        self._prepared, self._model_name, self._emit = prepared, model.name, emit
        self._pieces: list[str] = []

    def _keep(self, text: str) -> None:
        self._pieces.append(text)
        self._emit(Piece(text))

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token from logits [vocabulary]; whether the answer goes on."""
        if super().take(logits):
            return True
        self._emit(Piece("", self._prepared.answer("".join(self._pieces), self.record, self._model_name)))
        return False


class Batch:
    """Up to NUM_ROWS answers of one model. To be used on the compute thread alone.

    A model whose attention is not ours, or a linking that wants another, is answered as a whole in `begin`.
    """

    def __init__(self, model: LanguageModel, width: int | None = None):
        self._model = model
        self._decoder = RowDecoder(model, width)
        self._underway: list[_Underway] = []

    @property
    def width(self) -> int:
        """How many answers share a product with the weights."""
        return self._decoder.width

    @property
    def num_rows(self) -> int:
        """Answers under way."""
        return len(self._underway)

    @property
    def has_room(self) -> bool:
        return len(self._underway) < NUM_ROWS

    def begin(
        self,
        maker: AnswerMaker,
        request: Request,
        emit: Emit[Piece],
        on_end: OnEnd,
        on_prepared: Callable[[Prepared], None] = lambda prepared: None,
    ) -> None:
        """Compute a question's context and let its answer join.

        What `emit` raises ends that answer alone; on_end gets it, or None after a whole answer.
        """
        try:
            prepared = maker.prepare(request)
            on_prepared(prepared)
            if not self._decoder.takes(prepared.context):
                maker.complete(prepared, emit)
                on_end(None)
                return
            one = _Underway(self._model, prepared, emit, on_end)
            goes_on = one.take(predict(self._model, prepared.context, 1)[-1])
        except BaseException as error:  # handed to whoever waits for this answer
            on_end(error)
            return
        if goes_on:
            self._underway.append(one)
        else:
            prepared.context.release()
            on_end(None)

    def step(self) -> None:
        """One token more for every answer."""
        for some in self._decoder.shares(self._underway):
            self._step(some)

    def _step(self, some: list[_Underway]) -> None:
        try:
            logits = self._decoder.forward(some)
        except BaseException as error:  # these answers do not survive it, the thread does
            for one in some:
                self._end(one, error)
            return
        for one, row_logits in zip(some, logits, strict=False):
            self._advance(one, row_logits)

    def _advance(self, one: _Underway, logits: torch.Tensor) -> None:
        try:
            if one.take(logits):
                return
        except BaseException as error:  # handed to whoever waits for this answer
            self._end(one, error)
        else:
            self._end(one, None)

    def _end(self, one: _Underway, error: BaseException | None) -> None:
        self._underway.remove(one)
        one.context.release()
        one.on_end(error)
