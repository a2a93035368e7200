"""From what a caller asks to a checked request: messages, documents in place, known chunks in finished prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from kvlink_rag.answering import Request
from kvlink_rag.chunking import as_hit
from kvlink_rag.config import GenerationSettings
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.index import VectorIndex
from kvlink_rag.matching import ChunkMatcher, say_unmatched
from kvlink_rag.prompt import Message, build_prompt
from kvlink_rag.types import Chunk, Document, Hit

NUM_TURNS = 2  # of a conversation, that tell what its last message is about
TURN_CHARS = 300  # of each: what was pasted is no question


class AskOptions(TypedDict, total=False):
    """What `ask` and `stream` take beside the question."""

    documents: Sequence[str | Document | Hit] | None
    system: str | None
    linking: str | None
    reuse: bool
    match_documents: bool
    on_unmatched: str
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: str | Sequence[str]
    seed: int | None


def refuse_unknown(options: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError where there are options beside the known ones."""
    if unknown := sorted(set(options).difference(known)):
        raise TypeError(f"unknown options {', '.join(unknown)}; known are {', '.join(known)}")


class Asking:
    """Makes requests for one model's prompts and one namespace's chunks."""

    def __init__(self, encoder: Encoder, index: VectorIndex):
        self._encoder, self._index = encoder, index
        self._matcher: tuple[tuple[int, int], ChunkMatcher] | None = None

    def request(
        self,
        question: str | Sequence[Message],
        options: Mapping[str, Any],
        started: float,
        linking: str,
        find: Callable[[str], list[Hit]] | None,
        default_system: str | None,
    ) -> Request:
        """The question with everything the caller said, checked; linking by name. Raises BadInput, TypeError."""
        refuse_unknown(options, AskOptions.__annotations__)
        if not isinstance(question, Iterable):
            raise BadInput(f"a question is a text or a list of messages, got {type(question).__name__}")
        stop = options.get("stop") or ()
        if not isinstance(stop, Iterable):
            raise BadInput(f"stop must be a text or a list of texts, got {stop!r}")
        settings = GenerationSettings(
            max_new_tokens=options.get("max_new_tokens", GenerationSettings.max_new_tokens),
            temperature=options.get("temperature", GenerationSettings.temperature),
            top_p=options.get("top_p", GenerationSettings.top_p),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            seed=options.get("seed"),
        )
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if wrong := [message for message in messages if not isinstance(message, Mapping)]:
            raise BadInput(f"a message is a dict of role and content, got {type(wrong[0]).__name__}")
        given = [as_hit(item) for item in _several(options.get("documents"))]
        in_place: list[Hit] = []
        match = options.get("match_documents", False)
        laid_out = [{**message, "content": self._pieces(message, in_place, match)} for message in messages]
        self._note_unmatched(options, bool(in_place or given or find), match)
        has_system = bool(messages) and messages[0].get("role") == "system"
        system = options.get("system")
        prompt = build_prompt(
            self._encoder.model.tokenizer,
            laid_out,
            [],
            system=system if system is not None or has_system else default_system,
        )
        words = _words(messages[-1].get("content"))
        return Request(words, prompt, in_place, given, find, linking, options.get("reuse", True), settings, started)

    def _pieces(self, message: Message, found: list[Hit], match: bool) -> Any:
        """A message's content with Documents and known chunks as token ids; appends their hits to `found`."""
        content = message.get("content")
        if isinstance(content, str):
            content = [content]
        if not isinstance(content, Sequence):
            return content  # refused where messages are checked
        pieces: list[Any] = []
        for item in content:
            for piece in self._matched(item) if match and isinstance(item, str) else [item]:
                if isinstance(piece, Document | Hit):
                    found.append(as_hit(piece))
                    pieces.append(self._encoder.token_ids(found[-1].chunk.text))
                else:
                    pieces.append(piece)
        return pieces

    def _matched(self, text: str) -> list[str | Hit]:
        """A text, split at the known chunks in it."""
        version = self._index.version()
        if self._matcher is None or self._matcher[0] != version:
            self._matcher = (version, ChunkMatcher(self._index.texts()))
        pieces = self._matcher[1].split(text)
        ids = {piece[0] for piece in pieces if not isinstance(piece, str)}
        known = {(each, one.chunk.text): one.chunk for each in ids for one in reversed(self._index.chunks_of(each))}
        return [
            piece if isinstance(piece, str) else Hit(known.get(piece, Chunk(piece[1], piece[0], 0))) for piece in pieces
        ]

    def _note_unmatched(self, options: Mapping[str, Any], has_documents: bool, match: bool) -> None:
        on_unmatched = options.get("on_unmatched", "ignore")
        if on_unmatched not in ("ignore", "warn", "raise"):
            raise BadInput(f"on_unmatched must be 'ignore', 'warn' or 'raise', got {on_unmatched!r}")
        if not match or has_documents or on_unmatched == "ignore" or not self._index.counts()[1]:
            return
        say_unmatched(on_unmatched)


def _several(documents: Any) -> Sequence[str | Document | Hit]:
    """The documents of a question; one alone is refused, since a text is a sequence too: of letters."""
    if isinstance(documents, str | Document | Hit):
        raise BadInput(f"documents must be a list, got one {type(documents).__name__}: put it into a list")
    if documents and not isinstance(documents, Iterable):
        raise BadInput(f"documents must be a list, got {type(documents).__name__}")
    return documents or ()


def asked_before(messages: Sequence[Message]) -> list[str]:
    """What the user said in the last turns before this one, the latest first, as far as it helps to search for it."""
    said = [_words(message.get("content")) for message in messages[:-1] if message.get("role") == "user"]
    return [words[-TURN_CHARS:] for words in said[: -NUM_TURNS - 1 : -1] if words.strip()]


def _words(content: Any) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(item for item in content or () if isinstance(item, str))
