"""Random acts at a store beside a dictionary that says what must come of them: Hypothesis' state machine. No torch.

    python tests/store_machine.py FOLDER RUNS STEPS SEED

Two handles and forked processes, some of them killed at a chosen call, put, read, delete, check and sweep; meanwhile
files are damaged, the index is lost and the clock jumps. Prints one JSON object; a run that fails is shown.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from store_faults import DAMAGES, LOSSES, die_at
from store_kill_loop import identity_of

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.entry import pack, verify
from kvlink_rag.store.files import entry_files

NUM_KEYS = 6
KEYS = [identity_of(number).key for number in range(NUM_KEYS)]
NUMBER_OF = {key: number for number, key in enumerate(KEYS)}
ROOMY, TIGHT = 2**30, 5_000
TTL_S = 100.5  # clocks jump by whole seconds: nothing is ever exactly at its end
numbers = st.integers(0, NUM_KEYS - 1)
handles = st.integers(0, 1)
counts: Counter[str] = Counter()


def entry_of(number: int, version: int, size: int) -> bytes:
    return pack(identity_of(number), {}, version.to_bytes(4, "little") * size)


@dataclass
class Row:
    """What the store must hold under a key; `entry` is None once its file is damaged."""

    entry: bytes | None
    size: int
    ends: float


class StoreMachine(RuleBasedStateMachine):
    root: Path

    def __init__(self) -> None:
        super().__init__()
        counts["runs"] += 1
        self.folder = self.root / str(counts["runs"])
        self.now, self.version = 1.8e9 + 0.25, 0
        self.rows: dict[int, Row] = {}
        self.strays: dict[int, dict[bytes, float]] = {}  # what files a killed writer may have left, and their ends
        self.unswept = False
        self.stamped: set[str] = set()
        self.stores: list[DiskStore] = []
        self.real_time, time.time = time.time, lambda: self.now

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        time.time = self.real_time
        shutil.rmtree(self.folder, ignore_errors=True)

    @initialize(max_bytes=st.sampled_from([ROOMY, TIGHT]), ttl_s=st.sampled_from([None, TTL_S]))
    def begin(self, max_bytes: int, ttl_s: float | None) -> None:
        self.max_bytes, self.ttl_s = max_bytes, ttl_s
        self.stores = [self.opened(), self.opened()]
        for number in range(0, NUM_KEYS, 2):
            self.put(0, number, 100)

    def opened(self) -> DiskStore:
        return DiskStore(self.folder, max_bytes=self.max_bytes, ttl_s=self.ttl_s)

    # -- what is expected --------------------------------------------------------------------------

    def is_over(self, number: int) -> bool:
        return number in self.rows and self.rows[number].ends <= self.now

    def expire(self) -> None:
        self.rows = {number: row for number, row in self.rows.items() if not self.is_over(number)}

    def stored(self) -> set[int]:
        return {NUMBER_OF[key] for key in self.stores[0].keys()}

    def swept(self, *, index_lost: bool = False) -> None:
        """Rows and files agree again: what is damaged is there or not, what is sound must be.

        A killed writer's whole file is taken in where its key has no other; without an index, perhaps in its place.
        """
        strays, self.unswept, self.strays = self.strays, False, {}
        there = self.stored()
        self.rows = {n: row for n, row in self.rows.items() if row.entry is not None or n in there}
        for number, ends in strays.items():
            found, row = self.found(self.stores[0], number, quarantine=False), self.rows.get(number)
            may_differ = row is None or row.entry is None or index_lost
            if may_differ and found is not None and (row is None or found != row.entry):
                self.rows[number] = Row(found, len(found), ends[found])

    def stamp(self) -> None:
        """Files get the time of this machine's clock, as a system whose clock jumps would give it to them."""
        for path in entry_files(self.folder, with_unfinished=True):
            if path.name not in self.stamped:
                self.stamped.add(path.name)
                os.utime(path, (self.now, self.now))

    def evicted(self, candidates: Iterable[int], needed: int, exact: bool) -> None:
        """Entries may be missing only where room was needed; those go out of what is expected.

        exact: no file of a killed writer was taken in meanwhile, so that all that takes room is known.
        """
        gone = set(candidates) - self.stored()
        sound = [n for n in gone if self.rows[n].entry is not None]
        accounted = sum(row.size for row in self.rows.values())
        if exact and accounted + needed <= self.max_bytes:
            assert not sound, f"{sound} are lost though there was room"
        left = accounted - sum(self.rows[n].size for n in gone)
        if exact and gone:
            assert left + max(self.rows[n].size for n in gone) + needed > self.max_bytes, f"{gone}: more than needed"
        counts["evicted"] += len(gone)
        for number in gone:
            del self.rows[number]

    def was_put(self, number: int, entry: bytes, exact: bool) -> None:
        self.stamp()
        self.expire()
        self.evicted(set(self.rows) - {number}, len(entry), exact)
        self.rows[number] = Row(entry, len(entry), self.now + (self.ttl_s or 1e18))
        assert number in self.stored()
        assert self.stores[0].size_bytes() <= self.max_bytes

    def found(self, store: DiskStore, number: int, *, quarantine: bool = True) -> bytes | None:
        """What whoever asks gets: verified bytes or none."""
        entry = store.get(KEYS[number])
        if entry is None:
            return None
        try:
            verify(entry, identity_of(number))
        except CorruptEntry as error:
            if quarantine:
                store.quarantine(KEYS[number], str(error), entry)
            return None
        return bytes(entry)

    # -- acts --------------------------------------------------------------------------------------

    @rule(handle=handles, number=numbers, size=st.integers(0, 400))
    def put(self, handle: int, number: int, size: int) -> None:
        self.version += 1
        entry = entry_of(number, self.version, size)
        self.stores[handle].put(KEYS[number], entry)
        self.was_put(number, entry, not self.unswept)

    @rule(handle=handles)
    def get(self, handle: int) -> None:
        for number in range(NUM_KEYS):
            self.get_one(handle, number)

    def get_one(self, handle: int, number: int) -> None:
        found, row = self.found(self.stores[handle], number), self.rows.get(number)
        if row is None or row.entry is None or self.is_over(number):
            assert found is None or found in self.strays.get(number, ()), f"{number} is back"
            if row is not None and row.entry is None:
                self.settle(number)
        else:
            assert found == row.entry, f"{number} is lost or wrong"

    def settle(self, number: int) -> None:
        """A damaged entry was met: it is out of use, or another whole file of its key has taken its place."""
        found = self.found(self.stores[0], number)
        if found is not None:
            self.rows[number] = Row(found, len(found), self.rows[number].ends)
        elif number not in self.stored():
            del self.rows[number]

    @rule(handle=handles, chosen=st.sets(numbers, min_size=1, max_size=3))
    def delete(self, handle: int, chosen: set[int]) -> None:
        deleted = self.stores[handle].delete([KEYS[number] for number in sorted(chosen)])
        assert self.unswept or deleted == len(chosen & set(self.rows))
        self.were_deleted(chosen)

    def were_deleted(self, chosen: set[int]) -> None:
        for number in chosen:
            self.rows.pop(number, None)
            self.strays.pop(number, None)
            assert self.found(self.stores[0], number) is None

    @rule(handle=handles, what=st.sampled_from(["check", "sweep", "reopen", "touch"]))
    def keep_up(self, handle: int, what: str) -> None:
        getattr(self, what)(handle)

    def touch(self, handle: int) -> None:
        for number in self.rows:
            self.stores[handle].touch(KEYS[number])

    def check(self, handle: int) -> None:
        strays = self.strays
        sound, dropped = self.stores[handle].verify()
        self.expire()
        damaged = {number for number, row in self.rows.items() if row.entry is None}
        if not strays:
            assert (sound, set(dropped)) == (len(self.rows) - len(damaged), {KEYS[number] for number in damaged})
        for number in damaged:
            del self.rows[number]
        self.swept()

    def sweep(self, handle: int) -> None:
        self.stores[handle].sweep()
        self.expire()
        self.swept()

    def reopen(self, handle: int) -> None:
        self.stores[handle].close()
        self.stores[handle] = self.opened()
        self.swept()

    @rule(seconds=st.integers(-150, 150) | st.integers(-3 * 10**8, 3 * 10**8))
    def jump(self, seconds: int) -> None:
        if self.strays:  # their end is not followed any further
            self.sweep(0)
        self.now = max(self.now + seconds, 1e6 + 0.25)

    # -- what goes wrong ---------------------------------------------------------------------------

    @rule(number=numbers, how=st.sampled_from(sorted(DAMAGES)), dice=st.integers(0, 2**32))
    def damage(self, number: int, how: str, dice: int) -> None:
        """The file of a sound entry is not what it was; its times stay, as when a disk rots."""
        sound = [n for n in self.rows if self.rows[n].entry is not None and not self.is_over(n)]
        if not sound:
            return
        number = sound[number % len(sound)]
        row, path = self.rows[number], self.stores[0]._row_or_file(KEYS[number])
        assert path is not None
        other = entry_of((number + 1) % NUM_KEYS, 0, 9)
        data = DAMAGES[how](path.read_bytes(), random.Random(dice), other)
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
            os.utime(path, (row.ends - self.ttl_s if self.ttl_s else self.now,) * 2)
        row.entry = None
        counts["damaged"] += 1

    @rule(how=st.sampled_from(sorted(LOSSES)), dice=st.integers(0, 2**32))
    def lose_index(self, how: str, dice: int) -> None:
        """With no handle open the index is damaged; all sound entries come back."""
        for store in self.stores:
            store.close()
        LOSSES[how](self.folder / "cache.db", random.Random(dice))
        self.stores = [self.opened(), self.opened()]
        self.swept(index_lost=True)
        counts["index lost"] += 1

    @rule(dice=st.integers(0, 2**32))
    def leave_half_a_file(self, dice: int) -> None:
        """As a writer that lost power would: unfinished under its temporary name, or cut under its final one."""
        rng = random.Random(dice)
        number, whole = rng.randrange(NUM_KEYS), rng.random() < 0.5
        entry = entry_of(number, 0, 50)
        name = f"{KEYS[number][:2]}/{KEYS[number]}.{rng.getrandbits(64):016x}.{'kv' if whole else 'tmp'}"
        (self.folder / name).parent.mkdir(mode=0o700, exist_ok=True)
        (self.folder / name).write_bytes(entry[: rng.randrange(len(entry))])
        self.unswept = True
        self.stamp()

    @rule(
        act=st.sampled_from(["put", "put", "delete", "check", "sweep", "open"]),
        inherited=st.booleans(),
        number=numbers,
        size=st.integers(0, 400),
        tick=st.none() | st.integers(1, 60),
    )
    def another_process(self, act: str, inherited: bool, number: int, size: int, tick: int | None) -> None:
        """It works with a handle that was open before the fork, or one of its own; at the n-th call it is killed."""
        self.version += 1
        entry = entry_of(number, self.version, size)
        acts: dict[str, Callable[[DiskStore], object]] = {
            "put": lambda store: store.put(KEYS[number], entry),
            "delete": lambda store: store.delete([KEYS[number]]),
            "check": lambda store: store.verify(),
            "sweep": lambda store: store.sweep(),
            "open": lambda store: self.opened(),
        }
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if tick is not None:
                    die_at(tick)
                acts[act](self.stores[0] if inherited else self.opened())
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        self.stamp()
        if os.WIFSIGNALED(status):
            counts["killed"] += 1
            return self.undecided(act, number, entry)
        assert status == 0, f"{act} in another process failed"
        exact = not self.unswept
        if act in ("put", "delete"):
            self.strays.pop(number, None)
        if not inherited:
            self.swept()  # opening did
        if act == "put":
            self.was_put(number, entry, exact)
        elif act == "delete":
            self.were_deleted({number})
        elif act in ("check", "sweep"):
            self.expire()
            self.swept()
            if act == "check":
                self.rows = {n: row for n, row in self.rows.items() if row.entry is not None}
        return None

    def undecided(self, act: str, number: int, entry: bytes) -> None:
        """After a kill: what was being changed is as before or as it was to be; nothing else is lost or wrong."""
        self.unswept = True
        if any(map(self.is_over, self.rows)):
            self.stores[0].sweep()  # they may be gone already
            self.expire()
            self.swept()
        needed = len(entry) if act == "put" else 0
        may_evict = sum(row.size for row in self.rows.values()) + needed > self.max_bytes or bool(self.strays)
        before = self.rows.get(number)
        if act == "put":
            strays = self.strays.setdefault(number, {})
            strays[entry] = self.now + (self.ttl_s or 1e18)
            if before is not None and before.entry is not None:
                strays[before.entry] = before.ends
        for n in range(NUM_KEYS):
            found, row = self.found(self.stores[0], n, quarantine=False), self.rows.get(n)
            expected = None if row is None else row.entry
            if found == expected:
                continue
            if found is None:
                assert (act == "put" and may_evict) or (act == "delete" and n == number), f"{n} is lost"
                del self.rows[n]
            else:
                assert found in self.strays.get(n, ()), f"{n} is back, or wrong"
                self.rows[n] = Row(found, len(found), self.strays[n][found])

    @invariant()
    def accounts_are_right(self) -> None:
        counts["steps"] += 1
        if not self.stores or self.unswept or any(row.entry is None for row in self.rows.values()):
            return
        assert self.stored() == set(self.rows)
        sizes = sum(path.stat().st_size for path in entry_files(self.folder, with_unfinished=True))
        assert self.stores[1].size_bytes() == sizes == sum(row.size for row in self.rows.values())


def main(folder: str, runs: int, steps: int, number: int) -> dict[str, int]:
    logging.disable()  # what is damaged here is said each time
    StoreMachine.root = Path(folder)
    StoreMachine.root.mkdir(parents=True, exist_ok=True)
    chosen = settings(
        max_examples=runs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking takes many times as long as the runs themselves
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(StoreMachine), settings=chosen)
    return dict(counts)


if __name__ == "__main__":
    result = main(sys.argv[1], *map(int, sys.argv[2:5]))
    print(json.dumps(result))
