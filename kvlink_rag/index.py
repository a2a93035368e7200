"""The vector index: chunk texts and vectors in SQLite, searched by FAISS.

SQLite is the truth. The FAISS file is derived from it, carries its digest in the database, and is
rebuilt whenever it is missing, damaged or behind. Row ids are never given twice.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from kvlink_rag.embedder import Vectors
from kvlink_rag.index_database import IndexDatabase
from kvlink_rag.store.kvdisk import replace
from kvlink_rag.types import Chunk, Hit

log = logging.getLogger(__name__)
_IS_REFERENCED = " OR ".join(f"EXISTS (SELECT 1 FROM {name} WHERE kv_key = ?1)" for name in ("chunks", "other_keys"))


@dataclass(frozen=True)
class IndexedChunk:
    """A chunk with what the index keeps beside its text."""

    chunk: Chunk
    num_tokens: int
    fingerprint: str
    kv_key: str


class VectorIndex:
    """Documents, their chunks and vectors in one folder."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._db = IndexDatabase(self._folder)
        self._faiss: Any = None  # loaded at the first search
        self._faiss_version = -1

    # -- documents ---------------------------------------------------------------------------------

    def document_digest(self, document_id: str) -> str | None:
        """The content digest the document was indexed under, or None."""
        row = self._db.row("SELECT digest FROM documents WHERE id = ?", (document_id,))
        return None if row is None else str(row[0])

    def document_ids(self) -> list[str]:
        """All documents, in order of id."""
        return [row[0] for row in self._db.rows("SELECT id FROM documents ORDER BY id")]

    def ids_where(self, name: str, value: str) -> list[str]:
        """Ids of the documents whose metadata holds `value` under the plain name `name`."""
        query = "SELECT id FROM documents WHERE CASE WHEN json_valid(metadata) THEN json_extract(metadata, ?) = ? END"
        found = [row[0] for row in self._db.rows(query, (f'$."{name}"', value))]
        beyond_json = self._db.rows("SELECT id, metadata FROM documents WHERE NOT json_valid(metadata)")  # NaN
        return sorted([*found, *(row[0] for row in beyond_json if json.loads(row[1]).get(name) == value)])

    def chunks_of(self, document_id: str) -> list[IndexedChunk]:
        """A document's chunks in order."""
        query = (
            "SELECT c.document_id, position, text, d.metadata, num_tokens, fingerprint, kv_key FROM chunks c "
            "JOIN documents d ON d.id = c.document_id WHERE c.document_id = ? ORDER BY position"
        )
        return [_indexed(row) for row in self._db.rows(query, (document_id,))]

    def replace_document(
        self,
        document_id: str,
        digest: str,
        title: str | None,
        metadata: dict[str, Any],
        chunks: Sequence[IndexedChunk],
        vectors: Vectors,
    ) -> list[str]:
        """Index a document in one transaction, in place of an earlier version; which KV keys that dooms.

        vectors [chunks, dim]; with dim 0 the chunks are kept but not found by `search`: somebody else finds them.
        """
        rows = [
            (document_id, c.chunk.position, c.chunk.text, c.num_tokens, c.fingerprint, c.kv_key, vector.tobytes())
            for c, vector in zip(chunks, vectors, strict=True)
        ]
        with self._changing() as db:
            keys = self.keys_of(document_id)
            gone = self._remove_chunks(db, document_id)
            db.execute(
                "INSERT INTO documents VALUES (?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET "
                "digest = excluded.digest, title = excluded.title, metadata = excluded.metadata",
                (document_id, digest, title, json.dumps(metadata)),
            )
            new = [
                db.execute(
                    "INSERT INTO chunks (document_id, position, text, num_tokens, fingerprint, kv_key, vector) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                ).lastrowid
                for row in rows
            ]
            self._update_faiss(gone, new, vectors)
            return self.doom(keys)

    def delete_document(self, document_id: str) -> bool:
        """Remove a document and its chunks, and doom the KV that nobody shares; whether there was one."""
        with self._changing() as db:
            keys = self.keys_of(document_id)
            gone = self._remove_chunks(db, document_id)
            found = db.execute("DELETE FROM documents WHERE id = ?", (document_id,)).rowcount > 0
            self._update_faiss(gone, [], None)
            self.doom(keys)
        return found

    @staticmethod
    def _remove_chunks(db: sqlite3.Connection, document_id: str) -> list[int]:
        """Remove a document's chunks and keys; the ids of the chunks' rows."""
        gone = [row[0] for row in db.execute("SELECT id FROM chunks WHERE document_id = ?", (document_id,))]
        db.execute("DELETE FROM chunks WHERE document_id = ?", (document_id,))
        db.execute("DELETE FROM other_keys WHERE document_id = ?", (document_id,))
        return gone

    def set_keys(self, document_id: str, digest: str, chunks: Sequence[IndexedChunk]) -> list[str]:
        """Note under which recipe and key a document's chunks are now encoded; which KV keys that dooms.

        digest: of the version whose chunks they are. Where the document has another by now, or none, nothing is noted,
        and theirs are doomed.
        """
        with self._transaction() as db:
            if self.document_digest(document_id) != digest:
                return self.doom([c.kv_key for c in chunks])
            db.execute(
                "INSERT OR IGNORE INTO other_keys SELECT document_id, kv_key FROM chunks WHERE document_id = ?",
                (document_id,),
            )
            db.executemany(
                "UPDATE chunks SET num_tokens = ?, fingerprint = ?, kv_key = ? WHERE document_id = ? AND position = ?",
                [(c.num_tokens, c.fingerprint, c.kv_key, document_id, c.chunk.position) for c in chunks],
            )
            return []

    def dim(self) -> int:
        """The length of the vectors; 0 if no chunk has one."""
        row = self._db.row("SELECT length(vector) FROM chunks WHERE length(vector) > 0 LIMIT 1")
        return 0 if row is None else int(row[0]) // np.dtype(np.float32).itemsize

    def note_key(self, document_id: str, kv_key: str, text: str | None = None) -> bool:
        """Note KV of a document's chunk that another recipe than the index's has, to be deleted with it.

        Whether the document is there. text: of the chunk, where it was found in the index; if the document was deleted
        meanwhile, or holds it no more, the key is doomed.
        """
        is_there = (
            "SELECT 1 FROM documents d WHERE id = ?1 AND "
            "(?2 IS NULL OR EXISTS (SELECT 1 FROM chunks WHERE document_id = d.id AND text = ?2))"
        )
        if kv_key in self.keys_of(document_id):
            return True
        if text is None and self._db.row(is_there, (document_id, text)) is None:
            return False
        with self._transaction() as db:
            if found := self._db.row(is_there, (document_id, text)) is not None:
                db.execute("INSERT OR IGNORE INTO other_keys VALUES (?, ?)", (document_id, kv_key))
            elif text is not None:
                self.doom([kv_key])
        return found

    def keys_of(self, document_id: str) -> list[str]:
        """The KV keys of a document's chunks, under whatever recipe they were stored."""
        tables = ("chunks", "other_keys")
        query = " UNION ".join(f"SELECT kv_key FROM {table} WHERE document_id = ?1" for table in tables)
        return [row[0] for row in self._db.rows(query, (document_id,))]

    def documents_with(self, text: str) -> list[str]:
        """Ids of the documents that have a chunk of this very text."""
        query = "SELECT DISTINCT document_id FROM chunks WHERE text = ?"
        return [row[0] for row in self._db.rows(query, (text,))]

    def texts(self) -> list[tuple[str, str]]:
        """(document id, text) of every chunk."""
        return self._db.rows("SELECT document_id, text FROM chunks ORDER BY id")

    def vectors_of(self, document_ids: Sequence[str]) -> dict[str, Vectors]:
        """Vectors [chunks, dim] of each document that has any."""
        query = "SELECT vector FROM chunks WHERE document_id = ? AND length(vector) > 0 ORDER BY position"
        found = {}
        for document_id in document_ids:
            if rows := [row[0] for row in self._db.rows(query, (document_id,))]:
                found[document_id] = np.frombuffer(b"".join(rows), dtype=np.float32).reshape(len(rows), -1)
        return found

    def version(self) -> tuple[int, int]:
        """Changes whenever the database does, by this connection or another."""
        return self._db.version()

    def live_keys(self) -> set[str]:
        """KV keys that some chunk refers to, each under the recipe that it was added by last."""
        return {row[0] for row in self._db.rows("SELECT DISTINCT kv_key FROM chunks")}

    def unreferenced(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that no document refers to."""
        return [key for key in dict.fromkeys(keys) if self._db.row(f"SELECT 1 WHERE {_IS_REFERENCED}", (key,)) is None]

    # -- KV that is to be deleted ------------------------------------------------------------------

    def doom(self, keys: Sequence[str]) -> list[str]:
        """Keep in mind that the KV of those of `keys` that no document refers to is to be deleted; which they are.

        Done together with the change that drops the last reference: whatever fails behind it, the keys stay known.
        """
        doomed = self.unreferenced(keys)
        for key in doomed:
            self._db.row("INSERT OR REPLACE INTO doomed (kv_key) VALUES (?)", (key,))
        return doomed

    def doomed(self) -> list[tuple[int, str]]:
        """(number, KV key) of what is to be deleted, the newest first; not what is referred to again meanwhile."""
        every = [] if self._db.read_only else self._db.rows("SELECT id, kv_key FROM doomed ORDER BY id DESC")
        unreferenced = set(self.unreferenced([key for _, key in every]))
        return [(number, key) for number, key in every if key in unreferenced]

    def forget_doomed(self, numbers: Sequence[int]) -> None:
        """Their KV is deleted. A key that was doomed anew meanwhile has another number, and stays."""
        with self._transaction() as db:
            db.executemany("DELETE FROM doomed WHERE id = ?", [(number,) for number in numbers])

    def counts(self) -> tuple[int, int, int]:
        """Documents, chunks, tokens."""
        query = "SELECT (SELECT COUNT(*) FROM documents), COUNT(*), COALESCE(SUM(num_tokens), 0) FROM chunks"
        documents, chunks, tokens = self._db.row(query)
        return int(documents), int(chunks), int(tokens)

    # -- search ------------------------------------------------------------------------------------

    def search(self, vector: Vectors, k: int) -> list[Hit]:
        """The k chunks nearest to a unit vector [1, dim], best first; fewer if there are fewer."""
        with self._db.lock:
            faiss_index = self._loaded_faiss(vector.shape[1])
            if faiss_index is None or faiss_index.ntotal == 0:
                return []
            scores, ids = faiss_index.search(vector, min(k, faiss_index.ntotal))
            query = (
                "SELECT c.document_id, position, text, d.metadata FROM chunks c "
                "JOIN documents d ON d.id = c.document_id WHERE c.id = ?"
            )
            hits = []
            for score, row_id in zip(scores[0].tolist(), ids[0].tolist(), strict=True):
                row = self._db.row(query, (row_id,))
                if row is not None:
                    hits.append(Hit(Chunk(row[2], row[0], row[1], json.loads(row[3])), round(float(score), 6)))
            return hits

    def last_fingerprint(self) -> str | None:
        """By which recipe the chunk that was indexed last was encoded; None where there is no chunk."""
        row = self._db.row("SELECT fingerprint FROM chunks ORDER BY rowid DESC LIMIT 1")
        return None if row is None else str(row[0])

    def get_meta(self, name: str) -> str | None:
        """A named value of the store, or None."""
        row = self._db.row("SELECT value FROM meta WHERE name = ?", (name,))
        return None if row is None else str(row[0])

    def set_meta(self, name: str, value: str) -> None:
        """Set a named value of the store."""
        with self._db.lock:
            self._db.place.check()
            self._db.rows(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value", (name, value)
            )

    def save(self) -> None:
        """Write the FAISS file, so that the next start need not rebuild it."""
        import faiss

        with self._db.lock:
            is_saved = self.get_meta("faiss_digest") and (self._folder / "index.faiss").exists()
            if self._faiss is None or self._is_behind() or is_saved:
                return
            data = faiss.serialize_index(self._faiss).tobytes()
            with self._transaction():
                if self._is_behind():  # somebody changed the database meanwhile
                    return
                try:
                    replace(self._folder / "index.faiss", data)
                    self.set_meta("faiss_digest", blake3(data).hexdigest())
                except OSError as error:
                    log.warning(
                        "%s: the search index is not saved (%s); the next start rebuilds it", self._folder, error
                    )

    def _is_behind(self) -> bool:
        """Whether another connection changed the database since FAISS was loaded."""
        return self._data_version() != self._faiss_version

    def _data_version(self) -> int:
        return self._db.version()[1]

    def close(self) -> None:
        """Let go of the files."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, one thread and one process at a time."""
        with self._db.lock:
            try:
                with self._db.transaction() as db:
                    yield db
            except BaseException:
                self._faiss = None  # it may know more than the database does, whose new row ids are given again
                raise

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that also notes that the FAISS file is behind."""
        with self._transaction() as db:
            self.set_meta("faiss_digest", "")
            (self._folder / "index.faiss").unlink(missing_ok=True)  # behind now; deleted vectors go with it
            yield db

    def _update_faiss(self, gone: list[int], new: list[int | None], vectors: Vectors | None) -> None:
        """Follow a change of the database; should that fail to be committed, the next search rebuilds."""
        if self._faiss is None:
            return
        if gone:
            self._faiss.remove_ids(np.array(gone, dtype=np.int64))
        if new and vectors is not None and vectors.shape[1]:
            self._faiss.add_with_ids(vectors, np.array(new, dtype=np.int64))

    def _loaded_faiss(self, dim: int) -> Any:
        """The FAISS index: the one in memory, the file if it is current, else rebuilt from SQLite."""
        import faiss

        if self._faiss is not None and not self._is_behind():
            return self._faiss
        self._faiss_version = self._data_version()
        try:
            data = (self._folder / "index.faiss").read_bytes() if self._db.place.is_kept() else b""
        except OSError:
            data = b""
        if data and blake3(data).hexdigest() == self.get_meta("faiss_digest"):
            self._faiss = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
            return self._faiss
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
        rows = self._db.rows("SELECT id, vector FROM chunks WHERE length(vector) > 0")
        if rows:
            vectors = np.frombuffer(b"".join(row[1] for row in rows), dtype=np.float32).reshape(len(rows), dim)
            index.add_with_ids(vectors, np.array([row[0] for row in rows], dtype=np.int64))
        self._faiss = index
        return index


def _indexed(row: Sequence[Any]) -> IndexedChunk:
    return IndexedChunk(Chunk(row[2], row[0], row[1], json.loads(row[3])), row[4], row[5], row[6])
