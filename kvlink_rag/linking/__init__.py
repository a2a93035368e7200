"""Linkings: ways to turn stored KVs into a context. One idea, one file, each with its paper.

`LINKINGS` is the table in which the rest of the package looks names up. A name may carry settings behind an @, several
divided by colons: recompute_deviation@0.3, parallel@0.9:0.8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from kvlink_rag.config import AUTO
from kvlink_rag.errors import BadInput
from kvlink_rag.joining import Linking
from kvlink_rag.linking.deviation import Deviation
from kvlink_rag.linking.first import First
from kvlink_rag.linking.fixed_positions import FixedPositions
from kvlink_rag.linking.full import Full
from kvlink_rag.linking.link_tokens import LinkTokenLinking
from kvlink_rag.linking.parallel import Parallel
from kvlink_rag.linking.plain import Plain
from kvlink_rag.linking.question import Question

LINKINGS: dict[str, Callable[..., Linking]] = {
    "full": Full,
    "plain": Plain,
    "link_tokens": LinkTokenLinking,
    "recompute_deviation": Deviation,
    "recompute_first": First,
    "recompute_question": Question,
    "fixed_positions": FixedPositions,
    "parallel": Parallel,
}
WITHOUT_TRAINING = "recompute_first"  # what "auto" stands for where no links were trained


@lru_cache(maxsize=64)  # names come from callers, also over the network
def get_linking(name: str) -> Linking:
    """The linking of that name, with the settings behind its @. Raises BadInput."""
    kind, _, settings = name.partition("@")
    if kind not in LINKINGS:
        raise BadInput(f"linking {name!r} is not one of {', '.join(LINKINGS)}")
    try:
        return LINKINGS[kind](*(float(value) for value in settings.split(":") if settings))
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"linking {name!r}: {settings!r} are no settings of {kind}") from error


def resolve_linking(name: str, has_links: bool) -> str:
    """What "auto" stands for: link tokens where trained ones are at hand. Other names stay. Raises BadInput."""
    if name == AUTO:
        return "link_tokens" if has_links else WITHOUT_TRAINING
    if name.partition("@")[0] not in LINKINGS:
        raise BadInput(f"linking {name!r} is not one of {', '.join((AUTO, *LINKINGS))}")
    get_linking(name)
    return name
