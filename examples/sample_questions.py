"""How many of the sample corpus's 60 questions each linking answers.

sample_questions.py [PREFIX] [--limit N] [--links untrained] [--linking full,plain,...]; PREFIX replaces the encoding
prefix; '' is none. An answer counts if the gold answer stands in it.
"""

import argparse
import json
import tempfile
from pathlib import Path

from transformers.utils import logging

from kvlink_rag import KVLinkRAG
from kvlink_rag.encoding_prefix import DEFAULT_ENCODING_PREFIX
from kvlink_rag.evaluation.scores import score

HERE = Path(__file__).parent
LINKINGS = "link_tokens,plain,full"


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser()
    parser.add_argument("prefix", nargs="?", default=DEFAULT_ENCODING_PREFIX)
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--links", help="folder of a checkpoint, or untrained; default: the one that ships")
    parser.add_argument("--linking", default=LINKINGS, help="linkings to compare")
    options = parser.parse_args()
    prefix = options.prefix
    rows = [json.loads(line) for line in (HERE / "questions.jsonl").read_text("utf-8").splitlines()][: options.limit]
    # trained ones know the default prefix
    links = options.links if prefix == DEFAULT_ENCODING_PREFIX else "untrained"
    with (
        tempfile.TemporaryDirectory() as folder,
        KVLinkRAG.load(store=folder, links=links, encoding_prefix=prefix) as rag,
    ):
        rag.add(HERE / "corpus")
        for linking in options.linking.split(","):
            answers = [rag.ask(row["question"], k=3, linking=linking, max_new_tokens=32).text for row in rows]
            right = sum(score(text, [row["answer"]]).accuracy for text, row in zip(answers, rows, strict=True))
            print(f"{linking:<20} {right:.0f} of {len(rows)}", flush=True)


if __name__ == "__main__":
    main()
