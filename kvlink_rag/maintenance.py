"""Looking after a store: what needs index and entries together, but no model."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from kvlink_rag.errors import BadInput, KVLinkError, StoreError, StoreFull
from kvlink_rag.index import VectorIndex
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.types import Hit

log = logging.getLogger(__name__)
CHECK = "check"  # in an index's meta data


class Deletes(Protocol):
    """What entries are deleted from: a store, or a store with the copies that memory holds."""

    def delete(self, keys: Iterable[str]) -> int: ...


def delete_documents(index: VectorIndex, kvs: Deletes, document_ids: Sequence[str]) -> int:
    """Remove documents, their chunks and all KV that no other document shares; how many documents there were.

    Raises CannotStore where KV could not be removed: the documents are gone then, their KV goes at the next try.
    """
    if wrong := [document_id for document_id in document_ids if not isinstance(document_id, str)]:
        raise BadInput(
            f"ids to delete are texts, each an argument of its own; got {type(wrong[0]).__name__}: delete(*ids)"
        )
    removed = 0
    for document_id in document_ids:
        try:
            removed += index.delete_document(document_id)
        except StoreFull:  # removing KV takes no room and makes some; what others share of it is encoded again
            kvs.delete(index.keys_of(document_id))
            removed += index.delete_document(document_id)
    delete_doomed(index, kvs)
    return removed


def delete_doomed(index: VectorIndex, kvs: Deletes) -> int:
    """Delete the KV that no document refers to any more, also what an earlier deletion left; how many were stored."""
    doomed = index.doomed()
    if not doomed:
        return 0
    removed = kvs.delete([key for _, key in doomed])
    index.forget_doomed([number for number, _ in doomed])
    return removed


def retry_deletions(index: VectorIndex, kvs: Deletes) -> None:
    """Delete the KV that an earlier deletion could not, or was killed before it did; it waits on if that fails."""
    try:
        delete_doomed(index, kvs)
    except (StoreError, sqlite3.Error, OSError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # its text may hold a key
        reason = getattr(cause, "strerror", None) or cause
        log.warning("KV of deleted documents is still stored (%s); `delete`, `add` and opening try again", reason)


def note_computed(index: VectorIndex, kvs: Deletes, hit: Hit, key: str, found: bool) -> None:
    """Let KV that an answer computed and stored for a hit be deleted with its document, if that is one of the store's.

    found: by the store's own search; where its document was deleted while its KV was computed, it is deleted now.
    """
    text = hit.chunk.text if found else None  # what callers give is kept, whosever it is, until a prune
    try:
        is_there = index.note_key(hit.chunk.document_id, key, text)
    except (sqlite3.Error, OSError, KVLinkError) as error:
        log.warning("KV of %s will not be deleted with it, only by prune: %s", hit.chunk.document_id, error)
        return
    if text is not None and not is_there:
        retry_deletions(index, kvs)


def prune(index: VectorIndex, entries: DiskStore, kvs: Deletes, namespace: str = "") -> int:
    """Delete every KV of a namespace (by id) that no indexed chunk refers to, and what killed writers left.

    How many KVs there were.
    """
    removed = delete_doomed(index, kvs)
    live = index.live_keys()
    removed += kvs.delete([key for key in entries.keys(namespace) if key not in live])
    entries.sweep()
    return removed


def prune_all(indexes: Mapping[str, VectorIndex], entries: DiskStore) -> int:
    """`prune` for a whole store, indexes by namespace id; what no known namespace holds goes too."""
    removed = sum(delete_doomed(index, entries) for index in indexes.values())
    live = set().union(*(index.live_keys() for index in indexes.values()))
    removed += entries.delete([key for key in entries.keys() if key not in live])
    entries.sweep()
    return removed


def stats(index: VectorIndex, entries: DiskStore, namespace: str = "") -> dict[str, Any]:
    """Documents, chunks, tokens of one namespace (by id) and the entries that hold their KV; the store's limits."""
    documents, chunks, tokens = index.counts()
    num_entries, num_bytes = entries.sizes().get(namespace, (0, 0))
    return {
        "documents": documents,
        "chunks": chunks,
        "tokens": tokens,
        "entries": num_entries,
        "bytes": num_bytes,
        "max_bytes": entries.max_bytes,
        "free_bytes": entries.free_bytes(),
    }


def remember_check(index: VectorIndex, checked_as: str, linking: str, failure: str | None, questions: int) -> None:
    """Keep the verdict of the last `kvlink check`, after how many questions; failure: what it advises if not passed.

    checked_as: `KVLinkEngine.checked_as` of what was checked.
    """
    verdict = {"checked_as": checked_as, "linking": linking, "failure": failure, "questions": questions}
    index.set_meta(CHECK, json.dumps(verdict))


def warnings(index: VectorIndex, fingerprint: str, checked_as: str, linking: str) -> Iterator[str]:
    """What whoever opens a store for this recipe, checkpoint and linking should know."""
    if index.last_fingerprint() not in (None, fingerprint):
        yield (
            "documents of this store were read by another recipe (model, dtype, precision, or a checkpoint's soft "
            "tokens or adapter): what a question finds is read anew, and kept beside; adding them again reads them all"
        )
    verdict = json.loads(index.get_meta(CHECK) or "{}")
    if (verdict.get("checked_as"), verdict.get("linking")) == (checked_as, linking) and verdict["failure"]:
        asked = verdict.get("questions")  # earlier versions did not keep it
        number = f" ({asked} question{'s' * (asked > 1)})" if asked else ""
        yield f"the last kvlink check of this store{number} failed: {verdict['failure']}"
