"""Answer quality by linking: the same questions over the same documents, one arm per linking.

Every arm reads the same prompt and decodes greedily. Beside what it answers, each arm is asked how likely it holds the
accepted answer: its NLL, the mean over the answer's tokens in nats, tells arms apart where few answers are right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kvlink_rag.config import DEFAULT_SYSTEM, GenerationSettings
from kvlink_rag.context import Context
from kvlink_rag.encoding import Encoder
from kvlink_rag.errors import BadInput
from kvlink_rag.evaluation.forced import Forcing, prompt_of
from kvlink_rag.evaluation.paired import question_of
from kvlink_rag.evaluation.scores import interval, interval_of_means, score, score_summary
from kvlink_rag.generation import predict
from kvlink_rag.kv import KV, StoredKV
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens, checkpoint_digest
from kvlink_rag.model import LanguageModel
from kvlink_rag.outputs import check_folder
from kvlink_rag.packing import Precision
from kvlink_rag.prompt import stop_ids
from kvlink_rag.questions import SUMMARY, Example
from kvlink_rag.rows import RowDecoder

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
        self.encoder = Encoder(model, soft_tokens=links.soft_tokens, precision=Precision.parse(precision))
        self.decoder = RowDecoder(model)
        self.forcing, self.num_links = Forcing(self.encoder, links), links.num_per_chunk
        self.label = label if precision == "model" else f"{label}, {precision}"
        self.reads_as = replace(self.encoder.recipe, storage_dtype="any").fingerprint  # the same for all precisions
        dtype, weights = str(model.dtype).removeprefix("torch."), model.origin or model.weights
        checkpoint = checkpoint_digest(model, links)
        self.made_by = (
            f"{dtype}, weights {weights[:8]}, checkpoint {checkpoint[:8]}, prompt {self._prompt_digest()[:8]}"
        )

    def _prompt_digest(self) -> str:
        """Over what decides a prompt besides question and documents: tokenizer, templates, prefixes, positions; hex.

        Not over a prompt as it is rendered: some templates tell the day.
        """
        recipe, chat = self.encoder.recipe, self.model.tokenizer.hf.chat_template
        told = (recipe.config, recipe.tokenizer, recipe.chunk_template, recipe.encoding_prefix, chat, DEFAULT_SYSTEM)
        return hashlib.sha256(repr(told).encode()).hexdigest()


class AnswerRun:
    """Answers examples with one or several models under several linkings, kept in `results.jsonl` of a folder.

    A run that was cut off goes on where it stopped; other runs may write to the same folder. Each row says by what it
    was made, so that no table mixes answers of two kinds under one name. Documents are read once,
    alone and in full, for all arms that read them by the same recipe: checkpoints with links or readers over one base.
    A few examples at a time are answered together, each as it would be alone (see `rows`): their contexts are in memory
    together, and what a run that is cut off has of them is lost.
    """

    def __init__(self, arms: Sequence[Arm], folder: Path, *, max_new_tokens: int):
        self._arms = arms
        self._settings = GenerationSettings(max_new_tokens=max_new_tokens)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "results.jsonl"
        self.rows = read_rows(self._path)

    def run(
        self,
        data: Mapping[str, Sequence[Example]],
        linkings: Sequence[str],
        progress: Callable[[str, int, int], None],
    ) -> None:
        """Answer all examples: the first of every file, then the second, so that a part of a run says something.

        Raises BadInput for an example without an accepted answer, and where the folder holds rows that this run would
        have made in another way.
        """
        for name, examples in data.items():
            if nameless := [number for number, example in enumerate(examples, 1) if not example.answers]:
                raise BadInput(f"{name}: example {nameless[0]} has no accepted answer to hold others against")
        self._refuse_others(data)
        done = {(row["data"], row["number"], row["links"], row["linking"]) for row in self.rows}
        order = sorted((number, name) for name, examples in data.items() for number in range(len(examples)))
        at_once = max(arm.decoder.width for arm in self._arms)
        for start in range(0, len(order), at_once):
            some = order[start : start + at_once]
            reads: dict[tuple[str, int, str], _Read] = {}  # by example and `Arm.reads_as`
            for arm in self._arms:
                asked = []
                for number, name in some:
                    wanted = arm.linkings or linkings
                    missing = [each for each in wanted if (name, number, arm.label, each) not in done]
                    if missing:
                        read = reads.setdefault((name, number, arm.reads_as), _Read())
                        against_full = "full" in wanted
                        one = _Asked(arm, name, number, data[name][number], missing, against_full, read)
                        one.about["at_most"] = self._settings.max_new_tokens
                        asked.append(one)
                self._answer(arm, asked)
                self._keep([row for one in asked for row in one.rows])
                progress("examples", start, len(order))  # lets it be stopped
            progress("examples", start + len(some), len(order))
        self.rows = read_rows(self._path)  # with those of runs beside this one

    def _refuse_others(self, data: Mapping[str, Sequence[Example]]) -> None:
        """A table must not mix bfloat16 with float32, two data files of one name, or lengths; nor, under one label, two
        checkpoints."""
        made_by = {arm.label: arm.made_by for arm in self._arms}
        asked = {name: [asked_digest(example) for example in examples] for name, examples in data.items()}
        dtype = _dtype_of(self._arms[0].made_by)
        for row in self.rows:
            then = str(row.get("made_by"))
            now: Row = {"made_by": made_by.get(row["links"], then if _dtype_of(then) == dtype else dtype)}
            if row["data"] in data:
                now["at_most"] = self._settings.max_new_tokens
            if row["number"] < len(examples := asked.get(row["data"], [])):
                now["asked"] = examples[row["number"]]
            for name, value in now.items():
                if row.get(name) != value:
                    raise BadInput(
                        f"{self._path} holds an answer of {row['links']} to {row['data']}, number {row['number']}, "
                        f"with {name} {row.get(name)}; of this run it would be {value}. Give another folder, or what "
                        f"was given then"
                    )

    def _answer(self, arm: Arm, asked: Sequence[_Asked]) -> None:
        """Give each its rows, one linking after another: the full prefill first, against which the others are held."""
        fitting = []
        for one in asked:
            if one.num_tokens + max(len(one.gold), self._settings.max_new_tokens) > arm.model.max_positions:
                one.rows = [{**one.about, "linking": each, "too_long": one.num_tokens} for each in one.missing]
            else:
                fitting.append(one)
        wanted = dict.fromkeys(linking for one in fitting for linking in one.linkings)
        for linking in sorted(wanted, key=lambda linking: linking != "full"):
            self._under(linking, arm, [one for one in fitting if linking in one.linkings])

    def _under(self, linking: str, arm: Arm, asked: Sequence[_Asked]) -> None:
        """One linking: the greedy answers, and what is predicted along the reference's answer, or along this one where
        there is none."""
        begun = [self._begin(linking, arm, one) for one in asked]
        contexts, firsts = [each.context for each in begun], [each.first_logits for each in begun]
        answers = arm.decoder.answers(contexts, firsts, self._settings)
        for one, each, (text, ids) in zip(asked, begun, answers, strict=True):
            ids, context = ids[:NUM_TOKENS], each.context
            along = one.reference.ids if one.reference is not None else ids
            context.rewind(0, [one.prompt.question_ids[-1], *along[:-1]])
            said = _Said(ids, log_softmax(predict(arm.model, context, len(along)).float(), -1))
            if linking == "full":
                one.reference, one.read.in_full = said, context
            else:
                context.release()
            if linking in one.missing:
                text = text.strip()
                row = {**one.about, "linking": linking, "nll": round(each.nll, 4), **_scores(one.example, text)}
                close = {} if one.reference is None else _closeness(one.reference, said)
                one.rows.append({**row, **close, "prediction": text})

    def _begin(self, linking: str, arm: Arm, one: _Asked) -> _Begun:
        """Compute an example's context and how likely the accepted answer is, and take that answer out again."""
        room = max(self._settings.max_new_tokens, NUM_TOKENS)
        if linking == "full" and one.read.in_full is not None:
            context = one.read.in_full
            logits = arm.forcing.again(context, one.prompt, one.gold)
        else:
            kvs = one.kvs(arm.forcing) if get_linking(linking).uses_stored_kv else ()
            context, logits = arm.forcing.logits(one.prompt, kvs, linking, one.gold, room)
        context.rewind(len(one.gold) - 1, one.prompt.question_ids[-1:])
        nll = float(cross_entropy(logits.float(), torch.tensor(one.gold, device=logits.device)))
        return _Begun(context, nll, logits[0].clone())

    def _keep(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if rows:
            _append("".join(json.dumps(row) + "\n" for row in rows).encode(), self._path)


@dataclass
class _Read:
    """What arms over one base share of an example: its chunks' KV, and its documents as a full prefill read them."""

    encoded: list[KV] | None = None
    in_full: Context | None = None


@dataclass(frozen=True)
class _Begun:
    """A context up to its question, the accepted answer's NLL, and the logits [vocabulary] behind the question."""

    context: Context
    nll: float
    first_logits: Tensor


@dataclass(frozen=True)
class _Said:
    """An arm's first token ids, and its log-probabilities [tokens, vocabulary] along the reference's."""

    ids: list[int]
    predicted: Tensor


class _Asked:
    """An example as an arm is asked it, and the rows it has so far.

    missing: linkings whose rows are wanted. linkings: these, and full where they are held against it.
    """

    def __init__(
        self,
        arm: Arm,
        name: str,
        number: int,
        example: Example,
        missing: Sequence[str],
        against_full: bool,
        read: _Read,
    ):
        self.example, self.missing, self.read = example, missing, read
        self.linkings = list(dict.fromkeys([*missing, "full"] if against_full else missing))
        self.prompt = prompt_of(arm.encoder, example)
        tokenizer = arm.model.tokenizer
        self.gold = (*tokenizer.plain_ids(example.answers[0]), *stop_ids(tokenizer))
        self.num_tokens = len(self.prompt.ids) + arm.num_links * len(self.prompt.chunk_ids)
        self.about: Row = {
            "data": name,
            "number": number,
            "links": arm.label,
            "made_by": arm.made_by,
            "asked": asked_digest(example),
            "num_documents": len(example.documents),
            "gold": min(example.gold) + 1 if example.gold else None,
        }
        self.rows: list[Row] = []
        self.reference: _Said | None = None  # under full prefill
        self._kvs: list[StoredKV] | None = None

    def kvs(self, forcing: Forcing) -> list[StoredKV]:
        """Its chunks' KV, encoded by whichever arm asks first, as it reads back from a store of the arm's precision."""
        if self.read.encoded is None:
            self.read.encoded = forcing.encoded(self.prompt)
        if self._kvs is None:
            self._kvs = forcing.at_rest(self.read.encoded)
        return self._kvs


def _dtype_of(made_by: str) -> str:
    return made_by.split(",")[0]


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
    """The rows of earlier runs, each arm's answer to an example once; lines that were cut off are left out."""
    rows: dict[tuple[str, int, str, str], Row] = {}
    for line in path.read_text("utf-8").split("\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed run, whose example is answered again, or an empty one
            continue
        rows.setdefault((row["data"], row["number"], row["links"], row["linking"]), row)  # two runs may have made it
    return list(rows.values())


def asked_digest(example: Example) -> str:
    """What tells an example from another: 8 hex digits over question, answers and documents, in their order."""
    documents = [(document.title, document.text) for document in example.documents]
    told = json.dumps([example.question, example.answers, documents, example.wanted])
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _append(lines: bytes, path: Path) -> None:
    """Write lines behind those of a file, in one call to the system, into which no other run's lines come.

    What was there stays, since others may be writing; a line that a killed run left cut off is ended first.
    """
    with path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # or another's call is under way: then the line between is empty
                lines = b"\n" + lines
        left = memoryview(lines)
        while left:
            left = left[file.write(left) :]


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
            means[metric] = round(sum(values) / len(values), 6)
            means[f"{metric}_interval"] = [round(bound, 6) for bound in interval(values)]
    return means


def _over_all(arm: tuple[str, str], rows: Sequence[Row]) -> Row:
    """The mean of the data sets' means, of each metric over those that have it."""
    answered = [row for row in rows if "too_long" not in row]
    names = list(dict.fromkeys(row["data"] for row in rows))
    total: Row = {"data": f"mean of {len(names)}", "links": arm[0], "linking": arm[1]}
    total |= {"examples": len(answered), "too_long": len(rows) - len(answered)}
    for metric in METRICS:
        valued = [row for row in answered if row.get(metric) is not None]
        sets = [{question_of(row): row[metric] for row in valued if row["data"] == name} for name in names]
        if sets := [values for values in sets if values]:
            total[metric] = round(sum(sum(values.values()) / len(values) for values in sets) / len(sets), 6)
            total[f"{metric}_interval"] = [round(bound, 6) for bound in interval_of_means(sets)]
    return total
