"""Kill writers of a store at random moments and check what they acknowledged. No torch, so a child is there at once.

    python tests/store_kill_loop.py FOLDER KILLS SEED

Prints one JSON object; exit status 1 if anything was lost, wrong, resurrected or left behind. The expected state is
kept here, outside the store: each child says what it begins and what is done.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from kvlink_rag.errors import CannotStore, CorruptEntry
from kvlink_rag.recipe import entry_key
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import Identity, pack, verify

NUM_KEYS = 24
PAYLOAD_BYTES = 20_000
ROOMY, TIGHT = 2**30, 8 * 21_000  # the tight store evicts all the time


def identity_of(number: int) -> Identity:
    ids = (number, number + 1)
    return Identity(entry_key("f" * 64, ids), "f" * 64, ids)


def entry_of(number: int) -> bytes:
    return pack(identity_of(number), {}, number.to_bytes(4, "little") * (PAYLOAD_BYTES // 4))


def work(folder: str, max_bytes: int, seed: int, log: int) -> None:
    """What a child does until it is killed."""
    rng = random.Random(seed)
    store = DiskStore(folder, max_bytes=max_bytes)
    while True:
        how, number = rng.choices("pdvcr", (70, 22, 3, 3, 2))[0], rng.randrange(NUM_KEYS)
        os.write(log, f"+{how} {number}\n".encode())
        if how == "p":
            store.put(identity_of(number).key, entry_of(number))
        elif how == "d":
            store.delete([identity_of(number).key])
        elif how == "v":
            store.verify()
        else:
            store.close()
            if how == "r":  # the index is lost, and rebuilt from the entries
                Path(folder, "cache.db").write_bytes(b"no database" * 100)
            store = DiskStore(folder, max_bytes=max_bytes)
        os.write(log, f"-{how} {number}\n".encode())


def killed_child(folder: str, max_bytes: int, seed: int, rng: random.Random) -> list[str]:
    """Start a child, kill it at a random moment; the lines it wrote."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            work(folder, max_bytes, seed, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    with open(read_end, "rb") as log:
        lines = [log.readline() for _ in range(rng.randrange(1, 24))]
        time.sleep(rng.uniform(0.0, 0.02))  # waits for nothing: it only moves the moment of the kill
        os.kill(pid, signal.SIGKILL)
        lines += log.readlines()
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise AssertionError(f"the child ended by itself: {lines[-3:]}")
    return [line.decode().strip() for line in lines if line.endswith(b"\n")]


def follow(lines: list[str], state: dict[int, bool | None]) -> None:
    """Bring the expected state up to date; None: the child was killed in the middle of changing it."""
    for line in lines:
        mark, how, number = line[0], line[1], int(line[3:])
        if how in "pd":
            state[number] = None if mark == "+" else how == "p"


def check(folder: Path, max_bytes: int, state: dict[int, bool | None], found: dict[str, int]) -> None:
    """Compare the store with what is expected of it, and take over what was undecided."""
    store = DiskStore(folder, max_bytes=max_bytes)
    for number in range(NUM_KEYS):
        entry, expected = store.get(identity_of(number).key), state.get(number, False)
        if entry is not None:
            try:
                _, payload = verify(entry, identity_of(number))
                found["wrong"] += bytes(payload[:4]) != number.to_bytes(4, "little")
            except CorruptEntry:
                found["wrong"] += 1
        found["lost"] += expected is True and entry is None and max_bytes == ROOMY
        found["resurrected"] += expected is False and entry is not None
        state[number] = entry is not None
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    found["orphan_bytes"] += sum(path.stat().st_size for path in files) - store.size_bytes()
    found["over_budget"] += store.size_bytes() > max_bytes
    found["dropped"] += store.counters.quarantined
    store.close()


def main(root: str, kills: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    states: dict[int, dict[int, bool | None]] = {ROOMY: {}, TIGHT: {}}
    found = dict.fromkeys(("wrong", "lost", "resurrected", "orphan_bytes", "over_budget", "dropped"), 0)
    acknowledged = 0
    for kill in range(kills):
        max_bytes = ROOMY if kill % 4 else TIGHT
        folder = Path(root, str(max_bytes))
        lines = killed_child(str(folder), max_bytes, rng.randrange(2**32), rng)
        acknowledged += sum(line.startswith(("-p", "-d")) for line in lines)
        follow(lines, states[max_bytes])
        try:
            check(folder, max_bytes, states[max_bytes], found)
        except CannotStore as error:
            raise AssertionError(f"kill {kill}: {error}") from error
    return {"kills": kills, "acknowledged": acknowledged, **found}


if __name__ == "__main__":
    result = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(result))
    sys.exit(any(value for name, value in result.items() if name not in ("kills", "acknowledged")))
