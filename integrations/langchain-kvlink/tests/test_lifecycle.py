"""KV follows the documents: what is live has KV, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kvlink_rag import LanguageModel, LinkTokens
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from langchain_kvlink import ChatKVLink, KVLinkFAISS, KVLinkVectorStore


def text_of(number, version=1):
    return f"Note {number}, version {version}."


def notes(numbers, version=1):
    return [Document(text_of(number, version), metadata={"source": f"note-{number}"}) for number in numbers]


def keys_of(engine, texts):
    """The KV keys that these texts must have, and no other may."""
    return {engine.kvs.key(engine.encoder.token_ids(text)) for text in texts}


@pytest.fixture(params=["wrapped", "faiss"])
def store(request, engine, embeddings):
    if request.param == "faiss":
        return KVLinkFAISS(embeddings, engine)
    return KVLinkVectorStore(InMemoryVectorStore(embeddings), engine)


@pytest.mark.parametrize("cleanup", [None, "incremental", "full", "scoped_full"])
def test_kv_is_exactly_that_of_live_chunks(store, engine, cleanup):
    """Add 200, update 50, delete 50, by LangChain's own indexing."""
    records = InMemoryRecordManager("notes")
    records.create_schema()

    def run(documents):
        return index(documents, records, store, cleanup=cleanup, source_id_key="source", key_encoder="sha256")

    assert run(notes(range(200)))["num_added"] == 200
    assert set(engine.entries.keys()) == keys_of(engine, map(text_of, range(200)))

    updated, kept = notes(range(50), version=2), notes(range(50, 150))
    assert run([*updated, *kept])["num_added"] == 50
    gone = {
        None: [],  # nothing is ever deleted
        "incremental": range(50),  # old versions of what was seen
        "scoped_full": range(50),
        "full": [*range(50), *range(150, 200)],  # and what was not seen
    }[cleanup]
    live = {document.page_content for document in updated} | {text_of(n) for n in range(200) if n not in gone}
    assert set(engine.entries.keys()) == keys_of(engine, live)
    assert len(engine.document_ids()) == len(live)
    found = store.similarity_search("note version", k=300)
    assert {document.page_content for document in found} == live

    store.delete([document.id for document in found if document.metadata["source"] in {"note-60", "note-61"}])
    assert set(engine.entries.keys()) == keys_of(engine, live - {text_of(60), text_of(61)})


async def test_kv_follows_async_indexing(store, engine):
    records = InMemoryRecordManager("notes")
    await records.acreate_schema()
    await aindex(notes(range(8)), records, store, cleanup="full", source_id_key="source", key_encoder="sha256")
    await aindex(notes(range(4)), records, store, cleanup="full", source_id_key="source", key_encoder="sha256")
    assert set(engine.entries.keys()) == keys_of(engine, map(text_of, range(4)))


def test_a_shared_text_lives_until_its_last_id_goes(store, engine):
    store.add_texts(["The tide comes and goes."] * 2, ids=["a", "b"])
    assert len(list(engine.entries.keys())) == 1
    store.delete(["a"])
    assert set(engine.entries.keys()) == keys_of(engine, ["The tide comes and goes."])
    store.delete(["b"])
    assert list(engine.entries.keys()) == []


def test_an_update_under_one_id_drops_the_old_kv(store, engine):
    store.add_texts(["The tide comes."], ids=["a"])
    store.add_texts(["The tide goes."], ids=["a"])
    assert set(engine.entries.keys()) == keys_of(engine, ["The tide goes."])


def test_an_empty_text_drops_the_kv_it_replaces(engine, embeddings):
    store = KVLinkVectorStore(InMemoryVectorStore(embeddings), engine)
    store.add_texts(["The tide comes."], ids=["a"])
    store.add_texts([""], ids=["a"])
    assert list(engine.entries.keys()) == []
    assert store.get_by_ids(["a"])[0].page_content == ""


def test_a_failing_store_within_is_repaired_by_the_same_call(engine, embeddings):
    """KV first: no vector is ever without it; the record of both is completed by the next run."""

    class Failing(InMemoryVectorStore):
        fails = True

        def add_documents(self, documents, ids=None, **kwargs):
            if self.fails:
                raise ConnectionError("the database is away")
            return super().add_documents(documents, ids, **kwargs)

    inner = Failing(embeddings)
    store = KVLinkVectorStore(inner, engine)
    with pytest.raises(ConnectionError):
        store.add_texts(["The tide comes."], ids=["a"])
    assert set(engine.entries.keys()) == keys_of(engine, ["The tide comes."])
    assert inner.store == {}
    inner.fails = False
    store.add_texts(["The tide comes."], ids=["a"])
    assert set(inner.store) == set(engine.document_ids()) == {"a"}


def test_a_store_that_makes_its_own_ids_is_refused(engine, embeddings):
    class OwnIds(InMemoryVectorStore):
        def add_documents(self, documents, ids=None, **kwargs):
            return super().add_documents(documents, [f"own-{id_}" for id_ in ids])

    with pytest.raises(ValueError, match="OwnIds does not keep the ids"):
        KVLinkVectorStore(OwnIds(embeddings), engine).add_texts(["The tide."], ids=["a"])


def test_what_is_added_is_reused_by_the_chat_model(store, engine, documents):
    store.add_documents(documents)
    answer = ChatKVLink(engine=store, max_tokens=4).invoke("When?", documents=store.similarity_search("lighthouse"))
    about = answer.response_metadata["kvlink"]["documents"]
    assert {d["id"] for d in about} == {"lighthouse", "ferry", "library"}
    assert all(d["reused"] for d in about)


