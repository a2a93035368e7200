"""Several chunks at once, each on a core of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from concurrent.futures import Future, wait
from contextlib import closing

import pytest
import torch
from tiny_models import VOCAB_SIZE, build

from kvlink_rag.compute import compute
from kvlink_rag.cores import _mkl_threads, on_cores
from kvlink_rag.encoding import ONE_CORE_TOKENS, Encoder


def random_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))


@pytest.fixture
def cores():
    """Sets how many cores torch may use; as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_order_each_computed_on_one_core(number, cores):
    cores(number)
    got = list(on_cores(lambda item: (item, torch.get_num_threads(), _mkl_threads() or 1), range(7)))
    assert got == [(item, 1, 1) for item in range(7)]
    assert torch.get_num_threads() == (_mkl_threads() or number) == number
    assert threads_of_a_new_thread() == number


@pytest.mark.parametrize("number", [2, 5])
def test_no_more_than_two_are_begun_ahead_of_the_cores(number, cores):
    cores(number)
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    for item in on_cores(work, range(12)):
        assert len(begun) <= item + 1 + number + 2


def test_the_caller_has_all_cores_while_it_has_other_work_to_do(cores):
    """And one else; all results come, in order."""
    cores(2)
    answers = iter([False, True, True, False, True, False, False, True])
    asked: list[bool] = []

    def is_wanted() -> bool:
        asked.append(next(answers))
        return asked[-1]

    for number, item in enumerate(on_cores(lambda item: (item, torch.get_num_threads()), range(8), is_wanted)):
        assert item == (number, 1)
        assert torch.get_num_threads() == (2 if asked[-1] else 1)


def test_what_computes_ends_and_what_has_not_begun_is_put_off_while_the_caller_has_other_work(cores, monkeypatch):
    cores(2)
    begun: list[int] = []
    ended: list[int] = []
    waited_for = threading.Event()

    def noted(futures):
        waited_for.set()
        return wait(futures)

    def work(item: int) -> int:
        begun.append(item)
        assert item not in (1, 2) or waited_for.wait(timeout=5)
        ended.append(item)
        return item

    monkeypatch.setattr("kvlink_rag.cores.wait", noted)
    results = on_cores(work, range(9), lambda: True)
    assert next(results) == 0
    assert sorted(begun) == sorted(ended) and 3 not in begun
    assert list(results) == list(range(1, 9))
    assert sorted(begun) == list(range(9))


def test_the_next_compute_while_the_caller_has_its_turn(cores):
    cores(2)
    third = threading.Event()
    for item in on_cores(lambda item: third.set() if item == 2 else None, range(3)):
        assert third.wait(timeout=60), item


def test_who_leaves_early_gets_the_cores_back_and_nothing_more_is_begun(cores, monkeypatch):
    cores(2)
    begun: list[int] = []
    all_cancelled = threading.Event()
    cancel, num_cancelled = Future.cancel, iter(range(1, 5))

    def noted(future):
        cancelled = cancel(future)
        if next(num_cancelled) == 4:
            all_cancelled.set()
        return cancelled

    def work(item: int) -> None:
        begun.append(item)
        assert item == 0 or all_cancelled.wait(timeout=5)

    monkeypatch.setattr(Future, "cancel", noted)
    with closing(on_cores(work, range(20))) as results:
        next(results)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert threads_of_a_new_thread() == 2
    assert set(begun) <= {0, 1, 2}


IN_A_NEW_PROCESS = """
import torch
from kvlink_rag.cores import _mkl_threads, on_cores, one_core

def threads(item=None):
    torch.ones(99, 99) @ torch.ones(99, 99)
    return torch.get_num_threads(), _mkl_threads()

def never(number):
    raise AssertionError("MKL now looks for threads in every product")

torch.set_num_threads = never
print(threads())
with one_core():
    print(threads())
for found in on_cores(threads, range(4), iter([False, True, True, False]).__next__):
    print(found, threads())
print(threads())
"""
WHAT_IT_PRINTS = """(2, 2)
(1, 1)
(1, 1) (1, 1)
(1, 1) (2, 2)
(1, 1) (2, 2)
(1, 1) (1, 1)
(2, 2)
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
def test_cores_are_shared_out_without_setting_torch_s_own_number_of_threads():
    """In a process of its own: once it has been set, it holds for MKL."""
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.stdout, done.stderr) == (WHAT_IT_PRINTS, "")


def test_two_are_under_way_at_once(cores):
    cores(2)
    both = threading.Barrier(2)
    assert len({place for place in on_cores(lambda item: both.wait(timeout=60), range(2))}) == 2


def test_what_fails_is_raised_and_the_cores_are_given_back(cores):
    cores(2)

    def work(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    got = on_cores(work, range(6))
    assert [next(got), next(got), next(got)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(got)
    assert torch.get_num_threads() == 2


def test_a_chunks_kv_is_the_same_to_the_last_bit_however_many_cores_there_are(smollm, cores):
    rng = random.Random(4)
    chunks = [random_ids(rng, length) for length in (40, 41, 57, 90, 91)]
    found = []
    for number in (1, 2, 3):
        cores(number)
        found.append(compute.run(lambda job: dict(Encoder(smollm).encode(chunks))))
    for others in found[1:]:
        for index, kv in found[0].items():
            assert torch.equal(kv.keys, others[index].keys) and torch.equal(kv.values, others[index].values)


def test_long_chunks_come_first_one_at_a_time_on_all_cores(cores, monkeypatch):
    """Which way a chunk is computed depends on its length alone."""
    cores(2)
    model = build("llama")
    encoder = Encoder(model, encoding_prefix="")
    used: dict[int, int] = {}
    encode = model.encode

    def noted(rows, *rest):
        used[rows.shape[1]] = torch.get_num_threads()
        return encode(rows, *rest)

    monkeypatch.setattr(model, "encode", noted)
    rng = random.Random(5)
    lengths = (ONE_CORE_TOKENS + 1, 30, ONE_CORE_TOKENS, 31)
    kvs = list(encoder.encode([random_ids(rng, length) for length in lengths]))
    assert used == {30: 1, 31: 1, ONE_CORE_TOKENS: 1, ONE_CORE_TOKENS + 1: 2}
    assert [index for index, _ in kvs] == [0, 2, 3, 1]
