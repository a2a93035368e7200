"""Nodes and the engine's store: one way in for all components."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode, MetadataMode
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from llama_index.llms.kvlink.base import KVLinkLLM

    from kvlink_rag import KVLinkEngine

REF_DOC_ID, REF_DOC_HASH, NODE_METADATA = "ref_doc_id", "ref_doc_hash", "node_metadata"


def engine_of(owner: KVLinkEngine | KVLinkLLM) -> KVLinkEngine:
    """The engine itself, or that of a KVLinkLLM (which loads its model if it has not yet)."""
    engine: Any = getattr(owner, "engine", owner)
    if not hasattr(engine, "add_chunks"):
        raise ValueError(f"engine must be a KVLinkLLM or a kvlink_rag.KVLinkEngine, got {type(owner).__name__}")
    found: KVLinkEngine = engine
    return found


async def aengine_of(owner: KVLinkEngine | KVLinkLLM) -> KVLinkEngine:
    """`engine_of`, with the event loop free while a model is loaded."""
    return await asyncio.to_thread(engine_of, owner)


def kv_folder(persist_dir: str | Path) -> Path:
    """Where the KV of an index kept in `persist_dir` belongs: `<persist_dir>/kvlink`."""
    return Path(persist_dir) / "kvlink"


def content_of(node: Any) -> str:
    """What the language model reads of a node, and so what its KV is keyed on."""
    return str(node.get_content(metadata_mode=MetadataMode.LLM))


def store_kv(engine: KVLinkEngine, nodes: Sequence[BaseNode], show_progress: bool) -> None:
    """Store the nodes' KV; of those that hold no text (any more) nothing stays."""
    if blank := _blank(nodes):
        engine.delete(*blank)
    engine.add_chunks(**_chunks_of(nodes), progress=progress_bar(show_progress))


async def astore_kv(engine: KVLinkEngine, nodes: Sequence[BaseNode], show_progress: bool) -> None:
    """`store_kv`, with the event loop free meanwhile."""
    if blank := _blank(nodes):
        await engine.arun(lambda: engine.delete(*blank))
    await engine.aadd_chunks(**_chunks_of(nodes), progress=progress_bar(show_progress))


def _blank(nodes: Sequence[BaseNode]) -> list[str]:
    return [node.node_id for node in nodes if not content_of(node).strip()]


def _chunks_of(nodes: Sequence[BaseNode]) -> dict[str, Any]:
    """The arguments of `add_chunks` for these nodes; nodes without text are passed over."""
    with_text = [node for node in nodes if content_of(node).strip()]
    return {
        "chunks": {node.node_id: content_of(node) for node in with_text},
        "metadata": {node.node_id: _metadata_of(node) for node in with_text},
    }


def _metadata_of(node: BaseNode) -> dict[str, Any]:
    """What is needed later to find a node's KV again: its document, that document's version, its own metadata."""
    source = node.source_node
    return {
        REF_DOC_ID: source.node_id if source else None,
        REF_DOC_HASH: source.hash if source else None,
        NODE_METADATA: json.loads(json.dumps(node.metadata, default=str)),
    }


def stored_metadata(engine: KVLinkEngine, node_id: str) -> dict[str, Any]:
    """The metadata under which `store_kv` stored a node."""
    indexed = engine.index.chunks_of(node_id)
    return dict(indexed[0].chunk.metadata) if indexed else {}


def ids_of_document(engine: KVLinkEngine, ref_doc_id: str) -> list[str]:
    """Ids of the nodes cut from a document, the document's own included: it may have been stored uncut."""
    return [ref_doc_id, *engine.index.ids_where(REF_DOC_ID, ref_doc_id)]


def progress_bar(show: bool) -> Callable[[str, int, int], None] | None:
    """A report for `add_chunks` that moves a progress bar, or None."""
    if not show:
        return None
    bar = tqdm(desc="Reading chunks", unit="chunk")

    def report(stage: str, done: int, total: int) -> None:
        bar.total, bar.n = total or None, done
        bar.refresh()
        if done == total:
            bar.close()

    return report
