"""The study of what ranks the pairs: its variants, and that it changes nothing for others."""

from __future__ import annotations

from typing import Any

import pytest
from nutgraf import load_compressor
from nutgraf.benchmarks.rows import read_rows
from nutgraf.benchmarks.studies import kv_match as study
from nutgraf.benchmarks.studies.kv_match import ADOPTED, variants, variants_of
from nutgraf.compressors.kv import repair, selection
from texts import write_people

TEXT = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."


@pytest.mark.slow
def test_the_adopted_variant_is_what_kv_match_does_and_no_other_is(zoo):
    reader = zoo.reader("llama")
    before = dict(selection.SCORES), selection.FLOOR, repair.VALUE_RIDGE
    made = variants_of(reader, TEXT, [3.0])
    assert before == (selection.SCORES, selection.FLOOR, repair.VALUE_RIDGE)
    assert {name for name, _ in made} == set(variants(reader))
    (ours,) = load_compressor("kv-match", reader=reader).compress([TEXT], ratio=3.0)
    assert made[ADOPTED, 3.0].to_bytes() == ours.to_bytes()
    # Constants alone change what is fitted, and a score what is kept.
    assert (made[f"{ADOPTED}, value ridge 1e-1", 3.0].positions == ours.positions).all()
    assert made[f"{ADOPTED}, value ridge 1e-1", 3.0].to_bytes() != ours.to_bytes()
    assert made["p^2", 3.0].to_bytes() != ours.to_bytes()


@pytest.mark.slow
def test_the_table_of_choices_goes_on_after_a_stop(zoo, tmp_path, monkeypatch):
    zoo.reader("llama").save_pretrained(tmp_path / "reader")
    write_people(tmp_path / "people.jsonl")
    lines = ["kv-match:budget=uniform,repair=none", "kv-match:score=random", "kv-match:score=snapkv,repair=none"]
    monkeypatch.setattr(study, "planes", lambda: lines)
    monkeypatch.setattr(study, "BLOCK", 2)  # of three questions
    asked: list[int] = []
    answers = study.answers

    def stopping(reader: Any, prompts: Any, **options: Any) -> list[str]:
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answers(reader, prompts, **options)

    def run(name: str) -> list[dict[str, Any]]:
        study.choices(str(tmp_path / "people.jsonl"), None, [2.0, 4.0], str(tmp_path / "reader"), tmp_path / name)
        return [{k: v for k, v in row.items() if k != "date"} for row in read_rows(tmp_path / name)]

    whole = run("whole.jsonl")
    assert [row["n"] for row in whole] == [3] * 6
    monkeypatch.setattr(study, "answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("parts.jsonl")
    assert run("parts.jsonl") == whole
    assert asked == [2 * 8, 8, 8]  # the first block is not asked again
    assert not list(tmp_path.glob("*.partial.json"))
