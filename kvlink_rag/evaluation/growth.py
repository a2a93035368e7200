"""What grows with the number of chunks, and what must not: search over synthetic vectors, look-up of stored KV."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvlink_rag.evaluation.store_speed import median_seconds, write_entries
from kvlink_rag.index import IndexedChunk, VectorIndex
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.types import Chunk

DIM = 384  # of all-MiniLM-L6-v2
NUM_DOCUMENT_CHUNKS = 100
K = 10


def run_growth(
    sizes: list[int], repeats: int, progress: Callable[[str, int, int], None]
) -> list[dict[str, float | int]]:
    """One row per number of chunks: medians over the repeats, in seconds."""
    rows: list[dict[str, float | int]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="kvlink-bench-") as folder:
            rows.append({"chunks": size, **_searching(Path(folder), size, repeats), **_looking_up(folder, size)})
        progress("sizes", len(rows), len(sizes))
    return rows


def _searching(folder: Path, size: int, repeats: int) -> dict[str, float]:
    """Index so many chunks, 100 a document, open the index anew and search it for random vectors."""
    rng = np.random.default_rng(0)
    index = VectorIndex(folder)
    for start in range(0, size, NUM_DOCUMENT_CHUNKS):
        places = range(start, min(start + NUM_DOCUMENT_CHUNKS, size))
        chunks = [IndexedChunk(Chunk(f"chunk {n}", str(start), n - start), 4, "f" * 64, f"{n:064x}") for n in places]
        index.replace_document(str(start), "digest", None, {}, chunks, _unit(rng, len(chunks)))
    index.search(_unit(rng, 1), K)
    index.save()
    index.close()
    index = VectorIndex(folder)
    first_s = median_seconds(lambda: index.search(_unit(rng, 1), K), 1)
    search_s = median_seconds(lambda: index.search(_unit(rng, 1), K), repeats * 5)
    index.close()
    return {"first_search_s": round(first_s, 4), "search_s": round(search_s, 5)}


def _looking_up(folder: str, size: int) -> dict[str, float]:
    """Whether a key is stored, and its bytes, in a store of so many small entries."""
    kv_folder = Path(folder, "kv")
    keys = write_entries(kv_folder, size)
    store = DiskStore(kv_folder, max_bytes=2**40)
    some = [keys[place] for place in np.random.default_rng(0).integers(0, size, 200)]
    contains_s = median_seconds(lambda: [key in store for key in some], 5) / len(some)
    get_s = median_seconds(lambda: [store.get(key) for key in some], 5) / len(some)
    store.close()
    return {"contains_s": round(contains_s, 7), "get_s": round(get_s, 7)}


def _unit(rng: np.random.Generator, number: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    vectors = rng.standard_normal((number, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors
