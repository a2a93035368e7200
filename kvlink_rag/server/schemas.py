"""Requests as they may look: typed, bounded, closed. Names are OpenAI's; what is ours stands at the end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from kvlink_rag.config import DEFAULT_K
from kvlink_rag.errors import BadInput
from kvlink_rag.linking import LINKINGS, get_linking
from kvlink_rag.server import settings as bounds
from kvlink_rag.types import Document

Name = Annotated[str, StringConstraints(min_length=1, max_length=bounds.MAX_NAME_CHARS)]
DocumentId = Annotated[
    str, StringConstraints(min_length=1, max_length=bounds.MAX_NAME_CHARS, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Title = Annotated[str, StringConstraints(max_length=bounds.MAX_TITLE_CHARS)]
# A text holds a word; how much of it is allowed is the server's setting.
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


def _known(linking: str) -> str:
    try:
        get_linking(linking)
    except BadInput:
        raise ValueError(f"must be one of {', '.join(LINKINGS)}, settings behind an @") from None
    return linking


LinkingName = Annotated[Name, AfterValidator(_known), Field(json_schema_extra={"pattern": f"^({'|'.join(LINKINGS)})$"})]


class Closed(BaseModel):
    """Unknown fields are refused, so that no setting is ever silently dropped."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Closed):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Closed):
    """One turn. "developer" is OpenAI's newer name for "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=bounds.MAX_MESSAGES)]
    name: Name | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The words of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class DocumentData(Closed):
    """Cohere's form of a document's content."""

    text: Text
    title: Title | None = None


class ChatDocument(Closed):
    """A document to answer from: vLLM's {"title", "text"} or Cohere's {"id", "data"}."""

    id: DocumentId | None = None
    title: Title | None = None
    text: Text | None = None
    data: Text | DocumentData | None = None

    def to_document(self) -> Document | None:
        """The document, or None if it holds no text, or two."""
        data = DocumentData(text=self.data) if isinstance(self.data, str) else self.data
        if (self.text is None) == (data is None):
            return None
        return Document(self.text or data.text, self.id, self.title or (data.title if data else None))  # type: ignore[union-attr]


class StreamOptions(Closed):
    """OpenAI's."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(Closed):
    """Only text comes back."""

    type: Literal["text"]


class ChatRequest(Closed):
    """OpenAI's chat completion request; what would need abilities we lack is refused, not ignored."""

    model: Name
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=bounds.MAX_MESSAGES)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    stop: Name | Annotated[list[Name], Field(max_length=bounds.MAX_STOP)] | None = None
    seed: Annotated[int, Field(ge=-(2**53), le=2**53)] | None = None
    # taken, without any effect on the answer
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None
    # taken at the value that means nothing
    n: Literal[1] | None = 1
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    logprobs: Literal[False] | None = False
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    # ours
    documents: Annotated[list[Text | ChatDocument], Field(max_length=bounds.MAX_DOCUMENTS)] | None = Field(
        default=None, description="What to answer from, best first; [] is nothing. Without it, the store is searched."
    )
    k: Annotated[int, Field(ge=1, le=bounds.MAX_K)] = Field(default=DEFAULT_K, description="Chunks to retrieve.")
    linking: LinkingName | None = Field(default=None, description='"full" reads everything again, for comparison.')


class NewDocument(Closed):
    """A text to keep. Another text under a known id is an update."""

    text: Text
    id: DocumentId | None = None
    title: Title | None = None
    metadata: Annotated[dict[Name, Title | int | bool | None], Field(max_length=32)] = {}


class NewDocuments(Closed):
    """Texts to keep."""

    documents: Annotated[list[NewDocument], Field(min_length=1, max_length=bounds.MAX_ADDED)]


class SearchRequest(Closed):
    """A question to the index."""

    query: Annotated[Text, Field(max_length=bounds.MAX_QUERY_CHARS)]
    k: Annotated[int, Field(ge=1, le=bounds.MAX_K)] = DEFAULT_K
