"""The quality and reading suites on a tiny random reader: rows, budgets, fixed lines, controls."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from nutgraf.benchmarks import baselines, rows
from nutgraf.benchmarks import methods as lines
from nutgraf.benchmarks.quality import quality, reading, scoring
from nutgraf.benchmarks.speed import entrants, speed, timing
from nutgraf.compressors import CompressedPassage, CompressorConfig, Reader, SoftCompressor, make_compressor
from nutgraf.recipes.data.corpus import Record
from nutgraf.recipes.data.templates import question_prompt

PLACES = ["Warsaw", "Prague", "Vienna", "Lisbon", "Dublin", "Oslo", "Athens", "Madrid"]
QUIET = quality.Settings(dataset="toy", max_new_tokens=4, batch_size=4, progress=False)
KEYS = {
    "suite", "commit", "command", "device", "dtype", "seed", "date", "dataset", "passages", "method", "ratio",
    "reader_tokens", "n", "em", "f1", "containment", "rouge_l", "token_em", "answer_ppl", "kl_to_full",
}  # fmt: skip


@dataclass
class StridedConfig(CompressorConfig):
    method: ClassVar[str] = "strided-test"
    ratio: float = 4.0


class Strided(SoftCompressor):
    """Every n-th token's embedding: no training, some content."""

    config_class = StridedConfig
    interface = "embeds"

    def encode(self, texts: Sequence[str], query: Any = None, ratio: float | None = None, vectors: Any = None) -> list:
        made = []
        for text in texts:
            ids = torch.tensor(self.reader.tokenize(text), dtype=torch.long)
            slots = self.reader.embed(ids[:: int(ratio or self.config.ratio)])
            made.append(CompressedPassage("embeds", len(ids), "strided", self.reader.fingerprint, embeds=slots))
        return made


@pytest.fixture(scope="module")
def reader(zoo: ModuleType) -> Reader:
    return zoo.reader("llama")


@pytest.fixture
def compressor(reader: Reader) -> Strided:
    return Strided(StridedConfig(), reader)


def record(i: int) -> Record:
    """Three passages, the gold one at i % 3, about eight places."""
    who = [(i + k) % 8 for k in range(3)]
    texts = [f"Traveller {k} was born in {PLACES[k]}. Rain fell on day {k}, and more." for k in who]
    gold = i % 3
    texts[0], texts[gold] = texts[gold], texts[0]
    return Record(f"Where was traveller {i} born?", (PLACES[i],), tuple(texts), ("",) * 3, gold, "toy", id=str(i))


RECORDS = [record(i) for i in range(8)]


@pytest.mark.slow
def test_evaluate_gives_a_row_for_each_line(reader: Reader, compressor: Strided) -> None:
    methods = lines.lines([lines.Compressed(compressor, 6)], baselines=list(baselines.BASELINES), shuffled=True)
    found = quality.evaluate(reader, methods, RECORDS, QUIET)
    by_name = {line.method: line.row for line in found}
    assert list(by_name) == ["full", "none", "strided-test", "strided-test-shuffled", *baselines.BASELINES]
    for row in by_name.values():
        assert set(row) >= KEYS - ({"ratio"} if row["method"] == "none" else set())
    full, none, soft = by_name["full"], by_name["none"], by_name["strided-test"]
    assert full["ratio"] == pytest.approx(1)
    assert full["kl_to_full"] == 0
    assert none["kl_to_full"] > 0
    assert none["reader_tokens"] < soft["reader_tokens"] < full["reader_tokens"]
    assert full["kept_numbers"] == full["kept_names"] == 1
    assert by_name["truncate"]["kept_names"] < 1
    assert "kept_names" not in soft
    assert 4 < soft["ratio"] <= 6
    assert soft["compressor"] == compressor.fingerprint
    for name in baselines.BASELINES:
        assert by_name[name]["reader_tokens"] <= soft["reader_tokens"]
        assert by_name[name]["budget_of"] == "strided-test"


@pytest.mark.slow
def test_passages_that_share_a_budget_are_compressed_together(reader: Reader) -> None:
    (method,) = lines.named_methods(reader, ["exit:pooled=true@4"], [])
    assert method.name == "exit:pooled=true"
    records = [replace(one, question=one.question + end) for end in ("", " Say.") for one in RECORDS][:12]
    for record, found in zip(records, method.contexts(reader, records)):
        alone = method.compressor.compress(list(record.passages), record.question, 4)
        assert [(p.text, p.info) for p in found] == [(p.text, p.info) for p in alone]


