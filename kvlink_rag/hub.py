"""Folders by hub id: what is not here is downloaded, and nothing but data is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvlink_rag.errors import BadInput


def hub_folder(name: str, patterns: Sequence[str], what: str) -> Path:
    """A hub repository's files that match `patterns`, downloaded unless they are here already. Raises BadInput.

    what: what is looked for, for the error ("model").
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"no {what} {name!r}: not a folder here, and not to be had from the hub ({reason})") from error
