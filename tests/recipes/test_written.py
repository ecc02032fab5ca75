"""Answers of a reader of the text: those of plain prompts, and the same file after any stop."""

from __future__ import annotations

import pytest
from nutgraf.recipes.data import written
from nutgraf.recipes.data.corpus import read_records
from nutgraf.recipes.data.records import Material
from nutgraf.recipes.data.templates import question_prompt

PASSAGES = [
    "Marie Curie was born in Warsaw in 1867, won two prizes in Sweden, and worked in Paris with Pierre Curie.",
    "The treaty was signed in 1648 in Westphalia by the delegates of 109 parties, ending thirty years of war in Europe.",
    "Rivers carry sediment to the sea, and the Amazon, the Nile and the Yangtze are among the longest rivers on Earth today.",
]


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_answers_are_those_of_plain_prompts(zoo, name):
    reader = zoo.reader(name)
    asked = [["Where was she born?", "Who?"], [], ["How long?", "Why is it so?", "When?"]]
    got = written.answers(reader, PASSAGES, asked, 6)
    want = [
        [reader.generate([question_prompt([reader.identity(text)], q)], 6)[0].strip() for q in own]
        for text, own in zip(PASSAGES, asked)
    ]
    assert got == want


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_file(zoo, tmp_path):
    reader = zoo.reader("llama")
    material = Material([], [PASSAGES], 200)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    written.write(reader, material, whole, 10, 2)
    records = read_records(whole)
    assert {record.source for record in records} == {"written"}
    assert {record.id for record in records} == {f"written-{i}" for i in range(10)}
    data = whole.read_bytes()
    for cut in (1, len(data) // 3, len(data) - 5, len(data)):
        part.write_bytes(data[:cut])
        written.write(reader, material, part, 10, 2)
        assert part.read_bytes() == data
