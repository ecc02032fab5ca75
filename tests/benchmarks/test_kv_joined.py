"""The study of joined passages: which passages stand in which line."""

from __future__ import annotations

import pytest
from nutgraf.benchmarks.methods import prompt_size
from nutgraf.benchmarks.studies.kv_joined import GOLD, OTHERS, compressors, lines_of
from nutgraf.recipes.data.corpus import Record
from nutgraf.recipes.data.templates import question_prompt

PASSAGES = (
    "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe.",
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
)


@pytest.mark.slow
def test_lines_hold_each_passage_compressed_on_its_own(zoo):
    reader = zoo.reader("llama")
    record = Record("When was it signed?", ("1648",), PASSAGES, ("", ""), 0, "test")
    methods = compressors(reader, [3])
    lines = lines_of(reader, record, methods, [1.0, 3.0], parts=True)
    assert lines["full", None] == list(PASSAGES)
    assert lines["none", None] == []
    alone = {name: method.compress(list(PASSAGES), ratio=3.0) for name, method in methods.items()}
    for name, passages in alone.items():
        assert [p.to_bytes() for p in lines[name, 3.0]] == [p.to_bytes() for p in passages]
    assert [len(passage.first) for passage in lines["kv-match:reread=3", 3.0]] == [3, 3]
    assert [round(passage.ratio) for passage in lines[GOLD, 3.0]] == [3, 1]
    assert [round(passage.ratio) for passage in lines[OTHERS, 3.0]] == [1, 3]
    budget, text = (
        prompt_size(reader, question_prompt(lines[name, 3.0], record.question)) for name in ("kv-match", "truncate")
    )
    assert text <= budget
