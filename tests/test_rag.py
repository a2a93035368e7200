"""Add once, ask from stored KV: the lifecycle of documents and the sameness of answers."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import excerpt
from tiny_models import build, build_hf, byte_tokenizer

from kvlink_rag import ChunkSettings, Document, Embedder, KVLinkRAG, LanguageModel, StoreSettings
from kvlink_rag.default_models import default_embedder_folder
from kvlink_rag.errors import NotAStore, PromptTooLong, StoreFull
from kvlink_rag.kv_source import KVSource, reading

DOCUMENTS = [
    Document("The lighthouse was lit in 1874. Its horn is called Old Bertha.", id="lighthouse"),
    Document("The bakery sells rye bread for ninety pence. It opens at five.", id="bakery"),
    Document("The tram runs every ten minutes. Its cars are painted green.", id="tram"),
]
QUESTION = "When was the lighthouse lit?"


def test_cold_warm_and_restarted_stores_give_the_same_answer(open_rag):
    """KV entries absent, filled, and read after a restart: the text never differs."""
    rag = open_rag()
    rag.add(DOCUMENTS)
    warm = rag.ask(QUESTION, max_new_tokens=16)
    rag.entries.delete(list(rag.entries.keys()))
    cold = rag.ask(QUESTION, max_new_tokens=16)
    rag.close()
    restarted = open_rag().ask(QUESTION, max_new_tokens=16)
    assert warm.text == cold.text == restarted.text != ""
    assert [source.reused for source in warm.sources] == [True] * 3
    assert [source.reused for source in cold.sources] == [False] * 3
    assert [source.reused for source in restarted.sources] == [True] * 3


def test_cold_equals_warm_on_the_default_model_in_its_own_precision(open_rag, smollm, tmp_path):
    """In bfloat16 too: a chunk encoded on first use is the same to the last bit as one encoded at ingestion."""
    rag = open_rag(smollm)
    rag.add(excerpt("lighthouse.md", tmp_path, 1, 4), excerpt("bakery.md", tmp_path, 1))
    for question in ("What is the fog horn called?", "When does the bakery open?"):
        warm = rag.ask(question, max_new_tokens=16)
        rag.entries.delete(list(rag.entries.keys()))
        cold = rag.ask(question, max_new_tokens=16)
        again = rag.ask(question, max_new_tokens=16)
        assert warm.text == cold.text == again.text
        assert not any(source.reused for source in cold.sources)
        assert all(source.reused for source in again.sources)


def test_re_adding_unchanged_documents_encodes_nothing(rag):
    first = rag.add(DOCUMENTS)
    second = rag.add(DOCUMENTS)
    assert (first.encoded_chunks, first.reused_chunks) == (3, 0)
    assert (second.encoded_chunks, second.reused_chunks, second.bytes) == (0, 3, 0)


def test_a_text_without_an_id_is_one_document_however_it_is_cut(open_rag):
    """Its id is of its content: cut anew, it is an update and no second document."""
    text = "The lighthouse was lit in 1874. " * 30
    rag = open_rag(chunking=ChunkSettings(max_tokens=200))
    (first,) = rag.add(text).ids
    rag.close()
    again = open_rag(chunking=ChunkSettings(max_tokens=300))
    assert again.add(text).ids == (first,) == tuple(again.document_ids())


def test_two_documents_of_one_id_are_not_taken_for_one_in_silence(rag):
    report = rag.add([DOCUMENTS[0], Document("Another text.", id="lighthouse"), *DOCUMENTS[1:], DOCUMENTS[1]])
    assert report.ids == ("lighthouse", "bakery", "tram")
    assert len(report.skipped) == 1 and report.skipped[0].startswith("lighthouse: another document of this id")
    assert rag.index.chunks_of("lighthouse")[0].chunk.text == "Another text."


def test_an_update_drops_the_old_chunks_and_their_kv(rag):
    rag.add(DOCUMENTS)
    rag.add(Document("The lighthouse is dark since 1990.", id="lighthouse"))
    texts = [hit.chunk.text for hit in rag.search(QUESTION, 10)]
    assert "The lighthouse is dark since 1990." in texts and not any("1874" in text for text in texts)
    assert rag.stats()["entries"] == rag.stats()["chunks"] == 3
    assert set(rag.entries.keys()) == rag.index.live_keys()


def test_deleting_a_document_deletes_its_kv_but_not_what_another_shares(rag):
    shared = "The same paragraph stands in two documents."
    rag.add([Document(shared, id="a"), Document(shared, id="b"), DOCUMENTS[0]])
    assert rag.stats()["entries"] == 2
    assert rag.delete("a", "lighthouse", "never there") == 2
    assert rag.stats()["entries"] == 1
    assert rag.ask("Which paragraph?", max_new_tokens=2).sources[0].reused
    assert rag.delete("b") == 1
    assert rag.stats()["entries"] == 0


def test_an_interrupted_add_is_finished_by_the_next_one(open_rag):
    """Whatever stands in the index has its KV; the second add encodes only what is missing."""
    rag = open_rag()
    documents = [Document(f"Number {i} is a document about the number {i}.", id=str(i)) for i in range(100)]

    def interrupt(stage, done, total):
        if stage == "encoding" and done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rag.add(documents, progress=interrupt)
    assert rag.index.live_keys() <= set(rag.entries.keys())
    assert 0 < rag.stats()["documents"] < 100
    rag.close()
    rag = open_rag()
    report = rag.add(documents)
    assert report.encoded_chunks == 30
    assert rag.stats()["documents"] == rag.stats()["entries"] == 100


def test_embedding_a_long_document_lets_others_in_between_and_gives_the_same_vectors(open_rag):
    """A question that waits, or Ctrl-C, need not wait for all of a document's vectors."""
    rag = open_rag(chunking=ChunkSettings(max_tokens=80))
    text = " ".join(f"Sentence {i} speaks of the quay{', the crane and the fog' * (i % 2)}." for i in range(100))
    long, stages = Document(text, id="long"), []
    rag.add([long, DOCUMENTS[0]], encode="on-first-use", progress=lambda *stage: stages.append(stage))
    indexed = rag.index.chunks_of("long")
    num_chunks = len(indexed) + 1
    assert num_chunks > 64  # one group holds the whole document
    embedded = [(done, total) for stage, done, total in stages if stage == "embedding"]
    assert {total for _, total in embedded} == {num_chunks}
    assert all(0 < after - before <= 32 for before, after in pairwise([0, *(done for done, _ in embedded), num_chunks]))
    at_once = rag.embedder.embed([chunk.chunk.text for chunk in indexed])
    assert np.abs(rag.index.vectors_of(["long"])["long"] - at_once).max() < 1e-6

    def interrupt(stage, done, total):
        if stage == "embedding" and done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rag.add(Document(f"{text} The end.", id="long"), encode="on-first-use", progress=interrupt)
    assert rag.index.chunks_of("long") == indexed


