"""/v1/models, /healthz, /readyz, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from kvlink_rag.server.services import rag_of, services_of

router = APIRouter()


def _model(request: Request) -> dict[str, Any]:
    rag = rag_of(request)
    return {
        "id": rag.model.public_name,
        "object": "model",
        "created": 0,
        "owned_by": "kvlink",
        "max_model_len": rag.model.max_positions,
    }


@router.get("/v1/models")
def models(request: Request) -> dict[str, Any]:
    """The one model of this server."""
    return {"object": "list", "data": [_model(request)]}


@router.get("/v1/models/{name:path}")
def model(request: Request, name: str) -> dict[str, Any]:
    """The model, by its name."""
    if name != (own := _model(request))["id"]:
        raise HTTPException(404, "no model of that name; see GET /v1/models")
    return own


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(request: Request) -> dict[str, str]:
    """Whether new questions are taken."""
    services_of(request).must_be_open()
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(services_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