@pytest.mark.slow
def test_ragged_passages_count_their_pairs_and_give_the_full_answers_at_ratio_1(reader: Reader) -> None:
    made = lines.named_methods(reader, ["kv-match@1,4", "kv-match:repair=none,probes=2"], [3.0])
    alone = [replace(one, passages=one.passages[:1], titles=("",), gold=0) for one in RECORDS]
    found = quality.evaluate(reader, lines.lines(made, baselines=[], shuffled=False), alone, QUIET)
    full, _, whole, quarter, plain = found
    assert [line.method for line in found[2:]] == ["kv-match", "kv-match", "kv-match:repair=none,probes=2"]
    assert whole.predictions == full.predictions
    assert whole.row["kl_to_full"] < 1e-5
    assert whole.row["reader_tokens"] == full.row["reader_tokens"]
    assert plain.ratio == 3.0
    assert quarter.row["ratio"] == pytest.approx(4, rel=0.02)
    assert quarter.row["reader_tokens"] < plain.row["reader_tokens"] < full.row["reader_tokens"]
    assert quarter.row["bytes_per_passage"] < 0.4 * whole.row["bytes_per_passage"]
    with pytest.raises(ValueError, match="'repair' is no setting"):
        lines.named_methods(reader, ["kv-match:repair@4"], [])


@pytest.mark.slow
def test_a_tuned_reader_reads_its_own_lines_and_no_others(reader: Reader) -> None:
    gist = make_compressor("gist", reader, r=4, ratio=3.0).eval()
    with torch.no_grad():
        for parameter in gist.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    compressed = lines.Compressed(gist)
    assert compressed.reads(reader) is gist.reader
    assert lines.Shuffled(compressed).reads(reader) is gist.reader
    methods = lines.lines([compressed], baselines=["truncate"], shuffled=True)
    found = {line.method: line for line in quality.evaluate(reader, methods, RECORDS, QUIET)}
    prompts = lines.prompts(compressed, reader, RECORDS)
    assert found["gist"].predictions == [a.strip() for a in gist.reader.generate(prompts, 4)]
    full = [question_prompt(list(r.passages), r.question) for r in RECORDS]
    assert found["full"].predictions == [a.strip() for a in reader.generate(full, 4)]
    assert found["truncate"].row["reader_tokens"] <= found["gist"].row["reader_tokens"]
    request = timing.Request(RECORDS[0].question, tuple(RECORDS[0].passages))
    given = [entrants.FULL, entrants.Entrant.of(compressed)]
    full, own = timing.time_requests(reader, given, [request], repeats=1, warmup=0, decode_tokens=2).values()
    assert own.slots < full.slots


def test_fixed_lines_are_what_the_reader_says(reader: Reader) -> None:
    full, none = quality.evaluate(reader, [lines.FullText(), lines.NoContext()], RECORDS, QUIET)
    question = f"Question: {RECORDS[0].question}\nAnswer:"
    text = "\n\n".join([*RECORDS[0].passages, question])
    assert full.predictions[0] == reader.generate([text], 4, stop=["\n"])[0].strip()
    assert none.predictions[0] == reader.generate([question], 4, stop=["\n"])[0].strip()
    assert full.scores["reader_tokens"][0] == reader.length(text)
    logits = reader.target_logits([text], [" Warsaw"])[0].log_softmax(-1)
    ids = torch.tensor(reader.tokenize(" Warsaw"))
    assert full.scores["nll"][0] == pytest.approx(-float(logits[range(len(ids)), ids].sum()), rel=1e-4)


def test_identity_memory_is_the_full_text(reader: Reader) -> None:
    """A line of the passages' own embeddings gives the full text's answers and no divergence from it."""

    class Identity(lines.Method):
        name = "identity"

        def contexts(self, reader: Reader, records: Sequence[Record]) -> list[list[Any]]:
            return [[reader.identity(passage) for passage in r.passages] for r in records]

    full, _, same = quality.evaluate(reader, [lines.FullText(), lines.NoContext(), Identity()], RECORDS[:4], QUIET)
    assert same.predictions == full.predictions
    assert same.row["kl_to_full"] < 1e-5
    assert same.row["reader_tokens"] == full.row["reader_tokens"]


