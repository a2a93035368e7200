"""A bounded load on a server of our own, on this machine only: `python tests/load_server.py [SECONDS]` (`make load`).

Three times as many clients as the server has places ask without pause. Shown: every status, the server's memory, and
the time of a single question before and after. Streams, and clients that leave, are measured by `measure_server.py`.
"""

from __future__ import annotations

import asyncio
import collections
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from serving import wait_until_ready

PLACES = 4 + 16  # under way and waiting, as `kvlink serve` has them
PORT = 8765
HERE = Path(__file__).parent


def rss_mib(pid: int) -> float:
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return next(int(words[1]) / 1024 for words in fields if words[0] == "VmRSS:")


def body(number: int) -> dict:
    documents = [f"Cage {number % 50} holds a canary.", f"Cage {number % 7} holds a gull."]
    messages = [{"role": "user", "content": f"What does cage {number % 50} hold?"}]
    return {"model": "tiny-llama", "messages": messages, "documents": documents, "max_tokens": 8}


async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, float]:
    started = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body(number))
    return response.status_code, time.perf_counter() - started


async def load(client: httpx.AsyncClient, seconds: float, pid: int) -> tuple[collections.Counter, list[float]]:
    statuses: collections.Counter = collections.Counter()
    memory: list[float] = []
    until = time.monotonic() + seconds

    async def one(number: int) -> None:
        while time.monotonic() < until:
            number += 1
            status, _ = await ask(client, number)
            statuses[status] += 1
            if status == 429:
                await asyncio.sleep(0.1)  # far sooner than Retry-After asks for: the load shall stay

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(rss_mib(pid))
            await asyncio.sleep(0.5)

    await asyncio.gather(watch(), *(one(1000 * number) for number in range(3 * PLACES)))
    return statuses, memory


async def measure(seconds: float, pid: int) -> bool:
    url, limits = f"http://127.0.0.1:{PORT}", httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await load(client, min(20.0, seconds / 4), pid)  # warm up: everything has been used once
        before = statistics.median([(await ask(client, number))[1] for number in range(20)])
        statuses, memory = await load(client, seconds, pid)
        started = time.perf_counter()
        while (await ask(client, 1))[1] > 2 * before and time.perf_counter() - started < 30:
            pass
        recovered = time.perf_counter() - started
        quarter = len(memory) // 4
        growth = statistics.mean(memory[-quarter:]) / statistics.mean(memory[:quarter]) - 1
    print(f"{seconds:.0f} s with {3 * PLACES} clients for {PLACES} places: {dict(statuses)}")
    print(f"memory {memory[0]:.0f} MiB at first, {memory[-1]:.0f} at last, {max(memory):.0f} at most: {growth:+.1%}")
    print(f"a question took {before:.3f} s before; back below twice that {recovered:.1f} s after the load")
    return set(statuses) <= {200, 429, 503} and abs(growth) <= 0.05 and recovered <= 10


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "serving.py"), f"{folder}/store", str(PORT)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                wait_until_ready(server, f"http://127.0.0.1:{PORT}")
                is_good = asyncio.run(measure(seconds, server.pid))
            finally:
                server.terminate()
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
