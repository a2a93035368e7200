"""The `kvlink` command: parse, call, show. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink_rag.cli_measure import bench_app, evaluate
from kvlink_rag.cli_options import (
    DEFAULT_EMBEDDER_NAME,
    DEFAULT_MODEL_NAME,
    Adapter,
    Device,
    Dtype,
    Embedder,
    Json,
    K,
    Linking,
    Links,
    MaxGib,
    Model,
    Store,
    loaded,
    must_be_store,
)
from kvlink_rag.cli_train import train
from kvlink_rag.config import DEFAULT_K, DEFAULT_STORE
from kvlink_rag.console import notes, progress_bar, read_line, say, say_plan, say_sources, show
from kvlink_rag.errors import BadInput, KVLinkError

app = typer.Typer(
    help="Read every document once; answer from its stored KV.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
store_app = typer.Typer(help="Look after a store.", no_args_is_help=True)
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")
app.command("eval")(evaluate)
app.command("train")(train)


@app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="Files (.txt .md .rst .html .pdf) and folders.")],
    store: Store = Path(DEFAULT_STORE),
    model: Model = DEFAULT_MODEL_NAME,
    embedder: Embedder = DEFAULT_EMBEDDER_NAME,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_gib: MaxGib = 20.0,
    encode: Annotated[str, typer.Option("--encode", help="now or on-first-use.")] = "now",
    as_json: Json = False,
) -> None:
    """Read documents once: chunk, encode, index. Run again to update; unchanged ones cost nothing."""
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
    with loaded(store, model, embedder, adapter=adapter, dtype=dtype, device=device, max_gib=max_gib) as rag:
        with progress_bar() as progress:
            try:
                report = rag.add(paths, encode=encode, on_plan=say_plan, progress=progress)
            except KeyboardInterrupt:
                documents = rag.index.counts()[0]
                raise KVLinkError(
                    f"stopped; the store holds {documents} documents. Run the same command again to finish"
                ) from None
        for line in report.skipped:
            notes.print(f"skipped {line}", style="yellow", markup=False, soft_wrap=True)
        if as_json:
            print(json.dumps(report.to_json()))
        else:
            print(
                f"{report.documents} documents, {report.chunks} chunks, {report.tokens:,} tokens: "
                f"{report.encoded_chunks} encoded, {report.reused_chunks} reused; {report.skipped_files} files "
                f"skipped; {report.bytes / 2**20:,.1f} MiB written in {report.seconds:.1f} s"
            )
        if report.skipped and not report.documents:
            raise KVLinkError("nothing was added: every file was skipped (reasons above)")


@app.command()
def ask(
    question: str,
    store: Store = Path(DEFAULT_STORE),
    model: Model = DEFAULT_MODEL_NAME,
    embedder: Embedder = DEFAULT_EMBEDDER_NAME,
    links: Links = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    linking: Linking = "auto",
    k: K = DEFAULT_K,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text (repeatable).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    as_json: Json = False,
) -> None:
    """Answer one question from the store."""
    if not question.strip():
        raise BadInput("the question is empty")
    with loaded(
        store,
        model,
        embedder,
        must_exist=True,
        links=links,
        adapter=adapter,
        dtype=dtype,
        device=device,
        linking=linking,
    ) as rag:
        pieces = rag.stream(
            question,
            k=k,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop or (),
            seed=seed,
        )
        answer = show(pieces, quiet=as_json)
        if as_json:
            print(json.dumps(answer.to_json()))
        else:
            say_sources(answer)


@app.command()
def chat(
    store: Store = Path(DEFAULT_STORE),
    model: Model = DEFAULT_MODEL_NAME,
    embedder: Embedder = DEFAULT_EMBEDDER_NAME,
    links: Links = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    linking: Linking = "auto",
    k: K = DEFAULT_K,
    as_json: Json = False,
) -> None:
    """Ask several questions in a row; earlier turns are remembered. An empty line or Ctrl-D ends."""
    with loaded(
        store,
        model,
        embedder,
        must_exist=True,
        links=links,
        adapter=adapter,
        dtype=dtype,
        device=device,
        linking=linking,
    ) as rag:
        messages: list[dict[str, str]] = []
        while (words := read_line()) is not None:
            messages.append({"role": "user", "content": words})
            answer = show(rag.stream(messages, k=k), quiet=as_json)
            messages.append({"role": "assistant", "content": answer.text})
            if as_json:
                print(json.dumps(answer.to_json()), flush=True)
            else:
                say_sources(answer)


@store_app.command()
def stats(store: Store = Path(DEFAULT_STORE), as_json: Json = False) -> None:
    """Documents, chunks, entries and bytes of a store."""
    with _maintained(store) as (index, entries):
        say(_maintenance().stats(index, entries), as_json)


@store_app.command("list")
def list_documents(store: Store = Path(DEFAULT_STORE), as_json: Json = False) -> None:
    """Ids of all documents."""
    with _maintained(store) as (index, _):
        ids = index.document_ids()
        print(json.dumps(ids) if as_json else "\n".join(ids))


@store_app.command()
def delete(
    documents: Annotated[list[str], typer.Argument(help="Ids of documents, as `kvlink store list` prints them.")],
    store: Store = Path(DEFAULT_STORE),
    as_json: Json = False,
) -> None:
    """Remove documents with their chunks and stored KV."""
    with _maintained(store) as (index, entries):
        known = [name if index.document_digest(name) is not None else str(Path(name).resolve()) for name in documents]
        removed = _maintenance().delete_documents(index, entries, known)
        say({"deleted": removed}, as_json)
        if removed < len(documents):
            raise BadInput(f"{len(documents) - removed} of {len(documents)} documents are not in {store}")


@store_app.command()
def prune(store: Store = Path(DEFAULT_STORE), as_json: Json = False) -> None:
    """Delete stored KV that no document refers to, and files that a killed writer left."""
    with _maintained(store) as (index, entries):
        say({"pruned": _maintenance().prune(index, entries)}, as_json)


@store_app.command()
def verify(store: Store = Path(DEFAULT_STORE), as_json: Json = False) -> None:
    """Check every stored KV; damaged ones are dropped and encoded again when needed."""
    with _maintained(store) as (_, entries):
        sound, dropped = entries.verify()
        say({"sound": sound, "dropped": len(dropped)}, as_json)
        if dropped:
            raise KVLinkError(f"{len(dropped)} damaged entries dropped; the next question or `add` encodes them again")


def main() -> None:
    """Run the command; every expected failure is one clear line and exit code 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app(prog_name="kvlink")
    except KVLinkError as error:
        notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        notes.print("stopped", style="red")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)


def _maintenance() -> Any:
    from kvlink_rag import maintenance

    return maintenance


@contextmanager
def _maintained(store: Path) -> Iterator[Any]:
    """Index and entries of a store, without any model."""
    must_be_store(store)
    from kvlink_rag.config import StoreSettings
    from kvlink_rag.index import VectorIndex
    from kvlink_rag.store.disk import DiskStore
    from kvlink_rag.store.folder import open_folder

    folder = open_folder(store)
    index, entries = VectorIndex(folder), DiskStore(folder / "kv", max_bytes=StoreSettings.max_bytes)
    try:
        yield index, entries
    finally:
        index.close()
        entries.close()


if __name__ == "__main__":
    main()
