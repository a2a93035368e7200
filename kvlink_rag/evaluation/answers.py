"""Answer quality by linking: the same questions over the same documents, one arm per linking.

Every arm reads the same prompt and decodes greedily. Beside what it answers, each arm is asked how likely it holds the
accepted answer: its NLL, the mean over the answer's tokens in nats, tells arms apart where few answers are right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kvlink_rag.config import GenerationSettings
from kvlink_rag.context import Context
from kvlink_rag.encoding import Encoder
from kvlink_rag.evaluation.forced import Forcing, prompt_of
from kvlink_rag.evaluation.scores import interval, interval_of_means, score, score_summary
from kvlink_rag.generation import generate, predict
from kvlink_rag.kv import KV, StoredKV
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.prompt import Prompt, stop_ids
from kvlink_rag.questions import SUMMARY, Example

METRICS = ("accuracy", "exact_match", "f1", "rouge_l", "nll", "top1", "kl")
NUM_TOKENS = 16  # of an answer, along which arms are held against the full prefill
Row = dict[str, Any]


class Arm:
    """A model with its links, under which name its rows are kept, and its linkings where they are not the run's."""

    def __init__(
        self,
        model: LanguageModel,
        links: LinkTokens,
        label: str,
        precision: str = "model",
        linkings: Sequence[str] | None = None,
    ):
        self.model, self.linkings = model, linkings
        self.encoder = Encoder(model, precision=Precision.parse(precision))
        self.forcing, self.num_links = Forcing(self.encoder, links), links.num_per_chunk
        self.label = label if precision == "model" else f"{label}, {precision}"
        self.reads_as = replace(self.encoder.recipe, storage_dtype="any").fingerprint  # the same for all precisions


