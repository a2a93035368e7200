"""Looking after a store: what needs index and entries together, but no model."""

from __future__ import annotations

from collections.abc import Sequence

from kvlink_rag.index import VectorIndex
from kvlink_rag.store.disk import DiskStore


def delete_documents(index: VectorIndex, entries: DiskStore, document_ids: Sequence[str]) -> int:
    """Remove documents, their chunks and all KV that no other document shares; how many documents there were."""
    removed = 0
    for document_id in document_ids:
        keys = [chunk.kv_key for chunk in index.chunks_of(document_id)]
        removed += index.delete_document(document_id)
        entries.delete(index.unreferenced(keys))
    return removed


def prune(index: VectorIndex, entries: DiskStore) -> int:
    """Delete every KV that no indexed chunk refers to, and files a killed writer left; how many KVs there were."""
    live = index.live_keys()
    removed = entries.delete([key for key in entries.keys() if key not in live])
    entries.sweep()
    return removed


def stats(index: VectorIndex, entries: DiskStore) -> dict[str, int]:
    """Documents, chunks, tokens, and the entries that hold their KV."""
    documents, chunks, tokens = index.counts()
    return {
        "documents": documents,
        "chunks": chunks,
        "tokens": tokens,
        "entries": sum(1 for _ in entries.keys()),
        "bytes": entries.size_bytes(),
        "max_bytes": entries.max_bytes,
        "free_bytes": entries.free_bytes(),
    }
