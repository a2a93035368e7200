"""The application: routes, what stands in front of them, and its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from kvlink_rag import __version__
from kvlink_rag.config import PUBLIC
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.server import chat, documents, failures, health, page
from kvlink_rag.server.body import BoundedBody
from kvlink_rag.server.guard import Guard
from kvlink_rag.server.jobs import Ingestions
from kvlink_rag.server.keys import Keys
from kvlink_rag.server.metrics import Metrics
from kvlink_rag.server.outcome import Outcome
from kvlink_rag.server.scheduler import Scheduler
from kvlink_rag.server.schemas import NewDocuments
from kvlink_rag.server.services import Services
from kvlink_rag.server.settings import ServerSettings
from kvlink_rag.server.stores import Stores

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}
_FAILURES = {
    "400": "The request cannot be used.",
    "401": "No key, or a wrong one.",
    "403": "A page of another origin, or another host name, asked.",
    "404": "There is no such thing.",
    "405": "Not with this method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "Not a kind of body that is read.",
    "429": "The queue is full; Retry-After says when to come again.",
    "503": "The time limit was reached, or the server is about to end.",
}


def make_app(rag: KVLinkRAG, *, keys: Keys | None = None, settings: ServerSettings | None = None) -> FastAPI:
    """The HTTP application over a loaded engine. Its end closes the engine's stores."""
    settings = settings or ServerSettings()
    metrics = Metrics()
    stores = Stores(rag, keys.namespaces if keys else (PUBLIC,))
    scheduler = Scheduler(rag.model, settings, metrics)
    services = Services(settings, stores, scheduler, Ingestions(settings, metrics), metrics)
    metrics.watch(lambda: [(name, own.stats()) for name, own in stores.items()])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        services.is_draining = True
        services.ingestions.close()
        stores.close()

    app = FastAPI(
        title="kvlink", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False
    )
    app.state.services = services
    failures.install(app)
    for part in (chat, documents, health, page):
        app.include_router(part.router)
    app.add_middleware(BoundedBody, settings=settings)
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(Outcome, metrics=metrics)
    app.openapi = lambda: _described(app, rag.model.public_name)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI, model: str) -> dict[str, Any]:
    """openapi.json with our failures in place of FastAPI's."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        parts = schema["components"]["schemas"]
        new = NewDocuments.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= {"Error": _ERROR, **new.pop("$defs"), "NewDocuments": new}
        parts["ChatRequest"]["properties"]["model"] = {"type": "string", "enum": [model]}
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status, text in _FAILURES.items():
                    operation["responses"].setdefault(status, {"description": text, "content": content})
    return app.openapi_schema or {}
