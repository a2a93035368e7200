"""The language model: LlamaIndex's prompts go in, known chunks in them are answered from stored KV."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.llms.kvlink.messages import as_conversation, as_documents
from llama_index.llms.kvlink.report import announce

from kvlink_rag import Answer, GenerationSettings, Piece

if TYPE_CHECKING:
    from kvlink_rag import KVLinkEngine

# What a single call may set; the first five are taken from the LLM where a call leaves them out.
_FROM_SELF = ("max_new_tokens", "temperature", "top_p", "seed", "reuse", "match_documents", "on_unmatched")
KNOWN_OPTIONS = ("documents", *_FROM_SELF, "linking", "stop", "system")
_OF_ENGINE = ("store", "adapter", "links", "dtype", "device")


class KVLinkLLM(CustomLLM):
    """A local model that answers from stored KV wherever a known chunk reaches it.

    The model is loaded by the first question, or give a loaded `engine`. Chunks reach it as `documents=` of any call,
    or stand in the prompt word for word (`match_documents`), which is how query and chat engines bring them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model_name: str = Field(default="smollm2-135m-instruct", description="folder, hub id, or the default's name")
    store: str = Field(default="kvlink_store", description="folder of the stored KV; see kv_folder(persist_dir)")
    adapter: str | None = Field(default=None, description="folder of a PEFT adapter")
    links: str | None = Field(default=None, description="folder or hub id of trained link tokens")
    linking: str | None = Field(default=None, description="how chunks are joined; None: as the engine does")
    dtype: str = Field(default="auto", description="the model's number format")
    device: str = Field(default="auto", description="where the model runs")
    context_window: int | None = Field(default=None, description="tokens of prompt and answer; None: the model's own")
    max_new_tokens: int = Field(default=GenerationSettings.max_new_tokens, gt=0, description="length of an answer")
    temperature: float = Field(default=GenerationSettings.temperature, ge=0, description="0: greedy")
    top_p: float = Field(default=GenerationSettings.top_p, gt=0, le=1, description="nucleus sampling")
    seed: int | None = Field(default=GenerationSettings.seed, description="of the sampling")
    match_documents: bool = Field(default=True, description="use stored KV of chunks that stand in the prompt")
    on_unmatched: str = Field(default="ignore", description="no known chunk in a prompt: ignore, warn or raise")
    reuse: bool = Field(default=True, description="False: same prompt, every chunk read afresh, to compare")

    _engine: KVLinkEngine | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, engine: KVLinkEngine | None = None, **fields: Any):
        if engine is not None:
            if clash := [name for name in _OF_ENGINE if name in fields]:
                raise ValueError(f"engine is loaded already, so {', '.join(clash)} would have no effect; leave it out")
            fields = {"model_name": engine.model.name, **fields, "store": str(engine.folder)}
        fields.update({name: str(fields[name]) for name in ("store", "adapter", "links") if fields.get(name)})
        super().__init__(**fields)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        return "KVLinkLLM"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy that shares a loaded engine: a model in memory is there once."""
        return self.__copy__()

    @property
    def engine(self) -> KVLinkEngine:
        """The engine; loads the model if that has not happened yet. Call it early to spare the first question."""
        with self._lock:
            if self._engine is None:
                self._engine = self._load()
            return self._engine

    def tokenizer(self, text: str) -> list[int]:
        """The model's own tokens of a text: `Settings.tokenizer = llm.tokenizer` makes LlamaIndex count with them."""
        return list(self.engine.model.tokenizer.plain_ids(text))

    @property
    def metadata(self) -> LLMMetadata:
        """The model's window and name; loads the model unless `context_window` is given."""
        if self.context_window is None and self._engine is None and _in_event_loop():
            warnings.warn(
                "KVLinkLLM loads its model on the event loop, because LlamaIndex asked for its context window; read "
                "`llm.engine` before the loop starts, or give `context_window`",
                stacklevel=2,
            )
        return LLMMetadata(
            context_window=self.context_window or self.engine.model.max_positions,
            num_output=self.max_new_tokens,
            is_chat_model=True,
            model_name=self.model_name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What instrumentation tells about this model, without loading it."""
        return {
            "class_name": self.class_name(),
            "model_name": self.model_name,
            "context_window": self.context_window,
            "num_output": self.max_new_tokens,
            "is_chat_model": True,
        }

    # -- completion: the prompt is one user's message -----------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The answer to one prompt."""
        answer = self.engine.ask(self._as_user(prompt, formatted), **self._options(kwargs))
        return CompletionResponse(**_finished(answer), text=answer.text)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The answer piece by piece; the last one carries the figures."""
        pieces = self.engine.stream(self._as_user(prompt, formatted), **self._options(kwargs))

        def responses() -> CompletionResponseGen:
            text = ""
            for piece in pieces:
                text += piece.text
                yield _completion_piece(text, piece)

        return responses()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete`, with the event loop free meanwhile."""
        options = self._options(kwargs)
        answer = await (await self._aengine()).aask(self._as_user(prompt, formatted), **options)
        return CompletionResponse(**_finished(answer), text=answer.text)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete`, with the event loop free meanwhile."""
        options = self._options(kwargs)
        pieces = (await self._aengine()).astream(self._as_user(prompt, formatted), **options)

        async def responses() -> CompletionResponseAsyncGen:
            text = ""
            try:
                async for piece in pieces:
                    text += piece.text
                    yield _completion_piece(text, piece)
            finally:
                await pieces.aclose()

        return responses()

    # -- chat: roles go through the model's own chat template ---------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The answer to a conversation."""
        answer = self.engine.ask(as_conversation(messages), **self._options(kwargs))
        return ChatResponse(**_finished(answer), message=_assistant(answer.text))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """The answer piece by piece; the last one carries the figures."""
        pieces = self.engine.stream(as_conversation(messages), **self._options(kwargs))

        def responses() -> ChatResponseGen:
            text = ""
            for piece in pieces:
                text += piece.text
                yield _chat_piece(text, piece)

        return responses()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat`, with the event loop free meanwhile."""
        conversation, options = as_conversation(messages), self._options(kwargs)
        answer = await (await self._aengine()).aask(conversation, **options)
        return ChatResponse(**_finished(answer), message=_assistant(answer.text))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat`, with the event loop free meanwhile."""
        conversation, options = as_conversation(messages), self._options(kwargs)
        pieces = (await self._aengine()).astream(conversation, **options)

        async def responses() -> ChatResponseAsyncGen:
            text = ""
            try:
                async for piece in pieces:
                    text += piece.text
                    yield _chat_piece(text, piece)
            finally:
                await pieces.aclose()

        return responses()

    # -- inside ------------------------------------------------------------------------------------

    def _load(self) -> KVLinkEngine:
        from kvlink_rag import KVLinkEngine

        linking: dict[str, Any] = {"linking": self.linking} if self.linking else {}
        return KVLinkEngine.load(
            self.model_name,
            self.store,
            adapter=self.adapter,
            links=self.links,
            dtype=self.dtype,
            device=self.device,
            **linking,
        )

    async def _aengine(self) -> KVLinkEngine:
        """The engine; loading it does not hold up the event loop."""
        return await asyncio.to_thread(lambda: self.engine) if self._engine is None else self._engine

    def _as_user(self, prompt: str, formatted: bool) -> list[dict[str, str]]:
        if not formatted and self.completion_to_prompt is not None:
            prompt = self.completion_to_prompt(prompt)
        return [{"role": "user", "content": prompt}]

    def _options(self, given: dict[str, Any]) -> Any:
        """The engine's options for one call: the call's own, else this LLM's."""
        if unknown := sorted(given.keys() - set(KNOWN_OPTIONS)):
            raise ValueError(
                f"KVLinkLLM does not know {', '.join(map(repr, unknown))}; a call takes {', '.join(KNOWN_OPTIONS)}"
            )
        own = {"linking": self.linking, "system": ""}  # LlamaIndex's prompts are finished
        options = {**own, **{name: getattr(self, name) for name in _FROM_SELF}, **given}
        return {**options, "documents": as_documents(given.get("documents") or ())}


def _in_event_loop() -> bool:
    """Whether this thread runs an event loop, which loading a model would hold up."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _assistant(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _finished(answer: Answer) -> dict[str, Any]:
    """What a finished answer adds to a response; tells the listeners."""
    return {"raw": answer.to_json(), "additional_kwargs": {"kvlink": announce(answer)}}


def _completion_piece(text: str, piece: Piece) -> CompletionResponse:
    finished = _finished(piece.answer) if piece.answer else {}
    return CompletionResponse(text=text, delta=piece.text, **finished)


def _chat_piece(text: str, piece: Piece) -> ChatResponse:
    finished = _finished(piece.answer) if piece.answer else {}
    return ChatResponse(message=_assistant(text), delta=piece.text, **finished)