class AnswerRun:
    """Answers examples with one or several models under several linkings, kept in `results.jsonl` of a folder.

    A run that was cut off goes on where it stopped; other runs may write to the same folder. Documents are read once,
    alone and in full, for all arms that read them by the same recipe: checkpoints with links or readers over one base.
    """

    def __init__(self, arms: Sequence[Arm], folder: Path, *, max_new_tokens: int):
        self._arms = arms
        self._settings = GenerationSettings(max_new_tokens=max_new_tokens)
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
            reads: dict[str, _Read] = {}  # by `Arm.reads_as`, of this example
            for arm in self._arms:
                missing = [each for each in arm.linkings or linkings if (name, number, arm.label, each) not in done]
                if missing:
                    self._answer(name, number, data[name][number], arm, missing, reads)
            progress("examples", place, len(order))

    def _answer(
        self,
        name: str,
        number: int,
        example: Example,
        arm: Arm,
        linkings: Sequence[str],
        reads: dict[str, _Read],
    ) -> None:
        prompt = prompt_of(arm.encoder, example)
        tokenizer = arm.model.tokenizer
        gold = (*tokenizer.plain_ids(example.answers[0]), *stop_ids(tokenizer))
        about: Row = {"data": name, "number": number, "links": arm.label}
        about["num_documents"] = len(example.documents)
        about["gold"] = min(example.gold) + 1 if example.gold else None
        tokens = len(prompt.ids) + arm.num_links * len(prompt.chunk_ids)
        if tokens + max(len(gold), self._settings.max_new_tokens) > arm.model.max_positions:
            self._keep([{**about, "linking": linking, "too_long": tokens} for linking in linkings])
            return
        read = reads.setdefault(arm.reads_as, _Read())
        if read.encoded is None and any(get_linking(linking).uses_stored_kv for linking in linkings):
            read.encoded = arm.forcing.encoded(prompt)
        kvs = arm.forcing.at_rest(read.encoded or ())
        reference: _Said | None = None
        for linking in sorted(linkings, key=lambda linking: linking != "full"):
            said = self._one(arm, prompt, gold, linking, kvs, read, reference)
            reference = said if linking == "full" else reference
            row = {**about, "linking": linking, "nll": round(said.nll, 4), **_scores(example, said.text)}
            if reference is not None:
                row |= _closeness(reference, said)
            self._keep([{**row, "prediction": said.text}])

    def _keep(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def _one(
        self,
        arm: Arm,
        prompt: Prompt,
        gold: Sequence[int],
        linking: str,
        kvs: Sequence[StoredKV],
        read: _Read,
        reference: _Said | None,
    ) -> _Said:
        """The greedy answer; the NLL of the accepted one; and what is predicted along the reference's answer, or along
        this one where there is none."""
        model = arm.model
        room = max(self._settings.max_new_tokens, NUM_TOKENS)
        if linking == "full" and read.in_full is not None:
            context = read.in_full
            logits = arm.forcing.again(context, prompt, gold)
        else:
            context, logits = arm.forcing.logits(prompt, kvs, linking, gold, room)
        nll = float(cross_entropy(logits.float(), torch.tensor(gold, device=logits.device)))
        context.rewind(len(gold) - 1, prompt.question_ids[-1:])
        pieces: list[str] = []
        ids = generate(model, context, self._settings, pieces.append).token_ids[:NUM_TOKENS]
        along = reference.ids if reference is not None else ids
        context.rewind(0, [prompt.question_ids[-1], *along[:-1]])
        predicted = log_softmax(predict(model, context, len(along)).float(), -1)
        if linking == "full":
            read.in_full = context
        else:
            context.release()
        return _Said("".join(pieces).strip(), ids, nll, predicted)


@dataclass
class _Read:
    """What arms over one base share of an example: its chunks' KV, and its documents as a full prefill read them."""

    encoded: list[KV] | None = None
    in_full: Context | None = None


@dataclass(frozen=True)
class _Said:
    """An arm's answer, its first token ids, the accepted answer's NLL, and log-probabilities [tokens, vocabulary]."""

    text: str
    ids: list[int]
    nll: float
    predicted: Tensor


def _scores(example: Example, text: str) -> Row:
    if example.wanted == SUMMARY:
        return {"rouge_l": score_summary(text, example.answers)}
    return {name: round(value, 4) for name, value in asdict(score(text, example.answers)).items()}


def _closeness(reference: _Said, said: _Said) -> Row:
    """Along the full prefill's first answer tokens: where both predict the same, and the KL from it, nats a token."""
    same = (reference.predicted.argmax(-1) == said.predicted.argmax(-1)).float().mean()
    divergence = kl_div(said.predicted, reference.predicted, log_target=True, reduction="sum") / len(reference.ids)
    return {"top1": round(float(same), 4), "kl": round(float(divergence), 4)}


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
    """Means with 95 % intervals: a row per data set and arm, then one per arm over the data sets' means.

    Examples beyond the model's window are counted as `too_long` and are in no mean.
    """
    arms = list(dict.fromkeys((row["links"], row["linking"]) for row in rows))
    names = list(dict.fromkeys(row["data"] for row in rows))
    found: list[Row] = []
    for name in names:
        for arm in arms:
            of_arm = [row for row in rows if row["data"] == name and (row["links"], row["linking"]) == arm]
            if of_arm:
                found.append({"data": name, "links": arm[0], "linking": arm[1], **_means(of_arm)})
    if len(names) > 1:
        found += [_over_all(arm, [row for row in rows if (row["links"], row["linking"]) == arm]) for arm in arms]
    return found


def _means(rows: Sequence[Row]) -> Row:
    answered = [row for row in rows if "too_long" not in row]
    means: Row = {"examples": len(answered), "too_long": len(rows) - len(answered)}
    for metric in METRICS:
        if values := [row[metric] for row in answered if row.get(metric) is not None]:
            means[metric] = round(sum(values) / len(values), 4)
            means[f"{metric}_interval"] = [round(bound, 4) for bound in interval(values)]
    return means


def _over_all(arm: tuple[str, str], rows: Sequence[Row]) -> Row:
    """The mean of the data sets' means, of each metric over those that have it."""
    answered = [row for row in rows if "too_long" not in row]
    names = list(dict.fromkeys(row["data"] for row in rows))
    total: Row = {"data": f"mean of {len(names)}", "links": arm[0], "linking": arm[1]}
    total |= {"examples": len(answered), "too_long": len(rows) - len(answered)}
    for metric in METRICS:
        sets = [[row[metric] for row in answered if row["data"] == n and row.get(metric) is not None] for n in names]
        if sets := [values for values in sets if values]:
            total[metric] = round(sum(sum(values) / len(values) for values in sets) / len(sets), 4)
            total[f"{metric}_interval"] = [round(bound, 4) for bound in interval_of_means(sets)]
    return total
