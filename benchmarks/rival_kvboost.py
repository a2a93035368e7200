"""kvboost: chunks of a fixed length, kept by their content and found in any order.

At its best: chunks as long as a document, and the prompt with the documents first, system message and question behind
them, since chunks are counted from the prompt's first token and only an unbroken run of them is used. Its true first
token is timed by `on_token`; its own clock (`ttft_ms`) starts later.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from kvboost import KVBoost
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker import Clock, serve

CACHE_BYTES = 2 << 30


class KVBoostRival:
    packages = ("kvboost", "transformers")

    def __init__(self, options: argparse.Namespace):
        self._tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
        self._model, self._strategy = model.eval(), options.strategy
        self._engines: dict[int, Any] = {}  # by length of a chunk, over the same weights

    def forget(self) -> None:
        for engine in self._engines.values():
            engine.reset_cache()

    def ask(self, ask: Any, clock: Clock) -> dict[str, Any]:
        engine = self._engine(ask.tokens_per_document)
        _, *documents, after = ask.parts
        result = engine.generate(
            "".join((*documents, ask.system, " ", after)),
            max_new_tokens=1,
            cacheable_prefix_len=ask.tokens_per_document * len(documents),  # the question is not worth a chunk
            on_token=clock.first_token,
        )
        return {
            "own_clock_s": result.ttft_ms / 1000,
            "reused_tokens": result.cached_tokens,  # as it counts
            "prompt_tokens": result.prompt_tokens,
        }

    def _engine(self, chunk_size: int) -> Any:
        if chunk_size not in self._engines:
            self._engines[chunk_size] = KVBoost(
                model=self._model,
                tokenizer=self._tokenizer,
                max_cache_bytes=CACHE_BYTES,
                chunk_size=chunk_size,
                recompute_strategy=self._strategy,
            )
        return self._engines[chunk_size]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", choices=("selective", "cacheblend", "none"), default="selective")
    serve(KVBoostRival, parser)
