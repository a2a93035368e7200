"""Feed the entry parser changed entries, its digest check bypassed; watched by an audit hook.

    python tests/store_fuzz.py EXECUTIONS SEED

Prints one JSON object; exit status 1 if anything but a KV of the wanted shape or CorruptEntry came out, or if the
parser ran, imported, opened or connected to anything. What may break a parser is kept in tests/corpus and tried first.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from contextlib import suppress

from conftest import ROOT
from store_parts import AS_COMPUTED, entry_of, identity_of, mutated, random_kv, shape_of

from kvlink_rag.errors import CorruptEntry
from kvlink_rag.packing import Precision
from kvlink_rag.store.codec import check_layout, read_tensors, to_entry
from kvlink_rag.store.entry import check_identity, parse_header, split_entry

FORBIDDEN = ("pickle.", "exec", "compile", "import", "subprocess.", "os.", "open", "socket.", "marshal.", "ctypes.")


def parse(header: bytes, payload: bytes, precision: Precision) -> None:
    """What a reader does with an entry whose digest holds."""
    layout = precision.layout(shape_of(), len(identity_of().token_ids))
    described = parse_header(header)
    check_identity(described, identity_of())
    check_layout(described, layout)
    tensors = read_tensors(memoryview(bytearray(payload)), layout)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout


def main(executions: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    int4 = Precision.parse("int4")
    sources = []
    for precision in (AS_COMPUTED, int4):
        kv = precision.at_rest(random_kv())
        parts = split_entry(memoryview(to_entry(kv, identity_of(), shape_of(), precision)))
        sources.append((*map(bytes, parts), precision))
    corpus = sorted((ROOT / "tests" / "corpus").glob("*.bin"))
    kept = [(path.read_bytes(), *source[1:]) for path in corpus for source in sources]
    kept += [(source[0], path.read_bytes(), source[2]) for path in corpus for source in sources]
    parse(*sources[0])
    parse(*sources[1])
    assert entry_of()
    outcomes: Counter[str] = Counter(taken=0, refused=0, broken=0)
    events: list[object] = []
    watching = [False]
    sys.addaudithook(
        lambda event, args: (
            events.append((event, str(args)[:80])) if watching[0] and event.startswith(FORBIDDEN) else None
        )
    )
    for source in sources:  # what Python and torch import lazily at the first of each kind of error is theirs
        for header, payload in ((b"{", source[1]), (source[0], b"x" * 20), (source[0][:-1] + b"{", source[1])):
            with suppress(CorruptEntry):
                parse(header, payload, source[2])
    watching[0] = True
    for number in range(executions):
        header, payload, precision = kept[number] if number < len(kept) else rng.choice(sources)
        if number >= len(kept):
            header, payload = mutated(header, rng), mutated(payload, rng)
        try:
            parse(header, payload, precision)
            outcomes["taken"] += 1
        except CorruptEntry:
            outcomes["refused"] += 1
        except Exception as error:
            outcomes["broken"] += 1
            print(type(error).__name__, error, header[:200], payload[:200], file=sys.stderr)
    watching[0] = False
    if events:
        print(Counter(events), file=sys.stderr)
    return {"executions": executions, "corpus": len(kept), **outcomes, "forbidden_events": len(events)}


if __name__ == "__main__":
    result = main(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(result))
    sys.exit(bool(result["broken"] or result["forbidden_events"] or not result["taken"]))
