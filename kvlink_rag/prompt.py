"""The prompt, built from ids: scaffold ids and plain ids are made apart and joined, never re-tokenised.

    prefix | history | chunk 1 | links | chunk 2 | links | ... | question

prefix: the template up to the first user's words (system message included); history: earlier turns;
question: the user's words and the template up to the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from kvlink_rag.errors import BadInput
from kvlink_rag.tokens import TextTokenizer

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
_SLOT = "KVLINKSLOT{}X"  # stands for a message's words while the chat template is rendered


@dataclass(frozen=True)
class Prompt:
    """Token ids of one request, in order of position."""

    prefix_ids: tuple[int, ...]
    history_ids: tuple[int, ...]
    chunk_ids: tuple[tuple[int, ...], ...]
    question_ids: tuple[int, ...]

    @property
    def num_scaffold_tokens(self) -> int:
        """Tokens outside the chunks."""
        return len(self.prefix_ids) + len(self.history_ids) + len(self.question_ids)


def build_prompt(
    tokenizer: TextTokenizer, messages: Sequence[Message], chunk_ids: Sequence[tuple[int, ...]], *, system: str | None
) -> Prompt:
    """Lay out `messages`, of which the last is the user's question, with the chunks before that question.

    messages are {"role", "content"}; a leading system message and `system` exclude each other.
    Raises BadInput for messages that make no conversation.
    """
    messages = _checked(messages, system)
    rendered = _render(tokenizer, messages)
    pieces = re.split(_SLOT.format(r"(\d+)"), rendered)  # scaffold, slot, scaffold, slot, ..., scaffold
    slots = [int(slot) for slot in pieces[1::2]]
    if slots != list(range(len(messages))):
        raise BadInput("this model's chat template drops or reorders messages of this conversation")
    scaffolds = [tokenizer.scaffold_ids(text) if text else () for text in pieces[0::2]]
    first_user = next(index for index, message in enumerate(messages) if message["role"] == "user")
    runs: list[tuple[int, ...]] = []
    for index, message in enumerate(messages):
        runs.append(scaffolds[index])
        if index == first_user:
            prefix = _joined(runs)
            runs = []
        if index == len(messages) - 1:
            history = _joined(runs)
            runs = []
        runs.append(tokenizer.plain_ids(message["content"]))
    runs.append(scaffolds[-1])
    return Prompt(prefix, history, tuple(chunk_ids), _joined(runs))


def stop_ids(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The control tokens with which the chat template ends an assistant's turn."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SLOT.format(0)}]
    if not tokenizer.hf.chat_template:
        return ()
    rendered = str(tokenizer.hf.apply_chat_template(messages, tokenize=False))
    _, _, after = rendered.partition(_SLOT.format(0))
    ids = tokenizer.scaffold_ids(after) if after else ()
    return ids[:1] if ids and ids[0] in tokenizer.control_ids else ()


def _checked(messages: Sequence[Message], system: str | None) -> list[dict[str, str]]:
    checked = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise BadInput(f"a message needs a role of {', '.join(ROLES)} and a text as content; got {dict(message)!r}")
        checked.append({"role": role, "content": content})
    if not checked or checked[-1]["role"] != "user" or not checked[-1]["content"].strip():
        raise BadInput("the question is empty; the last message must be the user's, with at least one word")
    if any(message["role"] == "system" for message in checked[1:]):
        raise BadInput("a system message can only be the first")
    if checked[0]["role"] == "system":
        if system is not None:
            raise BadInput("give the system message once: in `system` or as the first message")
    elif system:
        checked.insert(0, {"role": "system", "content": system})
    return checked


def _render(tokenizer: TextTokenizer, messages: list[dict[str, str]]) -> str:
    """The template's text with slots in place of the messages' words."""
    slotted = [{"role": m["role"], "content": _SLOT.format(i)} for i, m in enumerate(messages)]
    if not tokenizer.hf.chat_template:
        lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in slotted]
        return "".join(lines) + "Assistant:"
    try:
        return str(tokenizer.hf.apply_chat_template(slotted, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        if slotted[0]["role"] != "system":
            raise BadInput(f"this model's chat template refuses the conversation: {error}") from error
    # Some templates know no system role: its words then open the first user's turn.
    merged = [{"role": "user", "content": f"{slotted[0]['content']}\n\n{slotted[1]['content']}"}, *slotted[2:]]
    try:
        return str(tokenizer.hf.apply_chat_template(merged, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise BadInput(f"this model's chat template refuses the conversation: {error}") from error


def _joined(runs: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(token_id for run in runs for token_id in run)
