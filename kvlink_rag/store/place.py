"""A folder in which nobody else may write, and which stays the one that was opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvlink_rag.errors import NotAStore, StoreError


def is_plain(status: os.stat_result) -> bool:
    """Whether it is a file that has one name only."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


class Place:
    """An opened folder. Raises NotAStore where others could put files of theirs in place of ours.

    names: files that may be in it. One that is a link, a second name of some file, a pipe or a device is refused:
    whoever wrote to it would write elsewhere.
    Whoever may write the folder above can still move this one away, and put another or a link in its place: `check`
    notices, since it asks for the folder itself, not for its name.
    """

    def __init__(self, folder: Path, *names: str):
        status = folder.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotAStore(f"others may write into {folder} (mode {mode:o}); run: chmod go-w {folder}")
        if hasattr(os, "geteuid") and status.st_uid not in (os.geteuid(), 0):  # root may do anything anyway
            raise NotAStore(
                f"{folder} belongs to another user (uid {status.st_uid}, you are {os.geteuid()}), who could put KV of "
                f"theirs into it; choose a folder of yours, or run: chown -R {os.geteuid()} {folder}"
            )
        for path in (folder / name for name in names):
            if os.path.lexists(path) and not is_plain(os.lstat(path)):
                raise NotAStore(f"{path} is a link, or no file; remove it, it is none of this store's")
        self.folder, self._identity = folder, (status.st_dev, status.st_ino)

    def is_kept(self) -> bool:
        """Whether the path still leads to the folder that was opened."""
        try:
            status = self.folder.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def check(self, error: type[StoreError] = NotAStore) -> None:
        """Raise an error unless the folder is kept."""
        if not self.is_kept():
            raise error(f"{self.folder} is not the folder any more that was opened; open the store again")
