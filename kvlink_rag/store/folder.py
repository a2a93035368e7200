"""A store's folder: what marks it as ours."""

from __future__ import annotations

import json
from pathlib import Path

from kvlink_rag.errors import NotAStore

MANIFEST = "store.json"
FORMAT = 1


def open_folder(folder: str | Path) -> Path:
    """The folder, made and marked if it is new. Raises NotAStore if it holds something else."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise NotAStore(f"{path} is a file; a store is a folder")
    manifest = path / MANIFEST
    if manifest.exists():
        try:
            about = json.loads(manifest.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise NotAStore(f"{manifest} cannot be read: {error}") from error
        if not isinstance(about, dict) or about.get("kvlink_store") != FORMAT:
            raise NotAStore(f"{path} is a store of another version, or none of ours; choose another folder")
        return path
    try:
        if path.exists() and any(path.iterdir()):
            raise NotAStore(f"{path} holds other files and is no kvlink store; choose an empty or new folder")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"kvlink_store": FORMAT}), "utf-8")
    except OSError as error:
        raise NotAStore(f"no store can be made in {path}: {error.strerror}") from error
    return path
