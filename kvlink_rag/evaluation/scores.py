"""How right an answer is, and how sure a mean of such scores can be."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvlink_rag.errors import MissingExtra

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHOICES = frozenset({"yes", "no", "maybe"})
_RESAMPLES = 2000


@dataclass(frozen=True)
class Scores:
    """Of one answer, each between 0 and 1."""

    accuracy: float
    exact_match: float
    f1: float


def score(prediction: str, answers: Sequence[str]) -> Scores:
    """Against the accepted answers, best over them.

    accuracy is KVLink's (arXiv 2502.16002): a normalised answer is a substring of the normalised prediction; where the
    answer is yes, no or maybe, the first word must be it.
    """
    found = normalise(prediction)
    wanted = [normalise(answer) for answer in answers]
    if set(wanted) <= _CHOICES:
        first = found.split()[0] if found else ""
        accuracy = first in wanted
    else:
        accuracy = any(answer and answer in found for answer in wanted)
    best_f1 = max((_f1(found, answer) for answer in wanted), default=0.0)
    return Scores(float(accuracy), float(found in wanted), best_f1)


def score_summary(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (F, stemmed; rouge-score), best over the references. Raises MissingExtra."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtra("scoring summaries", "eval") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = max((scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references), default=0.0)
    return round(float(best), 4)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's normalisation, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean; of paired differences where `values` are such."""
    return interval_of_means([dict(enumerate(values))], seed)


def interval_of_means(sets: Sequence[Mapping[Any, float]], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of several sets' means, of values by question.

    Each set is resampled within itself; sets that hold the same questions (a file in several orders, or with several
    numbers of documents) are resampled together, since their values are not independent.
    """
    families: list[list[Mapping[Any, float]]] = []
    for values in filter(None, sets):
        family = next((found for found in families if not found[0].keys().isdisjoint(values)), None)
        if family is None:
            families.append([values])
        else:
            family.append(values)
    if not families:
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    means = []
    for family in families:
        questions = list(dict.fromkeys(question for values in family for question in values))
        drawn = rng.integers(0, len(questions), (_RESAMPLES, len(questions)))
        for values in family:
            sample = np.array([values.get(question, 0.0) for question in questions], dtype=np.float64)
            is_there = np.array([question in values for question in questions])
            with np.errstate(invalid="ignore"):  # none of them drawn, which hardly ever happens
                means.append(sample[drawn].sum(axis=1) / is_there[drawn].sum(axis=1))
    low, high = np.nanpercentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def _f1(prediction: str, answer: str) -> float:
    common = sum((Counter(prediction.split()) & Counter(answer.split())).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction.split()), common / len(answer.split())
    return 2 * precision * recall / (precision + recall)
