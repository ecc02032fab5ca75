"""The data that ships with the package: schema, size, licences, and the script that builds the full sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from nutgraf.benchmarks import build_data
from nutgraf.benchmarks.loading import SAMPLE, SAMPLE_ARTICLES, SAMPLE_QUESTIONS, find_records
from nutgraf.recipes.data.corpus import read_documents, read_records, split_paragraphs


def test_sample_questions_have_the_schema() -> None:
    lines = SAMPLE_QUESTIONS.read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        assert set(row) == {"id", "question", "answers", "passages", "gold", "source", "half"}
        assert row["half"] in ("tune", "report")
        assert row["question"].strip() == row["question"] != ""
        gold = row["passages"][row["gold"]]
        assert set(gold) == {"title", "text"}
        assert any(answer in gold["text"] for answer in row["answers"])
    records = read_records(SAMPLE_QUESTIONS)
    assert len(records) == len(lines) >= 600
    assert len({passage for record in records for passage in record.passages}) >= 300
    assert len({record.id for record in records}) == len(records)


def test_halves_share_no_article() -> None:
    titles = {
        half: {t for r in read_records(SAMPLE_QUESTIONS, half=half) for t in r.titles} for half in ("tune", "report")
    }
    assert titles["tune"]
    assert titles["report"]
    assert titles["tune"].isdisjoint(titles["report"])


def test_sample_articles_are_documents() -> None:
    documents = list(read_documents(SAMPLE_ARTICLES))
    assert len(documents) >= 20
    assert all(document.startswith("# ") for document in documents)
    assert all(len(split_paragraphs(document)) >= 5 for document in documents)
    questions = SAMPLE_QUESTIONS.read_text(encoding="utf-8")
    assert not any(paragraph in questions for document in documents for paragraph in split_paragraphs(document))


def test_sample_is_small_and_clean() -> None:
    for path in (SAMPLE_QUESTIONS, SAMPLE_ARTICLES):
        data = path.read_bytes()
        assert b"\0" not in data
        assert b"\r" not in data
        assert "\ufffd" not in data.decode("utf-8")
    assert SAMPLE_QUESTIONS.stat().st_size < 1_000_000
    assert SAMPLE_ARTICLES.stat().st_size < 300_000


def test_licences_and_attribution_stand_beside_the_data() -> None:
    card = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for needed in ("CC BY-SA 4.0", "CC BY-SA 3.0", "Rajpurkar", SAMPLE_QUESTIONS.name, SAMPLE_ARTICLES.name, "Changes"):
        assert needed in card
    for document in read_documents(SAMPLE_ARTICLES):
        assert f"[{document.splitlines()[0][2:]}](https://en.wikipedia.org/wiki/" in card
    questions = read_records(SAMPLE_QUESTIONS)
    for title in {title for record in questions for title in record.titles}:
        assert f"*{title}*" in card
    assert f"{len(questions)} questions" in card


def test_find_records_spreads_a_limit() -> None:
    some = find_records("sample", half="report", limit=20)
    assert len(some) == 20
    assert len(Counter(record.titles for record in some)) >= 3
    with pytest.raises(ValueError, match="no questions"):
        find_records("sample", half="absent")
    with pytest.raises(ValueError, match="at least 1"):
        find_records("sample", limit=0)


# -- building the full sets ------------------------------------------------------------------------------------------

SQUAD = [
    {"id": f"{title}-{p}-{q}", "title": title, "context": f"{title} passage {p} tells of thing {q}.", "question": f"What {q}?",
     "answers": {"text": [f"thing {q}", f"thing {q}", f"{q}"]}}
    for title in ("A_b", "C", "D", "E") for p in range(4) for q in (p,)
]  # fmt: skip
NQ = [
    {
        "query_id": "7",
        "query": "who won?",
        "answers": ["Ann"],
        "positive_passages": [{"title": "T", "text": "Ann won."}],
        "negative_passages": [{"title": "N", "text": f"Bob {i}."} for i in range(12)]
        + [{"title": "N", "text": "Ann?"}],
    },
    {"query_id": "8", "query": "q?", "answers": ["x"], "positive_passages": [], "negative_passages": []},
]
HOTPOT = [
    {
        "id": "h",
        "question": "which?",
        "answer": "yes",
        "context": {"title": ["A", "B"], "sentences": [["One. ", "Two."], ["Three."]]},
        "supporting_facts": {"title": ["B"], "sent_id": [0]},
    }
]


def test_squad_is_turned_into_records() -> None:
    found = list(build_data.squad(SQUAD))
    assert found[0] == {
        "id": "A_b-0-0",
        "question": "What 0?",
        "answers": ["thing 0", "0"],
        "passages": [{"title": "A b", "text": "A_b passage 0 tells of thing 0."}],
        "gold": 0,
        "source": "squad_v1.1_dev",
        "half": found[0]["half"],
    }
    halves = {
        title: {r["half"] for r in found if r["passages"][0]["title"] == title} for title in ("A b", "C", "D", "E")
    }
    assert all(len(half) == 1 for half in halves.values())


def test_squad_with_distractors() -> None:
    found = list(build_data.squad_10(SQUAD, passages=6))
    assert found == list(build_data.squad_10(SQUAD, passages=6))
    for row in found:
        texts = [p["text"] for p in row["passages"]]
        assert len(set(texts)) == 6
        assert row["answers"][0] in texts[row["gold"]]
        assert sum(any(a in text for a in row["answers"]) for text in texts) == 1
        assert sum(p["title"] == row["passages"][row["gold"]]["title"] for p in row["passages"]) > 1
    assert len({row["gold"] for row in found}) > 2


def test_nq_and_hotpot() -> None:
    (row,) = build_data.nq_10(NQ)
    assert len(row["passages"]) == 10
    assert row["passages"][row["gold"]]["text"] == "Ann won."
    assert all("Ann?" not in p["text"] for p in row["passages"])
    (alone,) = build_data.nq(NQ)
    assert [p["text"] for p in alone["passages"]] == ["Ann won."]
    (row,) = build_data.hotpotqa(HOTPOT)
    assert row["passages"] == [{"title": "A", "text": "One. Two."}, {"title": "B", "text": "Three."}]
    assert row["gold"] == 1


def test_build_writes_files_that_the_benchmark_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_data, "fetch", lambda source: iter(SQUAD))
    path = build_data.build("squad", tmp_path)
    assert path == tmp_path / "squad.jsonl"
    assert len(read_records(path)) == len(SQUAD)


def test_build_says_so_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match="needs the network"):
        build_data.build("squad", tmp_path)
    with pytest.raises(ValueError, match="known are"):
        build_data.build("absent", tmp_path)
    assert not list(tmp_path.iterdir())
