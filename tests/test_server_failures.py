"""What breaks inside, or comes to an end, is said in words that quote nobody."""

from __future__ import annotations

import hmac
import json
import logging
import threading

import pytest
from serving import ingest, live, wait_until

from kvlink_rag.compute import compute
from kvlink_rag.server import keys as server_keys
from kvlink_rag.server.failures import TookTooLong
from kvlink_rag.server.keys import Keys
from kvlink_rag.server.settings import ServerSettings

CANARY = "canary-5b1e"


@pytest.fixture
def server(open_rag):
    rag = open_rag()
    rag.add("The ferry leaves at nine.")
    with live(rag) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def rag_of(server):
    return server.services.stores["public"]


def broken(*_, **__):
    raise RuntimeError(f"cannot read {CANARY}")


def test_an_unexpected_failure_is_a_500_that_quotes_nobody(server, client, monkeypatch, caplog):
    """Neither its response nor any log line holds the exception's text, which may be a client's."""
    caplog.set_level(logging.INFO)
    for owner, name, ask in (
        (rag_of(server).index, "chunks_of", lambda: client.get(f"/v1/documents/{CANARY}")),
        (rag_of(server), "search", lambda: client.post("/v1/search", json={"query": CANARY})),
        (rag_of(server), "begin", lambda: client.post("/v1/chat/completions", json=server.chat(CANARY))),
        (rag_of(server), "begin", lambda: client.post("/v1/chat/completions", json=server.chat(CANARY, stream=True))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            response = ask()
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        assert CANARY not in response.text
    not_ours = ("httpx", "uvicorn.access")  # the client's own, and one that is switched off but for pytest
    said = [record.getMessage() for record in caplog.records if record.name not in not_ours]
    assert "\n".join(said).count("RuntimeError at ") == 4 and CANARY not in "\n".join(said)
    assert client.post("/v1/chat/completions", json=server.chat()).status_code == 200  # and the server goes on


def test_what_breaks_in_the_middle_of_a_stream_is_its_last_event(server, client, monkeypatch, caplog):
    request = server.chat(CANARY, stream=True, max_tokens=200, k=1)
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        (answer,) = wait_until(lambda: list(server.services.scheduler._batch._underway))
        monkeypatch.setattr(answer._sampler, "choose", broken)
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert json.loads(events[-1])["error"]["type"] == "server_error"
    assert CANARY not in events[-1] and CANARY not in caplog.text and "RuntimeError at " in caplog.text
    wait_until(lambda: server.services.scheduler.num_places == 0)
    assert client.post("/v1/chat/completions", json=server.chat()).status_code == 200


IMAGE = {"type": "image_url", "image_url": {"url": CANARY}}
TEXT = {"type": "text", "text": "What is this?"}


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        (
            {"messages": [{"role": "user", "content": [TEXT, IMAGE]}]},
            "messages[0].content[1].type",
            "images are not read",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a string or an array, got a number"),
        ({"tools": [{"type": "function"}]}, "tools", "tool calling is not offered by this server; leave it out"),
        ({"n": 2}, "n", "leave it out, or ask several times"),
        ({"documents": [3]}, "documents[0]", "must be a string or an object, got a number"),
        ({"documents": ["x", {"url": CANARY}]}, "documents[1].url", "is no field of this request; leave it out"),
        ({"documents": [{"data": {"text": None}}]}, "documents[0].data.text", "must be a string, got null"),
        ({"stop": ["a"] * 5}, "stop", "must have at most 4 items, not 5"),
        ({"k": 1.5}, "k", "must be an integer, got a number with a fraction"),
    ],
)
def test_a_field_that_is_refused_is_named_as_openai_names_it(server, client, change, param, says):
    """With the form that came closest, where a field may have several; no pydantic in it."""
    response = client.post("/v1/chat/completions", json={**server.chat(), **change})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert says in error["message"] and CANARY not in response.text


def test_a_body_that_is_no_json_is_said_to_be_none(client):
    """At the character where it ends to be JSON, which is no name of a field."""
    for path in ("/v1/chat/completions", "/v1/documents", "/v1/search"):
        response = client.post(path, content="{bad", headers={"content-type": "application/json"})
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] is None
        assert "the body is not valid JSON" in error["message"] and " 2)" in error["message"]


def test_a_body_without_its_content_type_is_told_the_header(client):
    for path in ("/v1/chat/completions", "/v1/documents", "/v1/search"):
        for headers in ({}, {"content-type": "text/plain"}):
            response = client.post(path, content='{"query": "ferry"}', headers=headers)
            assert response.status_code == 415, path
            assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_metadata_of_a_wrong_kind_and_a_wrong_page_are_named_too(client):
    upload = client.post("/v1/documents", json={"documents": [{"text": "a", "metadata": {"year": [2026]}}]})
    assert upload.json()["error"]["param"] == "documents[0].metadata.year"
    assert client.get("/v1/documents", params={"limit": 0}).json()["error"]["param"] == "limit"


