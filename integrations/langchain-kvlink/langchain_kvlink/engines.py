"""One engine for everything that shares it: a chat model and the vector stores that feed it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlink_rag import KVLinkEngine


class SharedEngine:
    """A KVLinkEngine, loaded when it is first needed, and once whoever asks."""

    def __init__(self, load: Callable[[], KVLinkEngine], engine: KVLinkEngine | None = None):
        self._load, self._engine = load, engine
        self._lock = threading.Lock()

    @classmethod
    def of(cls, engine: Any, load_options: dict[str, Any]) -> SharedEngine:
        """The engine behind what the user gave as `engine`, or one to be loaded with `load_options`.

        engine: a KVLinkEngine, or anything of this package, which then shares its own. Raises ValueError.
        """
        if engine is None:
            return cls(lambda: _load(load_options))
        if load_options:
            raise ValueError(_clash(sorted(load_options)))
        shared = getattr(engine, "shared_engine", None)
        if isinstance(shared, cls):
            return shared
        if not hasattr(engine, "add_chunks"):
            raise ValueError(
                f"engine must be a kvlink_rag.KVLinkEngine, a ChatKVLink or a vector store of this package; got "
                f"{type(engine).__name__}. To name a model or a store folder, use model= and store="
            )
        return cls(lambda: engine, engine)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedEngine:
        """Itself: a copy of whatever shares the engine shares it too."""
        return self

    @property
    def loaded(self) -> KVLinkEngine | None:
        """The engine if it is loaded; never loads it."""
        return self._engine

    def get(self) -> KVLinkEngine:
        """The engine; the first caller loads it, the others wait."""
        with self._lock:
            engine = self._engine or self._load()
            self._engine = engine
        return engine

    async def aget(self) -> KVLinkEngine:
        """The engine, with the event loop free while it is loaded."""
        return await asyncio.to_thread(self.get) if self._engine is None else self._engine


class Attached:
    """The engines of a chat model and of those that LangChain makes of its fields (`configurable_fields`)."""

    def __init__(self, engine: Any, fields: dict[str, Any], shared: SharedEngine):
        """engine: what the user gave. fields: those of the first model that say what is loaded. shared: its engine."""
        self._engine, self._fields, self._shared = engine, fields, shared
        self._loaded = {_told(fields): shared}

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        """Itself, as its engines."""
        return self

    def engine_of(self, engine: Any, fields: dict[str, Any], load_options: dict[str, Any]) -> SharedEngine:
        """The engine of a model with these fields, loaded once for all that have them.

        Raises ValueError where they differ from the first one's beside an engine.
        """
        if engine is None:
            return self._loaded.setdefault(_told(fields), SharedEngine.of(None, load_options))
        if differing := sorted(name for name in fields if str(fields[name]) != str(self._fields[name])):
            raise ValueError(_clash(differing))
        return self._shared if engine is self._engine else SharedEngine.of(engine, {})


def _told(fields: dict[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, fields.values()))


def _clash(names: list[str]) -> str:
    return (
        f"{', '.join(names)} and engine exclude each other: an engine has its model and store already; leave one of "
        "the two out"
    )


def _load(options: dict[str, Any]) -> KVLinkEngine:
    from kvlink_rag import KVLinkEngine

    return KVLinkEngine.load(**options)
