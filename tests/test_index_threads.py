"""Threads that read the index while another changes it."""

from __future__ import annotations

import os
import signal
import threading
import warnings

from test_index import add, vectors_of

from kvlink_rag.index import VectorIndex


class _Looked(dict):
    """Metadata that somebody looks at the index meanwhile, when it is written: in the middle of a change."""

    def __init__(self, look):
        super().__init__(of="one")
        self._look = look

    def items(self):
        self._look()
        return super().items()


def test_another_thread_sees_a_document_before_or_after_its_update_never_half(tmp_path):
    """No read finds it without chunks, and the KV that it shares is never without a reference."""
    index = VectorIndex(tmp_path)
    add(index, "one", 1, 2)
    seen: list[object] = []

    def read():
        seen.append((index.unreferenced([f"{1:064x}"]), [c.chunk.text for c in index.chunks_of("one")]))
        seen.append((index.counts(), index.live_keys(), index.keys_of("one")))

    reader = threading.Thread(target=read)

    def look():
        reader.start()
        reader.join(0.5)  # who waits for the change comes after it

    chunks = index.chunks_of("one")[:1]
    index.replace_document("one", "new", None, _Looked(look), chunks, vectors_of(1))
    reader.join()
    assert seen == [([], ["text 1"]), ((1, 1, 3), {f"{1:064x}"}, [f"{1:064x}"])]
    index.close()


def test_a_process_forked_in_the_middle_of_a_change_reads_the_index(tmp_path):
    """The thread that held the lock is not there."""
    index = VectorIndex(tmp_path)
    add(index, "one", 1)
    code = []

    def fork():
        if child := os.fork():
            code.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            signal.alarm(30)
            os._exit(7 if index.document_ids() == ["one"] else 1)

    def look():
        forking = threading.Thread(target=fork)
        forking.start()
        forking.join()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from Python 3.12 on
        index.replace_document("two", "d", None, _Looked(look), index.chunks_of("one"), vectors_of(2))
    assert code == [7]
    index.close()
