"""`kvlink serve`: an OpenAI-compatible server over a store, with a page."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Annotated

import typer

from kvlink_rag.cli_options import (
    DEFAULT_EMBEDDER_NAME,
    DEFAULT_MODEL_NAME,
    Adapter,
    Device,
    Dtype,
    Embedder,
    Linking,
    Links,
    MaxGib,
    Model,
    Precision,
    Store,
    loaded,
)
from kvlink_rag.config import DEFAULT_STORE
from kvlink_rag.console import notes
from kvlink_rag.errors import MissingExtra

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def serve(
    store: Store = Path(DEFAULT_STORE),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line, each with its namespace behind it.")
    ] = None,
    model: Model = DEFAULT_MODEL_NAME,
    embedder: Embedder = DEFAULT_EMBEDDER_NAME,
    links: Links = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    linking: Linking = "auto",
    precision: Precision = None,
    max_gib: MaxGib = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer a request may ask for.", min=1)] = 1024,
    max_waiting: Annotated[int, typer.Option(help="Answers that may wait for their turn.", min=0)] = 16,
    request_timeout: Annotated[float, typer.Option(help="Seconds for an answer, waiting included.", min=1)] = 300.0,
) -> None:
    """Serve a store: OpenAI's chat API, documents, search, metrics, and a page to try it. Ctrl-C ends it."""
    if any(importlib.util.find_spec(name) is None for name in _PACKAGES):
        raise MissingExtra("kvlink serve", "server")
    from kvlink_rag.server.run import check_address, read_keys
    from kvlink_rag.server.run import serve as serve_until_signal
    from kvlink_rag.server.settings import ServerSettings

    keys = read_keys(api_key_file)
    check_address(host, keys)
    logging.getLogger("kvlink_rag.server").setLevel(logging.INFO)
    settings = ServerSettings(
        max_new_tokens=max_new_tokens, max_waiting=max_waiting, request_timeout_s=request_timeout,
        default_new_tokens=min(ServerSettings.default_new_tokens, max_new_tokens),
    )  # fmt: skip
    with loaded(
        store,
        model,
        embedder,
        max_gib=max_gib,
        links=links,
        adapter=adapter,
        dtype=dtype,
        device=device,
        linking=linking,
        precision=precision,
    ) as rag:

        def say(url: str) -> None:
            notes.print(
                f"{rag.model.public_name} on {url} (the page), {url}/v1 (OpenAI's API); Ctrl-C ends it", soft_wrap=True
            )

        serve_until_signal(rag, host=host, port=port, keys=keys, settings=settings, on_start=say)
