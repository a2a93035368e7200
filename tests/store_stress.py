"""Several processes and threads at one store, some of them stopped or killed; then the history of each key is checked.

    python tests/store_stress.py FOLDER SECONDS PROCESSES THREADS SEED

Prints one JSON object; exit status 1 if anything read was wrong, stale or lost, or anything raised. No torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from kvlink_rag.errors import CannotStore, CorruptEntry
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import Identity, pack, verify

NUM_KEYS = 24
FOREVER = 2**62


def identity_of(number: int) -> Identity:
    ids = (number, number + 1)
    return Identity(entry_key("f" * 64, ids), "f" * 64, ids)


def act(store: DiskStore, how: str, number: int, version: int) -> int | None:
    """Do one thing; for a read, the version that was found, 0 for none, -1 for wrong bytes."""
    identity = identity_of(number)
    if how == "p":
        store.put(identity.key, pack(identity, {}, version.to_bytes(8, "little") * 700))
    elif how == "d":
        store.delete([identity.key])
    elif how == "v":
        store.verify()
    else:
        entry = store.get(identity.key)
        if entry is None:
            return 0
        try:
            payload = bytes(verify(entry, identity)[1])
        except CorruptEntry:
            return -1
        found = int.from_bytes(payload[:8], "little")
        return found if payload == payload[:8] * 700 else -1
    return None


def worker(store: DiskStore, seed: int, log_path: Path, until: float) -> None:
    """Random acts, each noted before and after it is done: `+ time`, then what it was and its result."""
    rng = random.Random(seed)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while time.monotonic() < until:
        how, number = rng.choices("prdv", (30, 55, 14, 1))[0], rng.randrange(NUM_KEYS)
        version = rng.randrange(1, 2**60) if how == "p" else 0
        os.write(log, f"+ {time.monotonic_ns()} {how} {number} {version}\n".encode())
        try:
            result: object = act(store, how, number, version)
        except CannotStore:
            result = "refused"
        except Exception:
            traceback.print_exc()
            result = "raised"
        os.write(log, f"- {time.monotonic_ns()} {result}\n".encode())


def member(folder: str, seed: int, threads: int, logs: Path, until: float) -> None:
    store = DiskStore(folder, max_bytes=2**30)
    crew = [
        threading.Thread(target=worker, args=(store, seed + n, logs / f"{seed}-{n}", until)) for n in range(threads)
    ]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    store.close()


def started(folder: str, seed: int, threads: int, logs: Path, until: float) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            member(folder, seed, threads, logs, until)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def run(folder: Path, seconds: float, processes: int, threads: int, seed: int) -> tuple[Path, int, int]:
    """Let them work, stopping and killing some; where their logs are, how many were killed, how many failed."""
    rng = random.Random(seed)
    logs = folder / "logs"
    logs.mkdir(parents=True)
    until = time.monotonic() + seconds
    seeds = iter(range(1000 * (seed + 1), 10**9, 1000))
    crew = {started(str(folder / "kv"), next(seeds), threads, logs, until) for _ in range(processes)}
    killed = failed = 0
    while time.monotonic() < until:
        time.sleep(rng.uniform(0.05, 0.3))
        pid = rng.choice(sorted(crew))
        if rng.random() < 0.5:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.0, 0.2))
            os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            crew.remove(pid)
            killed += 1
            crew.add(started(str(folder / "kv"), next(seeds), threads, logs, until))
    for pid in crew:
        failed += os.waitpid(pid, 0)[1] != 0
    return logs, killed, failed


def history(logs: Path) -> tuple[dict[int, list[tuple[int, int, str, int]]], dict[str, int]]:
    """Key -> (begin, end, what, version) of all that was done to it, and counts."""
    acts: dict[int, list[tuple[int, int, str, int]]] = defaultdict(list)
    counts = {"acts": 0, "refused": 0, "raised": 0, "wrong": 0}
    for path in logs.iterdir():
        lines = path.read_text().splitlines()
        for begun, ended in zip(lines[::2], [*lines[1::2], None], strict=False):
            _, begin, how, number, version = begun.split()
            end, result = (FOREVER, "None") if ended is None else (int(ended.split()[1]), ended.split()[2])
            counts["acts"] += 1
            if result in ("refused", "raised"):
                counts[result] += 1
                end = FOREVER  # it may have been done in part
            elif how == "r" and ended is not None:
                counts["wrong"] += result == "-1"
                acts[int(number)].append((int(begin), end, how, int(result)))
            if how in "pd":
                acts[int(number)].append((int(begin), end, how, int(version)))
    return acts, counts


def stale_reads(acts: list[tuple[int, int, str, int]]) -> int:
    """Reads that no order of the writes explains. A miss beside a write to the same key is always allowed.

    A read of what write w wrote is stale iff another write began after w's end and ended before the read's begin.
    """
    writes = [(-1, -1, "d", 0), *(act for act in acts if act[2] in "pd")]
    begun = Latest((begin, end) for begin, end, _, _ in writes)
    done = Latest((end, begin) for begin, end, _, _ in writes)
    deleted = Latest((begin, end) for begin, end, how, _ in writes if how == "d")
    put = {version: (begin, end) for begin, end, how, version in writes if how == "p"}
    stale = 0
    for begin, end, how, version in acts:
        if how != "r" or version == -1:
            continue
        if version == 0:
            source_ended = deleted.before(end)
            if begun.before(end) > begin:
                continue
        else:
            source_began, source_ended = put.get(version, (FOREVER, FOREVER))
            if source_began >= end:
                stale += 1  # read before it was written
                continue
        stale += done.before(begin) > source_ended
    return stale


class Latest:
    """Of pairs of times: the greatest second one among those whose first one is before a time."""

    def __init__(self, pairs: Iterable[tuple[int, int]]):
        ordered = sorted(pairs)
        self._first = [first for first, _ in ordered]
        self._greatest = list(accumulate((second for _, second in ordered), max))

    def before(self, time_ns: int) -> int:
        place = bisect_left(self._first, time_ns)
        return self._greatest[place - 1] if place else -2


def main(root: str, seconds: float, processes: int, threads: int, seed: int) -> dict[str, int | float]:
    folder = Path(root)
    logs, killed, failed = run(folder, seconds, processes, threads, seed)
    acts, counts = history(logs)
    store = DiskStore(folder / "kv", max_bytes=2**30)
    _, dropped = store.verify()
    files = [path for path in (folder / "kv").rglob("*") if path.is_file() and path.parent != folder / "kv"]
    orphans = sum(path.stat().st_size for path in files) - store.size_bytes()
    store.close()
    stale = sum(stale_reads(of_key) for of_key in acts.values())
    return {
        "seconds": seconds, "processes": processes, "threads": threads, "killed": killed, **counts,
        "failed": failed, "stale": stale, "dropped": len(dropped), "orphan_bytes": orphans,
    }  # fmt: skip


if __name__ == "__main__":
    result = main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:6]))
    print(json.dumps(result))
    sys.exit(any(result[name] for name in ("raised", "wrong", "failed", "stale", "dropped", "orphan_bytes")))