def test_chunks_can_be_read_on_first_use(engine, embeddings, documents):
    store = KVLinkFAISS(embeddings, engine, encode="on-first-use")
    store.add_documents(documents)
    assert list(engine.entries.keys()) == []
    ChatKVLink(engine=engine, max_tokens=2).invoke("When?", documents=documents[:1])
    assert set(engine.entries.keys()) == keys_of(engine, [documents[0].page_content])


def test_progress_is_reported(engine, embeddings, documents):
    seen = []
    KVLinkFAISS(embeddings, engine, progress=lambda *step: seen.append(step)).add_documents(documents)
    assert ("encoding", 3, 3) in seen


def test_the_index_survives_a_restart(tiny, tmp_path, embeddings, documents):
    from kvlink_rag import KVLinkEngine

    with KVLinkEngine(tiny, tmp_path / "own") as first:
        KVLinkFAISS(embeddings, first).add_documents(documents)
    with KVLinkEngine(tiny, tmp_path / "own") as second:
        found = KVLinkFAISS(embeddings, second).similarity_search("the ferry to Corrin Head", k=1)
    assert found == [documents[1]]


def test_outer_white_space_of_a_text_is_kept(store):
    store.add_texts(["\n  The tide comes.\n"], [{"page": 3}], ids=["a"])
    expected = [Document("\n  The tide comes.\n", metadata={"page": 3}, id="a")]
    assert store.get_by_ids(["a"]) == store.similarity_search("tide", k=1) == expected


def test_filters_look_beyond_the_nearest(engine, embeddings):
    store = KVLinkFAISS(embeddings, engine)
    store.add_documents([Document(f"tide {n}", metadata={"even": n % 2 == 0, "n": n}) for n in range(30)])
    assert {d.metadata["even"] for d in store.similarity_search("tide", k=15, filter={"even": True})} == {True}
    found = store.similarity_search("tide", k=2, filter=lambda document: document.metadata["n"] == 29)
    assert [document.metadata["n"] for document in found] == [29]
    assert len(store.similarity_search("tide", k=15, filter={"even": True})) == 15


async def test_searches_agree_with_one_another(store, documents, embeddings):
    store.add_documents(documents)
    query, vector = "head librarian of the library", embeddings.embed_query("head librarian of the library")
    expected = store.similarity_search(query, k=2)
    assert expected[0] == documents[2]
    assert await store.asimilarity_search(query, k=2) == expected
    assert store.similarity_search_by_vector(vector, k=2) == expected
    assert await store.asimilarity_search_by_vector(vector, k=2) == expected
    scored = store.similarity_search_with_score(query, k=2)
    assert [document for document, _ in scored] == expected
    assert scored[0][1] > scored[1][1] > 0
    assert scored[0][1] == pytest.approx(sum(a * b for a, b in zip(
        vector, embeddings.embed_query(documents[2].page_content), strict=True)), abs=1e-5)  # fmt: skip
    assert [d for d, _ in await store.asimilarity_search_with_score(query, k=2)] == expected


async def test_marginal_relevance_prefers_what_differs(store, embeddings):
    store.add_texts(["tide tide tide comes", "tide tide comes", "tide ferry library"], ids=["a", "b", "c"])
    near = [d.id for d in store.similarity_search("tide comes", k=2)]
    varied = [d.id for d in store.max_marginal_relevance_search("tide comes", k=2, lambda_mult=0.1)]
    assert set(near) == {"a", "b"}
    assert "c" in varied
    assert [d.id for d in await store.amax_marginal_relevance_search("tide comes", k=2, lambda_mult=0.1)] == varied


def test_relevance_lies_between_0_and_1(engine, embeddings, documents):
    store = KVLinkFAISS(embeddings, engine)
    store.add_documents(documents)
    scores = [score for _, score in store.similarity_search_with_relevance_scores("the library", k=3)]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize("kind", [KVLinkVectorStore, KVLinkFAISS])
async def test_stores_are_made_from_texts_and_documents(kind, engine, embeddings, documents):
    assert isinstance(kind.from_texts(["The tide."], embeddings, ids=["t"], engine=engine), VectorStore)
    store = await kind.afrom_documents(documents, embeddings, engine=engine)
    assert set(engine.document_ids()) == {"t", "lighthouse", "ferry", "library"}
    assert store.embeddings is embeddings
    assert store.similarity_search("ferry crossing", k=1) == [documents[1]]


def test_deleting_without_ids_empties_the_index(engine, embeddings, documents):
    store = KVLinkFAISS(embeddings, engine)
    store.add_documents(documents)
    store.delete()
    assert engine.document_ids() == list(engine.entries.keys()) == []
    assert store.similarity_search("tide") == []


@pytest.mark.parametrize(
    "of", [KVLinkFAISS, lambda given, **named: KVLinkVectorStore(InMemoryVectorStore(given), **named)]
)
def test_a_process_that_only_ingests_reads_for_the_checkpoint_it_names(of, model_folder, embeddings, tmp_path):
    """One with soft tokens, which decide how documents are read."""
    model = LanguageModel.load(model_folder)
    links = LinkTokens.untrained(model, 2)
    replace(links, soft_tokens=links.embeddings[0] * 2).save(tmp_path / "links", model)
    named = {"model": model_folder, "store": tmp_path / "lazy", "links": tmp_path / "links"}
    ingesting = of(embeddings, **named)
    ingesting.add_documents([Document(text_of(1), id="1")])
    ingesting.shared_engine.get().close()
    message = ChatKVLink(**named, max_tokens=2).invoke("Which?", documents=[Document(text_of(1))])
    assert [source["reused"] for source in message.response_metadata["kvlink"]["documents"]] == [True]
