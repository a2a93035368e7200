"""`kvlink serve` as a process: it listens, drains on SIGTERM, and its output quotes nobody."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import httpx
import pytest
from serving import ingest
from tiny_models import build_hf, byte_tokenizer

from kvlink_rag import cli
from kvlink_rag.server.run import serve

KEY, CANARY = "canary-key-0123456789", "canary-text"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What one server said to requests with canaries in every place, well and badly formed, and to SIGTERM."""
    folder = tmp_path_factory.mktemp("serve")
    build_hf("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "keys").write_text(KEY)
    command = [sys.executable, "-m", "kvlink_rag.cli", "serve", "--store", str(folder / "store"), "--port", "0"]
    command += ["--model", str(folder / "model"), "--links", "untrained", "--api-key-file", str(folder / "keys")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output, url = [], None
        for line in process.stdout:
            output.append(line)
            if url := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert url, output
        reader = threading.Thread(target=lambda: output.extend(process.stdout))
        reader.start()
        try:
            with httpx.Client(base_url=url[0], timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
                result = talk(client, process)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url[0]}/readyz")
            result.code = process.wait(60)
        finally:
            process.kill()
            reader.join()
    result.output = "".join(output)
    return result


def talk(client, process):
    model = client.get("/v1/models").json()["data"][0]["id"]
    assert client.get("/readyz").status_code == 200
    chat = {"model": model, "messages": [{"role": "user", "content": f"Where is {CANARY}?"}], "max_tokens": 4}
    document = {"text": f"The {CANARY} sings.", "id": "canary-id", "title": CANARY, "metadata": {"canary": "canary"}}
    assert ingest(client, json={"documents": [document]})["status"] == "done"
    assert CANARY in client.post("/v1/chat/completions", json=chat).text  # in its source: so it was read
    assert CANARY in client.post("/v1/search", json={"query": CANARY}).text
    ingest(client, files=[("files", (f"{CANARY}.pdf", CANARY.encode())), ("files", ("b.md", CANARY.encode()))])
    wrong = [
        {**chat, "model": CANARY},
        {**chat, "linking": CANARY},
        {**chat, "messages": [{"role": CANARY, "content": CANARY}]},
        {**chat, "messages": [{"role": "user", "content": CANARY * 500}]},
        {**chat, "documents": [{"title": CANARY}]},
    ]
    errors = [client.post("/v1/chat/completions", json=body) for body in wrong]
    errors += [client.get(f"/v1/documents/{CANARY}"), client.delete(f"/v1/documents/{CANARY}")]
    errors += [client.get(f"/{CANARY}"), client.post("/v1/documents", content=CANARY)]
    errors.append(client.get("/v1/models", headers={"Authorization": f"Bearer {CANARY}"}))
    errors.append(client.get("/v1/models", headers={"Host": "canary.example", "Origin": f"http://{CANARY}"}))
    metrics = client.get("/metrics").text
    assert client.delete("/v1/documents/canary-id").status_code == 200
    with client.stream("POST", "/v1/chat/completions", json={**chat, "max_tokens": 400, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line]
    return SimpleNamespace(errors=errors, metrics=metrics, events=events)


def test_sigterm_lets_the_answer_under_way_come_to_its_end(served):
    assert served.events[-1] == "data: [DONE]"
    assert json.loads(served.events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    assert served.code == 0


def test_no_text_id_or_key_of_a_client_reaches_output_metrics_or_errors(served):
    assert [response.status_code // 100 for response in served.errors] == [4] * len(served.errors)
    assert "kvlink_answers" in served.metrics and "POST /v1/chat/completions 200" in served.output
    for text in (served.metrics, served.output, *(response.text for response in served.errors)):
        assert "canary" not in text.lower()


def test_the_address_can_be_connected_to_as_soon_as_it_is_named(rag):
    class Reached(Exception): ...

    def connect(url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            raise Reached

    with pytest.raises(Reached):
        serve(rag, port=0, on_start=connect)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--host", "0.0.0.0"], "give keys by --api-key-file"),
        (["--api-key-file", "none.txt"], "none.txt cannot be read"),
    ],
)
def test_what_would_be_unsafe_is_refused_before_any_model_loads(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvlink", "serve", "--store", str(tmp_path / "new"), *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1 and line in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "new").exists()


def test_without_the_extra_the_pip_line_is_said(tmp_path):
    """In a process that cannot find fastapi, as where it is not installed."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'fastapi' else find(name, *more); "
        "sys.argv = ['kvlink', 'serve']; import kvlink_rag.cli; kvlink_rag.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "pip install 'kvlink-rag[server]'" in result.stderr.replace("\n", " ")