@pytest.mark.parametrize("name", sorted(baselines.BASELINES))
@pytest.mark.parametrize("more", [0, 1, 7, 20, 1000])
def test_baselines_never_exceed_the_budget(reader: Reader, name: str, more: int) -> None:
    r = RECORDS[3]
    budget = reader.length(question_prompt([], r.question)) + more
    pieces = baselines.BASELINES[name](reader, r.question, r.passages, budget, random.Random(0))
    assert reader.length(question_prompt(pieces, r.question)) <= budget
    if more == 1000:
        assert pieces == list(r.passages)
    again = baselines.BASELINES[name](reader, r.question, r.passages, budget, random.Random(0))
    assert pieces == again


def test_bm25_prefers_the_passage_about_the_question() -> None:
    texts = ["The cat sat on the mat.", "Vienna is the capital of Austria.", "The dog sat on the log."]
    assert np.argmax(baselines.bm25("What is the capital of Austria?", texts)) == 1
    assert baselines.split_sentences('He left. "Why?" she asked. It cost 3.5 dollars. ok') == [
        "He left.", '"Why?" she asked.', "It cost 3.5 dollars. ok",
    ]  # fmt: skip


def test_shuffled_reads_other_passages(reader: Reader, compressor: Strided) -> None:
    apart = [RECORDS[0], RECORDS[3], RECORDS[6]]
    for own, other in zip(apart, lines.strangers(apart)):
        assert set(own.passages).isdisjoint(other.passages)
    with pytest.raises(ValueError, match="needs more records"):
        lines.strangers([RECORDS[0], RECORDS[0]])


def test_shared_passages_are_compressed_once(reader: Reader, compressor: Strided) -> None:
    method = lines.Compressed(compressor)
    a, b = method.contexts(reader, [RECORDS[0], RECORDS[1]])
    shared = set(RECORDS[0].passages) & set(RECORDS[1].passages)
    assert len({id(piece) for piece in [*a, *b]}) == 6 - len(shared)
    assert all(isinstance(piece, CompressedPassage) for piece in [*a, *b])


def test_long_records_are_skipped_and_counted(reader: Reader, zoo: ModuleType) -> None:
    long = Record("q?", ("a",), ("word " * 5000,), ("",), 0, "toy", id="long")
    found = quality.evaluate(reader, [lines.FullText(), lines.NoContext()], [*RECORDS[:2], long], QUIET)
    assert found[0].row["skipped"] == 1
    assert found[0].row["n"] == 2
    with pytest.raises(ValueError, match="too long"):
        quality.evaluate(reader, [lines.FullText(), lines.NoContext()], [long], QUIET)


def test_evaluate_refuses_what_it_cannot_measure(reader: Reader) -> None:
    with pytest.raises(ValueError, match="first two methods"):
        quality.evaluate(reader, [lines.NoContext()], RECORDS, QUIET)
    silent = Record("q?", (), ("text",), ("",), 0, "toy")
    with pytest.raises(ValueError, match="no reference answer"):
        quality.evaluate(reader, [lines.FullText(), lines.NoContext()], [silent], QUIET)
    with pytest.raises(ValueError, match="no baseline"):
        lines.EqualBudget("magic", lines.FullText())


def test_kl_needs_the_same_answer(reader: Reader) -> None:
    a, b = scoring.likelihoods(reader, [["x"], ["x"]], [[5, 6], [5]], batch_size=2)
    assert scoring.kl_divergence(reader, a, a) == 0
    with pytest.raises(ValueError, match="same answer tokens"):
        scoring.kl_divergence(reader, a, b)


@pytest.mark.slow
def test_gold_moves_and_answers_swap(reader: Reader, compressor: Strided) -> None:
    for place in range(3):
        moved = reading.move_gold(RECORDS[4], place)
        assert moved.gold_text == RECORDS[4].gold_text
        assert sorted(moved.passages) == sorted(RECORDS[4].passages)
    methods = [lines.FullText(), lines.Compressed(compressor)]
    found = reading.gold_positions(reader, methods, RECORDS, QUIET)
    assert [(row["position"], row["method"]) for row in found[:3]] == [(0, "full"), (0, "strided-test"), (1, "full")]
    assert len(found) == 6
    with pytest.raises(ValueError, match="cannot be put"):
        reading.gold_positions(reader, methods, RECORDS, QUIET, positions=[3])

    swaps = reading.swap_answers(RECORDS)
    assert len(swaps) == 8
    for swap in swaps:
        text = " ".join(swap.changed.passages)
        assert swap.original.answers[0] not in text
        assert swap.changed.answers[0] in text
        assert swap.changed.answers[0] not in " ".join(swap.original.passages)
    row = reading.answer_swap(reader, methods, RECORDS, QUIET)[0]
    assert row["test"] == "answer-swap"
    assert row["n"] == 8
    assert {"em", "em_old", "em_before", "n_right"} <= set(row)


