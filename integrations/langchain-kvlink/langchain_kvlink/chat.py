"""`ChatKVLink`: a chat model that answers from documents it has read before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from kvlink_rag import GenerationSettings
from kvlink_rag.errors import BadInput
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LangSmithParams, ModelProfile
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from langchain_kvlink.engines import Attached, SharedEngine
from langchain_kvlink.messages import engine_messages, split_documents
from langchain_kvlink.results import ChunkMaker, message_of

_LOAD_OPTIONS = ("model", "store", "adapter", "links", "dtype", "device")
_CALL_OPTIONS = ("temperature", "top_p", "seed", "linking", "reuse", "match_documents", "on_unmatched")
_TWO_NAMES = "max_tokens and max_new_tokens are two names of one argument; give one of them"
_NO_TOOLS = (
    "ChatKVLink offers no tool calling (bind_tools), nor structured output, which needs it: give an agent tools=[] and "
    "hand it documents by middleware, as the README of langchain-kvlink shows, or take another chat model for tools"
)
_OF_SERVICES = ("timeout", "max_retries", "api_key")  # every LangChain chat model takes them; nothing remote here


class ChatKVLink(BaseChatModel):
    """A local chat model that reads every document once: known chunks are taken from stored KV.

    Documents reach it as `documents=`, as text-plain blocks, as a tool's artifact, or simply as text in the prompt,
    where chunks that the store knows are found. The model is loaded at first use. `timeout`, `max_retries` and
    `api_key` are accepted and mean nothing here.
    """

    model: str | Path = "smollm2-135m-instruct"
    """Folder, hub id or the default's name."""
    store: str | Path = "kvlink_store"
    """Folder of the stored KV; made if it is missing."""
    engine: Any = Field(default=None, exclude=True, repr=False)
    """Instead of `model` and `store`: a KVLinkEngine, or a vector store or chat model of this package to share with."""
    attached: Any = Field(default=None, exclude=True, repr=False)
    """Made by the model itself: what it shares with the models that LangChain makes of its fields."""
    adapter: str | Path | None = None
    """A PEFT folder."""
    links: str | Path | None = None
    """Trained link tokens for this model."""
    linking: str | None = None
    """How chunks are joined; None: the engine's own way, link_tokens unless it says otherwise."""
    dtype: str = "auto"
    device: str = "auto"
    temperature: float = GenerationSettings.temperature
    top_p: float = GenerationSettings.top_p
    max_tokens: int = GenerationSettings.max_new_tokens
    """Tokens of an answer at most; `max_new_tokens` is another name for it."""
    stop: list[str] | None = None
    seed: int | None = GenerationSettings.seed
    streaming: bool = False
    match_documents: bool = True
    """Find known chunks in the prompt's text."""
    on_unmatched: Literal["ignore", "warn", "raise"] = "ignore"
    """What to do if the store holds chunks but none reached the model by any way."""
    reuse: bool = True
    """False: the same prompt with every chunk read afresh, for comparison."""

    model_config = ConfigDict(extra="forbid")
    _shared: SharedEngine = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _known_arguments(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {name: value for name, value in values.items() if name not in _OF_SERVICES}
        if "max_new_tokens" in values:
            if "max_tokens" in values:
                raise ValueError(_TWO_NAMES)
            values["max_tokens"] = values.pop("max_new_tokens")
        known = {field.alias or name for name, field in cls.model_fields.items()} | cls.model_fields.keys()
        if unknown := sorted(values.keys() - known):
            own = ", ".join(sorted(ChatKVLink.__annotations__.keys() - {"model_config", "_shared", "attached"}))
            raise ValueError(f"unknown arguments {', '.join(unknown)}; ChatKVLink has {own}")
        return values

    @model_validator(mode="after")
    def _attach_engine(self) -> Self:
        with _both_names():
            GenerationSettings(
                max_new_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                stop=tuple(self.stop or ()),
            )
        fields = {name: getattr(self, name) for name in _LOAD_OPTIONS}
        to_load = fields if self.linking is None else {**fields, "linking": self.linking}
        if self.attached is not None:  # LangChain makes a configured model of another's fields
            self._shared = self.attached.engine_of(self.engine, fields, to_load)
            return self
        given = {name: value for name, value in fields.items() if name in self.model_fields_set}
        self._shared = SharedEngine.of(self.engine, to_load if self.engine is None else given)
        self.attached = Attached(self.engine, fields, self._shared)
        return self

    @property
    def shared_engine(self) -> SharedEngine:
        """The engine, loaded or not, for what wants to share it."""
        return self._shared

    # -- answers -----------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(messages, stop, kwargs)
        with _both_names():
            answer = self._shared.get().ask(engine_messages(messages), **options)
        return ChatResult(generations=[ChatGeneration(message=message_of(answer, reuse=options["reuse"]))])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(messages, stop, kwargs)
        engine = await self._shared.aget()
        with _both_names():
            answer = await engine.aask(engine_messages(messages), **options)
        return ChatResult(generations=[ChatGeneration(message=message_of(answer, reuse=options["reuse"]))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = self._options(messages, stop, kwargs)
        maker = ChunkMaker(reuse=options["reuse"])
        with _both_names():
            for piece in self._shared.get().stream(engine_messages(messages), **options):
                if (message := maker.chunk(piece)) is None:
                    continue
                chunk = ChatGenerationChunk(message=message)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        options = self._options(messages, stop, kwargs)
        maker = ChunkMaker(reuse=options["reuse"])
        engine = await self._shared.aget()
        with _both_names():
            async with aclosing(engine.astream(engine_messages(messages), **options)) as pieces:
                async for piece in pieces:
                    if (message := maker.chunk(piece)) is None:
                        continue
                    chunk = ChatGenerationChunk(message=message)
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _options(self, messages: list[BaseMessage], stop: list[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's options: what the call says, else what the constructor said. Raises ValueError."""
        call = {name: value for name, value in given.items() if name != "stream"}
        documents = split_documents(messages, call.pop("documents", None))
        tokens = [call.pop(name) for name in ("max_tokens", "max_new_tokens") if name in call]
        if len(tokens) > 1:
            raise ValueError(_TWO_NAMES)
        if (model := call.pop("model", None)) not in (None, self._model_name, str(self.model)):
            raise ValueError(
                f"model={model!r} at call time: this ChatKVLink has {self._model_name!r} loaded with its stored KV; "
                "make another ChatKVLink for another model"
            )
        if unknown := sorted(call.keys() - set(_CALL_OPTIONS)):
            known = ", ".join(sorted(("documents", "max_tokens", "stop", *_CALL_OPTIONS)))
            raise ValueError(f"unknown arguments {', '.join(unknown)}; a call of ChatKVLink takes {known}")
        options = {name: call.get(name, getattr(self, name)) for name in _CALL_OPTIONS}
        options["max_new_tokens"] = tokens[0] if tokens else self.max_tokens
        options["stop"] = stop if stop is not None else self.stop or ()
        return {**options, "documents": documents, "system": ""}  # LangChain's prompts are finished

    def bind_tools(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered. Raises NotImplementedError, which says what to do."""
        raise NotImplementedError(_NO_TOOLS)

    # -- what LangChain asks about a model ---------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "kvlink-chat"

    @property
    def _model_name(self) -> str:
        return str(self.model) if (engine := self._shared.loaded) is None else engine.model.name

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that decides an answer. The fingerprint of the KV is there once the model is loaded."""
        engine = self._shared.loaded
        names = ("adapter", "links", "max_tokens", "stop", *_CALL_OPTIONS)
        params = {"model": self._model_name, **{name: getattr(self, name) for name in names}}
        params["store"] = str(self.store if engine is None else engine.folder)
        if engine is not None:
            params.update(linking=self.linking or engine.linking, fingerprint=engine.fingerprint)
        return params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of LangChain's cache of answers, which must hold the fingerprint: loads the model."""
        self._shared.get()
        return super()._get_llm_string(stop=stop, **kwargs)

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """`generate` for an event loop."""
        if self.cache is not False and (self.cache or get_llm_cache()):
            await self._shared.aget()  # else the cache's key would load it on the event loop
        return await super().agenerate(*args, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "kvlink"
        params["ls_model_name"] = str(kwargs.get("model") or self._model_name)
        if stop := stop or self.stop:
            params["ls_stop"] = stop
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        engine = SharedEngine.of(self.engine, {}).loaded
        if engine is None:
            return None
        return {"max_input_tokens": engine.model.max_positions, "tool_calling": False, "structured_output": False}

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own tokens of a text."""
        return list(self._shared.get().model.tokenizer.plain_ids(text))


@contextmanager
def _both_names() -> Iterator[None]:
    """The engine's errors with `max_tokens` beside `max_new_tokens`: callers know the first, or both."""
    try:
        yield
    except BadInput as error:
        error.args = (str(error).replace("max_new_tokens", "max_tokens (max_new_tokens)"),)
        raise
