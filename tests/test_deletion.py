"""Deleted means gone, everywhere at once: files, memory, what was damaged, half written or logged."""

from __future__ import annotations

import logging

from store_parts import entry_files

from kvlink_rag.config import StoreSettings
from kvlink_rag.store.entry import split_entry
from kvlink_rag.types import Document

CANARY = "xylophone-7391"
SECRET = Document(
    f"The {CANARY} hangs in the mill.", id=f"id-{CANARY}", title=f"On the {CANARY}", metadata={"of": CANARY}
)
OTHER = Document("The lighthouse on the rock has 201 steps.", id="lighthouse")


def test_nothing_of_a_deleted_document_is_left_in_files_memory_or_logs(open_rag, tmp_path, caplog):
    """S8: text, id, title, metadata, vector and KV; also where its entry was damaged, replaced or half written."""
    caplog.set_level(logging.DEBUG)
    rag = open_rag(store=tmp_path / "store", limits=StoreSettings(max_memory_bytes=2**24))
    rag.add([OTHER])
    kept = set(rag.index.live_keys())
    rag.add([SECRET])
    (key,) = rag.index.live_keys() - kept
    assert rag.ask(f"Where is the {CANARY}?", max_new_tokens=2).sources
    path = next(path for path in entry_files(rag.entries.folder) if path.name.startswith(key))
    entry = path.read_bytes()
    _, payload = split_entry(memoryview(entry))
    kv = [bytes(payload[place : place + 64]) for place in range(1000, len(payload) - 64, len(payload) // 8)]
    (others,) = (path.read_bytes() for path in entry_files(rag.entries.folder) if not path.name.startswith(key))
    kv = [piece for piece in kv if piece not in others]  # both begin with the same words of the template
    assert len(kv) > 4
    (vector,) = rag.index.vectors_of([SECRET.id])[SECRET.id]
    canaries = [CANARY.encode(), key.encode(), vector.tobytes(), *kv]

    path.write_bytes(entry[:-1] + bytes([entry[-1] ^ 1]))  # found damaged, dropped, encoded again
    assert rag.verify()[1] == 1
    assert rag.ask(f"Where is the {CANARY}?", max_new_tokens=2).sources and key in rag.entries
    path.with_suffix(".tmp").write_bytes(entry)  # half written by somebody who was killed
    (path.parent / f"{key}.{'0' * 16}.kv").write_bytes(entry)
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert all(canary in everything for canary in canaries), "they are there before"

    assert rag.delete(SECRET.id) == 1
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [(path, canary) for path, data in left.items() for canary in canaries if canary in data] == []
    assert not [path for path in tmp_path.rglob("*") if key in path.name]
    assert rag.kvs._memory.get(key) is None and key not in rag.entries._uses
    assert kept <= set(rag.entries.keys())
    rag.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(canary in everything for canary in canaries)
    logged = " ".join(str(record.__dict__) for record in caplog.records)
    assert "failed verification" in logged and CANARY not in logged and key not in logged
