"""The benchmarks' clocks hold what they say. Time stands still here, but for what a test says takes time."""

from __future__ import annotations

import threading
import time

import pytest
import tiny_models

from kvlink_rag.context import Context
from kvlink_rag.embedder import Embedder
from kvlink_rag.encoding import Encoder
from kvlink_rag.evaluation.decode import run_decode
from kvlink_rag.evaluation.growth import run_growth
from kvlink_rag.evaluation.ingest import run_ingest
from kvlink_rag.evaluation.ttft import run_ttft
from kvlink_rag.index import VectorIndex
from kvlink_rag.links import LinkTokens
from kvlink_rag.store.kv_store import KVStore

TOKEN_S = 2**-10  # of a forward, so that sums are exact
READ_S, PLACE_S, EMBED_S, SEARCH_S, WRITE_S = 1.0, 0.125, 4.0, 0.25, 8.0
NUM_CHUNKS, NUM_LINKS = 10, 50


@pytest.fixture
def model(monkeypatch):
    """A tiny model in a world in which only forwards, reads, writes, rotating, embedding and searching take time."""
    model = tiny_models.build("llama")
    now, guard = [0.0], threading.Lock()  # chunks are read on a thread of their own

    def takes(owner, name, seconds):
        act = getattr(owner, name)

        def timed(*args, **kwargs):
            result = act(*args, **kwargs)
            with guard:
                now[0] += seconds(*args, **kwargs) if callable(seconds) else seconds
            return result

        monkeypatch.setattr(owner, name, timed)

    def forward_s(*args, **kwargs):
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"][..., 0]
        return inputs.numel() * TOKEN_S

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    takes(model.hf, "forward", forward_s)
    takes(type(model), "encode", lambda self, ids, *rest: ids.numel() * TOKEN_S)
    takes(KVStore, "get", READ_S)
    takes(KVStore, "put", WRITE_S)
    takes(Context, "place", PLACE_S)
    takes(Embedder, "embed", EMBED_S)
    takes(VectorIndex, "search", SEARCH_S)
    return model


def silent(stage, done, total):
    """Nobody watches."""


def test_time_to_first_token_holds_finding_reading_rotating_and_the_forward(model):
    """From stored KV: all of it. Full prefill: finding, and one forward over all, no more. Floor: the question."""
    (row,) = run_ttft(model, LinkTokens.untrained(model), [600], 1, silent)
    num_tokens = row["context_tokens"]
    found_s = EMBED_S + SEARCH_S
    assert row["full_s"] == pytest.approx(found_s + (num_tokens - NUM_LINKS) * TOKEN_S, abs=1e-4)
    loaded_s = NUM_CHUNKS * READ_S + (NUM_CHUNKS + 1) * PLACE_S
    num_question = round(row["floor_s"] / TOKEN_S)
    assert 40 <= num_question < 100
    assert row["linked_s"] == pytest.approx(found_s + loaded_s + (num_question + NUM_LINKS) * TOKEN_S, abs=1e-4)


def test_decoding_is_timed_from_the_first_token_on(model):
    """Neither loading nor a prefill counts: a token takes one token's time, in both arms."""
    row = run_decode(model, LinkTokens.untrained(model), 600, 1, silent)
    assert row["linked_tokens_per_s"] == row["plain_tokens_per_s"] == 1 / TOKEN_S


def test_adding_holds_writing_and_embedding_and_is_held_against_forwards_alone(model):
    row = run_ingest(model, 3, 120, 1, silent)
    encoded_s = row["tokens"] * TOKEN_S
    prefix_s = len(Encoder(model).prefix_ids) * TOKEN_S  # once for a store
    assert row["add_s"] == pytest.approx(prefix_s + encoded_s + row["chunks"] * WRITE_S + EMBED_S, abs=1e-3)
    assert encoded_s <= row["raw_prefill_s"] + 1e-3
    assert row["raw_prefill_s"] <= 1.5 * encoded_s  # the last batch is a whole one
    assert row["again_over_add"] == 0  # nothing is read, encoded or embedded again


def test_growth_searches_and_looks_up_in_each_size():
    rows = run_growth([20, 200], 1, silent)
    assert [row["chunks"] for row in rows] == [20, 200]
    assert all(row[name] > 0 for row in rows for name in ("first_search_s", "search_s", "contains_s", "get_s"))
