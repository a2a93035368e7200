"""What an evaluation leaves behind for people: a table, the figures as JSON, and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvlink_rag.errors import BadInput, MissingExtra
from kvlink_rag.evaluation.answers import summary
from kvlink_rag.evaluation.paired import differences, paired_table
from kvlink_rag.evaluation.scores import interval
from kvlink_rag.outputs import check_file

Row = Mapping[str, Any]
COLUMNS = (("accuracy", "accuracy", 100), ("exact_match", "exact", 100), ("f1", "F1", 100), ("rouge_l", "ROUGE-L", 100),
           ("nll", "NLL", 1), ("top1", "agrees", 100), ("kl", "KL", 1))  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The summary of an evaluation as a Markdown table; 95 % intervals in brackets, columns nobody has left out."""
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    left_out = any(row.get("too_long") for row in rows)
    titles = [title for _, title, _ in columns]
    lines = [
        "| " + " | ".join(["data", "links", "linking", "examples", *(["too long"] * left_out), *titles]) + " |",
        "|---|---|---|--:|" + "--:|" * (len(columns) + left_out),
    ]
    for row in rows:
        cells = [row["data"], row["links"], row["linking"], str(row["examples"])]
        cells += [str(row.get("too_long", 0))] * left_out
        lines.append("| " + " | ".join(cells + [_cell(row, name, scale) for name, _, scale in columns]) + " |")
    return "\n".join(lines)


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write summary and paired differences (.json, .md) and the plots of an evaluation's rows; the files."""
    found = summary([dict(row) for row in rows])
    written = []
    for name, figures, text in (
        ("summary", found, table(found)),
        ("paired", pairs := differences(rows), paired_table(pairs)),
    ):
        for suffix, content in (("json", json.dumps(figures, indent=1)), ("md", text)):
            written.append(folder / f"{name}.{suffix}")
            written[-1].write_text(content + "\n", "utf-8")
    return [*written, *_plots(rows, folder)]


def plot_ttft(rows: Sequence[Row], path: Path) -> Path:
    """Seconds to the first token by tokens of context, as `run_ttft` measured them: stored KV, full prefill, floor."""
    pyplot = drawing("plotting times")
    figure, axes = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    lengths = [row["context_tokens"] for row in rows]
    for name, label in (
        ("full_s", "full prefill"),
        ("linked_s", "from stored KV"),
        ("floor_s", "floor: question alone"),
    ):
        axes.plot(lengths, [row[name] for row in rows], marker="o", ms=3, label=label)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("seconds to the first token")
    axes.set_xlim(left=0)
    return _saved(figure, axes, path)


def check_plot(path: Path) -> None:
    """Raise MissingExtra where nothing can be drawn, BadInput where no such plot can be written to `path`."""
    kinds = drawing("plotting times").Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise BadInput(f"{path} is no file of a kind that plots are written as: {', '.join(sorted(kinds))}")
    check_file(path)


def drawing(what: str) -> Any:
    """matplotlib, drawing to files. Raises MissingExtra."""
    try:
        from matplotlib import use
    except ImportError as error:
        raise MissingExtra(what, "eval") from error
    use("svg")
    from matplotlib import pyplot

    return pyplot


def _cell(row: Row, name: str, scale: int) -> str:
    if name not in row:
        return ""
    text = f"{row[name] * scale:.1f}" if scale == 100 else f"{row[name]:.2f}"
    if f"{name}_interval" not in row:
        return text
    low, high = row[f"{name}_interval"]
    return f"{text} ({low * scale:.0f}..{high * scale:.0f})" if scale == 100 else f"{text} ({low:.2f}..{high:.2f})"


def _plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Accuracy by arm and data set; by place of the gold document and by number of documents, where these vary."""
    answered = [row for row in rows if row.get("accuracy") is not None]
    if not answered:
        return []
    drawing("plotting an evaluation")
    files = [_bars(answered, folder / "accuracy.svg")]
    for name, title in (("gold", "place of the gold document"), ("num_documents", "documents")):
        if len({row[name] for row in answered if row.get(name)}) > 1:
            files.append(_course(answered, name, title, folder / f"accuracy_by_{name}.svg"))
    return files


def _bars(rows: Sequence[Row], path: Path) -> Path:
    pyplot = drawing("plotting an evaluation")
    names = list(dict.fromkeys(row["data"] for row in rows))
    arms = list(dict.fromkeys((row["links"], row["linking"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(max(5, 1.2 * len(names) * len(arms) / 2), 3.6), layout="constrained")
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        heights, errors = [], []
        for name in names:
            values = [r["accuracy"] for r in rows if r["data"] == name and (r["links"], r["linking"]) == arm]
            mean = sum(values) / len(values) if values else 0.0
            low, high = interval(values)
            heights.append(mean * 100)
            errors.append((max(0.0, mean - low) * 100, max(0.0, high - mean) * 100))
        places = [place + (number - (len(arms) - 1) / 2) * width for place in range(len(names))]
        label = arm[1] if len({links for links, _ in arms}) == 1 else f"{arm[1]} ({arm[0]})"
        axes.bar(places, heights, width, yerr=list(zip(*errors, strict=True)), label=label, error_kw={"lw": 0.8})
    axes.set_xticks(range(len(names)), [name.removesuffix(".gz").removesuffix(".jsonl") for name in names])
    axes.set_ylabel("answers right, %")
    return _saved(figure, axes, path)


def _course(rows: Sequence[Row], name: str, title: str, path: Path) -> Path:
    pyplot = drawing("plotting an evaluation")
    figure, axes = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    for arm in dict.fromkeys((row["links"], row["linking"]) for row in rows):
        of_arm = [row for row in rows if (row["links"], row["linking"]) == arm and row.get(name)]
        points = sorted({row[name] for row in of_arm})
        means = [_mean([row["accuracy"] for row in of_arm if row[name] == point]) * 100 for point in points]
        axes.plot(points, means, marker="o", ms=3, label=f"{arm[1]} ({arm[0]})")
    axes.set_xlabel(title)
    axes.set_ylabel("answers right, %")
    return _saved(figure, axes, path)


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.legend(loc="outside upper center", fontsize="small", frameon=False, ncols=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
