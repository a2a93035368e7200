"""Hugging Face transformers: the whole prompt every time (`full`), or all but what it shares from its beginning on
with the prompt before (`prefix`), whose cache is kept."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from worker import Clock, serve


class HuggingFace:
    packages = ("transformers",)

    def __init__(self, options: argparse.Namespace):
        self._tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        self._model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
        self._keeps = options.mode == "prefix"
        self.forget()

    def forget(self) -> None:
        self._ids: list[int] = []
        self._cache: Any = DynamicCache(config=self._model.config)

    def ask(self, ask: Any, clock: Clock) -> dict[str, Any]:
        if not self._keeps:
            self.forget()
        ids = self._tokenizer("".join(ask.parts), add_special_tokens=False)["input_ids"]
        num_shared = 0
        for known, new in zip(self._ids, ids[:-1], strict=False):  # the last token is always computed
            if known != new:
                break
            num_shared += 1
        if num_shared < len(self._ids):
            self._cache.crop(num_shared - len(self._ids))
        rows = torch.tensor([ids])
        with torch.inference_mode():
            out = self._model.generate(
                rows, attention_mask=torch.ones_like(rows), cache=self._cache, max_new_tokens=1, do_sample=False
            )
        token_id = int(out[0, -1])
        clock.first_token()
        self._ids = ids
        return {
            "reused_tokens": num_shared,
            "prompt_tokens": len(ids),
            "first_token": self._tokenizer.decode([token_id]),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("full", "prefix"))
    serve(HuggingFace, parser)
