"""Serving an application on a socket, up to its orderly end."""

from __future__ import annotations

import ipaddress
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET
from socket import socket as Socket
from typing import Any

import uvicorn

from kvlink_rag.errors import BadInput
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.server.app import make_app
from kvlink_rag.server.keys import Keys
from kvlink_rag.server.settings import ServerSettings


def check_address(host: str, keys: Keys | None) -> None:
    """Refuse to listen where others can reach it without a key. Raises BadInput."""
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if keys is None and not is_local:
        raise BadInput(
            f"{host} can be reached from other machines; give keys by --api-key-file, or listen on 127.0.0.1"
        )


def read_keys(path: Path | None) -> Keys | None:
    """The keys of a file, if one is given. Raises BadInput."""
    return None if path is None else Keys.read(path)


class Server(uvicorn.Server):
    """uvicorn, which from SIGTERM on takes no new question and finishes those under way."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.config.app.state.services.is_draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def serve(
    rag: KVLinkRAG,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Keys | None = None,
    settings: ServerSettings | None = None,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is under way and close the store.

    on_start is told the URL once it is listened on; port 0 takes a free one. Raises BadInput.
    """
    check_address(host, keys)
    settings = settings or ServerSettings()
    app = make_app(rag, keys=keys, settings=settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(settings.drain_s),
        ws="none",
    )
    socket = _listening(host, port, config.backlog)
    name = f"[{host}]" if ":" in host else host
    try:
        on_start(f"http://{name}:{socket.getsockname()[1]}")
        # uvicorn raises the signal again once it has drained; that is the orderly end
        signal.signal(signal.SIGTERM, lambda *_: None)
        Server(config).run(sockets=[socket])
    except KeyboardInterrupt:
        pass
    finally:
        socket.close()


def _listening(host: str, port: int, backlog: int) -> Socket:
    """A socket that is listened on: whoever comes before the loop runs waits, and is not refused. Raises BadInput.

    uvicorn's own way would log the reason beside our line, and exit.
    """
    with ExitStack() as undone:
        try:
            socket = undone.enter_context(Socket(AF_INET6 if ":" in host else AF_INET))
            socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            socket.bind((host, port))
            socket.listen(backlog)
        except OSError as error:
            raise BadInput(
                f"{host}:{port} cannot be listened on ({error.strerror}); is another server there? Choose another "
                "--port or --host"
            ) from None
        undone.pop_all()
    return socket
