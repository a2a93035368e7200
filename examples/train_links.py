"""Train link tokens on your own documents, without a label.

    python examples/train_links.py [QUESTIONS STEPS HELD_OUT SOFT_TOKENS]

The model asks itself questions about the sample corpus, answers them by full prefill, and the links learn to say the
same from stored KV. How close they come is measured on other questions, written by people, before and after, and beside
`recompute_first`, which needs no training and computes each document's first tokens again.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from transformers.utils import logging

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.console import progress_bar, training_bar
from kvlink_rag.evaluation.agreement import closeness
from kvlink_rag.evaluation.scores import interval
from kvlink_rag.training.study import study
from kvlink_rag.training.train import train
from kvlink_rag.training.trainer import TrainSettings

HERE = Path(__file__).parent


def main(num_questions: int = 60, steps: int = 90, num_held_out: int = 60, num_soft_tokens: int = 0) -> None:
    logging.disable_progress_bar()
    started = time.monotonic()
    rows = [json.loads(line) for line in (HERE / "questions.jsonl").read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "links"
        with KVLinkRAG.load(store=folder + "/store", links="untrained") as rag:
            rag.add(HERE / "corpus")
            held_out = [
                (row["question"], [Document(hit.chunk.text) for hit in rag.search(row["question"])])
                for row in rows[:num_held_out]
            ]
            with progress_bar() as progress:
                before = closeness(rag, held_out, ["link_tokens", "recompute_first"], progress)
            examples = study(rag, num_questions)
            print(f"{len(examples)} questions, as: {examples[0].question} - {examples[0].answers[0]}", flush=True)
            settings = TrainSettings(
                trainable="links",
                objective="distill",
                num_link_tokens=8,
                num_soft_tokens=num_soft_tokens,
                steps=steps,
                batch=1,
                max_docs=3,
            )
            with training_bar() as report:
                train(rag.model, {"study": examples}, checkpoint, settings, report=report)
        with KVLinkRAG.load(store=folder + "/store", links=checkpoint) as rag:
            rag.add(HERE / "corpus")  # unchanged documents cost nothing, unless soft tokens make them be read anew
            with progress_bar() as progress:
                after = closeness(rag, held_out, ["link_tokens"], progress)["link_tokens"]
    untrained = before["link_tokens"]
    for name, found in (("before", untrained), ("after", after), ("recompute_first", before["recompute_first"])):
        figures = found.agreement()
        print(f"{name:<15} same word as full prefill {figures.top1:.1%}, KL {figures.kl:.3f} nats a token")
    pairs = zip(after.by_example(), untrained.by_example(), strict=True)
    gains = [(same - was_same, kl - was_kl) for (same, kl), (was_same, was_kl) in pairs]
    (low, high), (kl_low, kl_high) = interval([same for same, _ in gains]), interval([kl for _, kl in gains])
    print(f"after - before  {low:+.1%} to {high:+.1%}, KL {kl_low:+.3f} to {kl_high:+.3f} (95 %, by question)")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
