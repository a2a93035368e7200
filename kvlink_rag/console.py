"""What a person sees of the command: answers and numbers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from kvlink_rag.ingestion import AddPlan
    from kvlink_rag.types import Answer

notes = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, off when that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, disable=not notes.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield report


@contextmanager
def training_bar(*, shown: bool = True) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Steps, loss, tokens per second and time left, on stderr; a line now and then where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=notes, disable=not (shown and notes.is_terminal), transient=True) as bar:
        task = bar.add_task("training", total=None, figures="")

        def report(at: Mapping[str, Any]) -> None:
            minutes = at["seconds_left"] / 60
            loss = "" if at["loss"] is None else f"loss {at['loss']:.3f}, "
            figures = f"{loss}{at['tokens_per_s']:,.0f} tokens/s, {minutes:.0f} min left"
            bar.update(task, completed=at["step"], total=at["steps"], figures=figures)
            if shown and not notes.is_terminal and (at["step"] % 20 == 0 or at["step"] == at["steps"]):
                notes.print(f"step {at['step']} of {at['steps']}: {figures}")

        yield report


def say_plan(plan: AddPlan) -> None:
    notes.print(
        f"{plan.documents} documents ({plan.unchanged_documents} unchanged), {plan.chunks} chunks; "
        f"{plan.chunks_to_encode} to encode: {plan.tokens_to_encode:,} tokens, about "
        f"{plan.expected_bytes / 2**20:,.1f} MiB ({plan.free_bytes / 2**30:,.1f} GiB free)",
        soft_wrap=True,
    )


def show(pieces: Iterator[Any], *, quiet: bool) -> Answer:
    answer = None
    for piece in pieces:
        if not quiet:
            print(piece.text, end="", flush=True)
        answer = piece.answer
    if not quiet:
        print(flush=True)
    assert answer is not None
    return answer  # type: ignore[no-any-return]


def say_sources(answer: Answer) -> None:
    for source in answer.sources:
        chunk, score = source.hit.chunk, source.hit.score
        how = "reused" if source.reused else "computed"
        shown = f"{score:.2f}" if score is not None else "    "
        notes.print(
            f"  {shown}  {_short(chunk.document_id)}, chunk {chunk.position + 1}: {source.num_tokens} tokens, {how}",
            style="dim", markup=False, soft_wrap=True,
        )  # fmt: skip
    if answer.left_out:
        notes.print(
            f"  {len(answer.left_out)} retrieved chunks left out: the model's window has no room for them",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    if answer.finish_reason == "length":
        notes.print("  (cut off at --max-new-tokens)", style="yellow")
    tokens = answer.tokens
    notes.print(
        f"  first token after {answer.timings.ttft_s:.2f} s; {tokens.reused} tokens reused, {tokens.computed} computed",
        style="dim", soft_wrap=True,
    )  # fmt: skip


def _short(document_id: str) -> str:
    """A path below the working folder without that folder."""
    path, here = Path(document_id), Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else document_id


def say(numbers: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(numbers))
        return
    for name, value in numbers.items():
        print(f"{name:>24}  {value if value is None else f'{value:,}'}")


def read_line() -> str | None:
    prompt = "> " if sys.stdin.isatty() else ""
    if not sys.stdout.isatty():  # input() would write it among the answers; on a terminal, line editing needs it
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        words = input(prompt)
    except EOFError:
        return None
    return words.strip() or None
