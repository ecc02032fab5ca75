"""The shipped models: answers come from the slots and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import nutgraf
import pytest
import torch
from nutgraf import Reader, load_compressor, pretrained
from nutgraf.benchmarks.quality.scoring import likelihoods
from nutgraf.compressors.fidelity.questions import sentences
from nutgraf.compressors.reader import packaged as packaged_lm
from nutgraf.recipes.data.answer_scores import f1
from nutgraf.recipes.data.templates import question_prompt

SAMPLE = Path(nutgraf.__file__).parent / "benchmarks" / "sample"
SOFT = ["500x-small", "icae-small"]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.from_pretrained(pretrained("reader-small"), dtype="float32")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    path = next(SAMPLE.glob("*.jsonl"))
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen: dict[str, dict] = {}
    for record in found:  # one question a passage
        if record.get("gold") is not None:
            seen.setdefault(record["passages"][record["gold"]]["text"], record)
    return list(seen.values())[:40]


def ask(reader: Reader, contexts: list, records: list[dict]) -> list[str]:
    prompts = [[c, f"\n\nQuestion: {r['question']}\nAnswer:"] for c, r in zip(contexts, records)]
    return reader.generate(prompts, 12, batch_size=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOFT)
def test_answers_come_from_the_slots_alone(reader, records, name):
    compressor = load_compressor(pretrained(name), reader=reader)
    texts = [r["passages"][r["gold"]]["text"] for r in records]
    passages = compressor.compress(texts)
    reads = compressor.reader
    before = ask(reads, passages, records)
    revived = [type(p).from_bytes(p.to_bytes()) for p in passages]
    del texts, passages, compressor  # neither the text nor the compressor is left
    assert all(p.text is None for p in revived)
    assert ask(reads, revived, records) == before
    elsewhere = ask(reads, revived[1:] + revived[:1], records)
    assert sum(a != b for a, b in zip(before, elsewhere)) >= len(records) // 4


@pytest.mark.slow
def test_reader_uses_its_context(reader, records):
    texts = [r["passages"][r["gold"]]["text"] for r in records]

    def found(contexts):
        answers = ask(reader, contexts, records)
        return sum(any(g.lower() in a.lower() for g in r["answers"]) for a, r in zip(answers, records))

    assert found(texts) > found([""] * len(texts))


def sentence_with_answer(record: dict) -> str:
    """The sentence of the gold passage that holds an answer."""
    text = record["passages"][record["gold"]]["text"]
    bounds = [bound for bound in sentences(text) if any(a in text[bound[0] : bound[1]] for a in record["answers"])]
    return text[bounds[0][0] : bounds[0][1]] if bounds else text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["icae-small", "llmlingua2-query-small", "llmlingua2-small"])
def test_compressed_passages_answer_better_than_none_and_than_those_of_others(reader, name):
    compressor = load_compressor(pretrained(name), reader=reader)
    lines = next(SAMPLE.glob("*.jsonl")).read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if (record := json.loads(line)).get("gold") is not None]
    records = records[::3]
    asked = [r["question"] for r in records] if compressor.query_aware else None
    passages = compressor.compress([sentence_with_answer(r) for r in records], asked)
    reads = compressor.reader or reader

    def score(contexts):
        answers = ask(reads, contexts, records)
        return sum(f1(a.strip(), r["answers"]) for a, r in zip(answers, records)) / len(records)

    found = score(passages)
    assert found > 1.5 * score([""] * len(records))
    assert found > 1.5 * score(passages[len(passages) // 2 :] + passages[: len(passages) // 2])


@pytest.fixture(scope="module")
def smollm2(model_cache: Path) -> Reader:
    return Reader.from_pretrained(pretrained("reader-smollm2"), dtype="bfloat16")


# By the answers' likelihood, which tells more from few questions than answers do; this reader takes its time.
@pytest.mark.slow
@pytest.mark.skipif(not packaged_lm.is_installed(), reason=f"needs {packaged_lm.INSTALL}")
@pytest.mark.parametrize("name", ["icae-smollm2", "mean-pool-smollm2", "salient-pool-query-smollm2", "xrag-smollm2"])
def test_slots_of_the_pretrained_reader_make_answers_likelier(smollm2, records, name):
    compressor = load_compressor(pretrained(name), reader=smollm2)
    asked = [r["question"] for r in records] if compressor.query_aware else None
    passages = compressor.compress([sentence_with_answer(r) for r in records], asked)
    references = smollm2.tokenize_batch([f" {r['answers'][0]}" for r in records])

    def score(contexts):
        prompts = [question_prompt([c], r["question"]) for c, r in zip(contexts, records)]
        found = likelihoods(compressor.reader, prompts, references, batch_size=20)
        return float(torch.cat([each.log_probs for each in found]).mean())

    found = score(passages)
    assert found > score([""] * len(records)) + 0.1
    assert found > score(passages[1:] + passages[:1]) + 0.05


def test_weights_stay_under_thirty_megabytes():
    folder = Path(pretrained("reader-small")).parent
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) < 30e6


def test_models_are_found_by_name_as_on_the_command_line(reader, tmp_path, monkeypatch):
    named = Reader.from_pretrained("reader-small", dtype="float32")
    assert (named.name, named.fingerprint) == ("reader-small", reader.fingerprint)
    folder = pretrained("icae-small")
    assert load_compressor("icae-small", named).fingerprint == load_compressor(folder, named).fingerprint
    made = load_compressor("kv-match:budget=uniform,probes=3", named)
    assert (made.config.budget, made.config.probes) == ("uniform", 3)
    for name, message in {
        "kv-mach": "There is no compressor 'kv-mach'.*kv-match.*icae-smollm2",
        "icae": "icae needs training",
        "kv-match:budget": "'budget' is no setting",
        "kv-match:": "is no setting",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_compressor(name, named)
    (tmp_path / "reader-small").mkdir()  # the user's own folder comes first
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no reader"):
        Reader.from_pretrained("reader-small")


@pytest.mark.slow
def test_the_surrogate_keeps_what_answers_without_reading_questions(smollm2):
    compressor = load_compressor("kv-surrogate-smollm2", reader=smollm2)
    text = "The treaty was signed in October 1648 in Westphalia. It ended thirty years of war in the Holy Roman Empire."
    (passage,) = compressor.compress([text], ratio=4)
    assert passage.ratio == pytest.approx(4, rel=0.05)
    (answer,) = smollm2.generate([[passage, "\n\nQuestion: When was the treaty signed?\nAnswer:"]], 8)
    assert "1648" in answer
    assert compressor.probes(text, None, None) == []
