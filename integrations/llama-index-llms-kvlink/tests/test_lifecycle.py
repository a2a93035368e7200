"""Documents come, change and go; the KV store holds exactly what the vector store does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from corpus import WordEmbedding
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import ExactMatchFilter, MetadataFilters
from llama_index.llms.kvlink import KVLinkIngestion, KVLinkLLM, KVLinkVectorStore, kv_folder, prune

from kvlink_rag import KVLinkEngine

SPLITTER = SentenceSplitter(chunk_size=100, chunk_overlap=0)


def text(number: int, edition: int = 1) -> str:
    return f"Notice {number} of the harbour office, edition {edition}."


def documents(numbers: Iterable[int], edition: int = 1) -> list[Document]:
    return [Document(text=text(number, edition), doc_id=f"notice-{number}") for number in numbers]


ADDED = documents(range(200))
CHANGED = documents(range(50), edition=2)  # and 50 to 149 as they were, and 150 to 199 gone
SECOND_ROUND = [*CHANGED, *documents(range(50, 150))]
OLD = [text(number) for number in range(50)]
GONE = [text(number) for number in range(150, 200)]
LIVE = [*(text(number, 2) for number in range(50)), *(text(number) for number in range(50, 150))]


def assert_in_step(engine: KVLinkEngine, inner: SimpleVectorStore, texts: Sequence[str]) -> None:
    """The engine knows exactly the nodes of the vector store, with these texts, and stores exactly their KV."""
    ids = set(inner.data.embedding_dict)
    assert set(engine.document_ids()) == ids
    chunks = [chunk for node_id in ids for chunk in engine.index.chunks_of(node_id)]
    assert sorted(chunk.chunk.text for chunk in chunks) == sorted(texts)
    assert set(engine.entries.keys()) == {chunk.kv_key for chunk in chunks}
    assert len(set(engine.entries.keys())) == len(set(texts))


def assert_no_stale_hits(llm: KVLinkLLM, stale: Sequence[str], live: Sequence[str]) -> None:
    """A text that is gone is not recognised any more; one that lives is."""
    for gone, lives in zip(stale[:3], live[:3], strict=True):
        report = llm.complete(f"{gone}\n{lives}\nWhat is it?", max_new_tokens=1).additional_kwargs["kvlink"]
        assert len(report["documents"]) == 1 and report["documents"][0]["reused"]


@pytest.fixture
def inner() -> SimpleVectorStore:
    return SimpleVectorStore()


@pytest.fixture
def store(inner: SimpleVectorStore, llm: KVLinkLLM) -> KVLinkVectorStore:
    return KVLinkVectorStore(inner, llm)


@pytest.mark.parametrize(
    ("strategy", "live", "stale"),
    [
        (DocstoreStrategy.UPSERTS, [*LIVE, *GONE], OLD),
        (DocstoreStrategy.UPSERTS_AND_DELETE, LIVE, [*OLD, *GONE]),
        (DocstoreStrategy.DUPLICATES_ONLY, [*LIVE, *GONE, *OLD], []),  # this strategy deletes nothing
    ],
)
async def test_docstore_strategies_drop_stale_kv(
    engine: KVLinkEngine,
    llm: KVLinkLLM,
    inner: SimpleVectorStore,
    store: KVLinkVectorStore,
    strategy: DocstoreStrategy,
    live: list[str],
    stale: list[str],
) -> None:
    """200 documents added, then 50 changed and 50 missing; the third run is async and changes nothing."""
    pipeline = IngestionPipeline(
        transformations=[SPLITTER, WordEmbedding()],
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
        vector_store=store,
    )
    pipeline.run(documents=ADDED)
    assert_in_step(engine, inner, [document.text for document in ADDED])
    pipeline.run(documents=SECOND_ROUND)
    assert_in_step(engine, inner, live)
    assert_no_stale_hits(llm, stale, live) if stale else None
    await pipeline.arun(documents=SECOND_ROUND)
    assert_in_step(engine, inner, live)


def test_index_updates_and_deletions_drop_stale_kv(
    engine: KVLinkEngine, llm: KVLinkLLM, inner: SimpleVectorStore, store: KVLinkVectorStore
) -> None:
    """refresh_ref_docs, update_ref_doc and delete_ref_doc, each on its share of 200 documents."""
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex.from_documents(ADDED, storage_context=context, transformations=[SPLITTER])
    assert_in_step(engine, inner, [document.text for document in ADDED])
    assert sum(index.refresh_ref_docs([*CHANGED[:25], *documents(range(50, 75))])) == 25
    for document in CHANGED[25:]:
        index.update_ref_doc(document)
    for number in range(150, 200):
        index.delete_ref_doc(f"notice-{number}", delete_from_docstore=True)
    assert_in_step(engine, inner, LIVE)
    assert_no_stale_hits(llm, [*OLD, *GONE], LIVE)
    found = [node.get_content() for text in (OLD[0], GONE[0]) for node in index.as_retriever().retrieve(text)]
    assert found and set(found) <= set(LIVE)


async def test_async_twins_keep_step_too(
    engine: KVLinkEngine, inner: SimpleVectorStore, store: KVLinkVectorStore
) -> None:
    """Insert, delete by document, by node, everything."""
    index = VectorStoreIndex([], storage_context=StorageContext.from_defaults(vector_store=store))
    for document in documents(range(4)):
        await index.ainsert(document)
    assert_in_step(engine, inner, [text(number) for number in range(4)])
    await index.adelete_ref_doc("notice-0", delete_from_docstore=True)
    assert_in_step(engine, inner, [text(number) for number in range(1, 4)])
    (node_id,) = index.ref_doc_info["notice-1"].node_ids
    await index.adelete_nodes([node_id], delete_from_docstore=True)
    assert_in_step(engine, inner, [text(2), text(3)])
    await store.aclear()
    assert_in_step(engine, inner, [])


def test_deleting_nodes_by_filter_deletes_their_kv(
    engine: KVLinkEngine, inner: SimpleVectorStore, store: KVLinkVectorStore
) -> None:
    """The inner store does not say which they were."""
    nodes = [TextNode(text=text(n), id_=str(n), metadata={"even": n % 2 == 0}, embedding=[1.0]) for n in range(6)]
    store.add(nodes)
    even = MetadataFilters(filters=[ExactMatchFilter(key="even", value=1)])
    store.delete_nodes(["0", "2", "1"], even)
    assert set(engine.document_ids()) == set(inner.data.embedding_dict) == {"1", "3", "4", "5"}
    store.delete_nodes(filters=even)
    assert set(engine.document_ids()) == set(inner.data.embedding_dict) == {"1", "3", "5"}
    store.clear()
    assert list(engine.entries.keys()) == []


def test_a_text_of_two_documents_survives_the_deletion_of_one(engine: KVLinkEngine, store: KVLinkVectorStore) -> None:
    """KV belongs to the text."""
    store.add([TextNode(text=text(1), id_=node_id, embedding=[1.0]) for node_id in "ab"])
    store.delete_nodes(["a"])
    assert len(list(engine.entries.keys())) == 1
    store.delete_nodes(["b"])
    assert list(engine.entries.keys()) == []


def test_an_empty_cell_in_one_documents_metadata_hinders_no_other(
    engine: KVLinkEngine, inner: SimpleVectorStore, store: KVLinkVectorStore
) -> None:
    """NaN is what a table's empty cell becomes, and no JSON."""
    odd = Document(text=text(1), doc_id="notice-1", metadata={"price": float("nan"), "by": [float("inf"), 1]})
    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex.from_documents([*documents([0]), odd], storage_context=context)
    index.update_ref_doc(documents([0], edition=2)[0])
    assert text(0, 2) in [chunk.chunk.text for n in engine.document_ids() for chunk in engine.index.chunks_of(n)]
    assert set(engine.document_ids()) == set(inner.data.embedding_dict)
    index.delete_ref_doc("notice-1", delete_from_docstore=True)
    assert len(engine.document_ids()) == len(inner.data.embedding_dict) == 1


