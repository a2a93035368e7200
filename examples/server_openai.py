"""The server and OpenAI's client, unchanged: starts `kvlink serve`, adds a document, streams an answer, ends it."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from openai import OpenAI

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kvlink_rag.cli", "serve", "--store", f"{folder}/store", "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                url = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
                talk(url)
            finally:
                server.terminate()  # drains: what is under way comes to its end


def talk(url: str) -> None:
    with (CORPUS / "lighthouse.md").open("rb") as file, httpx.Client(base_url=url, timeout=60) as http:
        job = http.post("/v1/documents", files={"files": file}).json()
        while job["status"] in ("queued", "running"):
            time.sleep(0.2)
            job = http.get(f"/v1/jobs/{job['id']}").json()
        print(f"{job['documents'][0]}: {job['report']['encoded_chunks']} chunks read")
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the fog horn of the lighthouse called?"}],
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        else:
            print(f"\n{chunk.usage.prompt_tokens_details.cached_tokens} of {chunk.usage.prompt_tokens} tokens reused")


if __name__ == "__main__":
    main()