def test_swaps_keep_kind_and_whole_words() -> None:
    def ask(text: str, *answers: str) -> Record:
        return Record("q?", answers, (text,), ("",), 0, "toy")

    records = [
        ask("The war of 1648, not 16480, ended it.", "in 1648", "1648"),
        ask("It opened in 1871.", "1871"),
        ask("It took three long years.", "three long years"),
    ]
    swaps = reading.swap_answers(records)
    assert swaps[0].changed.passages == ("The war of 1871, not 16480, ended it.",)
    assert swaps[0].changed.answers == ("1871",)
    assert len(swaps) == 2  # nothing else is a phrase of three words


def test_rows_round_trip(tmp_path: Any) -> None:
    path = tmp_path / "sub" / "quality.jsonl"
    rows.append_rows(path, [{"suite": "quality", "f1": 0.123456789, "ci_low": None, "ppl": float("inf")}])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # someone's editor took the last line break
    rows.append_rows(path, [{"suite": "speed"}])
    rows.append_rows(path, [])
    assert rows.read_rows(tmp_path / "sub") == [{"suite": "quality", "f1": 0.123457}, {"suite": "speed"}]
    with pytest.raises(ValueError, match="JSON cannot express"):
        rows.append_rows(path, [{"x": object()}])
    assert len(rows.read_rows(path)) == 2
    path.write_text("{broken")
    with pytest.raises(ValueError, match="line 1"):
        rows.read_rows([path])


def test_commands_hold_no_machine_paths(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["/opt/env/bin/nutgraf", "bench", f"{tmp_path}/data/x.jsonl", "--out=/some/place/out.jsonl", "--ratio", "4"]
    assert rows.command(argv) == "nutgraf bench data/x.jsonl --out=out.jsonl --ratio 4"


def test_rows_are_json(reader: Reader) -> None:
    found = quality.evaluate(reader, [lines.FullText(), lines.NoContext()], RECORDS[:2], QUIET)
    assert all(json.loads(json.dumps(rows.clean(line.row), allow_nan=False)) for line in found)


@pytest.mark.slow
def test_speed_rows(reader: Reader, compressor: Strided) -> None:
    found = speed.speed(
        reader, [entrants.Entrant("strided", 8, compressor, "embeds")], RECORDS, passages=(1, 3), requests=2, repeats=1,
        decode_tokens=3, progress=False,
    )  # fmt: skip
    assert [(row["passages"], row["method"]) for row in found] == [
        (1, "full"),
        (1, "strided"),
        (3, "full"),
        (3, "strided"),
    ]
    full, soft = found[2], found[3]
    assert full["ttft_speedup"] == 1
    assert "compress_ms" not in full
    assert soft["reader_tokens"] < full["reader_tokens"]
    assert soft["flops"] < full["flops"]
    assert soft["bytes_per_passage"] > 0
    for key in ("compress_ms", "load_ms", "prefill_ms", "ttft_ms", "ttft_online_ms", "decode_ms_per_token", "ratio"):
        assert soft[key] > 0


def test_flops_count_the_linear_layers(reader: Reader) -> None:
    ids = torch.ones(1, 64, dtype=torch.long)
    with torch.no_grad():
        flops = timing.count_flops(lambda: reader.model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    config = reader.model.config
    linear = sum(p.numel() for name, p in reader.model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = config.num_hidden_layers * 4 * 64 * 64 * config.hidden_size
    assert flops == pytest.approx(2 * 64 * linear + attention, rel=0.01)


def test_timing_refuses_nothing_to_time(reader: Reader) -> None:
    with pytest.raises(ValueError, match="at least one contender"):
        timing.time_requests(reader, [], [])
    with pytest.raises(ValueError, match="1 to"):
        speed.make_requests(RECORDS, 1000, 1)
    long = Record("q?", ("a",), ("word " * 5000,), ("",), 0, "toy")
    with pytest.raises(ValueError, match="ask for fewer"):
        speed.speed(reader, [], [long], passages=(1,), progress=False)
