"""A store without labels teaches: the real default model asks, answers and learns."""

from __future__ import annotations

import pytest
from conftest import excerpt

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import BadInput
from kvlink_rag.training.study import studied, study


def test_the_model_asks_about_what_the_store_holds(tmp_path, loaded_once):
    """Each question comes with the chunks retrieval would bring, its own among them, and is asked once only."""
    with KVLinkRAG.load(store=tmp_path / "store", links="untrained") as rag:
        with pytest.raises(BadInput, match="holds no documents"):
            study(rag, 2)
        rag.add(excerpt("lighthouse.md", tmp_path, 1, 2, 4))
        examples = studied(
            rag, tmp_path / "run" / "questions.jsonl", 2, 0, lambda stage, done, total: None, resume=False
        )
    assert 1 <= len(examples) <= 2
    assert len({example.question for example in examples}) == len(examples)
    for example in examples:
        assert example.question.endswith("?") and example.answers[0]
        assert len(example.documents) <= 3 and len(example.gold) == 1
    kept = tmp_path / "run" / "questions.jsonl"
    assert studied(None, kept, 2, 0, lambda *_: None, resume=True) == examples
    with pytest.raises(AttributeError):  # asked anew: what lies there may be of another store
        studied(None, kept, 2, 0, lambda *_: None, resume=False)
