"""A tiny random Llama, and embeddings of words: nothing is downloaded, nothing is faked."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from garbage import modules_are_no_garbage, pytest_collection_finish  # noqa: E402, F401


class WordEmbeddings(Embeddings):
    """Texts that share words have near vectors."""

    def embed_query(self, text):
        vector = np.zeros(128)
        for word in text.lower().split():
            vector[int(hashlib.md5(word.strip(".,?").encode()).hexdigest(), 16) % 128] += 1.0
        return (vector / (np.linalg.norm(vector) or 1.0)).tolist()

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


@pytest.fixture(scope="session")
def tiny():
    from tiny_models import build

    return build("llama")


@pytest.fixture
def engine(tiny, tmp_path):
    from kvlink_rag import KVLinkEngine

    with KVLinkEngine(tiny, tmp_path / "store", linking="link_tokens") as engine:
        yield engine


@pytest.fixture(scope="session")
def session_engine(tiny, tmp_path_factory):
    """For suites that build their models in class properties."""
    from kvlink_rag import KVLinkEngine

    with KVLinkEngine(tiny, tmp_path_factory.mktemp("session") / "store", linking="link_tokens") as engine:
        yield engine


@pytest.fixture
def chat(engine):
    from langchain_kvlink import ChatKVLink

    return ChatKVLink(engine=engine, max_tokens=16)


@pytest.fixture
def documents():
    return [
        Document("The lighthouse of Marrow Bay was lit for the first time in 1874.", id="lighthouse"),
        Document("The ferry crossing to Corrin Head takes ninety-five minutes in calm weather.", id="ferry"),
        Document("Petra Hollin is the head librarian of the library of Marrow Bay.", id="library"),
    ]


@pytest.fixture
def added(engine, documents):
    engine.add_chunks({document.id: document.page_content for document in documents})
    return documents


@pytest.fixture
def embeddings():
    return WordEmbeddings()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model as a user has it: files in a folder."""
    from tiny_models import build_hf, byte_tokenizer

    folder = tmp_path_factory.mktemp("model")
    build_hf("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
