"""kvlink_rag: the documents given with the question, their KV read from the store; link tokens between them.

Cold, the store is empty: the question waits until the documents are read and stored. Without the memory tier, a
process answers from the folder that the other one filled.
"""

from __future__ import annotations

import argparse
from typing import Any

from kvlink_rag import KVLinkEngine, StoreSettings
from worker import Clock, serve


class KVLink:
    packages = ("kvlink-rag", "transformers")

    def __init__(self, options: argparse.Namespace):
        limits = StoreSettings(max_memory_bytes=0) if options.memory_tier == "off" else StoreSettings()
        self._engine = KVLinkEngine.load(
            options.model, store=options.store, limits=limits, dtype="float32", linking="auto"
        )

    def forget(self) -> None:
        self._engine.prune(live_ids=[])

    def ask(self, ask: Any, clock: Clock) -> dict[str, Any]:
        answer = None
        for piece in self._engine.stream(ask.question, documents=ask.documents, system=ask.system, max_new_tokens=1):
            clock.first_token()
            answer = piece.answer
        assert answer is not None and len(answer.sources) == len(ask.documents)
        return {
            "own_clock_s": answer.timings.ttft_s,
            "reused_tokens": answer.tokens.reused,
            "prompt_tokens": answer.tokens.reused + answer.tokens.computed,
            "first_token": answer.text,
            "linking": answer.linking,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory-tier", choices=("on", "off"), default="on")
    serve(KVLink, parser)
