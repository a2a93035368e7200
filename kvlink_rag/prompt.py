"""The prompt, built from ids: scaffold ids and plain ids are made apart and joined, never re-tokenised.

    prefix | history | chunk 1 | links | chunk 2 | links | ... | question

prefix: the template up to the first user's words (system message included) or the first chunk; history: earlier
turns; question: the user's words and the template up to the answer. A message may also hold chunks inside its words;
they then stand there, with the text around them computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from kvlink_rag.errors import BadInput
from kvlink_rag.tokens import TextTokenizer

Message = Mapping[str, Any]  # role; content: a text, or a sequence of texts and chunks
ROLES = ("system", "user", "assistant")
_SLOT = "KVLINKSLOT{}X"  # stands for a message's words while the chat template is rendered


@dataclass(frozen=True)
class Part:
    """A stretch of the prompt: a chunk, whose KV is stored, or text, which is computed."""

    ids: tuple[int, ...]
    is_chunk: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids of one request, in order of position: the prefix, then the parts, of which the last is text.

    place: where among the parts chunks found for the question go, right before its words.
    """

    prefix_ids: tuple[int, ...]
    parts: tuple[Part, ...]
    place: int = 0

    @property
    def chunk_ids(self) -> tuple[tuple[int, ...], ...]:
        """The chunks in order of position."""
        return tuple(part.ids for part in self.parts if part.is_chunk)

    @property
    def ids(self) -> tuple[int, ...]:
        """All of it."""
        return (*self.prefix_ids, *(token_id for part in self.parts for token_id in part.ids))

    @property
    def question_ids(self) -> tuple[int, ...]:
        """The text behind the last chunk."""
        return self.parts[-1].ids

    @property
    def num_scaffold_tokens(self) -> int:
        """Tokens outside the chunks."""
        return len(self.prefix_ids) + sum(len(part.ids) for part in self.parts if not part.is_chunk)

    def with_chunks(self, chunk_ids: Iterable[tuple[int, ...]]) -> Prompt:
        """The prompt with more chunks before the question's words."""
        chunks = tuple(Part(ids, is_chunk=True) for ids in chunk_ids)
        return replace(self, parts=(*self.parts[: self.place], *chunks, *self.parts[self.place :]))


def build_prompt(
    tokenizer: TextTokenizer, messages: Sequence[Message], chunk_ids: Sequence[tuple[int, ...]], *, system: str | None
) -> Prompt:
    """Lay out `messages`, of which the last is the user's question, with the chunks before that question.

    messages are {"role", "content"}, where content is a text or a sequence of texts and chunks (as tuples of ids); a
    leading system message and `system` exclude each other. Raises BadInput for messages that make no conversation.
    """
    messages = _checked(messages, system)
    rendered = _render(tokenizer, messages)
    pieces = re.split(_SLOT.format(r"(\d+)"), rendered)  # scaffold, slot, scaffold, slot, ..., scaffold
    slots = [int(slot) for slot in pieces[1::2]]
    if slots != list(range(len(messages))):
        raise BadInput("this model's chat template drops or reorders messages of this conversation")
    scaffolds = [tokenizer.scaffold_ids(text) if text else () for text in pieces[0::2]]
    layout = _Layout()
    first_user = next(index for index, message in enumerate(messages) if message["role"] == "user")
    for index, message in enumerate(messages):
        layout.text(scaffolds[index])
        if index == first_user:
            layout.end_prefix()
        if index == len(messages) - 1:
            layout.set_place()
        for piece in message["content"]:
            layout.text(tokenizer.plain_ids(piece)) if isinstance(piece, str) else layout.chunk(piece)
    layout.text(scaffolds[-1])
    prompt = layout.prompt()
    if not prompt.question_ids:
        raise BadInput("nothing behind the last document of the message, nor in this model's chat template: add words")
    return prompt.with_chunks(chunk_ids)


class _Layout:
    """Collects a prompt from left to right."""

    def __init__(self) -> None:
        self._prefix: tuple[int, ...] | None = None
        self._parts: list[Part] = []
        self._run: list[int] = []
        self._place = 0

    def text(self, ids: Sequence[int]) -> None:
        self._run.extend(ids)

    def chunk(self, ids: tuple[int, ...]) -> None:
        self.end_prefix()
        self._end_run()
        self._parts.append(Part(ids, is_chunk=True))

    def end_prefix(self) -> None:
        if self._prefix is None:
            self._prefix, self._run = tuple(self._run), []

    def set_place(self) -> None:
        self._end_run()
        self._place = len(self._parts)

    def prompt(self) -> Prompt:
        assert self._prefix is not None
        return Prompt(self._prefix, (*self._parts, Part(tuple(self._run))), self._place)

    def _end_run(self) -> None:
        if self._run:
            self._parts.append(Part(tuple(self._run)))
            self._run = []


def stop_ids(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The control tokens with which the chat template ends an assistant's turn."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SLOT.format(0)}]
    if not tokenizer.hf.chat_template:
        return ()
    rendered = str(tokenizer.hf.apply_chat_template(messages, tokenize=False))
    _, _, after = rendered.partition(_SLOT.format(0))
    ids = tokenizer.scaffold_ids(after) if after else ()
    return ids[:1] if ids and ids[0] in tokenizer.control_ids else ()


def _checked(messages: Sequence[Message], system: str | None) -> list[dict[str, Any]]:
    """The messages with their content as a list of pieces, the system message first."""
    checked: list[dict[str, Any]] = []
    pieces: Any = None
    for message in messages:
        role, content = message.get("role"), message.get("content")
        pieces = [content] if isinstance(content, str) else content
        if role not in ROLES or not isinstance(pieces, list) or not all(isinstance(p, str | tuple) for p in pieces):
            raise BadInput(f"a message needs a role of {', '.join(ROLES)} and a text as content; got {dict(message)!r}")
        checked.append({"role": role, "content": pieces})
    if not checked or checked[-1]["role"] != "user" or not any(not isinstance(p, str) or p.strip() for p in pieces):
        raise BadInput("the question is empty; the last message must be the user's, with at least one word")
    if any(message["role"] == "system" for message in checked[1:]):
        raise BadInput("a system message can only be the first")
    if checked[0]["role"] == "system":
        if system:
            raise BadInput("give the system message once: in `system` or as the first message")
    elif system:
        checked.insert(0, {"role": "system", "content": [system]})
    return checked


def _render(tokenizer: TextTokenizer, messages: list[dict[str, Any]]) -> str:
    """The template's text with slots in place of the messages' words."""
    slotted = [{"role": m["role"], "content": _SLOT.format(i)} for i, m in enumerate(messages)]
    if not tokenizer.hf.chat_template:
        lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in slotted]
        return "".join(lines) + "Assistant:"
    try:
        return str(tokenizer.hf.apply_chat_template(slotted, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        refusal = f"this model's chat template refuses the conversation: {error}"
        if slotted[0]["role"] != "system":
            raise BadInput(refusal) from error
        if slotted[1]["role"] != "user":
            raise BadInput(
                f"{refusal}; where a template knows no system role, such a message opens the user's turn: let the "
                f"user's words stand right behind it, or leave it out"
            ) from error
    # Some templates know no system role: its words then open the first user's turn.
    merged = [{"role": "user", "content": f"{slotted[0]['content']}\n\n{slotted[1]['content']}"}, *slotted[2:]]
    try:
        return str(tokenizer.hf.apply_chat_template(merged, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise BadInput(f"this model's chat template refuses the conversation: {error}") from error
