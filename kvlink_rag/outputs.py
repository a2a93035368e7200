"""Where results go: whether a folder can be made or a file written there, asked before hours of work.

Nothing is made by asking. Whether the disk has room, nobody knows before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvlink_rag.errors import BadInput


def check_folder(path: Path) -> None:
    """Raise BadInput where no folder is and none can be made, or nothing can be written into it."""
    with _refusing(path, "cannot be the folder of results", "choose another folder"):
        there, missing = path.absolute(), []
        while not _exists(there):
            missing.append(there.name)
            there = there.parent
        for name in missing:
            _exists(there / name)  # its name alone may be refused: one too long
        _must_take_files(there)


def check_file(path: Path) -> None:
    """Raise BadInput where a file can be neither written nor made."""
    with _refusing(path, "cannot be written", "name a file in a folder that is there"):
        _must_take_files(path.absolute().parent)
        if _exists(path) and path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _exists(path) and not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _refusing(path: Path, what: str, instead: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path} {what}: {error.strerror}; {instead}") from error


def _exists(path: Path) -> bool:
    """Raises OSError where that cannot be told, and where no such file can be."""
    with suppress(FileNotFoundError):
        os.stat(path)
        return True
    return False


def _must_take_files(folder: Path) -> None:
    """Raises OSError."""
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
