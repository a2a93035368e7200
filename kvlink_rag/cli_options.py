"""What the commands share: their options, and loading with a note on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvlink_rag import collector
from kvlink_rag.config import GIB, PUBLIC
from kvlink_rag.console import notes
from kvlink_rag.errors import BadInput

if TYPE_CHECKING:
    from kvlink_rag.links import Checkpoint, LinkTokens
    from kvlink_rag.model import LanguageModel
    from kvlink_rag.rag import KVLinkRAG

Store = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a causal LM; default: SmolLM2-135M-Instruct.")]
Embedder = Annotated[str, typer.Option("--embedder", help="Folder or hub id of a sentence-transformers model.")]
Links = Annotated[
    str | None, typer.Option("--links", help="Folder or hub id of a link checkpoint for this model; untrained: none.")
]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Folder of a PEFT adapter.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Linking = Annotated[
    str, typer.Option("--linking", help="auto, link_tokens, full, plain, recompute_first, ...: docs/linkings.md.")
]
MaxGib = Annotated[
    float | None,
    typer.Option(
        "--max-gib",
        help="Budget of the store in GiB; old KV makes room for new. Default: what it was last given, at first 20.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="How KV is stored: model, int8 or int4; int4/32: groups. Default: as documents were "
        "last added, at first model.",
    ),
]
Namespace = Annotated[str, typer.Option("--namespace", help="Whose documents; nobody else finds them.")]
INTEGRITY_KEY = "KVLINK_INTEGRITY_KEY"  # environment variable: 64 hex digits that seal the store's entries
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.", min=1)]
K = Annotated[int, typer.Option("-k", help="Chunks to retrieve.", min=1)]

DEFAULT_MODEL_NAME = "smollm2-135m-instruct"
DEFAULT_EMBEDDER_NAME = "all-minilm-l6-v2"


def options_given(context: typer.Context, *names: str) -> list[str]:
    """Those of a command's options that stand on its command line, as they are written there."""
    sources = {name: context.get_parameter_source(name) for name in names}
    found = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in found]


def loaded_model(
    model: str, dtype: str, device: str, *, links: str | None = None, adapter: Path | None = None
) -> tuple[LanguageModel, Checkpoint | None]:
    """A model with the checkpoint that `links` names, loaded with a note on stderr."""
    with notes.status("loading the model"), collector.paused(for_good=True):
        from kvlink_rag.links import Checkpoint
        from kvlink_rag.model import LanguageModel

        quiet_libraries()
        checkpoint = Checkpoint.find(model, links, adapter)
        adapter = adapter or (checkpoint.adapter if checkpoint else None)
        reader = checkpoint.reader if checkpoint else None
        return LanguageModel.load(model, adapter=adapter, reader=reader, dtype=dtype, device=device), checkpoint


def linked_model(
    model: str, dtype: str, device: str, links: str | None, adapter: Path | None = None
) -> tuple[LanguageModel, LinkTokens]:
    """A model, and the links of its checkpoint, or untrained ones."""
    language_model, checkpoint = loaded_model(model, dtype, device, links=links, adapter=adapter)
    from kvlink_rag.links import LinkTokens

    return language_model, checkpoint.links(language_model) if checkpoint else LinkTokens.untrained(language_model)


@contextmanager
def loaded(
    store: Path, model: str, embedder: str, *, must_exist: bool = False, max_gib: float | None = None, **options: Any
) -> Iterator[KVLinkRAG]:
    """The store with its models, loaded with a note on stderr."""
    if must_exist:
        must_be_store(store)
        must_be_namespace(store, options.get("namespace", PUBLIC))
    max_bytes = None if max_gib is None else size_bytes("--max-gib", max_gib)
    from kvlink_rag.store.folder import open_folder

    open_folder(store, integrity_key())
    with notes.status("loading the models"), collector.paused(for_good=True):
        from kvlink_rag.config import StoreSettings
        from kvlink_rag.rag import KVLinkRAG

        quiet_libraries()
        limits = StoreSettings(max_bytes=max_bytes, integrity_key=integrity_key())
        rag = KVLinkRAG.load(model, store, embedder=embedder, limits=limits, **options)
        rag.warm_up()
    if must_exist and not rag.index.counts()[1]:
        notes.print(f"{store} holds no documents; add some with: kvlink add PATH --store {store}", style="yellow")
    with rag:
        yield rag


def integrity_key() -> bytes | None:
    """The key that the environment gives, or None."""
    text = os.environ.get(INTEGRITY_KEY, "")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if text and len(key) != 32:
        raise BadInput(f"{INTEGRITY_KEY} must hold 64 hex digits (try: openssl rand -hex 32)")
    return key or None


def numbers(option: str, text: str) -> list[int]:
    """The numbers of an option like 1000,2000. Raises BadInput."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadInput(f"{option} takes numbers like 1000,2000; got {text!r}")
    return [int(part) for part in parts]


def size_bytes(option: str, gib: float) -> int:
    """The bytes of an option in GiB. Raises BadInput."""
    if not 1 <= gib * GIB < 2**63:  # nan and infinity neither
        raise BadInput(f"{option} takes a number of GiB above 0 and below 2^33; got {gib:g}")
    return int(gib * GIB)


def must_be_store(store: Path) -> None:
    if os.path.exists(store / "store.json"):
        return
    from kvlink_rag.store.folder import lost_manifest

    raise BadInput(lost_manifest(store) or f"no store in {store}; make one with: kvlink add PATH --store {store}")


def must_be_namespace(store: Path, namespace: str) -> None:
    from kvlink_rag.store.namespaces import namespace_id

    identifier = namespace_id(store, namespace)
    if identifier and not (store / "namespaces" / identifier).is_dir():
        raise BadInput(f"there is no namespace {namespace!r} in {store}; see: kvlink store stats --store {store}")


def quiet_libraries() -> None:
    """Keep libraries' bars and notices out of a command's output."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # a PDF that cannot be read is named with its reason by us
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
