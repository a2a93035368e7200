"""Small training runs: boxes with colours in them, asked of a tiny model."""

from __future__ import annotations

import random

from kvlink_rag import LanguageModel
from kvlink_rag.questions import Example
from kvlink_rag.training.train import train
from kvlink_rag.training.trainer import TrainSettings
from kvlink_rag.types import Document

COLOURS = ["red", "green", "blue", "white"]


def examples(num=12):
    """Small boxes with colours in them; the answer stands in one of three documents."""
    rng = random.Random(0)
    found = []
    for number in range(num):
        documents = [Document(f"Box {number + place}: {rng.choice(COLOURS)}.") for place in range(3)]
        answer = documents[1].text.split(": ")[1].rstrip(".")
        found.append(Example(f"Box {number + 1}?", (answer,), tuple(documents), frozenset({1})))
    return found


def settings(**changes):
    rates = {"learning_rate": 5e-3, "link_learning_rate": 5e-2}
    return TrainSettings(**{"steps": 20, "batch": 2, "slots": 2, "num_link_tokens": 2, **rates, **changes})


def run(base, out, *, data=None, dtype="float32", resume=False, report=lambda figures: None, **changes):
    """Train on the boxes; the losses by step."""
    given = {"encoding_prefix": changes.pop("encoding_prefix")} if "encoding_prefix" in changes else {}
    about = train(
        LanguageModel.load(base, dtype=dtype),
        {"boxes": examples() if data is None else data},
        out,
        settings(**changes),
        resume=resume,
        report=report,
        **given,
    )
    return {entry["step"]: entry["loss"] for entry in about["log"]}
