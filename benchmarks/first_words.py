"""How much of an arm's accuracy comes from saying much: counted in the first words of its answers alone.

    python benchmarks/first_words.py OUT --data FILE [--data FILE ...] --first untrained --second CHECKPOINT [--unnamed]

KVLink's accuracy counts an accepted answer wherever it stands in what was said. Over the rows that `kvlink eval --out
OUT` kept of a full prefill by two checkpoints: accuracy in the first 4, 8, 16 words and in all, the second less the
first with its 95 % interval, and how many words each says. An answer that stands in the question is also given by
whoever repeats the question, or both of two things to choose from: --unnamed leaves such questions out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kvlink_rag.evaluation.answers import read_rows
from kvlink_rag.evaluation.datasets import read_data
from kvlink_rag.evaluation.scores import interval, normalise, score
from kvlink_rag.questions import Example

LENGTHS = (4, 8, 16, 10_000)


def main(out: Path, files: list[Path], arms: tuple[str, str], unnamed: bool) -> None:
    said = {
        (row["data"], row["number"], row["links"]): row["prediction"].split()
        for row in read_rows(out / "results.jsonl")
        if row["linking"] == "full" and "prediction" in row
    }
    print(f"| data | questions | words | in the first | {arms[0]}, % | {arms[1]}, % | points |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for path in files:
        asked = list(enumerate(read_data(path)))
        asked = [(number, each) for number, each in asked if all((path.name, number, arm) in said for arm in arms)]
        asked = [(number, each) for number, each in asked if not (unnamed and names_answer(each))]
        if not asked:
            print(f"| {path.name} | 0 | | | | | |")
            continue
        words = [np.mean([len(said[path.name, number, arm]) for number, _ in asked]) for arm in arms]
        for length in LENGTHS:
            right = [
                [score(" ".join(said[path.name, n, arm][:length]), each.answers).accuracy for n, each in asked]
                for arm in arms
            ]
            gains = [b - a for a, b in zip(*right, strict=True)]
            low, high = interval(gains)
            first = "all" if length == LENGTHS[-1] else length
            told = f"{path.name} | {len(asked)} | {words[0]:.0f}, {words[1]:.0f} | {first}"
            means = " | ".join(f"{100 * np.mean(each):.1f}" for each in right)
            print(f"| {told} | {means} | {100 * np.mean(gains):+.1f} ({100 * low:+.1f}..{100 * high:+.1f}) |")


def names_answer(example: Example) -> bool:
    """Whether one of the accepted answers stands in the question."""
    question = normalise(example.question)
    return any(answer and answer in question for answer in map(normalise, example.answers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--first", default="untrained")
    parser.add_argument("--second", required=True)
    parser.add_argument("--unnamed", action="store_true", help="only questions that name none of their answers")
    given = parser.parse_args()
    main(given.out, given.data, (given.first, given.second), given.unnamed)
