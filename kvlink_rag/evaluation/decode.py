"""Decoding speed over a linked context, against plain `generate` after a full prefill; and the memory of an answer."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from kvlink_rag.compute import compute
from kvlink_rag.embedder import Embedder
from kvlink_rag.evaluation.ttft import FROM_DISK, NUM_CHUNKS, fill, make_texts
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.rag import KVLinkRAG

NEW_TOKENS = 64


def run_decode(
    model: LanguageModel, links: LinkTokens, context: int, repeats: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Tokens per second of both, interleaved, medians; peak memory above the loaded model, in bytes (Linux)."""
    return compute.run(lambda job: _run(model, links, context, repeats, job.checked(progress)))


def _run(
    model: LanguageModel, links: LinkTokens, context: int, repeats: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    linked, plain = [], []
    with (
        tempfile.TemporaryDirectory(prefix="kvlink-bench-") as folder,
        KVLinkRAG(model, Embedder(), folder, links=links, limits=FROM_DISK) as rag,
    ):
        question, texts = make_texts(rag, context)
        fill(rag, texts)
        rag.warm_up()
        before = _resident_bytes()
        _reset_peak()
        answer = rag.ask(question, k=NUM_CHUNKS, linking="link_tokens", max_new_tokens=NEW_TOKENS)
        peak = _peak_bytes()
        num_tokens = answer.tokens.reused + answer.tokens.computed
        with _endless(model):
            for run in range(repeats):
                answer = rag.ask(question, k=NUM_CHUNKS, linking="link_tokens", max_new_tokens=NEW_TOKENS)
                assert answer.tokens.generated == NEW_TOKENS
                linked.append((NEW_TOKENS - 1) / answer.timings.decode_s)
                plain.append(_plain_rate(model, num_tokens))
                progress("runs", run + 1, repeats)
    kv_bytes = num_tokens * model.kv_shape.bytes_per_token
    return {
        "context_tokens": num_tokens,
        "linked_tokens_per_s": round(statistics.median(linked), 2),
        "plain_tokens_per_s": round(statistics.median(plain), 2),
        "ratio": round(statistics.median(linked) / statistics.median(plain), 3),
        "context_kv_bytes": kv_bytes,
        "peak_above_model_bytes": peak - before if peak and before else None,
        "repeats": repeats,
    }


@contextmanager
def _endless(model: LanguageModel) -> Iterator[None]:
    """Let no token end an answer, so that both arms decode as many."""
    configs = [model.hf.generation_config, model.reader.generation_config]
    ends = [config.eos_token_id for config in configs]
    own_end_ids, model.end_ids = model.end_ids, ()
    for config in configs:
        config.eos_token_id = None
    try:
        yield
    finally:
        model.end_ids = own_end_ids
        for config, end in zip(configs, ends, strict=True):
            config.eos_token_id = end


def _plain_rate(model: LanguageModel, num_tokens: int) -> float:
    """Tokens per second of the model's own `generate`, its prefill left out."""
    stamps: list[float] = []

    class Clock:
        def put(self, value: Any) -> None:
            stamps.append(time.perf_counter())

        def end(self) -> None: ...

    ids = torch.randint(model.vocab_size, (1, num_tokens), device=model.device)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    attention = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("sdpa")  # as a user without this package runs it
    try:
        with torch.inference_mode():
            model.hf.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=Clock())
    finally:
        model.hf.set_attn_implementation(attention)
    return (NEW_TOKENS - 1) / (stamps[-1] - stamps[1])  # stamps[0] is the prompt's


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _resident_bytes() -> int:
    return _status("VmRSS:")


def _peak_bytes() -> int:
    return _status("VmHWM:")


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:  # not Linux: no peak is reported
        return
