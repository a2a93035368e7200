"""From single runs to a Markdown table of medians and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from prompts import CASES

Run = dict[str, Any]
FULL = "Hugging Face, full prefill"
EXACT = "Hugging Face, exact prefix"  # computes what a full prefill computes, to the last bit, in every case
VLLM = "vLLM, prefix cache"


def median_of(runs: Iterable[Run], rival: str, case: str, key: str = "first_token_s") -> float | None:
    """Median over the rounds; None where nothing was measured."""
    values = [run[key] for run in runs if run["rival"] == rival and run["case"] == case and run.get(key) is not None]
    return statistics.median(values) if values else None


def markdown(results: dict[str, Any]) -> str:
    """One pair of tables per length of a document, and what could not run."""
    lines: list[str] = []
    for tokens in sorted({run["tokens_per_document"] for run in results["runs"]}):
        runs = [run for run in results["runs"] if run["tokens_per_document"] == tokens]
        num_rounds = max(run["round"] for run in runs) + 1
        lines += [f"### {results['num_documents']} documents of {tokens} tokens, medians of {num_rounds} rounds", ""]
        lines += [*_first_tokens(runs, results["rivals"], results["failed"]), ""]
        lines += [*_clocks(runs, results["rivals"]), ""]
    lines += [f"* **{rival}** did not run, or not to the end: {why}" for rival, why in results["failed"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _first_tokens(runs: Sequence[Run], rivals: Sequence[str], failed: dict[str, str]) -> list[str]:
    """Seconds to the first token, and what share they are of a full prefill and of vLLM's cold one."""
    shares_of = ("of full prefill", "of vLLM")
    lines = _head(["", *CASES, *(f"{case}, {whole}" for whole in shares_of for case in CASES)])
    full, vllm = median_of(runs, FULL, "cold"), median_of(runs, VLLM, "cold")
    for rival in rivals:
        medians = [median_of(runs, rival, case) for case in CASES]
        if rival in failed and medians == [None] * len(CASES):
            lines.append(_row([rival, "did not run", *[""] * (3 * len(CASES) - 1)]))
            continue
        shares = [_share(seconds, whole) for whole in (full, vllm) for seconds in medians]
        lines.append(_row([rival, *map(_seconds, medians), *shares]))
    return lines


def _clocks(runs: Sequence[Run], rivals: Sequence[str]) -> list[str]:
    """Processor seconds, the rival's own clock, and what it says it reused."""
    head = ["", *(f"CPU, {case}" for case in CASES), *(f"own clock, {case}" for case in CASES)]
    lines = _head([*head, *(f"reused, {case}" for case in CASES[1:]), "first token as exact"])
    for rival in rivals:
        if all(median_of(runs, rival, case) is None for case in CASES):
            continue
        cells = [_seconds(median_of(runs, rival, case, key)) for key in ("cpu_s", "own_clock_s") for case in CASES]
        reused = [_whole(median_of(runs, rival, case, "reused_tokens")) for case in CASES[1:]]
        lines.append(_row([rival, *cells, *reused, _agreement(runs, rival)]))
    return lines


def _agreement(runs: Sequence[Run], rival: str) -> str:
    """How many first tokens were those of an exact computation of the same prompt."""
    exact = {(run["round"], run["case"]): run["first_token"] for run in runs if run["rival"] == EXACT}
    pairs = [
        (run["first_token"].strip(), exact[run["round"], run["case"]].strip())
        for run in runs
        if run["rival"] == rival and "first_token" in run and (run["round"], run["case"]) in exact
    ]
    return f"{sum(one == other for one, other in pairs)} of {len(pairs)}" if pairs else ""


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---|" + "--:|" * (len(cells) - 1)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _share(seconds: float | None, whole: float | None) -> str:
    return "" if seconds is None or not whole else f"{seconds / whole:.2f}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
