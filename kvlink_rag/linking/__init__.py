"""Linkings: ways to turn stored KVs into a context. One idea, one file, each with its paper.

Each module offers

    USES_STORED_KV: bool
    link(request: LinkRequest) -> Context

and `LINKINGS` is the table the rest of the package looks names up in.
"""

from __future__ import annotations

from types import ModuleType

from kvlink_rag.errors import BadInput
from kvlink_rag.linking import full, link_tokens, plain

LINKINGS: dict[str, ModuleType] = {"full": full, "plain": plain, "link_tokens": link_tokens}


def get_linking(name: str) -> ModuleType:
    """The linking of that name. Raises BadInput."""
    if name not in LINKINGS:
        raise BadInput(f"linking {name!r} is not one of {', '.join(LINKINGS)}")
    return LINKINGS[name]