def test_encoding_on_first_use_fills_the_index_only(rag):
    report = rag.add(DOCUMENTS, encode="on-first-use")
    assert (report.encoded_chunks, rag.stats()["entries"]) == (0, 0)
    assert not any(source.reused for source in rag.ask(QUESTION, max_new_tokens=2).sources)
    assert all(source.reused for source in rag.ask(QUESTION, max_new_tokens=2).sources)


@pytest.mark.parametrize("change", ["weights", "precision", "config", "encoding prefix", "tokenizer"])
def test_a_store_made_under_another_recipe_is_never_used(open_rag, change):
    """Other weights, precision, RoPE, prefix or vocabulary: nothing hits, and the answer is as from a fresh store."""
    rag = open_rag()
    rag.add(DOCUMENTS)
    options = {"encoding_prefix": "Read."} if change == "encoding prefix" else {}
    model = _changed_model(change)
    other = open_rag(model, **options)
    answer = other.ask(QUESTION, max_new_tokens=8)
    assert not any(source.reused for source in answer.sources)
    fresh = open_rag(model, store=rag.folder.parent / "fresh", **options)
    fresh.add(DOCUMENTS)
    assert fresh.ask(QUESTION, max_new_tokens=8).text == answer.text
    assert all(source.reused for source in rag.ask(QUESTION, max_new_tokens=2).sources)


