"""Who may come in: keys, and for browsers, pages of this server only.

A browser sends requests that any web page asks it to send, also to a server on this very machine. So a request that
names another origin is refused, and a server without keys answers only to this machine's own names (DNS rebinding).
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvlink_rag.config import PUBLIC
from kvlink_rag.server.failures import error_body
from kvlink_rag.server.keys import Keys

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware: lets a request through with its namespace in scope["state"], or refuses it."""

    def __init__(self, app: ASGIApp, keys: Keys | None):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refuse(scope, headers)
        await (refusal or self._app)(scope, receive, send)

    def _refuse(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if self._keys is None:
            if _name(host) not in _LOCAL_NAMES:
                return JSONResponse(error_body(403, "without keys only this machine's own name is answered"), 403)
            namespace: str | None = PUBLIC
        else:
            namespace = self._keys.namespace(headers.get("authorization", ""))
        if namespace is None:
            message = "give an API key: Authorization: Bearer KEY (in a browser: any name, the key as password)"
            return JSONResponse(error_body(401, message), 401, {"WWW-Authenticate": 'Basic realm="kvlink", Bearer'})
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return JSONResponse(error_body(403, "a page of another origin may not ask"), 403)
        scope.setdefault("state", {})["namespace"] = namespace
        return None


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
