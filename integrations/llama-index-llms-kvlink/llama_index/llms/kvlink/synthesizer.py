"""A response synthesizer that hands chunks over apart, so that none is lost to packing or splitting of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.prompts import PromptTemplate
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer, QueryTextType
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.types import RESPONSE_TEXT_TYPE, TokenAsyncGen, TokenGen
from llama_index.llms.kvlink.base import KVLinkLLM
from llama_index.llms.kvlink.nodes import content_of

from kvlink_rag import DEFAULT_SYSTEM, Document

DEFAULT_QUESTION = PromptTemplate("{query_str}")


@dataclass
class _Synthesis:
    """One call of `synthesize`: what its chunks are called, and the figures once there are some."""

    ids: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


_current: ContextVar[_Synthesis | None] = ContextVar("kvlink_synthesis", default=None)


class KVLinkSynthesizer(BaseSynthesizer):
    """Answers in one call: the chunks stand before the question, each with its own stored KV, best first.

    `Response.metadata["kvlink"]` holds the figures; of a streamed response, once the stream has ended. Chunks beyond
    the model's window are left out and named there. `text_qa_template` words the question: {query_str} is all it has.
    """

    def __init__(
        self,
        llm: KVLinkLLM | None = None,
        *,
        system: str | None = DEFAULT_SYSTEM,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        **more: Any,
    ):
        """more: callback_manager, prompt_helper, empty_response, as in every synthesizer."""
        llm = llm or Settings.llm  # type: ignore[assignment]
        if not isinstance(llm, KVLinkLLM):
            raise ValueError(
                f"KVLinkSynthesizer needs a KVLinkLLM, got {type(llm).__name__}; pass llm= or set Settings.llm"
            )
        if more.get("output_cls") or more.get("multimodal"):
            raise ValueError("KVLinkSynthesizer answers in text; leave out output_cls and multimodal")
        super().__init__(llm=llm, streaming=streaming, **more)
        self._kvlink, self._system = llm, system
        self._question = _checked(text_qa_template or DEFAULT_QUESTION)

    def synthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """The answer to `query` from `nodes`. No nodes: the empty response, as of every synthesizer."""
        with _noted(nodes):
            return super().synthesize(query, nodes, additional_source_nodes, **response_kwargs)

    async def asynthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """`synthesize`, with the event loop free meanwhile."""
        with _noted(nodes):
            return await super().asynthesize(query, nodes, additional_source_nodes, **response_kwargs)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """The answer as a text, or as a generator of texts when streaming; response_kwargs go to `KVLinkLLM.chat`."""
        synthesis = _current.get() or _Synthesis()
        messages, options = self._request(query_str, text_chunks, synthesis, response_kwargs)
        if not self._streaming:
            response = self._kvlink.chat(messages, **options)
            synthesis.report.update(response.additional_kwargs["kvlink"])
            return response.message.content or ""
        pieces = self._kvlink.stream_chat(messages, **options)

        def texts() -> TokenGen:
            for piece in pieces:
                synthesis.report.update(piece.additional_kwargs.get("kvlink", {}))
                yield piece.delta or ""

        return texts()

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response`, with the event loop free meanwhile."""
        synthesis = _current.get() or _Synthesis()
        messages, options = self._request(query_str, text_chunks, synthesis, response_kwargs)
        if not self._streaming:
            response = await self._kvlink.achat(messages, **options)
            synthesis.report.update(response.additional_kwargs["kvlink"])
            return response.message.content or ""
        pieces = await self._kvlink.astream_chat(messages, **options)

        async def texts() -> TokenAsyncGen:
            async for piece in pieces:
                synthesis.report.update(piece.additional_kwargs.get("kvlink", {}))
                yield piece.delta or ""

        return texts()

    def _request(
        self, query: str, texts: Sequence[str], synthesis: _Synthesis, given: dict[str, Any]
    ) -> tuple[list[ChatMessage], dict[str, Any]]:
        """The conversation and the options of its call."""
        question = ChatMessage(role=MessageRole.USER, content=self._question.format(query_str=query))
        system = [ChatMessage(role=MessageRole.SYSTEM, content=self._system)] if self._system else []
        documents = [Document(text, id=synthesis.ids.get(text)) for text in texts if text.strip()]
        # the chunks are given, so a question that quotes one is not searched for it
        return [*system, question], {"documents": documents, "match_documents": False, **given}

    def _get_metadata_for_response(self, nodes: list[BaseNode]) -> dict[str, Any] | None:
        """The nodes' metadata, as of every synthesizer, and the figures under "kvlink"."""
        metadata = super()._get_metadata_for_response(nodes) or {}
        synthesis = _current.get()
        return metadata if synthesis is None else {**metadata, "kvlink": synthesis.report}

    def _get_prompts(self) -> PromptDictType:
        """The question's wording."""
        return {"text_qa_template": self._question}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """Take another wording of the question."""
        if "text_qa_template" in prompts:
            self._question = _checked(prompts["text_qa_template"])


@contextmanager
def _noted(nodes: Sequence[NodeWithScore]) -> Iterator[None]:
    """Make the nodes' ids known to what runs inside; each call of `synthesize` has its own notes."""
    token = _current.set(_Synthesis(ids={content_of(node): node.node_id for node in nodes}))
    try:
        yield
    finally:
        _current.reset(token)


def _checked(template: BasePromptTemplate) -> BasePromptTemplate:
    if set(template.template_vars) - {"query_str"}:
        raise ValueError(
            f"text_qa_template has {', '.join(sorted(template.template_vars))}, but chunks stand before the question "
            "by themselves; keep only {query_str}"
        )
    return template
