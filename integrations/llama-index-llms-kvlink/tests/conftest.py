"""A tiny model, a store in a fresh folder and a small corpus for every test; nothing needs a network."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent
sys.path[:0] = [str(HERE), str(PACKAGE.parent.parent / "tests")]
if importlib.util.find_spec("llama_index.llms.kvlink") is None:  # not installed: test the sources beside us
    sys.path.insert(0, str(PACKAGE))

import llama_index.core  # noqa: E402
from corpus import DOCUMENTS, WordEmbedding  # noqa: E402
from garbage import modules_are_no_garbage, pytest_collection_finish  # noqa: E402, F401
from llama_index.core import Document, Settings, VectorStoreIndex  # noqa: E402
from llama_index.core.node_parser import SentenceSplitter  # noqa: E402
from llama_index.llms.kvlink import KVLinkIngestion, KVLinkLLM  # noqa: E402

from kvlink_rag import KVLinkEngine  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """LlamaIndex's asyncio_run makes an event loop for sync callers and never closes it; not ours to fix."""
    config.addinivalue_line("filterwarnings", "ignore:unclosed event loop:ResourceWarning")


@pytest.fixture(scope="session")
def model() -> Any:
    from tiny_models import build

    return build("llama", max_position_embeddings=8192)


@pytest.fixture
def engine(model: Any, tmp_path: Path) -> Iterator[KVLinkEngine]:
    with KVLinkEngine(model, store=tmp_path / "storage" / "kvlink", linking="link_tokens") as engine:
        yield engine


@pytest.fixture
def llm(engine: KVLinkEngine) -> KVLinkLLM:
    return KVLinkLLM(engine=engine, max_new_tokens=8)


@pytest.fixture(autouse=True)
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """LlamaIndex counts with the tiny model's tokens, so that its prompts fit; all is put back afterwards."""
    monkeypatch.setattr(llama_index.core, "global_tokenizer", lambda text: list(text.encode()))
    monkeypatch.setattr(Settings, "_embed_model", WordEmbedding())
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(Settings, "_prompt_helper", None)
    yield


@pytest.fixture
def index(llm: KVLinkLLM) -> VectorStoreIndex:
    """The corpus, cut and read once."""
    documents = [Document(text=text, doc_id=name) for name, text in DOCUMENTS.items()]
    splitter = SentenceSplitter(chunk_size=400, chunk_overlap=0)
    return VectorStoreIndex.from_documents(documents, transformations=[splitter, KVLinkIngestion(llm)])


@pytest.fixture
def environment() -> dict[str, str]:
    """For a new Python that must find what this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), *filter(None, sys.path)])}