def test_an_upload_that_breaks_says_so_and_the_next_one_is_read(server, client, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(rag_of(server), "add", broken)
        job = ingest(client, json={"documents": [{"text": CANARY}]})
    assert job["status"] == "failed" and CANARY not in job["error"] and CANARY not in caplog.text
    assert ingest(client, json={"documents": [{"text": "The mole is long."}]})["status"] == "done"


def test_an_upload_names_what_it_added_also_texts_without_a_name(client):
    upload = {"documents": [{"text": "The mole is long."}, {"text": "The weir is short.", "id": "w"}]}
    job = ingest(client, json=upload)
    assert len(job["documents"]) == 2 and job["documents"][1] == "w"
    for document_id in job["documents"]:
        assert client.delete(f"/v1/documents/{document_id}").status_code == 200


def test_an_upload_counts_every_file_that_it_skipped(client):
    """What was no document, and what was one and could not be added."""
    files = {"k.bin": b"\xff\0", "a.md": b"The mole is long.", "b.txt": b"The weir is short.", "c.md": b"\n"}
    job = ingest(client, files=[("files", item) for item in files.items()])
    assert job["documents"] == ["a.md", "b.txt"] and job["report"]["documents"] == 2
    assert len(job["skipped"]) == job["report"]["skipped_files"] == 2


def test_of_two_files_of_one_name_the_one_that_gave_way_is_named(client):
    files = [("files", (f"{folder}/README.md", f"The {folder} has a readme.".encode())) for folder in ("mill", "weir")]
    job = ingest(client, files=files)
    assert job["status"] == "done" and job["documents"] == ["README.md"]
    assert len(job["skipped"]) == 1 and "README.md: another document" in job["skipped"][0]
    assert client.get("/v1/documents/README.md").json()["texts"] == ["README\nThe weir has a readme."]


@pytest.fixture
def hurried(open_rag):
    """A server whose answers have a fifth of a second, over a store without a document."""
    with live(open_rag(), settings=ServerSettings(request_timeout_s=0.2)) as server:
        yield server


def test_the_time_limit_holds_for_a_question_that_waits_while_the_model_is_busy(hurried):
    """The refusal comes while the model is at other work, and the question is not read when that ends."""
    may_end, has_ended = threading.Event(), threading.Event()
    compute.submit(lambda job: (may_end.wait(20), has_ended.set()))
    with hurried.client() as client:
        for stream in (False, True):
            request = hurried.chat(documents=["The boiler holds forty litres."], stream=stream)
            response = client.post("/v1/chat/completions", json=request)
            assert response.status_code == 503 and "time limit" in response.text and "Retry-After" in response.headers
    assert hurried.services.scheduler.num_places == 0
    assert not has_ended.is_set()
    may_end.set()
    compute.run(lambda job: None)
    assert rag_of(hurried).stats()["entries"] == 0


async def test_a_question_whose_time_is_over_at_its_turn_is_not_read(open_rag):
    rag = open_rag()
    with live(rag, settings=ServerSettings(request_timeout_s=1e-9)) as server:
        options = {"documents": ["The boiler holds forty litres."], "max_new_tokens": 2}
        ticket = server.services.scheduler.submit(rag, [{"role": "user", "content": "How much?"}], options)
        compute.run(lambda job: None)  # its turn is over
        with pytest.raises(TookTooLong):
            async for _ in server.services.scheduler.follow(ticket):
                pass
        assert rag.stats()["entries"] == 0


def test_a_server_about_to_end_takes_nothing_new(server, client):
    server.services.is_draining = True
    for path, body in (
        ("/v1/chat/completions", server.chat()),
        ("/v1/search", {"query": "ferry"}),
        ("/v1/documents", {"documents": [{"text": "late"}]}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 503 and "Retry-After" in response.headers, path
    assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200


def test_an_upload_stops_at_its_next_chunk_when_the_server_ends_and_what_it_stored_stays(open_rag):
    rag, is_there, may_go_on = open_rag(), threading.Event(), threading.Event()
    documents = [{"text": f"Tower {number} stands on a hill.", "id": f"tower-{number}"} for number in range(100)]
    with live(rag) as server:
        put = rag.kvs.put

        def waiting(kv):
            size = put(kv)
            is_there.set()
            may_go_on.wait()
            return size

        rag.kvs.put = waiting
        with server.client() as client:
            job = client.post("/v1/documents", json={"documents": documents}).json()
            is_there.wait()
            closing = threading.Thread(target=server.services.ingestions.close)
            closing.start()
            wait_until(server.services.ingestions._is_closing.is_set)
            may_go_on.set()
            closing.join()
            ended = client.get(f"/v1/jobs/{job['id']}").json()
    assert ended["status"] == "failed" and "send it again" in ended["error"]
    again = open_rag()
    assert 0 < again.stats()["entries"] < 100
    assert again.add(*[item["text"] for item in documents]).reused_chunks > 0


@pytest.mark.parametrize("given", ["a-key-of-team-one", "a-key-of-team-two", "a-key-of-nobody-x", "a", ""])
def test_every_key_is_compared_in_constant_time_whichever_fits(given, monkeypatch):
    """As many comparisons for the first key, the last and none; of digests of one length, by the library's function."""
    compared = []

    def watched(one, other):
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(server_keys, "hmac", type("Watched", (), {"compare_digest": staticmethod(watched)}))
    keys = Keys({"a-key-of-team-one": "one", "a-key-of-team-two": "two", "a-key-of-team-three": "three"})
    namespace = keys.namespace(f"Bearer {given}")
    assert namespace == {"a-key-of-team-one": "one", "a-key-of-team-two": "two"}.get(given)
    assert compared == [(32, 32)] * 3
