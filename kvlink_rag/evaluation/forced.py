"""How likely a linking holds a given answer: the answer is fed word by word, and every prediction kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvlink_rag.chunking import chunk_text
from kvlink_rag.context import Context
from kvlink_rag.encoding import Encoder
from kvlink_rag.generation import predict
from kvlink_rag.joining import LinkRequest
from kvlink_rag.kv import KV, StoredKV
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.prompt import Prompt, build_prompt
from kvlink_rag.questions import Example, system_for


class Forcing:
    """Feeds answers to one model under any linking. Chunks are encoded once per prompt, by `chunks`.

    Raises CheckpointMismatch for links that were not trained on chunks as the encoder makes them.
    """

    def __init__(self, encoder: Encoder, links: LinkTokens):
        links.check_recipe(encoder.recipe)
        self._encoder, self._links = encoder, links
        self._prefixes: dict[tuple[int, ...], StoredKV] = {}

    def chunks(self, prompt: Prompt) -> list[StoredKV]:
        """KV of the prompt's chunks, in order, up to rounding as a store would give it."""
        return self.at_rest(self.encoded(prompt))

    def encoded(self, prompt: Prompt) -> list[KV]:
        """KV of the prompt's chunks, in order, as the model computed it."""
        return [kv for _, kv in sorted(self._encoder.encode(prompt.chunk_ids), key=lambda found: found[0])]

    def at_rest(self, kvs: Sequence[KV]) -> list[StoredKV]:
        """KVs as they read back from a store of the encoder's precision."""
        return [self._encoder.precision.at_rest(kv) for kv in kvs]

    def context(self, prompt: Prompt, kvs: Sequence[StoredKV], linking: str, room: int) -> Context:
        """The prompt, linked, with room for an answer."""
        request = LinkRequest(self._encoder.model, prompt, self._prefix(prompt), kvs, self._links, room)
        return get_linking(linking).link(request)

    def logits(
        self, prompt: Prompt, kvs: Sequence[StoredKV], linking: str, answer_ids: Sequence[int], room: int = 0
    ) -> tuple[Context, Tensor]:
        """Logits [answer tokens, vocabulary] that predict the answer's tokens, and the context with the answer in it.

        `Context.rewind(len(answer_ids) - 1, last id of the question)` takes the answer out again.
        """
        context = self.context(prompt, kvs, linking, max(room, len(answer_ids)))  # which knows nothing of the answer
        context.extend(answer_ids[:-1], self._encoder.model.embed(answer_ids[:-1]))
        return context, predict(self._encoder.model, context, len(answer_ids))

    def again(self, context: Context, prompt: Prompt, answer_ids: Sequence[int]) -> Tensor:
        """What `logits` gives, over a context that another arm computed: the question and the answer are read anew.

        It must come from a linking that reads nothing but the question by the reader, and from the same base model.
        """
        asked = (*prompt.question_ids, *answer_ids[:-1])
        context.rewind(context.num_tokens - (len(prompt.ids) - len(prompt.question_ids)) - 1, asked)
        return predict(self._encoder.model, context, len(answer_ids))

    def _prefix(self, prompt: Prompt) -> StoredKV:
        ids = prompt.prefix_ids
        if ids not in self._prefixes:
            self._prefixes[ids] = self._encoder.encode_alone(ids)
        return self._prefixes[ids]


def prompt_of(encoder: Encoder, example: Example) -> Prompt:
    """The example as it is asked: its documents as chunks under the default system message, or plainly where none."""
    chunk_ids = [encoder.token_ids(chunk_text(item.text, item.title)) for item in example.documents]
    messages = [{"role": "user", "content": example.question}]
    return build_prompt(encoder.model.tokenizer, messages, chunk_ids, system=system_for(example.documents))
