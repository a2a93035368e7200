"""`kvlink bench` and `kvlink eval`: measurements on this machine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlink_rag.cli_options import (
    DEFAULT_MODEL_NAME,
    Adapter,
    Device,
    Dtype,
    Json,
    Links,
    Model,
    linked_model,
    loaded_model,
    numbers,
)
from kvlink_rag.config import UNTRAINED
from kvlink_rag.console import notes, progress_bar, say
from kvlink_rag.errors import BadInput, KVLinkError
from kvlink_rag.outputs import check_folder

bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@bench_app.command()
def ttft(
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1000,2000,4000,8000",
    repeats: Annotated[int, typer.Option(help="Interleaved runs per length.", min=1)] = 5,
    model: Model = DEFAULT_MODEL_NAME,
    links: Links = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="File (.svg) for a plot of the times.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time to first token: stored KV against a full prefill of the same context, and against the floor."""
    from kvlink_rag.evaluation.ttft import run_ttft

    lengths = numbers("--contexts", contexts)
    if plot is not None:
        from kvlink_rag.evaluation.report import check_plot

        check_plot(plot)  # said now if it cannot be done, not after minutes
    language_model, link_tokens = linked_model(model, dtype, device, links)
    with progress_bar() as progress:
        rows = run_ttft(language_model, link_tokens, lengths, repeats, progress)
    if as_json:
        print(json.dumps(rows))
    else:
        print(_times(rows))
    if plot is not None:
        from kvlink_rag.evaluation.report import plot_ttft

        plot_ttft(rows, plot)


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `run_ttft` measured, as a table."""
    lines = ["context  computed      full    linked     floor    less  x floor  KV/token      encode"]
    for row in rows:
        seconds = "".join(f"{row[name]:>8.3f} s" for name in ("full_s", "linked_s", "floor_s"))
        lines.append(
            f"{row['context_tokens']:>7} {row['computed_tokens']:>9}{seconds} {row['reduction']:>6.1%} "
            f"{row['linked_over_floor']:>8.2f} {row['kv_bytes_per_token'] / 1024:>6.1f} KiB "
            f"{row['encode_tokens_per_s']:>9,.0f}/s"
        )
    return "\n".join(lines)


@bench_app.command()
def decode(
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 4000,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.", min=1)] = 5,
    model: Model = DEFAULT_MODEL_NAME,
    links: Links = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Decoding speed over a linked context against plain generate; peak memory of an answer."""
    from kvlink_rag.evaluation.decode import run_decode

    language_model, link_tokens = linked_model(model, dtype, device, links)
    with progress_bar() as progress:
        say(run_decode(language_model, link_tokens, context, repeats, progress), as_json)


