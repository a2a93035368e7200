"""A real server on a real socket, over a tiny model; also `python tests/serving.py STORE PORT` for make targets."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from kvlink_rag import KVLinkRAG
from kvlink_rag.server.app import make_app
from kvlink_rag.server.run import serve


@dataclass
class Live:
    """A server that runs in a thread of this process."""

    url: str
    app: object
    model: str
    key: str = ""

    def client(self, key="", **options):
        headers = {"Authorization": f"Bearer {key or self.key}"} if key or self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    @property
    def services(self):
        return self.app.state.services

    def chat(self, question="When does the ferry leave?", **fields):
        """The body of a chat request."""
        return {"model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": 8, **fields}


def wait_until(condition, seconds=60):
    """Come back once `condition` holds; give up, loudly, after a minute."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.01)
    return value


def wait_until_ready(process, url):
    """Come back once the server that `process` is answers there."""

    def is_ready():
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/readyz").status_code == 200

    wait_until(is_ready, 600)


@contextmanager
def live(rag, **options):
    """Serve an engine on a free port."""
    app = make_app(rag, **options)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none")
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Live(f"http://127.0.0.1:{socket.getsockname()[1]}", app, rag.model.public_name)
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


def ingest(client, **body):
    """Upload and wait; the job's last form."""
    response = client.post("/v1/documents", **body)
    assert response.status_code == 202, response.text
    path = f"/v1/jobs/{response.json()['id']}"
    return wait_until(lambda: (job := client.get(path).json())["status"] in ("done", "failed") and job)


if __name__ == "__main__":
    from tiny_models import build

    from kvlink_rag import Embedder

    serve(KVLinkRAG(build("llama"), Embedder(), Path(sys.argv[1])), port=int(sys.argv[2]))
