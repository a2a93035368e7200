"""`kvlink check`: whether reuse is as good as a full prefill for a model, before anybody relies on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvlink_rag.cli_options import (
    DEFAULT_EMBEDDER_NAME,
    DEFAULT_MODEL_NAME,
    Adapter,
    Device,
    Dtype,
    Embedder,
    Json,
    Links,
    Model,
    Namespace,
    Precision,
    linked_model,
    loaded,
    numbers,
    options_given,
)
from kvlink_rag.config import AUTO, DEFAULT_PRECISION, PUBLIC, UNTRAINED
from kvlink_rag.console import notes, progress_bar
from kvlink_rag.errors import BadInput

if TYPE_CHECKING:
    from kvlink_rag.evaluation.check import Verdict

BESIDE = ("plain", "recompute_first")  # checked too, for a recommendation
UNSAFE = 3


def check(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option("--data", help="Question file; default: 24 that come along.")] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Ask about this store's documents instead.")] = None,
    linking: Annotated[str, typer.Option("--linking", help="The linking in question: docs/linkings.md.")] = AUTO,
    questions: Annotated[int, typer.Option("--questions", help="At most so many.", min=1)] = 24,
    repeats: Annotated[int, typer.Option(help="Interleaved timed runs per length.", min=1)] = 3,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens to time.")] = "500,1000,2000",
    model: Model = DEFAULT_MODEL_NAME,
    embedder: Embedder = DEFAULT_EMBEDDER_NAME,
    links: Links = None,
    adapter: Adapter = None,
    precision: Precision = None,
    namespace: Namespace = PUBLIC,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Is answering from stored KV safe and fast for this model here? Exit code 0: yes, 3: it differs too much."""
    from kvlink_rag.evaluation.datasets import read_data
    from kvlink_rag.linking import resolve_linking
    from kvlink_rag.questions import own_questions

    resolve_linking(linking, has_links=False)
    if linking == "full":
        raise BadInput("full is what a check holds the others against; name another linking")
    if data is not None and store is not None:
        raise BadInput("give --data or --store, not both: the questions are the file's, or made from the store")
    if store is None and (idle := options_given(context, "embedder", "namespace")):
        raise BadInput(f"{' and '.join(idle)}: of a store's documents; give --store, or leave that out")
    lengths = numbers("--contexts", contexts)
    given = read_data(data, questions) if data is not None else None
    from kvlink_rag.evaluation.check import check as run_check

    if store is None:
        language_model, link_tokens = linked_model(model, dtype, device, links, adapter)
        names = [resolve_linking(linking, has_links=link_tokens.name != UNTRAINED), *BESIDE]
        examples = (given if given is not None else own_questions())[:questions]
        with progress_bar() as progress:
            verdict = run_check(
                language_model,
                link_tokens,
                examples,
                names,
                precision=precision or DEFAULT_PRECISION,
                lengths=lengths,
                repeats=repeats,
                progress=progress,
            )
    else:
        from kvlink_rag.maintenance import remember_check
        from kvlink_rag.training.study import study

        with (
            loaded(
                store,
                model,
                embedder,
                must_exist=True,
                links=links,
                adapter=adapter,
                dtype=dtype,
                device=device,
                linking=linking,
                precision=precision,
                namespace=namespace,
            ) as rag,
            progress_bar() as progress,
        ):
            examples = study(rag, questions, progress=progress)
            verdict = run_check(
                rag.model,
                rag.links,
                examples,
                [rag.linking, *BESIDE],
                precision=rag.precision,
                lengths=lengths,
                repeats=repeats,
                progress=progress,
            )
            failure = None if verdict.is_safe else verdict.advice
            remember_check(rag.index, rag.checked_as, rag.linking, failure, verdict.questions)
    if as_json:
        print(json.dumps(verdict.to_json()))
    else:
        print(report(verdict))
        if store is None and data is None:
            notes.print(
                "these are easy questions that come along; --store asks about your documents, --data your questions",
                style="dim",
                soft_wrap=True,
            )
    if not verdict.is_safe:
        notes.print(verdict.advice, style="red", markup=False, soft_wrap=True)
        raise typer.Exit(UNSAFE)


def report(verdict: Verdict) -> str:
    """What a check found, for a person."""
    exact = verdict.exactness
    lengths = [f"{length:,}" for length in verdict.lengths]
    too_long = f" ({verdict.too_long} more are beyond the model's window)" if verdict.too_long else ""
    lines = [
        f"{verdict.model}: {verdict.questions} questions{too_long}, "
        f"{verdict.kv_bytes_per_token / 1024:.1f} KiB of KV a token",
        f"arithmetic: {exact.top1:.0%} of predictions as in one masked forward, logits differ by at most "
        f"{exact.max_difference:.1e}",
        "",
        f"{'linking':<22}{'agrees':>8}{'NLL':>8}  {'verdict':<9}"
        + "".join(f"{f'TTFT {length}':>12}" for length in lengths)
        + f"{'pays from':>12}",
        f"{'full':<22}{'100 %':>8}{'0':>8}  {'':<9}" + "".join(f"{s:>10.2f} s" for s in verdict.full_ttft_s),
    ]
    for found in verdict.linkings:
        gap = "" if found.nll_gap is None else f"{found.nll_gap:+.2f}"
        pays = "not here" if found.break_even_tokens is None else f"{found.break_even_tokens:,} tok"
        lines.append(
            f"{found.linking:<22}{found.agreement * 100:>6.0f} %{gap:>8}  {'safe' if found.is_safe else 'differs':<9}"
            + "".join(f"{s:>10.2f} s" for s in found.ttft_s)
            + f"{pays:>12}"
        )
    lines += ["", "agrees: on an answer's first tokens with a full prefill; NLL: of the accepted answer, beside it"]
    return "\n".join([*lines, verdict.advice] if verdict.is_safe else lines)
