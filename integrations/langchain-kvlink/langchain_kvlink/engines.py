"""One engine for everything that shares it: a chat model and the vector stores that feed it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
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

    @classmethod
    def again(cls, attached: Attached, fields: dict[str, Any], load_options: dict[str, Any]) -> SharedEngine:
        """The engine of a chat model that is made anew from another's fields; one to be loaded if these differ.

        fields: of the new one, as `attached` has the other's. Raises ValueError where they differ beside an engine.
        """
        differing = sorted(name for name, value in fields.items() if value != attached.fields[name])
        if not differing:
            return attached.shared_engine
        if attached.was_given:
            raise ValueError(_clash(differing))
        return cls.of(None, load_options)

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


@dataclass(frozen=True)
class Attached:
    """The engine of a chat model among its fields, of which LangChain may make another one (`configurable_fields`).

    fields: those that say what is loaded. was_given: by the user, rather than loaded by these.
    """

    shared_engine: SharedEngine
    fields: dict[str, Any]
    was_given: bool


def _clash(names: list[str]) -> str:
    return (
        f"{', '.join(names)} and engine exclude each other: an engine has its model and store already; leave one of "
        "the two out"
    )


def _load(options: dict[str, Any]) -> KVLinkEngine:
    from kvlink_rag import KVLinkEngine

    return KVLinkEngine.load(**options)
