"""Namespaces (tenants) of one store: each has keys and an index of its own, and never hits another's.

A namespace's id is HMAC-SHA256 of its name under a secret that the store keeps; it is part of every entry's key and
header. So nobody can name an entry of a namespace by its text, and equal texts have one entry per namespace. The
public namespace alone has no secret: what is in it is shared by all who ask there.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from kvlink_rag.config import PUBLIC
from kvlink_rag.errors import BadInput, NotAStore
from kvlink_rag.store.kvdisk import read_entry_file, replace
from kvlink_rag.store.lock import writer_lock

FOLDER = "namespaces"
SECRET = "namespaces.secret"
_SECRET_BYTES = 32


def namespace_id(folder: Path, name: str) -> str:
    """The id of a namespace of the store in `folder`; "" for the public one. Raises BadInput, NotAStore."""
    try:
        data = name.encode()
    except (AttributeError, UnicodeEncodeError):
        data = b""
    if not 0 < len(data) <= 1024:
        raise BadInput(f"a namespace is a text of 1 to 1024 bytes, got {name!r:.80}")
    return "" if name == PUBLIC else hmac.digest(_secret(folder / SECRET), data, "sha256").hex()


def namespace_folder(folder: Path, name: str) -> Path:
    """Where a namespace keeps its documents, made if it is new: the store's own folder for the public one."""
    identifier = namespace_id(folder, name)
    if not identifier:
        return folder
    path = folder / FOLDER / identifier
    try:
        for part in (path.parent, path):
            part.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise NotAStore(f"no place for namespace {name!r} can be made in {folder}: {error.strerror}") from error
    return path


def namespace_folders(folder: Path) -> dict[str, Path]:
    """Id -> folder of every namespace that holds documents, the public one first."""
    return {"": folder, **{path.name: path for path in sorted((folder / FOLDER).glob("*")) if path.is_dir()}}


def _secret(path: Path) -> bytes:
    try:
        if not path.exists():
            with writer_lock(path.with_suffix(".lock")):
                if not path.exists():
                    replace(path, secrets.token_bytes(_SECRET_BYTES))
        secret = bytes(read_entry_file(path))
    except OSError as error:
        raise NotAStore(f"the secret of the store's namespaces cannot be read from {path}: {error}") from error
    if len(secret) != _SECRET_BYTES:
        raise NotAStore(f"{path} is damaged: {len(secret)} bytes, not {_SECRET_BYTES}; restore it from a backup")
    return secret