def _changed_model(change):
    if change == "weights":
        hf = build_hf("llama")
        with torch.no_grad():
            hf.model.layers[2].mlp.up_proj.weight[3, 5] *= 1.0000002
        return LanguageModel(hf, byte_tokenizer())
    if change == "precision":
        return LanguageModel(build_hf("llama").to(torch.bfloat16), byte_tokenizer())
    if change == "config":
        return build("llama-linear")
    tokenizer = byte_tokenizer()
    if change == "tokenizer":
        tokenizer.add_tokens(["<extra>"])
    return LanguageModel(build_hf("llama"), tokenizer)


def test_what_does_not_decide_a_chunks_kv_keeps_the_store(open_rag):
    """Another system message, chat template, question or linking reuses every chunk."""
    rag = open_rag()
    rag.add(DOCUMENTS)
    hf, tokenizer = build_hf("llama"), byte_tokenizer()
    tokenizer.chat_template = "Today is Sunday. " + tokenizer.chat_template
    other = open_rag(LanguageModel(hf, tokenizer), linking="plain")
    for answer in (
        other.ask("Something else?", system="You are brief.", max_new_tokens=2),
        rag.ask(QUESTION, system="", max_new_tokens=2),
    ):
        assert all(source.reused for source in answer.sources)


def test_vectors_of_an_embedder_that_pools_otherwise_are_not_mixed_in(tiny, tmp_path):
    """Its weights are the same; how they become a vector stands in a folder within. A store made before that counted
    goes on."""
    folder = tmp_path / "embedder"
    shutil.copytree(default_embedder_folder(), folder)
    with KVLinkRAG(tiny, Embedder(folder), tmp_path / "store") as rag:
        rag.add(DOCUMENTS[0])
        rag.index.set_meta("embedder", rag.embedder.digest_before)
    with KVLinkRAG(tiny, Embedder(folder), tmp_path / "store") as rag:
        assert rag.search(QUESTION) and rag.index.get_meta("embedder") == rag.embedder.digest
    pooling = folder / "1_Pooling" / "config.json"
    how = json.loads(pooling.read_text("utf-8"))
    otherwise = {**how, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    pooling.write_text(json.dumps(otherwise), "utf-8")
    with (
        KVLinkRAG(tiny, Embedder(folder), tmp_path / "store") as rag,
        pytest.raises(NotAStore, match="another embedder"),
    ):
        rag.search(QUESTION)


def test_an_adapter_is_part_of_the_recipe(tmp_path, open_rag, embedder):
    """A merged adapter never reuses the base model's KV, and a folder that is none is refused."""
    from peft import LoraConfig, get_peft_model

    from kvlink_rag.errors import CheckpointMismatch

    hf = build_hf("llama")
    hf.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    peft = get_peft_model(hf, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    base = LanguageModel.load(tmp_path / "base", dtype="float32", device="cpu")
    adapted = LanguageModel.load(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    rag = open_rag(base)
    rag.add(DOCUMENTS)
    assert all(source.reused for source in rag.ask(QUESTION, max_new_tokens=2).sources)
    assert not any(source.reused for source in open_rag(adapted).ask(QUESTION, max_new_tokens=2).sources)
    with pytest.raises(CheckpointMismatch):
        LanguageModel.load(tmp_path / "base", adapter=tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "swapped"])
def test_a_damaged_entry_is_encoded_again_and_the_answer_is_the_same(open_rag, damage):
    rag = open_rag(limits=StoreSettings(max_memory_bytes=0))
    rag.add(DOCUMENTS)
    expected = rag.ask(QUESTION, max_new_tokens=16).text
    first, second, *_ = sorted(rag.entries.folder.glob("??/*.kv"))
    data = first.read_bytes()
    first.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "flipped": data[:-500] + bytes([data[-500] ^ 1]) + data[-499:],
            "emptied": b"",
            "swapped": second.read_bytes(),
        }[damage]
    )
    answer = rag.ask(QUESTION, max_new_tokens=16)
    assert answer.text == expected
    assert [source.reused for source in answer.sources].count(False) == 1
    assert rag.stats()["quarantined"] == 1
    assert all(source.reused for source in rag.ask(QUESTION, max_new_tokens=2).sources)


