"""The `kvlink` command: parse, call, show. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvlink_rag.config import DEFAULT_K, DEFAULT_STORE, GIB
from kvlink_rag.console import notes, progress_bar, read_line, say, say_plan, say_sources, show
from kvlink_rag.errors import BadInput, KVLinkError

if TYPE_CHECKING:
    from kvlink_rag.model import LanguageModel
    from kvlink_rag.rag import KVLinkRAG

app = typer.Typer(
    help="Read every document once; answer from its stored KV.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
store_app = typer.Typer(help="Look after a store.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")

Store = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a causal LM; default: SmolLM2-135M-Instruct.")]
Embedder = Annotated[str, typer.Option("--embedder", help="Folder or hub id of a sentence-transformers model.")]
Links = Annotated[Path | None, typer.Option("--links", help="Folder of a link checkpoint made for this model.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Folder of a PEFT adapter.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Linking = Annotated[str, typer.Option("--linking", help="link_tokens, plain or full.")]
MaxGib = Annotated[float, typer.Option("--max-gib", help="Budget of the store in GiB.")]
K = Annotated[int, typer.Option("-k", help="Chunks to retrieve.", min=1)]

DEFAULT_MODEL_NAME = "smollm2-135m-instruct"
DEFAULT_EMBEDDER_NAME = "all-minilm-l6-v2"


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
    with _loaded(store, model, embedder, adapter=adapter, dtype=dtype, device=device, max_gib=max_gib) as rag:
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
    linking: Linking = "link_tokens",
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
    with _loaded(
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
    linking: Linking = "link_tokens",
    k: K = DEFAULT_K,
    as_json: Json = False,
) -> None:
    """Ask several questions in a row; earlier turns are remembered. An empty line or Ctrl-D ends."""
    with _loaded(
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


@bench_app.command()
def ttft(
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1000,2000,4000,8000",
    repeats: Annotated[int, typer.Option(help="Interleaved runs per length.", min=1)] = 5,
    model: Model = DEFAULT_MODEL_NAME,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time to first token: stored KV against a full prefill of the same context, and against the floor."""
    from kvlink_rag.evaluation.ttft import run_ttft

    try:
        lengths = [int(part) for part in contexts.split(",")]
    except ValueError:
        raise BadInput(f"--contexts takes numbers like 1000,2000; got {contexts!r}") from None
    language_model = _loaded_model(model, dtype, device)
    with progress_bar() as progress:
        rows = run_ttft(language_model, lengths, repeats, progress)
    if as_json:
        print(json.dumps(rows))
        return
    print("context      full    linked     floor    less  x floor  KV/token      encode")
    for row in rows:
        print(
            f"{row['context_tokens']:>7} {row['full_s']:>7.3f} s {row['linked_s']:>7.3f} s {row['floor_s']:>7.3f} s "
            f"{row['reduction']:>6.1%} {row['linked_over_floor']:>8.2f} {row['kv_bytes_per_token'] / 1024:>6.1f} KiB "
            f"{row['encode_tokens_per_s']:>9,.0f}/s"
        )


@bench_app.command()
def decode(
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 4000,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.", min=1)] = 5,
    model: Model = DEFAULT_MODEL_NAME,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Decoding speed over a linked context against plain generate; peak memory of an answer."""
    from kvlink_rag.evaluation.decode import run_decode

    language_model = _loaded_model(model, dtype, device)
    with progress_bar() as progress:
        say(run_decode(language_model, context, repeats, progress), as_json)


@app.command("eval")
def evaluate(
    data: Annotated[list[Path], typer.Option("--data", help="Question files (.jsonl, .jsonl.gz); repeatable.")],
    linking: Annotated[str, typer.Option("--linking", help="Linkings to compare.")] = "full,plain,link_tokens",
    limit: Annotated[int, typer.Option(help="Examples per file.", min=1)] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 32,
    model: Model = DEFAULT_MODEL_NAME,
    links: Links = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy of each linking on questions with their own documents."""
    from kvlink_rag.evaluation.answers import run_answers
    from kvlink_rag.questions import read_examples

    files = [(path, read_examples(path, limit)) for path in data]
    with (
        tempfile.TemporaryDirectory(prefix="kvlink-eval-") as folder,
        _loaded(
            Path(folder), model, DEFAULT_EMBEDDER_NAME, links=links, adapter=adapter, dtype=dtype, device=device
        ) as rag,
    ):
        for path, examples in files:
            with progress_bar() as progress:
                rows = run_answers(rag, examples, linking.split(","), max_new_tokens, progress)
            if as_json:
                print(json.dumps({"data": path.name, "rows": rows}), flush=True)
                continue
            print(f"{path.name}: {len(examples)} examples")
            for row in rows:
                print(
                    f"  {row['linking']:<12} accuracy {row['accuracy']:>6.1%}   exact {row['exact_match']:>6.1%}   "
                    f"F1 {row['f1']:>6.1%}",
                    flush=True,
                )


def _loaded_model(model: str, dtype: str, device: str) -> LanguageModel:
    from kvlink_rag.compute import compute
    from kvlink_rag.model import LanguageModel

    _quiet_libraries()
    with notes.status("loading the model"):
        return compute.run(lambda job: LanguageModel.load(model, dtype=dtype, device=device))


def main() -> None:
    """Run the command; every expected failure is one clear line and exit code 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app()
    except KVLinkError as error:
        notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        notes.print("stopped", style="red")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)


@contextmanager
def _loaded(
    store: Path, model: str, embedder: str, *, must_exist: bool = False, max_gib: float = 20.0, **options: Any
) -> Iterator[KVLinkRAG]:
    """The store with its models, loaded with a note on stderr."""
    if must_exist:
        _must_be_store(store)
    from kvlink_rag.store.folder import open_folder

    open_folder(store)
    from kvlink_rag.config import StoreSettings
    from kvlink_rag.rag import KVLinkRAG

    _quiet_libraries()
    with notes.status("loading the models"):
        limits = StoreSettings(max_bytes=max(1, int(max_gib * GIB)))
        rag = KVLinkRAG.load(model, store, embedder=embedder, limits=limits, **options)
        rag.warm_up()
    with rag:
        yield rag


def _maintenance() -> Any:
    from kvlink_rag import maintenance

    return maintenance


@contextmanager
def _maintained(store: Path) -> Iterator[Any]:
    """Index and entries of a store, without any model."""
    _must_be_store(store)
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


def _must_be_store(store: Path) -> None:
    if not (store / "store.json").exists():
        raise BadInput(f"no store in {store}; make one with: kvlink add PATH --store {store}")


def _quiet_libraries() -> None:
    """Keep libraries' bars and notices out of a command's output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


if __name__ == "__main__":
    main()
