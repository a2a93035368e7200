"""Text to token ids, with a wall between what the template says and what documents and users say.

A chat template's control tokens are recognised only in scaffold text; the same characters in a
document or a question stay plain text, so no document can open a turn or forge a link token.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from kvlink_rag.errors import BadInput, UnsupportedModel


class TextTokenizer:
    """A Hugging Face fast tokenizer, split into a scaffold side and a plain side."""

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModel(
                f"tokenizer {type(tokenizer).__name__} has no `tokenizers` backend; save a fast one with the model"
            )
        self.hf = tokenizer
        added = tokenizer.added_tokens_decoder
        # Runs of spaces or newlines are added tokens in some vocabularies; they control nothing.
        self.control_ids = frozenset(
            token_id for token_id, token in added.items() if token.special or str(token.content).strip()
        )
        self.digest, self._plain = _digest_and_plain(backend.to_str(), self.control_ids)
        self._is_byte_level = self._plain.normalizer is None and "ByteLevel" in str(self._plain.pre_tokenizer)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The beginning-of-text token, where the vocabulary has one."""
        return () if self.hf.bos_token_id is None else (int(self.hf.bos_token_id),)

    def __len__(self) -> int:
        return len(self.hf)

    def scaffold_ids(self, text: str) -> tuple[int, ...]:
        """Ids of template text, control tokens recognised. Never pass a document or a question."""
        return tuple(self.hf(text, add_special_tokens=False).input_ids)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Ids of anybody's text, in which nothing is a control token."""
        try:
            ids = self._plain.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise BadInput(f"text holds characters that are no valid Unicode: {error}") from None
        if self.control_ids.isdisjoint(ids):
            return tuple(ids)
        # A vocabulary can hold a control token as an ordinary word too: spell such text out.
        spelled = [self._plain.encode(char, add_special_tokens=False).ids for char in text]
        ids = [token_id for char_ids in spelled for token_id in char_ids]
        if not self.control_ids.isdisjoint(ids):
            raise BadInput("the text cannot be written in this model's vocabulary without a control token")
        return tuple(ids)

    def count(self, text: str) -> int:
        """Number of tokens of plain text."""
        return len(self.plain_ids(text))

    def at_most(self, text: str) -> int:
        """A number that `count` is not above; found without counting where every token stands for a byte or more."""
        return len(text.encode("utf-8", "replace")) + 1 if self._is_byte_level else self.count(text)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Start and end character of every plain token."""
        return list(self._plain.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, control tokens left out."""
        return str(self.hf.decode(list(ids), skip_special_tokens=True))

    def decode_stream(self) -> TokenDecoder:
        """A decoder to feed one generated id at a time."""
        return TokenDecoder(self.hf.backend_tokenizer)


class TokenDecoder:
    """Turns ids into text piece by piece; holds back bytes that do not yet make a character."""

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # ids whose text is still to come

    def step(self, token_id: int) -> str:
        """The text that this id completes. Bytes that turn out to make no character become replacement characters."""
        self._held.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id) or ""
        except Exception:  # the class itself is raised: byte tokens that broke a run of which a part was given out
            # Read as a run of their own, they are never taken for what was given out before.
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(self._backend, held) or "" for held in self._held)
        if text:
            self._held.clear()
        return text


@functools.lru_cache(maxsize=2)
def _digest_and_plain(backend: str, control_ids: frozenset[int]) -> tuple[str, Tokenizer]:
    """Digest of a tokenizer's JSON, and that tokenizer without control tokens; seconds long for big vocabularies."""
    spec = {**json.loads(backend), "truncation": None, "padding": None}
    parts = {name: json.dumps(part, sort_keys=True) for name, part in spec.items()}  # the vocabulary once, for both
    kept = [token for token in spec.get("added_tokens", []) if token["id"] not in control_ids]
    without_control = {**parts, "added_tokens": json.dumps(kept), "post_processor": "null"}
    digest = hashlib.sha256(_json_object(parts).encode()).hexdigest()
    return digest, Tokenizer.from_str(_json_object(without_control))


def _json_object(parts: Mapping[str, str]) -> str:
    """What json.dumps writes with sorted keys, from values that are JSON already."""
    return "{" + ", ".join(f"{json.dumps(name)}: {parts[name]}" for name in sorted(parts)) + "}"
