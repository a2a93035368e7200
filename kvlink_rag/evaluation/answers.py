"""Answer quality by linking: the same questions over the same documents, one arm per linking.

Accuracy is KVLink's (arXiv 2502.16002): a normalised gold answer is a substring of the normalised prediction.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kvlink_rag.questions import Example
from kvlink_rag.rag import KVLinkRAG

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def run_answers(
    rag: KVLinkRAG,
    examples: Sequence[Example],
    linkings: Sequence[str],
    max_new_tokens: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Answer every example under every linking; one row of means per linking. KV is dropped after each example."""
    scores: dict[str, list[tuple[float, float, float]]] = {linking: [] for linking in linkings}
    for number, example in enumerate(examples, 1):
        for linking in linkings:
            answer = rag.ask(
                example.question, documents=example.documents, linking=linking, max_new_tokens=max_new_tokens
            )
            scores[linking].append(score(answer.text, example.answers))
        rag.entries.delete(list(rag.entries.keys()))
        progress("examples", number, len(examples))
    return [
        {
            "linking": linking,
            "examples": len(rows),
            "accuracy": _mean([row[0] for row in rows]),
            "exact_match": _mean([row[1] for row in rows]),
            "f1": _mean([row[2] for row in rows]),
        }
        for linking, rows in scores.items()
    ]


def score(prediction: str, answers: Sequence[str]) -> tuple[float, float, float]:
    """Substring accuracy, exact match and token F1 of a prediction, best over the accepted answers."""
    found = normalise(prediction)
    wanted = [normalise(answer) for answer in answers]
    accuracy = any(answer and answer in found for answer in wanted)
    return float(accuracy), float(found in wanted), max((_f1(found, answer) for answer in wanted), default=0.0)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's normalisation, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _f1(prediction: str, answer: str) -> float:
    common = sum((Counter(prediction.split()) & Counter(answer.split())).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction.split()), common / len(answer.split())
    return 2 * precision * recall / (precision + recall)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