def test_documents_given_with_the_question_reuse_what_the_store_holds(rag):
    """The door for integrations: the same text hits, whoever passes it; another text is encoded and kept."""
    rag.add(DOCUMENTS)
    answer = rag.ask(QUESTION, documents=[DOCUMENTS[1], DOCUMENTS[0].text, "A new text."], max_new_tokens=2)
    assert [source.reused for source in answer.sources] == [True, True, False]
    assert [source.hit.chunk.document_id for source in answer.sources] == ["bakery", "given", "given"]
    again = rag.ask(QUESTION, documents=[*rag.search(QUESTION, 2), "A new text."], max_new_tokens=2)
    assert all(source.reused for source in again.sources)


@pytest.mark.parametrize("linking", ["plain", "full"])
def test_the_first_chunks_are_read_while_the_others_texts_are_taken_apart(rag, linking, monkeypatch):
    rag.add(DOCUMENTS)
    stored, token_ids = KVSource.stored, KVSource.token_ids
    read, taken_apart, read_by_then = [], [], []
    monkeypatch.setattr(KVSource, "stored", lambda source, ids: (read.append(ids), stored(source, ids))[1])

    def noted(source, text):
        reading.run(lambda job: None)  # everything that was begun has ended
        read_by_then.append(list(read))
        taken_apart.append(token_ids(source, text))
        return taken_apart[-1]

    monkeypatch.setattr(KVSource, "token_ids", noted)
    answer = rag.ask(QUESTION, max_new_tokens=2, linking=linking)
    first, second, _ = taken_apart
    assert read_by_then == ([[], [first], [first, second]] if linking == "plain" else [[], [], []])
    assert read == (taken_apart if linking == "plain" else []) and len(answer.sources) == 3


def test_no_documents_is_a_plain_conversation(rag):
    answer = rag.ask(QUESTION, documents=[], max_new_tokens=4)
    assert answer.sources == () and answer.tokens.generated > 0


def test_answers_count_their_tokens(rag):
    rag.add(DOCUMENTS)
    rag.ask(QUESTION, max_new_tokens=2)
    linked, full = (rag.ask(QUESTION, max_new_tokens=2, linking=name) for name in ("link_tokens", "full"))
    chunk_tokens = sum(source.num_tokens for source in linked.sources)
    assert linked.tokens.reused >= chunk_tokens
    assert full.tokens.reused == 0
    links = 3 * rag.links.num_per_chunk
    assert linked.tokens.reused + linked.tokens.computed == full.tokens.computed + links
    assert linked.timings.ttft_s <= linked.timings.total_s


def test_chunks_fit_the_model_and_the_embedder(rag):
    """No chunk is longer than its setting for the model, nor than what the embedder reads."""
    text = " ".join(f"Sentence number {i} speaks of the quay, the crane and the fog." for i in range(200))
    rag.add(Document(text, id="long", title="A long one"))
    chunks = rag.index.chunks_of("long")
    assert len(chunks) > 5
    for indexed in chunks:
        assert rag.model.tokenizer.count(indexed.chunk.text) <= ChunkSettings().max_tokens
        assert rag.embedder.count(indexed.chunk.text) <= rag.embedder.max_tokens


def test_a_full_budget_stops_add_before_anything_is_written(open_rag):
    rag = open_rag(limits=StoreSettings(max_bytes=10_000))
    with pytest.raises(StoreFull, match="budget"):
        rag.add(DOCUMENTS)
    assert rag.stats()["documents"] == rag.stats()["entries"] == 0


