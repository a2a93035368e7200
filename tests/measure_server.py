"""`kvlink serve` on the clock, with the default model: `python tests/measure_server.py [REPEATS]` (`make load`).

Shown: tokens a second of one stream, of two and of eight at once, interleaved; and how long after a client has left a
full server its place is free, as /metrics says it, both while its answer streams and before its first token.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from serving import wait_until_ready

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
MAX_TOKENS = 64  # of an answer on the clock
PLACES = 4 + 4  # under way and waiting
STREAMS = (1, 2, 8)
LEAVERS = 10
MODEL = "smollm2-135m-instruct"
PORT = 8766


def body(number: int, **more) -> dict:
    """A question to the store. At this temperature few answers end before their limit; the seed makes it repeatable."""
    messages = [{"role": "user", "content": f"What happened on Marrow in the year {1900 + number}?"}]
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 2, "seed": number}
    return {"model": MODEL, "messages": messages, "max_tokens": MAX_TOKENS, **options, **more}


async def tokens_of(client: httpx.AsyncClient, number: int) -> int:
    """Tokens of one whole streamed answer."""
    async with client.stream("POST", "/v1/chat/completions", json=body(number)) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return int(re.search(r'"completion_tokens":(\d+)', lines[-2])[1])


async def long_answers(client: httpx.AsyncClient, count: int) -> list[int]:
    """Numbers of questions whose answers do not end before their limit."""
    found: list[int] = []
    for number in range(10 * count):
        if await tokens_of(client, number) == MAX_TOKENS:
            found.append(number)
        if len(found) == count:
            return found
    raise RuntimeError(f"of {10 * count} answers fewer than {count} have {MAX_TOKENS} tokens")


async def throughput(client: httpx.AsyncClient, numbers: list[int]) -> float:
    started = time.perf_counter()
    tokens = await asyncio.gather(*(tokens_of(client, number) for number in numbers))
    return sum(tokens) / (time.perf_counter() - started)


async def places(client: httpx.AsyncClient, count: int) -> float:
    """The moment at which the server says that so many places are taken."""
    while f"kvlink_answers {count}.0" not in (await client.get("/metrics")).text:
        pass
    return time.perf_counter()


async def leave(client: httpx.AsyncClient, *, is_streaming: bool) -> float:
    """Fill the server, let one client leave, and the seconds until its place is free."""
    begun = [asyncio.Event() for _ in range(PLACES)]

    async def hold(number: int) -> None:
        request = body(number, max_tokens=1000)
        async with client.stream("POST", "/v1/chat/completions", json=request) as response:
            async for line in response.aiter_lines():
                if '"delta":{"content"' in line:
                    begun[number].set()

    tasks = [asyncio.create_task(hold(number)) for number in range(PLACES - 1)]
    await begun[0].wait()
    tasks.append(asyncio.create_task(hold(PLACES - 1)))
    await places(client, PLACES)
    leaver = 0 if is_streaming else PLACES - 1
    assert begun[leaver].is_set() == is_streaming
    started = time.perf_counter()
    tasks[leaver].cancel()
    seconds = await places(client, PLACES - 1) - started
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await places(client, 0)
    return seconds


async def measure(url: str, repeats: int) -> bool:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        numbers = await long_answers(client, max(STREAMS))
        await throughput(client, numbers)  # warm up
        rates: dict[int, list[float]] = {num_streams: [] for num_streams in STREAMS}
        for _ in range(repeats):
            for num_streams, found in rates.items():
                found.append(await throughput(client, numbers[:num_streams]))
        for num_streams, found in rates.items():
            print(f"streams: {num_streams}, tokens/s together: {statistics.median(found):.1f} ", end="")
            print(f"({min(found):.1f} to {max(found):.1f})")
        worst = 0.0
        for is_streaming, when in ((True, "while its answer streamed"), (False, "before its first token")):
            times = [await leave(client, is_streaming=is_streaming) for _ in range(LEAVERS)]
            worst = max(worst, *times)
            print(f"a client left {when}: its place was free after {statistics.median(times):.3f} s, ", end="")
            print(f"{max(times):.3f} s at worst of {LEAVERS}")
    return worst < 1


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        kvlink = [sys.executable, "-m", "kvlink_rag.cli"]
        some = [str(path) for path in sorted(CORPUS.glob("*.md"))[:4]]
        subprocess.run([*kvlink, "add", *some, "--store", folder], check=True, stdout=subprocess.DEVNULL)
        command = [*kvlink, "serve", "--store", folder, "--port", str(PORT), "--max-waiting", str(PLACES - 4)]
        command += ["--request-timeout", "3600"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                url = f"http://127.0.0.1:{PORT}"
                wait_until_ready(server, url)
                is_good = asyncio.run(measure(url, repeats))
            finally:
                server.terminate()
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
