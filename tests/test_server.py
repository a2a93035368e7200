"""The server as its clients meet it: over a real socket, by OpenAI's own client where that is the promise."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys

import httpx
import openai
import pytest
from serving import ingest, live, wait_until

from kvlink_rag.server.documents import file_name
from kvlink_rag.server.keys import Keys
from kvlink_rag.server.settings import ServerSettings

FERRY, HORN = "The ferry leaves at nine.", "The fog horn is called Old Bertha."
KEYS = {"a-key-of-team-one": "one", "a-key-of-team-two": "two"}


@pytest.fixture(scope="module")
def engine(tiny, embedder, tmp_path_factory):
    """One engine for the whole file; each server is new."""
    from kvlink_rag import Document, KVLinkRAG

    rag = KVLinkRAG(tiny, embedder, tmp_path_factory.mktemp("server") / "store")
    rag.add([Document(FERRY, id="ferry"), Document(HORN, id="horn")])
    with rag:
        yield rag


@pytest.fixture
def serve(engine):
    """Starts servers over one store, each with its own settings; ends them with the test."""
    from contextlib import ExitStack

    from kvlink_rag import KVLinkRAG

    with ExitStack() as stack:

        def start(keys=None, **settings):
            again = KVLinkRAG(engine.model, engine.embedder, engine.folder)
            return stack.enter_context(
                live(again, keys=Keys(keys) if keys else None, settings=ServerSettings(**settings))
            )

        yield start


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def openai_client(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def events(response):
    """The data of each server-sent event."""
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


# -- OpenAI's client, unchanged ------------------------------------------------------------------------


def test_the_openai_client_chats_and_reads_usage_and_sources(server, engine):
    client = openai_client(server)
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).id == model
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "When does the ferry leave?"}], max_tokens=8
    )
    expected = engine.ask("When does the ferry leave?", max_new_tokens=8)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    tokens = expected.tokens
    assert answer.usage.completion_tokens == tokens.generated
    assert answer.usage.prompt_tokens == tokens.reused + tokens.computed
    assert 0 < answer.usage.prompt_tokens_details.cached_tokens == answer.kvlink["tokens"]["reused"]
    assert [(source["document"], source["reused"]) for source in answer.kvlink["sources"]] == [
        (source.hit.chunk.document_id, True) for source in expected.sources
    ]


def test_the_openai_client_streams_the_same_answer(server):
    client = openai_client(server)
    options = {"model": server.model, "messages": [{"role": "user", "content": "And the horn?"}], "max_tokens": 12}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == (
        whole.choices[0].message.content
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[0].kvlink["sources"][0]["text"]  # what it is made from comes first


def test_a_stream_ends_with_done_and_has_usage_only_if_asked(server, client):
    with client.stream("POST", "/v1/chat/completions", json=server.chat(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = events(response)
    assert data[-1] == "[DONE]" and all("usage" not in json.loads(item) for item in data[:-1])


@pytest.mark.parametrize(
    "document",
    ["Ships sail.", {"title": "Ships", "text": "They sail."}, {"id": "7", "data": {"text": "Ships sail."}},
     {"data": "Ships sail."}],
    ids=["text", "vllm", "cohere", "cohere-text"],
)  # fmt: skip
def test_documents_in_the_request_take_the_place_of_retrieval(server, client, document):
    kvlink = client.post("/v1/chat/completions", json=server.chat(documents=[document])).json()["kvlink"]
    assert len(kvlink["sources"]) == 1 and "sail" in kvlink["sources"][0]["text"]
    again = client.post("/v1/chat/completions", json=server.chat(documents=[document])).json()["kvlink"]
    assert again["sources"][0]["reused"] and again["timings"]["ttft_s"] > 0


def test_no_documents_at_all_and_full_prefill_can_be_asked_for(server, client):
    none = client.post("/v1/chat/completions", json=server.chat(documents=[])).json()
    assert none["kvlink"]["sources"] == []
    full = client.post("/v1/chat/completions", json=server.chat(linking="full", k=1)).json()
    assert full["kvlink"]["linking"] == "full" and full["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert [source["reused"] for source in full["kvlink"]["sources"]] == [False]


# -- documents -----------------------------------------------------------------------------------------


def test_texts_and_files_are_added_found_and_deleted(client):
    job = ingest(client, json={"documents": [{"text": "Gulls nest on the mole.", "id": "birds/gulls"}]})
    assert job["status"] == "done" and job["documents"] == ["birds/gulls"] and job["report"]["encoded_chunks"] == 1
    files = [
        ("files", ("../../etc/tide.md", b"# Tide\n\nThe tide turns at six.")),
        ("files", ("x.jpg", b"\xff")),
        ("files", ("bad.pdf", b"%PDF-1.4 nonsense")),
    ]
    job = ingest(client, files=files)
    assert job["status"] == "done" and job["documents"] == ["tide.md"] and len(job["skipped"]) == 2
    assert (job["stage"], job["done"], job["total"]) == ("encoding", 1, 1)
    assert {"birds/gulls", "tide.md"} <= {d["id"] for d in client.get("/v1/documents").json()["data"]}
    assert "six" in client.get("/v1/documents/tide.md").json()["texts"][0]
    found = client.post("/v1/search", json={"query": "When does the tide turn?", "k": 1}).json()["data"]
    assert found[0]["document"] == "tide.md"
    for name in ("tide.md", "birds/gulls"):
        assert client.delete(f"/v1/documents/{name}").json()["deleted"]
        assert client.delete(f"/v1/documents/{name}").status_code == 404
        assert client.get(f"/v1/documents/{name}").status_code == 404


def test_an_upload_without_any_document_fails_and_says_why(client):
    job = ingest(client, files=[("files", ("x.jpg", b"\xff"))])
    assert job["status"] == "failed" and "x.jpg: not one of" in job["error"]


def test_documents_come_in_pages(client):
    first = client.get("/v1/documents", params={"limit": 1}).json()
    rest = client.get("/v1/documents", params={"after": first["data"][0]["id"]}).json()
    assert first["has_more"] and [d["id"] for d in rest["data"]][-1] == "horn"


def test_the_store_says_what_it_holds_and_how_much_was_reused(server, client):
    assert client.get("/v1/store").json()["hit_rate"] is None
    client.post("/v1/chat/completions", json=server.chat(k=1))
    client.post("/v1/chat/completions", json=server.chat(documents=["Nobody has read this before."]))
    client.post("/v1/chat/completions", json=server.chat(k=1, linking="full"))  # a comparison does not count
    numbers = client.get("/v1/store").json()
    assert numbers["documents"] >= 2 and numbers["bytes"] > 0 and numbers["hit_rate"] == 0.5


def test_an_answer_is_counted_before_anyone_has_it(server, client, monkeypatch):
    """Whoever has read an answer to its end finds it in the numbers, however quickly they ask."""
    from kvlink_rag.server.scheduler import Ticket

    counted, put = [], Ticket.put

    def watched(ticket, item):
        if getattr(item, "answer", None):
            counted.append(client.get("/v1/store").json()["hit_rate"])
        put(ticket, item)

    monkeypatch.setattr(Ticket, "put", watched)
    client.post("/v1/chat/completions", json=server.chat(k=1))
    assert counted == [1.0]


def test_no_name_of_a_file_becomes_a_path():
    assert [file_name(name) for name in ("../../a.md", "C:\\b\\c.txt", "/", "..", "a\0\nb.md", "\ud800.md")] == [
        "a.md", "c.txt", "file", "..", "ab.md", "?.md",
    ]  # fmt: skip


# -- what is refused -----------------------------------------------------------------------------------

CANARY = "canary-3f9a"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "gpt-4o"}, "the model of this server"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": CANARY}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": CANARY}]}, "the last must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": CANARY}]}]}, "images are not"),
        ({"max_tokens": 10**9}, "limit is 1024"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("inf")}, "temperature"),
        ({"n": 2}, "n: "),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"documents": [{"title": CANARY}]}, "give each a text"),
        ({"documents": [{"url": "http://127.0.0.1/"}]}, "documents"),
        ({"documents": ["x"] * 65}, "documents"),
        ({"documents": ["x" * 400_001]}, "the limit is 400,000"),
        ({"k": 10**6}, "k: "),
        ({"linking": CANARY}, "linking"),
        ({"linking": "parallel@nan"}, "linking"),
        ({"messages": [{"role": "user", "content": f"{CANARY} " * 300}]}, "window is 2048"),
        ({"unknown": CANARY}, "unknown"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_quotes_nobody(server, client, change, says):
    body = json.dumps({**server.chat(), **change})  # Infinity too, which httpx would not write
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code in (400, 404) and says in error["message"] and CANARY not in response.text


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "nul", "[" * 100_000, '{"messages":"\ud800"}'.encode("utf-8", "surrogatepass")]
)
def test_a_body_that_is_no_request_is_refused(client, body):
    for path in ("/v1/chat/completions", "/v1/documents", "/v1/search"):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(serve):
    server = serve(max_body_bytes=1000)
    with server.client() as client:
        assert client.post("/v1/search", json={"query": "x" * 2000}).status_code == 413
        chunked = client.post("/v1/search", content=iter([b"x" * 600] * 3))
        assert chunked.status_code == 413
        assert client.post("/v1/search", json={"query": "x" * 200}).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(serve):
    server = serve(body_timeout_s=0.05)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as line:
        line.sendall(b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_beyond_the_time_limit_ends_in_an_error(serve):
    server = serve(request_timeout_s=0.001)
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=server.chat())
        assert response.status_code == 503 and "time limit" in response.text and "Retry-After" in response.headers
    wait_until(lambda: server.services.scheduler.num_places == 0)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(serve):
    server = serve(request_timeout_s=2)
    with (
        server.client() as client,
        client.stream("POST", "/v1/chat/completions", json=server.chat(max_tokens=1000, stream=True, k=1)) as response,
    ):
        ticket_of(server).deadline = 0
        data = events(response)
    assert "time limit" in json.loads(data[-1])["error"]["message"]


def ticket_of(server):
    """The ticket of the only answer under way."""
    batch = server.services.scheduler._batch
    (answer,) = wait_until(lambda: list(batch._underway))
    return answer._emit.__closure__[1].cell_contents


async def test_a_full_queue_says_when_to_come_again_and_clients_that_leave_make_room(serve):
    server = serve(max_waiting=1)
    scheduler = server.services.scheduler
    long = server.chat(max_tokens=1000, stream=True, k=1)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        waiting = [asyncio.create_task(client.post("/v1/chat/completions", json=long)) for _ in range(5)]
        await asyncio.to_thread(wait_until, lambda: scheduler.num_places == 5)
        refused = await client.post("/v1/chat/completions", json=server.chat())
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert (await client.post("/v1/search", json={"query": "x"})).status_code == 429
        for task in waiting:
            task.cancel()
        await asyncio.to_thread(wait_until, lambda: scheduler.num_places == 0)
        metrics = (await client.get("/metrics")).text
        assert "kvlink_answers 0.0" in metrics and 'kvlink_tokens_total{kind="generated"}' not in metrics
        assert (await client.post("/v1/chat/completions", json=server.chat())).status_code == 200


# -- who may come in -----------------------------------------------------------------------------------


def test_every_route_answers_401_without_a_key(serve):
    server = serve(keys=KEYS)
    described = server.app.openapi()["paths"]
    routes = [(method.upper(), path) for path, operations in described.items() for method in operations]
    assert len(routes) >= 13
    routes += [("GET", path) for path in ("/", "/static/app.js", "/openapi.json", "/nothing")]
    routes += [("HEAD", "/"), ("OPTIONS", "/v1/chat/completions"), ("POST", "/nothing")]
    with server.client() as client:
        for method, path in routes:
            for key in (None, "Bearer wrong", "Basic ???", "Basic d3Jvbmc6d3Jvbmc="):
                response = client.request(method, path, headers={"Authorization": key} if key else {})
                assert response.status_code == 401, (method, path)
                assert "Basic" in response.headers["WWW-Authenticate"]


def test_a_key_opens_its_own_namespace_and_no_other(serve):
    server = serve(keys=KEYS)
    secret = "The code of team one is 4711."
    with server.client("a-key-of-team-one") as one, server.client("a-key-of-team-two") as two:
        assert ingest(one, json={"documents": [{"text": secret, "id": "code"}]})["report"]["encoded_chunks"] == 1
        assert one.get("/v1/documents/code").status_code == 200
        assert one.post("/v1/chat/completions", json=server.chat()).json()["kvlink"]["sources"][0]["reused"]
        assert two.get("/v1/documents/code").status_code == 404
        assert two.delete("/v1/documents/code").status_code == 404
        assert two.get("/v1/documents").json()["data"] == two.get("/v1/jobs").json()["data"] == []
        assert two.post("/v1/search", json={"query": "code"}).json()["data"] == []
        given = two.post("/v1/chat/completions", json=server.chat(documents=[secret])).json()["kvlink"]["sources"]
        assert given[0]["reused"] is False  # not even by its text is the other's KV found
        assert one.post("/v1/chat/completions", json=server.chat(documents=[secret])).json()["kvlink"]["sources"][0][
            "reused"
        ]
        with httpx.Client(auth=("anyone", "a-key-of-team-one"), base_url=server.url) as browser:
            assert browser.get("/v1/documents/code").status_code == 200
            assert browser.delete("/v1/documents/code").status_code == 200


def test_pages_of_other_origins_and_other_names_are_refused(server, client):
    body = {"documents": [{"text": "planted"}]}
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        assert client.post("/v1/documents", json=body, headers=headers).status_code == 403
    own = {"Origin": server.url}
    assert client.post("/v1/search", json={"query": "x"}, headers=own).status_code == 200


# -- many at once --------------------------------------------------------------------------------------


async def test_a_hundred_streams_at_once_each_get_their_own_answer(serve, engine):
    """Each request brings a document of its own; sources and answer are those of that document alone."""
    server = serve(max_waiting=100)
    texts = [f"Canary {number * 7919} sings in cage {number}." for number in range(100)]

    async def one(client, number):
        body = server.chat(f"Which canary is {number}?", documents=[texts[number]], stream=True, max_tokens=4)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            return [line.removeprefix("data: ") async for line in response.aiter_lines() if line]

    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        streams = await asyncio.gather(*(one(client, number) for number in range(100)))
    for number, data in enumerate(streams):
        assert data[-1] == "[DONE]"
        text = "".join(json.loads(item)["choices"][0]["delta"].get("content", "") for item in data[:-1])
        assert set(re.findall(r"Canary (\d+)", "".join(data))) == {str(number * 7919)}
        if number % 20 == 0:
            expected = engine.ask(f"Which canary is {number}?", documents=[texts[number]], max_new_tokens=4)
            assert text.strip() == expected.text


def test_no_request_makes_the_server_open_an_address(server, client):
    """Whatever URLs a request holds, the process connects to nothing but the server itself."""
    port, seen, is_on = int(server.url.rpartition(":")[2]), [], True

    def watch(name, arguments):
        if is_on and name in ("socket.connect", "urllib.Request", "http.client.connect", "socket.getaddrinfo"):
            seen.append((name, arguments))

    sys.addaudithook(watch)
    url = "http://127.0.0.1:9/x.md"
    client.post("/v1/chat/completions", json=server.chat(url, documents=[url, {"text": url, "title": url}]))
    client.post("/v1/chat/completions", json=server.chat(documents=[{"url": url}]))
    ingest(client, json={"documents": [{"text": f"See {url} and file:///etc/passwd", "id": url}]})
    html = f'<html><body><img src="{url}"><a href="{url}">x</a><link rel=stylesheet href="{url}"></body></html>'
    ingest(client, files=[("files", ("a.html", html.encode()))])
    client.post("/v1/search", json={"query": url})
    is_on = False
    for name in (url, "a.html"):
        client.delete(f"/v1/documents/{name}")
    ours = [str(port) in str(arguments) for _, arguments in seen]
    assert ours and all(ours), seen