def test_a_full_budget_costs_reuse_but_never_the_answer(open_rag):
    rag = open_rag(limits=StoreSettings(max_bytes=10_000))
    rag.add(DOCUMENTS, encode="on-first-use")
    answer = rag.ask(QUESTION, max_new_tokens=8)
    roomy = open_rag(store=rag.folder.parent / "roomy")
    roomy.add(DOCUMENTS)
    assert answer.text == roomy.ask(QUESTION, max_new_tokens=8).text
    assert rag.stats()["entries"] == 0


def test_prune_and_verify_leave_a_sound_store(open_rag):
    rag = open_rag()
    rag.add(DOCUMENTS)
    rag.ask(QUESTION, documents=["Only given once."], max_new_tokens=2)
    assert rag.prune() == 1
    path = next(rag.entries.folder.glob("??/*.kv"))
    path.write_bytes(path.read_bytes()[:-1])
    assert rag.verify() == (2, 1)
    assert rag.verify() == (2, 0)


def test_an_answer_prints_as_its_text_and_has_a_json_form(rag):
    rag.add(DOCUMENTS)
    answer = rag.ask(QUESTION, k=2, max_new_tokens=4)
    assert str(answer) == answer.text
    form = json.loads(json.dumps(answer.to_json()))
    assert set(form) >= {"question", "answer", "sources", "timings", "tokens", "linking", "model"}
    assert set(form["sources"][0]) >= {"document", "chunk", "score", "num_tokens", "reused"}
    assert set(form["timings"]) == {
        "retrieve_s", "load_s", "link_s", "prefill_s", "ttft_s", "decode_s", "total_s"
    }  # fmt: skip
    assert set(form["tokens"]) == {"reused", "computed", "generated"}


def test_a_link_checkpoint_loads_only_onto_its_own_base(tmp_path, tiny):
    from kvlink_rag import LinkTokens
    from kvlink_rag.errors import CheckpointMismatch

    links = LinkTokens(torch.randn(4, 3, tiny.hidden_size), "trained")
    links.save(tmp_path / "links", tiny)
    assert torch.equal(LinkTokens.load(tmp_path / "links", tiny).embeddings, links.embeddings)
    with pytest.raises(CheckpointMismatch, match="trained for"):
        LinkTokens.load(tmp_path / "links", build("llama", seed=1))
    with pytest.raises(CheckpointMismatch, match="no link checkpoint"):
        LinkTokens.load(tmp_path, tiny)


def test_a_chunk_given_with_a_question_is_encoded_within_the_window_or_left_out(open_rag):
    """Behind a long encoding prefix it may reach beyond it, though the prompt does not."""
    rag = open_rag(encoding_prefix="x" * 1500)
    longest = rag.model.max_positions - len(rag.encoder.prefix_ids)
    text = "y" * longest
    answer = rag.ask("?", documents=["A first one.", text, "A last one."], max_new_tokens=1)
    assert [hit.chunk.text for hit in answer.hits] == ["A first one.", "A last one."]
    assert [hit.chunk.text for hit in answer.left_out] == [text]
    with pytest.raises(PromptTooLong, match="behind the encoding prefix"):
        rag.ask([{"role": "user", "content": [Document(text), "?"]}], max_new_tokens=1)


def test_what_is_recomputed_in_a_new_chunk_is_not_taken_from_what_was_reused(open_rag):
    rag = open_rag(linking="recompute_first")
    rag.add(DOCUMENTS[0])
    first, again = (rag.ask(QUESTION, documents=[DOCUMENTS[0]], max_new_tokens=1) for _ in range(2))
    alone = again.tokens.reused  # with the prompt's prefix, which the first question left
    assert alone > first.tokens.reused > 0
    beside = rag.ask(QUESTION, documents=[DOCUMENTS[0], DOCUMENTS[1]], max_new_tokens=1)
    assert [source.reused for source in beside.sources] == [True, False] and beside.tokens.reused == alone
