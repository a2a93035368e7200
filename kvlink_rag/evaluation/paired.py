"""How two arms differ on the very same questions: far narrower intervals than those of each arm alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from kvlink_rag.evaluation.scores import interval_of_means

Row = Mapping[str, Any]
METRICS = (("accuracy", 100), ("f1", 100), ("rouge_l", 100), ("nll", 1))
_ARRANGED = re.compile(r"( (gold@\d+|shuffled))?( \d+ documents)?( seed \d+)?$")  # as `kvlink eval` names a file
MULTI_HOP = ("hotpot", "2wiki", "musique")  # files of answers that no single document holds; KVLink reports them apart


def differences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first arm minus the second, for every pair of arms, over the questions that both answered.

    A row per pair and data set, then one over the multi-hop sets and one over all: the mean of the sets' means. Each
    metric is a triple: mean and 95 % interval, a bootstrap of the questions within their sets. Rows that name other
    questions under one number are no pair.
    """
    arms = list(dict.fromkeys((row["links"], row["linking"]) for row in rows))
    by_arm = {
        arm: {(r["data"], r["number"]): r for r in rows if (r["links"], r["linking"]) == arm and "too_long" not in r}
        for arm in arms
    }
    found = []
    for one, other in combinations(arms, 2):
        common = [
            place
            for place, row in by_arm[one].items()
            if place in by_arm[other] and row.get("asked") == by_arm[other][place].get("asked")
        ]
        names = list(dict.fromkeys(name for name, _ in common))
        pairs = {
            name: [(by_arm[one][place], by_arm[other][place]) for place in common if place[0] == name] for name in names
        }
        groups: list[tuple[str, list[str]]] = [(name, [name]) for name in names]
        multi_hop = [name for name in names if name.startswith(MULTI_HOP)]
        groups += [(f"multi-hop, {len(multi_hop)} sets", multi_hop)] * (1 < len(multi_hop) < len(names))
        groups += [(f"all {len(names)} sets", names)] * (len(names) > 1)
        for title, members in groups:
            row: dict[str, Any] = {"first": _name(one), "second": _name(other), "data": title}
            row["questions"] = sum(len(pairs[name]) for name in members)
            found.append(row | dict(_means(pairs[name] for name in members)))
    return found


def paired_table(rows: Sequence[Row]) -> str:
    """`differences` as a Markdown table, in points (accuracy, F1, ROUGE-L) and nats a token (NLL)."""
    metrics = [(name, scale) for name, scale in METRICS if any(name in row for row in rows)]
    lines = [
        "| first minus second | data | questions | " + " | ".join(name for name, _ in metrics) + " |",
        "|---|---|--:|" + "--:|" * len(metrics),
    ]
    for row in rows:
        cells = [f"{row['first']} - {row['second']}", row["data"], str(row["questions"])]
        lines.append("| " + " | ".join(cells + [_cell(row.get(name), scale) for name, scale in metrics]) + " |")
    return "\n".join(lines)


def _means(sets: Iterable[list[tuple[Row, Row]]]) -> Iterable[tuple[str, tuple[float, float, float]]]:
    sets = list(sets)
    for metric, _ in METRICS:
        values = [
            {
                question_of(first): first[metric] - second[metric]
                for first, second in pairs
                if None not in (first.get(metric), second.get(metric))
            }
            for pairs in sets
        ]
        if all(values):
            mean = sum(sum(each.values()) / len(each) for each in values) / len(values)
            yield metric, (round(mean, 6), *(round(bound, 6) for bound in interval_of_means(values)))


def question_of(row: Row) -> tuple[str, int]:
    """What a row asks, whatever the order and number of its documents: its file, and its number there."""
    return _ARRANGED.sub("", row["data"]), row["number"]


def _name(arm: tuple[str, str]) -> str:
    return f"{arm[1]} ({arm[0]})"


def _cell(found: tuple[float, float, float] | None, scale: int) -> str:
    if found is None:
        return ""
    mean, low, high = (value * scale for value in found)
    return f"{mean:+.1f} ({low:+.1f}..{high:+.1f})" if scale == 100 else f"{mean:+.3f} ({low:+.3f}..{high:+.3f})"
