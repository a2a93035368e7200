"""What safety costs: verifying entries, loading them into a context, opening a large store."""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from blake3 import blake3

from kvlink_rag.context import Context
from kvlink_rag.encoding import Encoder
from kvlink_rag.kv import KV
from kvlink_rag.kv_source import KVSource
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import Identity, pack
from kvlink_rag.store.kv_store import KVStore

NUM_CHUNKS, CHUNK_TOKENS = 10, 200
NUM_ENTRIES = 10_000


def run_store(model: LanguageModel, precision: Precision, repeats: int) -> dict[str, float]:
    """Medians over the repeats. GB are 10^9 bytes; warm: the files are in the system's cache."""
    with tempfile.TemporaryDirectory(prefix="kvlink-bench-") as folder:
        return {
            "verify_gb_per_s_per_core": verifying(repeats),
            **loading(model, precision, Path(folder, "load"), repeats),
            **opening(Path(folder, "open"), repeats),
        }


def verifying(repeats: int) -> float:
    """BLAKE3 on one core over 16 MiB, which is what verification does to each byte."""
    data = secrets.token_bytes(2**24)
    seconds = median_seconds(lambda: blake3(data, max_threads=1).digest(), repeats * 4)
    return round(len(data) / seconds / 1e9, 2)


def loading(model: LanguageModel, precision: Precision, folder: Path, repeats: int) -> dict[str, float]:
    """Read, verify, dequantise and rotate 10 chunks of 200 tokens into a context."""
    encoder, shape = Encoder(model, precision=precision), model.kv_shape
    store = DiskStore(folder, max_bytes=2**34)
    kvs = KVStore(store, encoder.fingerprint, shape, precision=precision)
    source = KVSource(encoder, kvs)
    chunks = [tuple(range(n, n + CHUNK_TOKENS)) for n in range(NUM_CHUNKS)]
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.num_layers, shape.num_kv_heads, CHUNK_TOKENS)
    for ids in chunks:
        keys, values = (
            torch.randn(*sizes, d, generator=generator).to(shape.dtype) for d in (shape.head_dim, shape.value_dim)
        )
        stored = kvs.put(kvs.at_rest(KV(keys, values, ids)))

    def load() -> None:
        context = Context(model.rope, model.buffers, NUM_CHUNKS * CHUNK_TOKENS, 1)
        loading = source.load(chunks)
        for place, kv in enumerate(loading):
            context.place(kv, place * CHUNK_TOKENS)
        assert all(loading.is_reused(ids) for ids in chunks)
        context.release()

    load()
    seconds = median_seconds(load, repeats)
    read_seconds = median_seconds(lambda: [kvs.get(ids) for ids in chunks], repeats)
    store.close()
    context_bytes = NUM_CHUNKS * CHUNK_TOKENS * shape.bytes_per_token
    return {
        "bytes_per_token": round(stored / CHUNK_TOKENS),
        "read_and_verify_gb_per_s": round(NUM_CHUNKS * stored / read_seconds / 1e9, 2),
        "load_into_context_gb_per_s": round(context_bytes / seconds / 1e9, 2),
        "load_into_context_s": round(seconds, 4),
    }


def opening(folder: Path, repeats: int) -> dict[str, float]:
    """Open a store of 10,000 entries: first with no index, so that all headers are read, then as usual."""
    write_entries(folder, NUM_ENTRIES)
    rebuild_s = median_seconds(lambda: DiskStore(folder, max_bytes=2**34).close(), 1)
    open_s = median_seconds(lambda: DiskStore(folder, max_bytes=2**34).close(), repeats)
    return {"entries": NUM_ENTRIES, "rebuild_s": round(rebuild_s, 3), "open_s": round(open_s, 3)}


def write_entries(folder: Path, number: int) -> list[str]:
    """So many small entries without any index; their keys."""
    fingerprint, payload, keys = "f" * 64, bytes(1024), []
    for n in range(number):
        identity = Identity(entry_key(fingerprint, (n,)), fingerprint, (n,))
        path = folder / identity.key[:2] / f"{identity.key}.{n:016x}.kv"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(pack(identity, {}, payload))
        keys.append(identity.key)
    folder.chmod(0o700)
    return keys


def median_seconds(act: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
