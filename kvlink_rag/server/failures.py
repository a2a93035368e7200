"""Failures as HTTP says them, in OpenAI's form. Nothing that a client sent stands in them, but names of its fields."""

from __future__ import annotations

import logging
import math
import traceback
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from kvlink_rag.errors import BadInput, KVLinkError, StoreFull
from kvlink_rag.server.refusals import refusal

log = logging.getLogger("kvlink_rag.server")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class QueueFull(KVLinkError):
    """As many answers wait as may wait."""

    def __init__(self, retry_after_s: float):
        self.retry_after_s = retry_after_s
        super().__init__("the queue is full; try again later")


class TookTooLong(KVLinkError):
    """An answer was not finished within the server's time limit, waiting included."""

    def __init__(self) -> None:
        super().__init__(
            "the answer was not finished within this server's time limit; ask for less, or try again later"
        )


class Draining(KVLinkError):
    """The server is about to end."""


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def status_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and message of what went wrong inside."""
    if isinstance(error, QueueFull):
        return 429, str(error)
    if isinstance(error, BadInput):
        return 400, str(error)
    if isinstance(error, StoreFull):
        return 507, "the store has no room for more; delete documents, or give it a larger budget"
    if isinstance(error, TookTooLong | Draining):
        return 503, str(error)
    return 500, "something went wrong in the server; its log says where"


def log_failure(error: BaseException) -> None:
    """Log what broke and where. Its text stays out: it may quote a client."""
    places = [f"{place.filename}:{place.lineno}" for place in traceback.extract_tb(error.__traceback__)]
    log.error("%s at %s", type(error).__name__, " < ".join(reversed(places[-6:])))


def failure(error: BaseException) -> JSONResponse:
    """The response to an error of ours."""
    status, message = status_of(error)
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif status == 503:
        headers["Retry-After"] = "5"
    return JSONResponse(error_body(status, message), status, headers)


def install(app: FastAPI) -> None:
    """Answer every expected failure in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if isinstance(error.body, bytes):  # FastAPI reads no other kind
            return JSONResponse(
                error_body(415, "send a JSON object with the header Content-Type: application/json"), 415
            )
        return JSONResponse(error_body(400, *refusal(error.errors(), error.body)), 400)

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # FastAPI names the methods of one route of the path
            route = str(getattr(request.scope.get("route"), "path", "")).replace(":path}", "}")
            operations = app.openapi()["paths"].get(route, {})
            headers["Allow"] = ", ".join(sorted(method.upper() for method in operations)) or headers.get("allow", "GET")
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers)

    @app.exception_handler(KVLinkError)
    async def ours(request: Request, error: KVLinkError) -> JSONResponse:
        return failure(error)
