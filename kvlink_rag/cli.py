"""The `kvlink` command: parse, call, show. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvlink_rag.cli_check import check
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
    MaxNewTokens,
    Model,
    Namespace,
    Precision,
    Store,
    loaded,
)
from kvlink_rag.cli_serve import serve
from kvlink_rag.cli_store import bench_store, store_app
from kvlink_rag.cli_train import train
from kvlink_rag.config import DEFAULT_K, DEFAULT_STORE, PUBLIC, GenerationSettings
from kvlink_rag.console import notes, progress_bar, read_line, say_plan, say_sources, show
from kvlink_rag.errors import BadInput, KVLinkError, PromptTooLong
from kvlink_rag.loading import SUFFIXES

app = typer.Typer(
    help="Read every document once; answer from its stored KV.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")
bench_app.command("store")(bench_store)
app.command("eval")(evaluate)
app.command("train")(train)
app.command("check")(check)
app.command("serve")(serve)


@app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help=f"Files ({' '.join(SUFFIXES)}) and folders.")],
    store: Store = Path(DEFAULT_STORE),
    model: Model = DEFAULT_MODEL_NAME,
    embedder: Embedder = DEFAULT_EMBEDDER_NAME,
    links: Links = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_gib: MaxGib = None,
    precision: Precision = None,
    namespace: Namespace = PUBLIC,
    encode: Annotated[str, typer.Option("--encode", help="now or on-first-use.")] = "now",
    as_json: Json = False,
) -> None:
    """Read documents once: chunk, encode, index. Run again to update; unchanged ones cost nothing."""
    for path in paths:
        if not os.path.exists(path):
            raise BadInput(f"{path}: no such file or folder")
    with loaded(
        store,
        model,
        embedder,
        links=links,
        adapter=adapter,
        dtype=dtype,
        device=device,
        max_gib=max_gib,
        precision=precision,
        namespace=namespace,
    ) as rag:
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
        if not report.documents:
            where = ", ".join(map(str, paths))
            raise KVLinkError(f"nothing was added: there is no file in {where} (hidden ones are left out)")


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
    precision: Precision = None,
    namespace: Namespace = PUBLIC,
    k: K = DEFAULT_K,
    max_new_tokens: MaxNewTokens = GenerationSettings.max_new_tokens,
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
        precision=precision,
        namespace=namespace,
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
    precision: Precision = None,
    namespace: Namespace = PUBLIC,
    k: K = DEFAULT_K,
    max_new_tokens: MaxNewTokens = GenerationSettings.max_new_tokens,
    as_json: Json = False,
) -> None:
    """Ask several questions in a row; earlier turns are remembered, and help to find. An empty line or Ctrl-D ends."""
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
        precision=precision,
        namespace=namespace,
    ) as rag:
        messages: list[dict[str, str]] = []
        while (words := read_line()) is not None:
            messages.append({"role": "user", "content": words})
            try:
                answer = show(rag.stream(messages, k=k, max_new_tokens=max_new_tokens), quiet=as_json)
            except PromptTooLong as error:
                messages.pop()
                forgotten, messages = messages[:2], messages[2:]
                what = (
                    "the first question and its answer are forgotten; ask again" if forgotten else "ask a shorter one"
                )
                notes.print(f"{error}. For this: {what}", style="yellow", markup=False, soft_wrap=True)
                continue
            messages.append({"role": "assistant", "content": answer.text})
            if as_json:
                print(json.dumps(answer.to_json()), flush=True)
            else:
                say_sources(answer)


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
    except (OSError, sqlite3.Error) as error:  # the machine's: a full disk, a file that somebody took away
        notes.print(f"error: {_told(error)}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


def _told(error: OSError | sqlite3.Error) -> str:
    """What the system says went wrong, and with which file, in one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return " ".join(": ".join([*names, str(reason)]).split())


if __name__ == "__main__":
    main()
