"""Request bodies, bounded in bytes and time before anything looks at them."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvlink_rag.server.failures import error_body
from kvlink_rag.server.settings import ServerSettings


class BoundedBody:
    """ASGI middleware: reads the whole body first, or refuses it."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        limit = self._settings.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                more = not declared.isdigit() or int(declared) <= limit
                while more and len(body) <= limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            await self._refuse(408, "the body did not arrive in time", scope, receive, send)
            return
        if len(body) > limit or (declared.isdigit() and int(declared) > limit):
            await self._refuse(413, f"the body is larger than {limit:,} bytes", scope, receive, send)
            return
        left: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return left.pop() if left else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(error_body(status, message), status, {"Connection": "close"})(scope, receive, send)
