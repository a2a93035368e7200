"""API keys: read from a file, compared in constant time, each opening one namespace."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from kvlink_rag.config import PUBLIC
from kvlink_rag.errors import BadInput

MIN_KEY_CHARS = 16
_COMMENT = re.compile(r"(^|\s)#.*")
_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Keys:
    """Digests of keys, and the namespace that each opens."""

    def __init__(self, namespaces: Mapping[str, str]):
        """namespaces: key -> namespace."""
        self._namespaces = {hashlib.sha256(key.encode()).digest(): name for key, name in namespaces.items()}

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Keys from a file: on each line a key, and its namespace if that is not the public one.

        What stands behind a # that begins a word is a comment. Raises BadInput.
        """
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the API keys in {path} cannot be read: {error}") from error
        namespaces: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            words = _COMMENT.sub("", line).split()
            if not words:
                continue
            key, name, *more = *words, *([PUBLIC] if len(words) == 1 else [])
            if more or not _NAMESPACE.fullmatch(name):
                raise BadInput(
                    f"{path}:{number}: give a key and, behind a space, a namespace of a-z, 0-9, _ and -; a comment "
                    "begins with a # behind a space"
                )
            if len(key) < MIN_KEY_CHARS or not key.isascii():
                raise BadInput(f"{path}:{number}: a key needs at least {MIN_KEY_CHARS} ASCII characters")
            if key in namespaces:
                raise BadInput(f"{path}:{number}: this key stands in the file twice")
            namespaces[key] = name
        if not namespaces:
            raise BadInput(f"{path} holds no key; put one on a line of its own")
        return cls(namespaces)

    @property
    def namespaces(self) -> list[str]:
        """All namespaces, in order."""
        return sorted(set(self._namespaces.values()))

    def namespace(self, authorization: str) -> str | None:
        """The namespace that an Authorization header opens, or None.

        "Bearer KEY", or "Basic ..." with the key as the password, as browsers send it.
        """
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return None
        elif scheme.lower() != "bearer":
            return None
        given = hashlib.sha256(value.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, name in self._namespaces.items():  # all of them, whichever fits
            if hmac.compare_digest(digest, given):
                found = name
        return found
