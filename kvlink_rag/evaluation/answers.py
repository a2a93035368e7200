"""Answer quality by linking: the same questions over the same documents, one arm per linking.

Every arm reads the same prompt and decodes greedily. Beside what it answers, each arm is asked how likely it holds the
accepted answer: its NLL, the mean over the answer's tokens in nats, tells arms apart where few answers are right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from kvlink_rag.config import GenerationSettings
from kvlink_rag.encoding import Encoder
from kvlink_rag.evaluation.forced import Forcing, prompt_of
from kvlink_rag.evaluation.scores import interval, score
from kvlink_rag.generation import generate
from kvlink_rag.kv import StoredKV
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.prompt import Prompt, stop_ids
from kvlink_rag.questions import Example

METRICS = ("accuracy", "exact_match", "f1", "nll")
Row = dict[str, Any]


class AnswerRun:
    """Answers examples with one model under several linkings, one row each, kept in `results.jsonl` of a folder.

    A run that was cut off goes on where it stopped; runs of other models may write to the same folder.
    """

    def __init__(
        self,
        model: LanguageModel,
        links: LinkTokens,
        folder: Path,
        *,
        label: str,
        max_new_tokens: int,
        precision: str = "model",
    ):
        self._model, self._label = model, label if precision == "model" else f"{label}, {precision}"
        self._encoder = Encoder(model, precision=Precision.parse(precision))
        self._settings = GenerationSettings(max_new_tokens=max_new_tokens)
        self._forcing = Forcing(self._encoder, links)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "results.jsonl"
        self.rows = read_rows(self._path)
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), "utf-8")  # without a line cut off

    def run(
        self,
        data: Mapping[str, Sequence[Example]],
        linkings: Sequence[str],
        progress: Callable[[str, int, int], None],
    ) -> None:
        """Answer all examples: the first of every file, then the second, so that a part of a run says something."""
        done = {(row["data"], row["number"], row["links"], row["linking"]) for row in self.rows}
        order = sorted((number, name) for name, examples in data.items() for number in range(len(examples)))
        for place, (number, name) in enumerate(order, 1):
            missing = [linking for linking in linkings if (name, number, self._label, linking) not in done]
            if missing:
                self._answer(name, number, data[name][number], missing)
            progress("examples", place, len(order))

    def _answer(self, name: str, number: int, example: Example, linkings: Sequence[str]) -> None:
        prompt = prompt_of(self._encoder, example)
        kvs: list[StoredKV] = []
        if any(get_linking(linking).uses_stored_kv for linking in linkings):
            kvs = self._forcing.chunks(prompt)
        with self._path.open("a", encoding="utf-8") as file:
            for linking in linkings:
                text, nll = self._one(prompt, example.answers[0], linking, kvs)
                row = {"data": name, "number": number, "links": self._label, "linking": linking, "nll": round(nll, 4)}
                row |= asdict(score(text, example.answers)) | {"prediction": text}
                self.rows.append(row)
                file.write(json.dumps(row) + "\n")

    def _one(self, prompt: Prompt, answer: str, linking: str, kvs: Sequence[StoredKV]) -> tuple[str, float]:
        """The greedy answer, and the NLL of the accepted one."""
        model, tokenizer = self._model, self._model.tokenizer
        gold = (*tokenizer.plain_ids(answer), *stop_ids(tokenizer))
        context, logits = self._forcing.logits(prompt, kvs, linking, gold, self._settings.max_new_tokens)
        nll = float(cross_entropy(logits.float(), torch.tensor(gold, device=logits.device)))
        context.rewind(len(gold) - 1, prompt.question_ids[-1:])
        pieces: list[str] = []
        generate(model, context, self._settings, pieces.append)
        context.release()
        return "".join(pieces).strip(), nll


def read_rows(path: Path) -> list[Row]:
    """The rows of earlier runs; a line that was cut off is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a killed run: its example is answered again
            continue
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means with 95 % intervals: a row per data set and arm, then one per arm over the data sets' means."""
    arms = list(dict.fromkeys((row["links"], row["linking"]) for row in rows))
    names = list(dict.fromkeys(row["data"] for row in rows))
    found: list[Row] = []
    for name in names:
        for arm in arms:
            of_arm = [row for row in rows if row["data"] == name and (row["links"], row["linking"]) == arm]
            if of_arm:
                found.append({"data": name, "links": arm[0], "linking": arm[1], **_means(of_arm)})
    if len(names) > 1:
        for arm in arms:
            means = [row for row in found if (row["links"], row["linking"]) == arm]
            mean = {metric: round(sum(row[metric] for row in means) / len(means), 4) for metric in METRICS}
            examples = sum(row["examples"] for row in means)
            found.append(
                {"data": f"mean of {len(means)}", "links": arm[0], "linking": arm[1], "examples": examples, **mean}
            )
    return found


def _means(rows: Sequence[Row]) -> Row:
    means: Row = {"examples": len(rows)}
    for metric in METRICS:
        values = [row[metric] for row in rows]
        means[metric] = round(sum(values) / len(values), 4)
        means[f"{metric}_interval"] = [round(bound, 4) for bound in interval(values)]
    return means
