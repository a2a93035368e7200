"""mellea's cached blocks, two ways.

`public`: documents as `CBlock(cache=True)` in a chat, asked by `generate_from_context`. `helpers`: what mellea's own
helpers can do when called by hand: blocks prefilled apart, each at position 0, and their caches set end to end.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import torch
from mellea import CBlock, ChatContext, ModelOption
from mellea.backends.huggingface import LocalHFBackend
from mellea.backends.kv_block_helpers import merge_dynamic_caches_v5, prefill_cache_v5
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker import Clock, serve


class Mellea:
    packages = ("mellea", "transformers")

    def __init__(self, options: argparse.Namespace):
        self._tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
        self._device = torch.device("cpu")
        self._model = model.eval()
        self._backend = LocalHFBackend(options.model, custom_config=(self._tokenizer, self._model, self._device))
        self._by_helpers = options.way == "helpers"
        self._loop = asyncio.new_event_loop()
        self._blocks: dict[str, Any] = {}

    def forget(self) -> None:
        self._blocks.clear()
        self._backend._cached_blocks.clear()

    def ask(self, ask: Any, clock: Clock) -> dict[str, Any]:
        if self._by_helpers:
            return self._join(ask, clock)
        return self._loop.run_until_complete(self._generate(ask, clock))

    async def _generate(self, ask: Any, clock: Clock) -> dict[str, Any]:
        context = ChatContext()
        for text in ask.documents:
            context = context.add(CBlock(text, cache=True))
        options = {ModelOption.MAX_NEW_TOKENS: 1, ModelOption.SYSTEM_PROMPT: ask.system, "do_sample": False}
        thunk, _ = await self._backend.generate_from_context(CBlock(ask.question), context, model_options=options)
        text = await thunk.avalue()
        clock.first_token()
        return {"reused_tokens": 0 if not self._backend._cached_blocks else None, "first_token": text}

    def _join(self, ask: Any, clock: Clock) -> dict[str, Any]:
        *cached, after = ask.parts
        num_reused = 0
        for text in cached:
            if text in self._blocks:
                num_reused += self._blocks[text][1].get_seq_length()
            else:
                self._blocks[text] = prefill_cache_v5(self._model, self._tokenizer, text, self._device)
        blocks = [self._blocks[text] for text in cached]
        end_ids = self._tokenizer(after, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([*(tokens["input_ids"] for tokens, _ in blocks), end_ids], dim=1)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=merge_dynamic_caches_v5([cache for _, cache in blocks]),
            max_new_tokens=1,
            do_sample=False,
        )
        clock.first_token()
        return {
            "reused_tokens": num_reused,
            "prompt_tokens": ids.shape[1],
            "first_token": self._tokenizer.decode(out[0, -1:]),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("public", "helpers"))
    serve(Mellea, parser)