def test_a_restarted_store_still_knows_which_nodes_a_document_has(
    model: object, tmp_path: Path, inner: SimpleVectorStore
) -> None:
    """The document's id is kept with the KV, not in this process."""
    folder = kv_folder(tmp_path)
    with KVLinkEngine(model, store=folder) as engine:  # type: ignore[arg-type]
        context = StorageContext.from_defaults(vector_store=KVLinkVectorStore(inner, engine))
        VectorStoreIndex.from_documents(documents([7, 8]), storage_context=context)
        assert_in_step(engine, inner, [text(7), text(8)])
    with KVLinkEngine(model, store=folder) as engine:  # type: ignore[arg-type]
        KVLinkVectorStore(inner, engine).delete("notice-7")
        assert_in_step(engine, inner, [text(8)])


def test_prune_drops_what_an_index_docstore_no_longer_holds(engine: KVLinkEngine, llm: KVLinkLLM) -> None:
    """With a plain vector store and KVLinkIngestion, deletions reach the KV through prune."""
    index = VectorStoreIndex.from_documents(documents(range(6)), transformations=[SPLITTER, KVLinkIngestion(llm)])
    index.update_ref_doc(documents([0], edition=2)[0])
    index.delete_ref_doc("notice-1", delete_from_docstore=True)
    assert len(list(engine.entries.keys())) == 7
    assert prune(llm, index.docstore) == 2
    held = [chunk.chunk.text for node_id in engine.document_ids() for chunk in engine.index.chunks_of(node_id)]
    assert sorted(held) == sorted([text(0, 2), *(text(number) for number in range(2, 6))])
    assert prune(engine, index.docstore) == 0


