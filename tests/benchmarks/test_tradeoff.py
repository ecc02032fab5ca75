"""Pooled shares, runs that are resumed, slots by score."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from nutgraf.benchmarks import baselines, metrics
from nutgraf.benchmarks import methods as lines
from nutgraf.benchmarks.quality import pooled, quality, remaining, source_hash
from nutgraf.benchmarks.speed import timing
from nutgraf.benchmarks.studies import allocation
from nutgraf.compressors import Reader, make_compressor
from nutgraf.recipes.data.corpus import Record
from nutgraf.recipes.data.templates import question_prompt

PLACES = ["Warsaw", "Prague", "Vienna", "Lisbon", "Dublin", "Oslo", "Athens", "Madrid"]
QUIET = quality.Settings(dataset="toy", max_new_tokens=3, batch_size=4, progress=False)


def record(i: int) -> Record:
    texts = tuple(f"Traveller {k} was born in {PLACES[k]}. Rain fell on day {k}, and more." for k in (i, (i + 1) % 8))
    return Record(f"Where was traveller {i} born?", (PLACES[i],), texts, ("", ""), 0, "toy", id=str(i))


RECORDS = [record(i) for i in range(6)]


@pytest.fixture(scope="module")
def reader(zoo: ModuleType) -> Reader:
    return zoo.reader("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def compressor(reader: Reader) -> Any:
    return make_compressor("mean-pool", reader, encoder="embeddings").eval()


def table(compressor: Any, ratios: Sequence[float], names: Sequence[str] = ("truncate",)) -> list[lines.Method]:
    return lines.lines([lines.Compressed(compressor, r) for r in ratios], baselines=names, shuffled=False)


# -- what a row keeps --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_keep_what_pooling_needs(reader: Reader, compressor: Any) -> None:
    seen: list[str] = []
    settings = replace(QUIET, ttft=2)
    found = quality.evaluate(reader, table(compressor, [4]), RECORDS, settings, lambda line: seen.append(line.method))
    assert seen == ["full", "none", "mean-pool", "truncate"]
    for line in found:
        assert line.row["f1_each"] == pytest.approx(line.scores["f1"], abs=1e-3)
        assert line.row["questions"] == quality.questions_hash(RECORDS)
        assert line.row["ttft_ms"] > 0
        assert line.row["ttft_full_ms"] > 0
    kinds = [line.row["interface"] for line in found]
    assert kinds == ["text", "text", "embeds", "text"]
    assert not any("reader_tuned" in line.row for line in found)
    assert quality.questions_hash(RECORDS[1:]) != quality.questions_hash(RECORDS)


def test_first_token_times_refuse_nothing_to_time(reader: Reader) -> None:
    prompt = question_prompt(["A passage."], "Who?")
    ours, theirs = timing.first_token_times(reader, [prompt], reader, [prompt], requests=5, repeats=1)
    assert min(ours, theirs) > 0
    with pytest.raises(ValueError, match="at least one request"):
        timing.first_token_times(reader, [prompt], reader, [prompt], requests=0)


def test_sentences_are_picked_by_meaning(reader: Reader) -> None:
    passages = ["The recipe needs two eggs. A feline slept on the rug. Shares fell by three points."]
    budget = reader.length(question_prompt(["A feline slept on the rug."], "Where did the cat lie?"))
    found = baselines.extract_embedder(reader, "Where did the cat lie?", passages, budget, random.Random(0))
    assert found == ["A feline slept on the rug."]


# -- runs that go on ---------------------------------------------------------------------------------------------------


def test_what_is_measured_is_left_out(reader: Reader, compressor: Any) -> None:
    first, more = table(compressor, [4]), table(compressor, [4, 8])
    rows = [line.row for line in quality.evaluate(reader, first, RECORDS, QUIET)]
    assert remaining.remaining(first, rows, reader, RECORDS, QUIET) == []
    left = remaining.remaining(more, rows, reader, RECORDS, QUIET)
    assert [(m.name, m.ratio) for m in left] == [("full", None), ("none", None), ("mean-pool", 8), ("truncate", 8)]
    assert len(remaining.remaining(first, rows[:2], reader, RECORDS, QUIET)) == 4
    # other questions, other settings, other weights, other code: measured anew
    assert len(remaining.remaining(first, rows, reader, RECORDS[1:], QUIET)) == 4
    assert len(remaining.remaining(first, rows, reader, RECORDS, replace(QUIET, seed=1))) == 4
    assert len(remaining.remaining(first, rows, reader, RECORDS, replace(QUIET, ttft=1))) == 4
    other = make_compressor("mean-pool", reader, encoder="embeddings", ratio=7.0).eval()
    assert [m.name for m in remaining.remaining(table(other, [4]), rows, reader, RECORDS, QUIET)][2:] == [
        "mean-pool",
        "truncate",
    ]
    assert len(remaining.remaining(first, [row | {"code": "old"} for row in rows], reader, RECORDS, QUIET)) == 4


def test_the_code_hash_follows_imports_and_no_comments(tmp_path: Path) -> None:
    files = {
        "a/one.py": "from .two import f\nfrom ..b import three\n",
        "a/two.py": '"""Doc."""\ndef f():\n    """Doc."""\n    return 1\n',
        "b/three.py": "x = 1\n",
        "b/four.py": "y = 1\n",
    }

    def hash_of(folder: str, changed: dict[str, str]) -> str:
        for name, text in {**files, **changed}.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source_hash.source_hash(("a.one",), tmp_path / folder)

    before = hash_of("before", {})
    other = '"""Other."""\n\n# a comment\ndef f():\n    return 1\n'
    assert hash_of("comments", {"a/two.py": other, "b/four.py": "y = 2\n"}) == before
    moved = {"a/two.py": "from ..b.moved import f\n", "b/moved.py": "def f():\n    return 1\n"}
    assert hash_of("moved", moved) == before, "a definition may move"
    assert hash_of("changed", {"b/three.py": "x = 2\n"}) != before
    with pytest.raises(ValueError, match="no module"):
        source_hash.source_hash(("a.none",), tmp_path)


def test_another_method_is_other_code(reader: Reader, compressor: Any) -> None:
    icae = make_compressor("icae", reader, mem_size=4).eval()
    assert len({source_hash.code_of(None), source_hash.code_of(compressor), source_hash.code_of(icae)}) == 3


# -- pooling -----------------------------------------------------------------------------------------------------------


def scores(share: float, n: int = 120, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def test_a_pooled_share_is_the_mean_over_sets_and_its_interval_holds_it() -> None:
    easy = (scores(0.5), np.zeros(120), scores(0.8))
    hard = (scores(0.1, 60, 1), np.zeros(60), scores(0.4, 60, 1))
    share, low, high = metrics.pooled_recovered_share([easy, hard])
    each = [s.mean() / f.mean() for s, _, f in (easy, hard)]
    assert share == pytest.approx(np.mean(each))
    assert low < share < high
    wide = metrics.pooled_recovered_share([tuple(s[:20] for s in easy), tuple(s[:20] for s in hard)])
    assert wide[2] - wide[1] > high - low
    assert metrics.pooled_recovered_share([easy, (scores(0.1), scores(0.3, seed=2), scores(0.3, seed=3))]) is None
    with pytest.raises(ValueError, match="at least one set"):
        metrics.pooled_recovered_share([])
    with pytest.raises(ValueError, match="paired"):
        metrics.pooled_recovered_share([(np.zeros(3), np.zeros(3), np.ones(4))])


def row(dataset: str, method: str, share: float, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    each = scores(0.6 * share, 100)
    made = {"suite": "quality", "dataset": dataset, "half": "report", "method": method, "questions": "q", "reader": "r"}
    made |= {
        "n": 100,
        "f1": float(each.mean()),
        "f1_each": each.tolist(),
        "em": 0.1,
        "containment": 0.1,
        "rouge_l": 0.1,
    }
    made |= {
        "reader_tokens": 100 / (ratio or 1),
        "recovered_share": share,
        "ci_low": share - 0.1,
        "ci_high": share + 0.1,
    }
    made |= {"ttft_ms": 20.0 / (ratio or 1), "ttft_full_ms": 20.0, "interface": "embeds", "skipped": 0}
    made |= {} if ratio is None else {"ratio": ratio, "ratio_asked": ratio}
    return made | more


def one_set(name: str) -> list[dict[str, Any]]:
    text = {"interface": "text"}
    return [
        row(name, "full", 1.0, **text) | {"ratio": 1.0},
        row(name, "none", 0.0, **text),
        row(name, "mean-pool", 0.7, 4.0),
        row(name, "mean-pool", 0.5, 8.0),
        row(name, "gist", 0.9, 4.0, reader_tuned=True),
        row(name, "llmlingua2", 0.6, 4.0, **text),
        row(name, "truncate", 0.4, 4.0, budget_of="mean-pool", **text),
        row(name, "extract", 0.8, 8.0, budget_of="mean-pool", **text),
        row(name, "xrag", 0.2, **({"ratio": 150.0})),
        row(name, "xrag-shuffled", 0.05, **({"ratio": 150.0})),
    ]


ROWS = [*one_set("qa_dev_squad"), *one_set("qa_dev_qamr")]


def test_only_paired_rows_are_pooled() -> None:
    old = [row("qa_dev_squad", "mean-pool", 0.1, 4.0), row("qa_dev_squad", "icae", 0.9, 4.0, questions="others")]
    elsewhere = [row("qa_dev_squad", "500x", 0.3, 4.0)]  # on one set alone
    rows = [*old, *ROWS, *elsewhere, row("qa_dev_squad", "mean-pool", 0.1, 4.0, half="tune")]
    found = {
        (r["method"], r["ratio_asked"]): r
        for r in pooled.pool([r | {"ratio_asked": r.get("ratio_asked")} for r in rows])
        if r.get("ratio_asked")
    }
    assert ("icae", 4.0) not in found
    assert ("500x", 4.0) not in found
    mine = found["mean-pool", 4.0]
    assert mine["datasets"] == ["qa_dev_squad", "qa_dev_qamr"]
    assert mine["n"] == 200
    assert mine["ci_low"] < mine["recovered_share"] < mine["ci_high"]
    assert mine["ttft_speedup"] == pytest.approx(4)


def test_times_count_in_relation_to_the_full_text_of_the_same_minute() -> None:
    slow = [r | {"ttft_ms": 3 * r["ttft_ms"], "ttft_full_ms": 60.0} if r["method"] == "mean-pool" else r for r in ROWS]
    assert [r["ttft_ms"] for r in pooled.pool(slow)] == [r["ttft_ms"] for r in pooled.pool(ROWS)]


def test_the_best_line_of_a_budget_has_no_tuned_reader() -> None:
    rows = pooled.pool(ROWS)
    assert pooled.best(rows, 4, "soft")["method"] == "mean-pool"
    assert pooled.best(rows, 16, "soft") is None


def test_a_tuned_reader_is_compared_with_full_text_tuned_alike() -> None:
    better = [
        row(name, "full-text", 1.3, reader_tuned=True) | {"ratio": 1.0} for name in ("qa_dev_squad", "qa_dev_qamr")
    ]
    rows = pooled.pool([*ROWS, *better])
    before = next(r for r in pooled.pool(ROWS) if r["method"] == "gist")
    after = next(r for r in rows if r["method"] == "gist")
    assert after["against"] == "full-text"
    assert after["recovered_share"] < before["recovered_share"]
    assert pooled.best(rows, 4, "soft")["method"] in ("gist", "mean-pool")
    assert all(pooled.budget_of(r) is None for r in rows if r["method"] == "full-text")


# -- slots by score ----------------------------------------------------------------------------------------------------


def test_slots_by_score_spend_the_same_budget(reader: Reader, compressor: Any) -> None:
    uniform = lines.Compressed(compressor, 4)
    same = uniform.contexts(reader, RECORDS)
    for scorer in ("bm25", "gold"):
        by_score = allocation.ByScore(compressor, 4, scorer=scorer, temperature=0.5)
        for r, pieces, plain in zip(RECORDS, by_score.contexts(reader, RECORDS), same):
            assert sum(p.slots for p in pieces) == sum(p.slots for p in plain)
            assert pieces[r.gold].slots > plain[r.gold].slots
    mild = allocation.ByScore(compressor, 4, scorer="gold", temperature=1e6)
    assert [p.slots for p in mild.contexts(reader, RECORDS)[0]] == [p.slots for p in same[0]]


def test_allocation_rows(reader: Reader, compressor: Any) -> None:
    seen: list[dict[str, Any]] = []
    rows = allocation.allocation_rows(
        reader,
        [lines.Compressed(compressor, 4)],
        RECORDS,
        QUIET,
        scorers=["bm25"],
        temperatures=[1, 0.3],
        on_row=seen.append,
    )
    assert [(r["method"], r.get("allocation"), r.get("temperature")) for r in rows] == [
        ("full", None, None),
        ("none", None, None),
        ("mean-pool", "uniform", None),
        ("mean-pool", "score", 1),
        ("mean-pool", "score", 0.3),
    ]
    assert seen == rows
    assert all(r["test"] == "allocation" for r in rows)
    assert rows[3]["reader_tokens"] == rows[2]["reader_tokens"]
    for name in ("f1", "nll"):
        key = f"{name}_minus_uniform"
        assert rows[3][f"{key}_low"] <= rows[3][key] <= rows[3][f"{key}_high"]
    assert json.dumps(rows)
    with pytest.raises(ValueError, match="no score"):
        allocation.ByScore(compressor, 4, scorer="luck")
    with pytest.raises(ValueError, match="makes text"):
        allocation.ByScore(make_compressor("selective-context", reader), 4)