@bench_app.command()
def ingest(
    documents: Annotated[int, typer.Option(help="Files to add.", min=1)] = 8,
    words: Annotated[int, typer.Option(help="Words in each.", min=1)] = 800,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.", min=1)] = 5,
    model: Model = DEFAULT_MODEL_NAME,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Speed of adding documents against the model's raw prefill; and of adding them again, unchanged."""
    from kvlink_rag.evaluation.ingest import run_ingest

    language_model, _ = loaded_model(model, dtype, device)
    with progress_bar() as progress:
        say(run_ingest(language_model, documents, words, repeats, progress), as_json)


@bench_app.command()
def growth(
    chunks: Annotated[str, typer.Option(help="Numbers of chunks.")] = "1000,10000,100000",
    repeats: Annotated[int, typer.Option(help="Runs.", min=1)] = 7,
    as_json: Json = False,
) -> None:
    """Search and look-up by the number of chunks, over synthetic vectors and small entries."""
    from kvlink_rag.evaluation.growth import run_growth

    with progress_bar() as progress:
        rows = run_growth(numbers("--chunks", chunks), repeats, progress)
    if as_json:
        print(json.dumps(rows))
        return
    print(" chunks  first search      search   is stored    its bytes")
    for row in rows:
        print(
            f"{row['chunks']:>7} {row['first_search_s']:>11.3f} s {row['search_s'] * 1e3:>8.2f} ms "
            f"{row['contains_s'] * 1e6:>8.0f} us {row['get_s'] * 1e6:>9.0f} us"
        )


def evaluate(
    data: Annotated[
        list[str], typer.Option("--data", help="Question files, or sample: 24 that come along; repeatable.")
    ],
    linking: Annotated[str, typer.Option("--linking", help="Linkings to compare.")] = "full,plain,link_tokens",
    limit: Annotated[int, typer.Option(help="Examples per file.", min=1)] = 50,
    documents: Annotated[str, typer.Option("--documents", help="Of each example: all, or how many.")] = "all",
    order: Annotated[str, typer.Option("--order", help="original, shuffled, or gold@N: gold at place N.")] = "original",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Of shuffling.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for every answer, table and plots; a second run goes on there.")
    ] = None,
    model: Model = DEFAULT_MODEL_NAME,
    links: Annotated[
        list[str] | None,
        typer.Option(
            "--links",
            help="Folder or hub id of a link checkpoint for this model; untrained: none. FOLDER=LINKING,...: with "
            "these linkings in place of the others. Repeatable.",
        ),
    ] = None,
    adapter: Adapter = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="KV at rest: model, int8 or int4; repeatable. Default: model."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy of each linking on questions with their own documents, with 95 % intervals."""
    from kvlink_rag.evaluation.datasets import arranged, read_data

    linkings = _known(linking)
    if out is not None:
        check_folder(out)
    if documents != "all" and not (documents.isdigit() and int(documents) >= 1):
        raise BadInput(f"--documents takes all, or a number from 1 on; got {documents!r}")
    num_documents = None if documents == "all" else int(documents)
    files = {}
    for source in data:
        name = Path(source).name + (f" {order}" if order != "original" else "")
        name += f" {documents} documents" if num_documents else ""
        name += f" seed {seed}" if seed and order == "shuffled" else ""
        if name in files:
            raise BadInput("two data files have the same name; rename one")
        examples = read_data(source, limit)
        files[name] = [arranged(example, order=order, num_documents=num_documents, seed=seed) for example in examples]
    from kvlink_rag.compute import compute
    from kvlink_rag.evaluation.answers import AnswerRun, Arm, summary
    from kvlink_rag.evaluation.report import drawing, table, write_report

    if out is not None:
        drawing("plotting an evaluation")  # said now if it cannot be done, not after hours
    arms = []
    chosen_links: Sequence[str | None] = links or [None]
    for chosen in chosen_links:
        is_folder = os.path.exists(chosen or "")
        chosen, _, its_own = (chosen or "", "", "") if is_folder else (chosen or "").partition("=")
        own_linkings = _known(its_own) if its_own else None
        language_model, link_tokens = linked_model(model, dtype, device, chosen or None, adapter)
        label = UNTRAINED if link_tokens.name == UNTRAINED else Path(link_tokens.name).name
        arms += [Arm(language_model, link_tokens, label, each, own_linkings) for each in precision or ["model"]]
    if len({arm.label for arm in arms}) < len(arms):
        raise BadInput("two of --links have the same folder name, under which results are kept; rename one")
    with tempfile.TemporaryDirectory(prefix="kvlink-eval-") as folder, progress_bar() as progress:
        run = AnswerRun(arms, out or Path(folder), max_new_tokens=max_new_tokens)
        try:
            compute.run(lambda job: run.run(files, linkings, job.checked(progress)))
        except KeyboardInterrupt:
            kept = f"{out} keeps {len(run.rows):,} answers, and the same command goes on" if out else "nothing is kept"
            raise KVLinkError(f"stopped; {kept}") from None
        files_written = write_report(run.rows, out) if out else []
    rows = summary(run.rows)
    print(json.dumps(rows) if as_json else table(rows))
    if files_written:
        notes.print(f"written: {', '.join(str(path) for path in files_written)}", markup=False, soft_wrap=True)


def _known(linkings: str) -> list[str]:
    """Names of linkings, separated by commas. Raises BadInput."""
    from kvlink_rag.linking import get_linking

    for name in linkings.split(","):
        get_linking(name)
    return linkings.split(",")
