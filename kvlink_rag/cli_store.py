"""`kvlink store`: looking after a store, without any model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink_rag.cli_options import (
    DEFAULT_MODEL_NAME,
    Device,
    Dtype,
    Json,
    Model,
    Namespace,
    Precision,
    Store,
    integrity_key,
    loaded_model,
    must_be_namespace,
    must_be_store,
)
from kvlink_rag.config import DEFAULT_PRECISION, DEFAULT_STORE, PUBLIC
from kvlink_rag.console import say
from kvlink_rag.errors import BadInput, KVLinkError

store_app = typer.Typer(help="Look after a store.", no_args_is_help=True)


@store_app.command()
def stats(store: Store = Path(DEFAULT_STORE), as_json: Json = False) -> None:
    """Documents, chunks, entries and bytes of a store, by namespace."""
    from kvlink_rag.index import VectorIndex
    from kvlink_rag.maintenance import stats as stats_of
    from kvlink_rag.store.namespaces import namespace_folders

    with _maintained(store, PUBLIC) as (_, entries):
        rows = {}
        for identifier, folder in namespace_folders(store).items():
            index = VectorIndex(folder)
            rows[index.get_meta("namespace") or PUBLIC] = stats_of(index, entries, identifier)
            index.close()
    names = ("documents", "chunks", "tokens", "entries", "bytes")
    total = {name: sum(row[name] for row in rows.values()) for name in names}
    limits = {name: rows[PUBLIC][name] for name in ("max_bytes", "free_bytes")}
    if as_json:
        by_namespace = {name: {key: row[key] for key in names} for name, row in rows.items()}
        print(json.dumps({**total, **limits, "namespaces": by_namespace}))
        return
    say({**total, **limits}, as_json)
    for name, row in rows.items() if len(rows) > 1 else ():
        print(f"{name:>24}  " + ", ".join(f"{row[key]:,} {key}" for key in names))


@store_app.command("list")
def list_documents(store: Store = Path(DEFAULT_STORE), namespace: Namespace = PUBLIC, as_json: Json = False) -> None:
    """Ids of all documents."""
    with _maintained(store, namespace) as (index, _):
        ids = index.document_ids()
        print(json.dumps(ids) if as_json else "".join(f"{name}\n" for name in ids), end="\n" if as_json else "")


@store_app.command()
def delete(
    documents: Annotated[list[str], typer.Argument(help="Ids of documents, as `kvlink store list` prints them.")],
    store: Store = Path(DEFAULT_STORE),
    namespace: Namespace = PUBLIC,
    as_json: Json = False,
) -> None:
    """Remove documents with their chunks and stored KV."""
    from kvlink_rag.maintenance import delete_documents

    documents = [name.encode(errors="backslashreplace").decode() for name in dict.fromkeys(documents)]
    with _maintained(store, namespace) as (index, entries):
        known = [name if index.document_digest(name) is not None else str(Path(name).resolve()) for name in documents]
        missing = [
            name for name, known_as in zip(documents, known, strict=True) if index.document_digest(known_as) is None
        ]
        say({"deleted": delete_documents(index, entries, known)}, as_json)
        if missing:
            raise BadInput(f"not in {store}: {', '.join(missing)}; its ids are told by: kvlink store list")


@store_app.command()
def prune(store: Store = Path(DEFAULT_STORE), as_json: Json = False) -> None:
    """Delete stored KV that no document refers to, in all namespaces, and what killed writers left.

    What an `add` that is under way has stored but not yet indexed goes, too: it is encoded again when it is needed.
    """
    from kvlink_rag.index import VectorIndex
    from kvlink_rag.maintenance import prune_all
    from kvlink_rag.store.namespaces import namespace_folders

    with _maintained(store, PUBLIC) as (_, entries):
        indexes = {identifier: VectorIndex(folder) for identifier, folder in namespace_folders(store).items()}
        say({"pruned": prune_all(indexes, entries)}, as_json)
        for index in indexes.values():
            index.close()


@store_app.command()
def verify(store: Store = Path(DEFAULT_STORE), as_json: Json = False) -> None:
    """Check every stored KV; damaged ones are dropped and encoded again when needed."""
    with _maintained(store, PUBLIC) as (_, entries):
        sound, dropped = entries.verify()
        say({"sound": sound, "dropped": len(dropped)}, as_json)
        if dropped:
            raise KVLinkError(f"{len(dropped)} damaged entries dropped; the next question or `add` encodes them again")


@contextmanager
def _maintained(store: Path, namespace: str) -> Iterator[Any]:
    """A namespace's index and the store's entries."""
    must_be_store(store)
    from kvlink_rag.config import StoreSettings
    from kvlink_rag.index import VectorIndex
    from kvlink_rag.store.folder import open_entries, open_folder
    from kvlink_rag.store.namespaces import namespace_folder

    folder = open_folder(store, integrity_key())
    must_be_namespace(folder, namespace)
    index = VectorIndex(namespace_folder(folder, namespace))
    entries = open_entries(folder, StoreSettings(integrity_key=integrity_key()))
    try:
        yield index, entries
    finally:
        index.close()
        entries.close()


def bench_store(
    repeats: Annotated[int, typer.Option(help="Runs; medians are shown.", min=1)] = 7,
    precision: Precision = None,
    model: Model = DEFAULT_MODEL_NAME,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What the store costs: verification, loading into a context, opening 10,000 entries."""
    from kvlink_rag.compute import compute
    from kvlink_rag.evaluation.store_speed import run_store
    from kvlink_rag.packing import Precision as Packing

    packing = Packing.parse(precision or DEFAULT_PRECISION)
    language_model, _ = loaded_model(model, dtype, device)
    say(compute.run(lambda job: run_store(language_model, packing, repeats)), as_json)
