"""A store's folder: what marks it as ours, and the entries in it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvlink_rag.config import DEFAULT_MAX_BYTES, DEFAULT_PRECISION, StoreSettings
from kvlink_rag.errors import CannotStore, NotAStore
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kvdisk import is_leftover, replace
from kvlink_rag.store.lock import writer_lock
from kvlink_rag.store.namespaces import SECRET
from kvlink_rag.store.place import Place

MANIFEST, LOCK = "store.json", "store.lock"
FORMAT = 1
_RESTORE = (  # format 1 is the only one so far; a later one must tell which it was
    f'restore it from a copy, or write {{"kvlink_store": {FORMAT}}} into it: documents are kept, budget and precision '
    "are those of a new store, KV that an integrity key sealed is lost"
)
log = logging.getLogger(__name__)


def open_folder(folder: str | Path, integrity_key: bytes | None = None) -> Path:
    """The folder, made and marked if it is new. Raises NotAStore if it holds something else.

    It says under which integrity key its entries are sealed, so that nobody with another drops them all as damaged.
    """
    path = Path(folder)
    about_new = {"kvlink_store": FORMAT, "integrity_key": _key_id(integrity_key)}
    try:
        if path.exists() and not path.is_dir():
            raise NotAStore(f"{path} is a file; a store is a folder")
        if path.exists():
            Place(path, MANIFEST, LOCK, SECRET, "namespaces.lock")
        if not (path / MANIFEST).exists():
            _make(path, about_new)
    except OSError as error:  # a name too long, a folder above that may not be entered
        raise NotAStore(f"no store can be in {path}: {error.strerror}; choose another folder") from error
    about = _manifest(path)
    if about.get("integrity_key", "") != about_new["integrity_key"]:
        given = "another was given" if integrity_key else "none was given"
        raise NotAStore(
            f"{path} is sealed with an integrity key, and {given}"
            if about.get("integrity_key")
            else f"{path} has no integrity key, but one was given; add the documents to a new store"
        )
    return path


def _make(path: Path, about: dict[str, Any]) -> None:
    """Mark a folder as a store, unless somebody else has just done so. Raises NotAStore."""
    manifest = path / MANIFEST
    try:
        is_taken = path.exists() and any(not _is_beginning(file.name) for file in path.iterdir())
        if is_taken and not manifest.exists():  # looked for last: it is there before all other files
            reason = f"{path} holds other files and is no kvlink store; choose an empty or new folder"
            raise NotAStore(lost_manifest(path) or reason)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with writer_lock(path / LOCK):
            if not manifest.exists():
                replace(manifest, json.dumps(about).encode())
    except (OSError, CannotStore) as error:
        raise NotAStore(f"no store can be made in {path}: {getattr(error, 'strerror', error)}") from error


def lost_manifest(path: Path) -> str | None:
    """What to do about a folder that holds a store's files without what marks it as one; None for any other."""
    is_lost = not os.path.exists(path / MANIFEST) and all(
        os.path.exists(path / name) for name in ("index.sqlite", "kv")
    )
    return f"{path} holds a store, but its {MANIFEST} is gone; {_RESTORE}" if is_lost else None


def _is_beginning(name: str) -> bool:
    """Whether somebody who makes a store, or was killed while he did, has such a file before there is a manifest."""
    return name == LOCK or is_leftover(name, MANIFEST)


def open_entries(folder: Path, limits: StoreSettings) -> DiskStore:
    """The entries of a store's folder, within its limits. A budget that is given is the store's from now on."""
    max_bytes = _remembered(folder, "max_bytes", limits.max_bytes, DEFAULT_MAX_BYTES)
    return DiskStore(folder / "kv", max_bytes=max_bytes, ttl_s=limits.ttl_s, integrity_key=limits.integrity_key)


def store_precision(folder: Path) -> str:
    """How KV lies in a store, as `Precision` reads it: that under which documents were last added."""
    return str(_remembered(folder, "precision", None, DEFAULT_PRECISION))


def remember_precision(folder: Path, precision: str) -> None:
    """Documents are added so; whoever opens the store without a precision has this one from now on."""
    _remembered(folder, "precision", precision, DEFAULT_PRECISION)


def _remembered(folder: Path, name: str, given: Any, default: Any) -> Any:
    """What the store was last given under this name; now `given`, unless that is None."""
    known = _manifest(folder).get(name, default)
    if given is None or given == known:
        return known
    try:
        with writer_lock(folder / LOCK):
            replace(folder / MANIFEST, json.dumps({**_manifest(folder), name: given}).encode())
    except (OSError, CannotStore) as error:  # a full disk can still be read and deleted from
        log.warning("%s %s of %s is not remembered: %s", name, given, folder, getattr(error, "strerror", error))
    return given


def _manifest(path: Path) -> dict[str, Any]:
    """What a store's folder says of itself. Raises NotAStore."""
    manifest = path / MANIFEST
    try:
        about = json.loads(manifest.read_text("utf-8"))
    except OSError as error:
        raise NotAStore(f"{manifest} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NotAStore(f"{manifest} is damaged ({error}); {_RESTORE}") from error
    if not isinstance(about, dict) or about.get("kvlink_store") != FORMAT:
        raise NotAStore(f"{path} is a store of another version, or none of ours; choose another folder")
    budget = about.get("max_bytes", DEFAULT_MAX_BYTES)
    if type(budget) is not int or budget < 1:
        raise NotAStore(f"{manifest} has a budget of {budget!r} bytes; take max_bytes out of it, or give a number")
    if not isinstance(about.get("precision", DEFAULT_PRECISION), str):
        raise NotAStore(f"{manifest} has a precision of {about['precision']!r}; take it out, or name one")
    return about


def _key_id(integrity_key: bytes | None) -> str:
    """What tells an integrity key from others without giving it away; "" without one."""
    return "" if integrity_key is None else blake3(integrity_key, derive_key_context="kvlink_rag key id").hexdigest()
