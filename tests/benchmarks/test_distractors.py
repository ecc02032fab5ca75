"""Passages before a question: how many, which, and where the gold one stands."""

from __future__ import annotations

import pytest
from nutgraf.benchmarks.loading import with_passages
from nutgraf.recipes.data.corpus import Record


def record(i: int, n: int = 1, answer: str | None = None) -> Record:
    texts = [f"Passage {i}-{k} tells of place number {i}." for k in range(n)]
    answer = answer or f"Town{i}"
    texts[n - 1] += f" It is {answer}."
    return Record(
        f"Question {i}?", (answer,), tuple(texts), tuple(f"title {i}-{k}" for k in range(n)), n - 1, "toy", id=str(i)
    )


RECORDS = [record(i) for i in range(12)]


def test_distractors_are_topped_up_without_the_answer():
    records = [*RECORDS, record(99, answer="Town3")]
    made = with_passages(records, 5)
    for before, after in zip(records, made):
        assert len(set(after.passages)) == len(after.passages) == len(after.titles) == 5
        assert after.gold_text == before.gold_text
        assert sum(f"{before.answers[0]}." in passage for passage in after.passages) == 1
        assert all(title.removeprefix("title ") in text for title, text in zip(after.titles, after.passages))
    assert len({after.gold for after in made}) > 1


def test_distractors_are_cut_and_own_ones_come_first():
    long = record(50, 8)
    made = with_passages([long], 3)[0]
    assert len(made.passages) == 3
    assert made.gold_text == long.gold_text
    more = with_passages([long], 10, pool=[long, *RECORDS])[0]
    assert set(long.passages) < set(more.passages)


def test_a_question_gets_the_same_passages_whatever_the_limit():
    assert with_passages(RECORDS, 4)[7] == with_passages([RECORDS[7]], 4, pool=RECORDS)[0]
    assert with_passages(RECORDS, 4, seed=1)[7] != with_passages(RECORDS, 4)[7]


def test_records_without_a_gold_passage_keep_none():
    from dataclasses import replace

    made = with_passages([replace(record(1, 5), gold=None)], 3)[0]
    assert made.gold is None
    assert len(made.passages) == 3


def test_too_many_passages_are_refused():
    with pytest.raises(ValueError, match="finds only 12 of 13"):
        with_passages(RECORDS, 13)
    with pytest.raises(ValueError, match="at least one passage"):
        with_passages(RECORDS, 0)
