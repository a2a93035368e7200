"""What stands in an engine for the parts that it has closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvlink_rag.errors import BadInput


class Closed:
    """Refuses every use with BadInput, except to be closed again."""

    def __init__(self, folder: Path):
        self._folder = folder

    def close(self) -> None:
        """Nothing is left to do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what Python asks of any object, copies for example
        raise BadInput(f"the store in {self._folder} was closed by this engine's close(); load it again to go on")
