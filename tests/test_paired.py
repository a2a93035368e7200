"""Arms against each other on the same questions."""

from __future__ import annotations

import random

import pytest

from kvlink_rag.evaluation.paired import differences, paired_table, question_of
from kvlink_rag.evaluation.scores import interval, interval_of_means


def rows_of(linking, values, data="squad.jsonl", links="mine", metric="accuracy"):
    arm = {"data": data, "links": links, "linking": linking}
    return [{**arm, "number": number, metric: value} for number, value in values.items()]


def test_only_questions_that_both_answered_count():
    too_long = {"data": "squad.jsonl", "links": "mine", "linking": "plain", "number": 3, "too_long": 9000}
    rows = [*rows_of("full", {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0}), *rows_of("plain", {1: 0.0, 2: 0.0, 4: 1.0}), too_long]
    (row,) = differences(rows)
    assert (row["first"], row["second"], row["data"]) == ("full (mine)", "plain (mine)", "squad.jsonl")
    assert row["questions"] == 2 and row["accuracy"][0] == 0.5 and "nll" not in row


def test_questions_of_one_number_in_two_files_of_one_name_are_no_pair():
    rows = [*rows_of("full", {0: 1.0, 1: 1.0}), *rows_of("plain", {0: 0.0, 1: 0.0})]
    asked = [{**row, "asked": row["linking"] if row["number"] else "the same"} for row in rows]
    (row,) = differences(asked)
    assert row["questions"] == 1


def test_sets_weigh_alike_and_the_multi_hop_sets_stand_apart():
    rows = []
    for name, first in (
        ("squad.jsonl", {0: 1.0}),
        ("hotpotqa.jsonl.gz", {0: 0.0, 1: 0.0}),
        ("musique.jsonl", {0: 1.0}),
    ):
        rows += rows_of("full", first, name, metric="nll") + rows_of(
            "plain", dict.fromkeys(first, 0.5), name, metric="nll"
        )
    found = {row["data"]: row for row in differences(rows)}
    assert list(found) == ["squad.jsonl", "hotpotqa.jsonl.gz", "musique.jsonl", "multi-hop, 2 sets", "all 3 sets"]
    assert found["hotpotqa.jsonl.gz"]["nll"] == (-0.5, -0.5, -0.5)
    assert found["multi-hop, 2 sets"]["nll"] == (0.0, 0.0, 0.0) and found["multi-hop, 2 sets"]["questions"] == 3
    assert found["all 3 sets"]["nll"][0] == round(0.5 / 3, 6)


def test_every_pair_of_arms_is_there_once():
    rows = [row for arm in "abc" for row in rows_of(arm, {0: 1.0})]
    pairs = [(row["first"][0], row["second"][0]) for row in differences(rows)]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


def test_on_the_same_questions_a_small_difference_shows_that_means_alone_would_hide():
    rng = random.Random(0)
    hard = {number: rng.uniform(0, 5) for number in range(60)}
    rows = rows_of("full", hard, metric="nll")
    rows += rows_of("plain", {number: value + rng.uniform(0, 0.2) for number, value in hard.items()}, metric="nll")
    mean, low, high = differences(rows)[0]["nll"]
    assert low < mean < high < 0
    full, plain = ([row["nll"] for row in rows if row["linking"] == each] for each in ("full", "plain"))
    assert interval(full)[1] > interval(plain)[0]


def test_the_interval_of_several_means_resamples_each_set_within_itself():
    assert interval_of_means([dict.fromkeys(range(500), 0.0), {"other": 1.0}]) == (0.5, 0.5)
    assert interval_of_means([{}, {0: 2.0, 1: 2.0}]) == (2.0, 2.0)
    values = dict(enumerate([0.0, 1.0] * 50))
    low, high = interval_of_means([values, {f"other {number}": value for number, value in values.items()}])
    alone = interval(list(values.values()))
    assert low < 0.5 < high and high - low < 0.8 * (alone[1] - alone[0])


def test_a_file_in_several_orders_is_resampled_by_question():
    """Asked ten times, a question is no surer than asked once."""
    once = {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0}
    alone = interval_of_means([once])
    assert interval_of_means([once] * 10) == pytest.approx(alone)
    assert interval_of_means([once, {0: 0.0, 1: 1.0}]) != pytest.approx(alone)
    names = [
        "a.jsonl",
        "a.jsonl gold@3",
        "a.jsonl shuffled seed 2",
        "a.jsonl 5 documents",
        "a.jsonl gold@1 2 documents",
    ]
    assert {question_of({"data": name, "number": 7}) for name in names} == {("a.jsonl", 7)}
    assert question_of({"data": "my gold.jsonl", "number": 7}) == ("my gold.jsonl", 7)


def test_the_table_says_points_and_nats():
    rows = [*rows_of("full", {0: 1.0, 1: 1.0}), *rows_of("plain", {0: 0.0, 1: 0.0})]
    assert paired_table(differences(rows)).splitlines() == [
        "| first minus second | data | questions | accuracy |",
        "|---|---|--:|--:|",
        "| full (mine) - plain (mine) | squad.jsonl | 2 | +100.0 (+100.0..+100.0) |",
    ]
