"""Speed of adding documents, against the model's raw prefill of as many tokens; and of adding them again.

add: from files on disk to a store that can be asked: reading, cutting, encoding, writing, embedding, indexing.
raw: as many tokens through the model in full batches, nothing kept. Runs are interleaved; medians are reported, and of
add_over_raw the median over rounds, so that a machine whose speed moves between rounds moves both sides of each ratio.
A store is deleted after its run: kept, every run would write to memory that nobody has touched, which costs a virtual
machine nine times as much (340 MB: 0.8 against 0.09 s of a core).
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvlink_rag.compute import compute
from kvlink_rag.embedder import Embedder
from kvlink_rag.evaluation.ttft import WORDS
from kvlink_rag.model import LanguageModel
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.types import AddReport

SENTENCE_WORDS, PARAGRAPH_SENTENCES = 12, 6
RAW_ROWS = (1, 4, 16)  # the quickest of these is what adding is held against


def run_ingest(
    model: LanguageModel, num_documents: int, words: int, repeats: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Add num_documents files of so many words each, again and again, each time to a new store."""
    return compute.run(lambda job: _run(model, num_documents, words, repeats, job.checked(progress)))


def _run(
    model: LanguageModel, num_documents: int, words: int, repeats: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    embedder = Embedder()
    embedder.warm_up()
    adding, again, raw = [], [], []
    with tempfile.TemporaryDirectory(prefix="kvlink-bench-") as folder:
        files = Path(folder, "files")
        write_documents(files, num_documents, words)
        first, _ = _add(model, embedder, files, Path(folder, "warm"))
        chunk_tokens = round(first.tokens / first.chunks)
        rows = min(RAW_ROWS, key=lambda rows: raw_seconds(model, rows * chunk_tokens, rows, chunk_tokens) / rows)
        for run in range(repeats):
            report, again_s = _add(model, embedder, files, Path(folder, str(run)))
            adding.append(report.seconds)
            again.append(again_s)
            raw.append(raw_seconds(model, report.tokens, rows, chunk_tokens))
            progress("runs", run + 1, repeats)
    add_s, again_s, raw_s = (statistics.median(times) for times in (adding, again, raw))
    return {
        "documents": num_documents,
        "chunks": first.chunks,
        "tokens": first.tokens,
        "add_s": round(add_s, 3),
        "add_again_s": round(again_s, 4),
        "raw_prefill_s": round(raw_s, 3),
        "add_tokens_per_s": round(first.tokens / add_s, 1),
        "raw_tokens_per_s": round(first.tokens / raw_s, 1),
        "add_over_raw": round(statistics.median(r / a for r, a in zip(raw, adding, strict=True)), 3),
        "again_over_add": round(again_s / add_s, 5),
        "repeats": repeats,
    }


def write_documents(folder: Path, number: int, words: int) -> None:
    """Text files of words in sentences and paragraphs, the same ones every time."""
    folder.mkdir()
    for place in range(number):
        rng, sentences = random.Random(place), []
        for _ in range(-(-words // SENTENCE_WORDS)):
            sentences.append(" ".join(rng.choice(WORDS) for _ in range(SENTENCE_WORDS)).capitalize() + ".")
        starts = range(0, len(sentences), PARAGRAPH_SENTENCES)
        paragraphs = [" ".join(sentences[start : start + PARAGRAPH_SENTENCES]) for start in starts]
        (folder / f"{place}.txt").write_text("\n\n".join(paragraphs), "utf-8")


@torch.inference_mode()
def raw_seconds(model: LanguageModel, num_tokens: int, rows: int, width: int) -> float:
    """Seconds for num_tokens through the model itself, in batches of rows x width, as any script would."""
    batch = torch.randint(model.vocab_size, (rows, width), generator=torch.Generator().manual_seed(0)).to(model.device)
    started = time.perf_counter()
    left = num_tokens
    while left > 0:
        part = batch[:, : max(1, min(width, left // rows))]
        logits = model.hf(input_ids=part, use_cache=True, logits_to_keep=1).logits
        left -= part.numel()
    float(logits[0, 0, 0])  # what runs elsewhere has ended
    return time.perf_counter() - started


def _add(model: LanguageModel, embedder: Embedder, files: Path, store: Path) -> tuple[AddReport, float]:
    """Add the files to a new store; what was done, and how long doing it once more takes."""
    with KVLinkRAG(model, embedder, store) as rag:
        report = rag.add(files)
        assert report.encoded_chunks == report.chunks
        started = time.perf_counter()
        again = rag.add(files)
        again_s = time.perf_counter() - started
        assert again.encoded_chunks == 0
    shutil.rmtree(store)
    return report, again_s