def test_prune_by_a_docstore_that_holds_nothing_is_refused(engine: KVLinkEngine) -> None:
    """So are all docstores beside a vector store that keeps the texts itself: everything would go."""
    KVLinkIngestion(engine)([TextNode(text=text(1))])
    with pytest.raises(ValueError, match="docstore holds nothing"):
        prune(engine, SimpleDocumentStore())
    assert len(engine.document_ids()) == 1
    engine.prune(live_ids=())
    assert prune(engine, SimpleDocumentStore()) == 0


def test_prune_by_a_pipelines_docstore_goes_by_the_documents_version(engine: KVLinkEngine, llm: KVLinkLLM) -> None:
    """It holds documents, not nodes: nodes cut from an earlier version are stale, though their document lives."""
    pipeline = IngestionPipeline(
        transformations=[SPLITTER, KVLinkIngestion(llm), WordEmbedding()],
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
        vector_store=SimpleVectorStore(),
    )
    pipeline.run(documents=documents(range(6)))
    pipeline.run(documents=[*documents([0], edition=2), *documents(range(1, 5))])
    assert len(list(engine.entries.keys())) == 7
    assert pipeline.docstore is not None
    assert prune(engine, pipeline.docstore) == 2
    held = [chunk.chunk.text for node_id in engine.document_ids() for chunk in engine.index.chunks_of(node_id)]
    assert sorted(held) == sorted([text(0, 2), *(text(number) for number in range(1, 5))])


@pytest.mark.parametrize("asynchronously", [False, True])
async def test_a_node_that_holds_no_text_any_more_keeps_no_kv(
    asynchronously: bool, engine: KVLinkEngine, inner: SimpleVectorStore
) -> None:
    store = KVLinkVectorStore(inner, engine)
    first, second = ([TextNode(id_="n", text=words, embedding=[1.0, 0.0])] for words in (text(1), " "))
    store.add(first)
    assert list(engine.entries.keys())
    if asynchronously:
        await store.async_add(second)
    else:
        store.add(second)
    assert not engine.document_ids() and not list(engine.entries.keys())


def test_the_ingestion_cache_skips_ingestion_but_not_the_answer(engine: KVLinkEngine, llm: KVLinkLLM) -> None:
    """On a cache hit no transformation runs; chunks whose KV is gone are encoded by the question instead."""
    pipeline = IngestionPipeline(transformations=[SPLITTER, KVLinkIngestion(llm)])
    nodes = pipeline.run(documents=documents([1, 2]))
    assert len(list(engine.entries.keys())) == 2
    engine.prune(live_ids=())
    pipeline.run(documents=documents([1, 2]))
    assert list(engine.entries.keys()) == []
    first = llm.complete("Which notice?", documents=nodes).additional_kwargs["kvlink"]
    assert [document["reused"] for document in first["documents"]] == [False, False]


