"""LangChain's own suites for integrations, no test of them overridden."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import ChatModelIntegrationTests, VectorStoreIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_kvlink import ChatKVLink, KVLinkFAISS, KVLinkVectorStore


class OnTheTinyModel:
    """Settings common to both suites of chat models."""

    @pytest.fixture(autouse=True)
    def _engine(self, session_engine):
        self.engine = session_engine

    @property
    def chat_model_class(self):
        return ChatKVLink

    @property
    def chat_model_params(self):
        return {"engine": self.engine}

    @property
    def supports_model_override(self):
        return False

    @property
    def has_tool_calling(self):
        return False  # bind_tools is there only to say so

    @property
    def has_structured_output(self):
        return False


class TestChatUnit(OnTheTinyModel, ChatModelUnitTests):
    pass


class TestChatIntegration(OnTheTinyModel, ChatModelIntegrationTests):
    @property
    def supported_usage_metadata_details(self):
        both = ["cache_read_input", "cache_creation_input"]
        return {"invoke": both, "stream": both}

    def invoke_with_cache_creation_input(self, *, stream=False):
        self.engine.delete(*self.engine.document_ids())
        self.engine.prune()
        message = self._ask(stream)
        assert message.usage_metadata["input_token_details"]["cache_creation"] > 0
        return message

    def invoke_with_cache_read_input(self, *, stream=False):
        self._ask(stream)
        message = self._ask(stream)
        assert message.usage_metadata["input_token_details"]["cache_read"] > 0
        return message

    def _ask(self, stream):
        model = ChatKVLink(engine=self.engine, max_tokens=4)
        documents = ["The lighthouse of Marrow Bay was lit for the first time in 1874."]
        if not stream:
            return model.invoke("When was it lit?", documents=documents)
        whole = AIMessageChunk("")
        for chunk in model.stream("When was it lit?", documents=documents):
            whole += chunk
        return whole


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, engine):
        return KVLinkVectorStore(InMemoryVectorStore(self.get_embeddings()), engine)


class TestFAISS(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, engine):
        return KVLinkFAISS(self.get_embeddings(), engine)
