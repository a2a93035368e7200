"""`kvlink bench` and `kvlink eval`: measurements on this machine."""

from __future__ import annotations

import json
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
    Precision,
    loaded_model,
)
from kvlink_rag.console import progress_bar, say
from kvlink_rag.errors import BadInput

bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@bench_app.command()
def ttft(
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1000,2000,4000,8000",
    repeats: Annotated[int, typer.Option(help="Interleaved runs per length.", min=1)] = 5,
    model: Model = DEFAULT_MODEL_NAME,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time to first token: stored KV against a full prefill of the same context, and against the floor."""
    from kvlink_rag.evaluation.ttft import run_ttft

    try:
        lengths = [int(part) for part in contexts.split(",")]
    except ValueError:
        raise BadInput(f"--contexts takes numbers like 1000,2000; got {contexts!r}") from None
    language_model, _ = loaded_model(model, dtype, device)
    with progress_bar() as progress:
        rows = run_ttft(language_model, lengths, repeats, progress)
    if as_json:
        print(json.dumps(rows))
        return
    print("context      full    linked     floor    less  x floor  KV/token      encode")
    for row in rows:
        print(
            f"{row['context_tokens']:>7} {row['full_s']:>7.3f} s {row['linked_s']:>7.3f} s {row['floor_s']:>7.3f} s "
            f"{row['reduction']:>6.1%} {row['linked_over_floor']:>8.2f} {row['kv_bytes_per_token'] / 1024:>6.1f} KiB "
            f"{row['encode_tokens_per_s']:>9,.0f}/s"
        )


@bench_app.command()
def decode(
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 4000,
    repeats: Annotated[int, typer.Option(help="Interleaved runs.", min=1)] = 5,
    model: Model = DEFAULT_MODEL_NAME,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Decoding speed over a linked context against plain generate; peak memory of an answer."""
    from kvlink_rag.evaluation.decode import run_decode

    language_model, _ = loaded_model(model, dtype, device)
    with progress_bar() as progress:
        say(run_decode(language_model, context, repeats, progress), as_json)


def evaluate(
    data: Annotated[list[Path], typer.Option("--data", help="Question files (.jsonl, .jsonl.gz); repeatable.")],
    linking: Annotated[str, typer.Option("--linking", help="Linkings to compare.")] = "full,plain,link_tokens",
    limit: Annotated[int, typer.Option(help="Examples per file.", min=1)] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 32,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for every answer; a second run goes on there.")
    ] = None,
    model: Model = DEFAULT_MODEL_NAME,
    links: Links = None,
    adapter: Adapter = None,
    precision: Precision = "model",
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy of each linking on questions with their own documents, with 95 % intervals."""
    from kvlink_rag.linking import get_linking
    from kvlink_rag.questions import read_examples

    linkings = linking.split(",")
    for name in linkings:
        get_linking(name)
    files = {path.name: read_examples(path, limit) for path in data}
    if len(files) < len(data):
        raise BadInput("two data files have the same name; rename one")
    language_model, checkpoint = loaded_model(model, dtype, device, links=links, adapter=adapter)
    from kvlink_rag.compute import compute
    from kvlink_rag.evaluation.answers import AnswerRun, summary
    from kvlink_rag.links import LinkTokens

    link_tokens = checkpoint.links(language_model) if checkpoint else LinkTokens.untrained(language_model)
    label = checkpoint.folder.name if checkpoint else "untrained"
    with tempfile.TemporaryDirectory(prefix="kvlink-eval-") as folder, progress_bar() as progress:
        run = AnswerRun(
            language_model,
            link_tokens,
            out or Path(folder),
            label=label,
            max_new_tokens=max_new_tokens,
            precision=precision,
        )
        compute.run(lambda job: run.run(files, linkings, progress))
    rows = summary(run.rows)
    print(json.dumps(rows) if as_json else table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary of an evaluation as a Markdown table."""
    lines = ["| data | links | linking | examples | accuracy | exact | F1 | NLL |", "|---|---|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        low, high = row.get("accuracy_interval", (None, None))
        spread = "" if low is None else f" ({low * 100:.0f}-{high * 100:.0f})"
        lines.append(
            f"| {row['data']} | {row['links']} | {row['linking']} | {row['examples']} | "
            f"{row['accuracy'] * 100:.1f}{spread} | {row['exact_match'] * 100:.1f} | {row['f1'] * 100:.1f} | "
            f"{row['nll']:.2f} |"
        )
    return "\n".join(lines)