def test_the_ingestion_cache_distinguishes_stores_and_models(
    engine: KVLinkEngine, model: object, tmp_path: Path, llm: KVLinkLLM
) -> None:
    """Its key holds the store and the fingerprint, so another store is filled in spite of the cache."""
    pipeline = IngestionPipeline(transformations=[SPLITTER, KVLinkIngestion(llm, show_progress=False)])
    pipeline.run(documents=documents([1]))
    with KVLinkEngine(model, store=tmp_path / "other") as other:  # type: ignore[arg-type]
        pipeline.transformations[1] = KVLinkIngestion(other)
        pipeline.run(documents=documents([1]))
        assert len(list(other.entries.keys())) == 1
    fields = KVLinkIngestion(llm).to_dict()
    assert fields["fingerprint"] == engine.fingerprint and fields["model_name"] == "tiny-llama"
    assert KVLinkIngestion(llm, show_progress=True).to_dict() == fields


async def test_async_ingestion_stores_and_returns_the_same_nodes(engine: KVLinkEngine, llm: KVLinkLLM) -> None:
    """Keyed on what the model reads: metadata it must not see does not count."""
    node = TextNode(text=text(1), metadata={"page": 3, "secret": 4}, excluded_llm_metadata_keys=["secret"])
    nodes = [node, TextNode(text="  ")]
    assert await KVLinkIngestion(engine).acall(nodes) == nodes
    assert engine.document_ids() == [node.node_id]
    (chunk,) = engine.index.chunks_of(node.node_id)
    assert chunk.chunk.text == f"page: 3\n\n{text(1)}"


@pytest.mark.parametrize("kind", ["ingestion", "adding", "deleting", "deleting nodes", "clearing"])
async def test_the_event_loop_is_free_while_the_model_is_loaded(
    engine: KVLinkEngine, inner: SimpleVectorStore, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The loading waits for the loop here: it would never end if it held the loop up."""
    may_load, loop = threading.Event(), asyncio.get_running_loop()

    def load(self: KVLinkLLM) -> KVLinkEngine:
        loop.call_soon_threadsafe(may_load.set)
        assert may_load.wait(10)
        return engine

    monkeypatch.setattr(KVLinkLLM, "_load", load)
    llm = KVLinkLLM(store=str(engine.folder))
    store, node = KVLinkVectorStore(inner, llm), TextNode(text=text(1), embedding=[1.0])
    work = {
        "ingestion": lambda: KVLinkIngestion(llm).acall([node]),
        "adding": lambda: store.async_add([node]),
        "deleting": lambda: store.adelete("notice-1"),
        "deleting nodes": lambda: store.adelete_nodes([node.node_id]),
        "clearing": store.aclear,
    }
    await work[kind]()
    assert may_load.is_set()


def test_worker_processes_are_refused(llm: KVLinkLLM) -> None:
    """Each worker would load the model and write the same store."""
    pipeline = IngestionPipeline(transformations=[SPLITTER, KVLinkIngestion(llm)])
    with pytest.raises(ValueError, match="without num_workers"):
        pipeline.run(documents=documents([1, 2]), num_workers=2)


def test_progress_is_shown_on_request(llm: KVLinkLLM, capsys: pytest.CaptureFixture[str]) -> None:
    """Off by default."""
    KVLinkIngestion(llm)([TextNode(text=text(1))])
    assert capsys.readouterr().err == ""
    KVLinkIngestion(llm, show_progress=True)([TextNode(text=text(2))])
    assert "Reading chunks" in capsys.readouterr().err


def test_components_say_what_engine_they_need() -> None:
    """A path or another LLM is no engine."""
    with pytest.raises(ValueError, match=r"KVLinkLLM or a kvlink_rag\.KVLinkEngine, got str"):
        KVLinkIngestion("kvlink_store")  # type: ignore[arg-type]
