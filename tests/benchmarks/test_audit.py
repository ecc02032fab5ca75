"""The privacy audit: attackers succeed where they must, fail where they must, and the scores are right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.benchmarks.audit.answering import answering
from nutgraf.benchmarks.audit.attackers import BagOfWords, KeptText, KVLayers, KVLookup, Repeat, SlotWords
from nutgraf.benchmarks.audit.audit import audit, baseline, sentence, strangers
from nutgraf.benchmarks.audit.corpus_statistics import CorpusStatistics
from nutgraf.benchmarks.audit.defences import defended
from nutgraf.benchmarks.audit.kv_lookup import first_layer_keys
from nutgraf.benchmarks.audit.page import audit_table, marked, write_page
from nutgraf.benchmarks.audit.scores import facts, score, summary, words
from nutgraf.benchmarks.audit.slot_words import pursue
from nutgraf.benchmarks.audit.targets import Target, compressed, stored
from nutgraf.benchmarks.rows import read_rows
from nutgraf.cli import app
from nutgraf.compressors import CompressedPassage, load_compressor, make_compressor
from nutgraf.compressors.kv.encode import cached_layers
from nutgraf.recipes.data.corpus import Record
from nutgraf.recipes.data.templates import autoencoding_prompt, question_prompt
from typer.testing import CliRunner

PASSAGE = "Marie Curie was born in Warsaw on 7 November 1867. She won £3,000 in 1903 and taught 12 students."
NAMES = ["Anna", "Boris", "Chen", "Dora", "Emil"]
TEXTS = [
    PASSAGE,
    "The treaty was signed in 1648 in Westphalia, ending thirty years of war.",
    "Rivers carry sediment to the sea.",
]


def dense(reader, text: str, start: int = 3) -> CompressedPassage:
    """All keys and values of a text, as a dense passage."""
    ids = torch.tensor([[*reader.bos_ids, *reader.tokenize(text)]])
    at = torch.arange(ids.shape[1])[None] + start
    with torch.no_grad():
        layers = cached_layers(reader.model.get_decoder(), reader.embed(ids), torch.ones_like(ids), at)
    keys, values = zip(*((k[0, :, 1:], v[0, :, 1:]) for k, v in layers))
    return CompressedPassage(
        "kv", ids.shape[1] - 1, "c", reader.fingerprint, keys=keys, values=values, positions=at[0, 1:]
    )


def test_scores_by_hand():
    assert facts(PASSAGE) == {
        "names": [["marie", "curie"], ["warsaw"]],
        "numbers": [["3", "000"], ["12"]],
        "dates": [["7", "november", "1867"], ["1903"]],
    }
    found = score("a b c d", "b a x")
    assert found["recall"] == 2 / 4
    assert found["token_f1"] == pytest.approx(2 * 2 / 7)
    assert found["rouge_l"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert "names" not in found  # the passage holds none
    # BLEU (16) with the precisions 3/4, 1/3, 1/(2*2), 1/(4*1) and no penalty; zeros smoothed exponentially
    assert score("a b c d", "a b d c")["bleu"] == pytest.approx((1 * 1 / 3 * 1 / (2 * 2) * 1 / (4 * 1)) ** 0.25)
    assert score(PASSAGE, PASSAGE.replace("Warsaw", "Paris"))["names"] == 1 / 2
    with pytest.raises(ValueError, match="without words"):
        score("...", "a")
    with pytest.raises(ValueError, match="paired"):
        summary(["a"], [])


@settings(max_examples=30)
@given(st.text(max_size=60), st.text(max_size=60))
def test_scores_are_shares_and_equal_texts_score_one(original, guess):
    if words(original):
        for other in (guess, original):
            found = score(original, other)
            assert all(0 <= value <= 1 + 1e-9 for value in found.values())
        assert found["recall"] == found["token_f1"] == found["exact"] == 1


def test_the_guess_holds_expected_counts():
    guess = CorpusStatistics(["the cat the dog", "the sea"]).guess(6)
    assert words(guess).count("the") == 3
    assert len(words(guess)) <= 6
    with pytest.raises(ValueError, match="public text"):
        CorpusStatistics(["..."])


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "olmo2", "mixtral", "falcon"]
)
def test_first_keys_give_every_token(zoo: ModuleType, architecture: str):
    reader = zoo.reader(architecture)
    attacker = KVLookup(reader)
    ids = reader.tokenize(PASSAGE)
    assert attacker.tokens(dense(reader, PASSAGE)) == dict(enumerate(ids))
    if architecture == "falcon":  # reads no ragged passages
        return
    kept = load_compressor("kv-match", reader, probes=2)
    (whole,), (half,) = kept.compress_at([PASSAGE], [1, 2])
    assert attacker.attack([whole]) == [PASSAGE]
    found = attacker.tokens(half)
    first = half.positions[: int(half.counts[0].sum())] - half.span[0]
    assert found == {int(i): ids[i] for i in first}  # all that the first layer keeps, and nothing else


def test_first_keys_are_the_projected_embeddings(zoo: ModuleType):
    reader = zoo.reader("llama")
    layer = reader.model.model.layers[0]
    with torch.no_grad():
        wanted = layer.self_attn.k_proj(layer.input_layernorm(reader.model.model.embed_tokens.weight))
    assert torch.allclose(first_layer_keys(reader, chunk=100).transpose(0, 1).flatten(1), wanted, atol=1e-5)


def test_learned_positions_are_refused(zoo: ModuleType):
    with pytest.raises(ValueError, match="rotary"):
        KVLookup(zoo.reader("gpt2"))


def test_deeper_keys_give_tokens_that_the_first_layer_lacks(zoo: ModuleType):
    reader = zoo.reader("llama")
    attacker = KVLayers(reader)
    passage = dense(reader, PASSAGE)
    with pytest.raises(ValueError, match="learn"):
        attacker.attack([passage])
    attacker.learn(TEXTS + zoo.CORPUS)
    ids = reader.tokenize(PASSAGE)
    counts = torch.zeros(3, 2, dtype=torch.int)
    counts[1:] = len(ids)
    keys, values = (torch.cat([part.flatten(0, 1) for part in kept[1:]]) for kept in (passage.keys, passage.values))
    about = {"positions": passage.positions.repeat(4), "counts": counts, "span": (int(passage.positions[0]), len(ids))}
    deep = CompressedPassage("kv", len(ids), "c", reader.fingerprint, keys=(keys,), values=(values,), **about)
    assert KVLookup(reader).attack([deep]) == [""]
    found = score(PASSAGE, attacker.attack([deep])[0])
    # the likeliest token by the distances themselves
    every = attacker.features(torch.arange(reader.vocab_size))
    for place in (0, 5):
        total = -2 * attacker.prior
        for layer, head in ((1, 0), (1, 1), (2, 0), (2, 1)):
            key = reader.kv_placement.rotate(passage.keys[layer][head : head + 1], -passage.positions, layer)[0, place]
            apart = key @ attacker.whiten[layer][head] - every @ attacker.maps[layer][head]
            total = total + apart.square().sum(-1)
        assert int(total.argmin()) == attacker.estimates([deep])[0][place]
    noise = deep.map(lambda t: torch.randn_like(t) * t.std() if t.is_floating_point() else t)
    assert found["recall"] > 0.5 > 0.3 > score(PASSAGE, attacker.attack([noise])[0])["recall"]


def test_repair_does_not_change_what_the_attacks_read(zoo: ModuleType):
    reader = zoo.reader("llama")
    (a,), (b,) = (
        load_compressor("kv-match", reader, probes=2, repair=repair).compress([PASSAGE], ratio=3)
        for repair in ("bias+values", "none")
    )
    assert torch.equal(a.keys[0], b.keys[0])
    assert torch.equal(a.positions, b.positions)
    assert torch.equal(a.counts, b.counts)


def test_tokens_to_read_again_are_stored_as_they_are(zoo: ModuleType):
    reader = zoo.reader("llama")
    (passage,) = load_compressor("kv-match", reader, probes=2, reread=4).compress([PASSAGE], ratio=1)
    assert KVLookup(reader).attack([passage]) == [PASSAGE]


def test_text_is_read_as_it_is_and_interfaces_are_told_apart(zoo: ModuleType):
    reader = zoo.reader("llama")
    (target,) = compressed(make_compressor("selective-context", reader), [2], TEXTS)
    assert audit(target, KeptText(reader)).guesses == [passage.text for passage in target.stolen]
    with pytest.raises(ValueError, match="cannot read text"):
        audit(target, KVLookup(reader))
    assert not KVLookup.reads(torch.zeros(1, 4))


def test_rows_sentence_table_and_page(zoo: ModuleType, tmp_path: Path):
    reader = zoo.reader("llama")
    (target,) = compressed(load_compressor("kv-match", reader, probes=2), [1], TEXTS)
    outcome = audit(target, KVLookup(reader))
    assert outcome.row["recall"] == outcome.row["names"] == outcome.row["exact"] == 1
    assert outcome.row["recall_other"] < 0.5
    assert outcome.row["recall_ci_low"] <= outcome.row["recall"] <= outcome.row["recall_ci_high"]
    guess = baseline(target, CorpusStatistics(zoo.CORPUS))
    said = sentence(outcome, guess)
    assert "reads 100 % of the words and 100 % of the names" in said
    assert "corpus's statistics" in said
    table = audit_table([guess.row, outcome.row])
    assert table.lines[0][0] == "corpus statistics alone"
    assert "100 (100 to 100)" in table.lines[1]
    page = write_page(tmp_path / "page.html", [guess, outcome], [said]).read_text()
    assert "Marie" in page
    assert said.replace("'", "&#39;") in page
    target.texts[0] = "<script>"
    assert "<script>" not in write_page(tmp_path / "page.html", [outcome], []).read_text()


@given(st.text(max_size=40), st.text(max_size=40))
def test_marked_pieces_join_to_the_original(original, guess):
    assert "".join(piece for piece, _ in marked(original, guess)) == original
    assert all(read or not text.strip() for text, read in marked("One two", "one two"))


def test_strangers_are_others():
    texts = [str(i) for i in range(7)]
    assert all(a != b for a, b in zip(texts, strangers(texts)))
    assert sorted(strangers(texts)) == texts
    assert not math.isnan(summary(texts, texts)["recall"])


def test_a_store_is_audited_by_maker_and_needs_texts(zoo: ModuleType):
    from nutgraf.adapters.store import MemoryStore, fill

    reader = zoo.reader("llama")
    store = MemoryStore()
    with pytest.raises(ValueError, match="no passage with its text"):
        stored(store, reader)
    fill(store, load_compressor("kv-match", reader, probes=2), TEXTS, ratio=2, vectors=[[1.0, 2.0]] * 3)
    kv, vector = stored(store, reader, limit=2)
    assert (kv.name, kv.ratio, kv.interface, len(kv.texts)) == ("kv-match", 2, "kv", 2)
    assert vector.interface == "vector"
    with pytest.raises(ValueError, match="for the reader"):
        stored(store, zoo.reader("llama", seed=1))


def test_of_a_large_store_only_the_attacked_passages_are_read(zoo: ModuleType):
    from nutgraf.adapters.store import Entry, MemoryStore, PassageKey, fill

    class Counting(MemoryStore):
        read = 0

        def get_many(self, keys):
            self.read += len(keys)
            return super().get_many(keys)

        def entries(self, maker=None):
            raise AssertionError("reads all passages")

    reader, store = zoo.reader("llama"), Counting()
    texts = [f"{a} wrote to {b}." for a in NAMES for b in NAMES]
    for ratio in (1, 4):
        fill(store, make_compressor("mean-pool", reader), texts, ratio=ratio, vectors=[[1.0, 2.0]] * len(texts))
    bare = reader.identity("without its text")
    key = PassageKey.of("without its text", compressor=bare.compressor, reader=reader.fingerprint)
    store.put_many([Entry(key, bare)])
    store.read = 0
    first, second, vectors = stored(store, reader, limit=7)
    assert store.read == 14
    assert [len(target.texts) for target in (first, second, vectors)] == [7, 7, 7]
    assert {first.ratio, second.ratio} == {1, 4}
    assert len(set(first.texts)) == 7
    assert first.texts == stored(store, reader, limit=7)[0].texts != texts[:7]
    assert sorted(stored(store, reader)[0].texts) == sorted(texts)


def test_repeat_asks_for_the_passage(zoo: ModuleType):
    reader = zoo.reader("llama")
    target = Target("identity", None, "embeds", TEXTS, [reader.identity(text) for text in TEXTS])
    found = audit(target, Repeat(reader))
    assert len(found.guesses) == len(TEXTS)
    assert found.row["recall"] < 0.9  # random weights repeat nothing


def test_a_tuned_reader_is_asked_itself(zoo: ModuleType):
    reader = zoo.reader("llama")
    compressor = make_compressor("full-text", reader, tune_reader=True).eval()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    (target,) = compressed(compressor, [None], TEXTS[:1])
    attacker = Repeat(reader)
    attacker.learn([], target)
    longest = target.stolen[0].source_tokens + 8
    told = compressor.reader.generate([autoencoding_prompt(TEXTS[0])], longest)[0].strip()
    assert attacker.attack(target.stolen) == [told] != Repeat(reader).attack(target.stolen)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_nearest_embeddings_give_a_passages_own_embeddings_and_nothing_of_noise(zoo: ModuleType, architecture: str):
    reader = zoo.reader(architecture)
    target = Target("identity", None, "embeds", TEXTS, [reader.identity(text) for text in TEXTS])
    assert audit(target, SlotWords(reader)).row["token_f1"] == 1
    noise = [one.map(torch.randn_like) for one in target.stolen]
    found = audit(Target("noise", None, "embeds", TEXTS, noise), SlotWords(reader)).row
    assert found["token_f1"] <= baseline(target, CorpusStatistics(zoo.CORPUS)).row["token_f1"] + 0.05


def test_pursuit_finds_the_tokens_of_a_sum():
    table = torch.nn.functional.normalize(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    slots = table[[3, 7]].sum(0, keepdim=True) + 0.8 * table[[20]]
    assert sorted(pursue(slots, table, 3)[0].tolist()) == [3, 7, 20]


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_sentence_and_writes_rows_and_page(zoo: ModuleType, tmp_path: Path):
    reader = str(zoo.saved("llama", tmp_path / "reader"))
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    about = ("--reader", reader, "--limit", "3", "--out", str(rows), "--report", str(page))
    done = CliRunner().invoke(
        app, ["audit", "sample", "--compressor", "kv-match:probes=2@1,8", "--attacker", "kv-lookup", *about]
    )
    assert done.exit_code == 0, done.output
    assert "reads 100 % of the words" in " ".join(done.output.split())
    found = read_rows(rows)
    assert [row["attacker"] for row in found] == ["statistics", "kv-lookup", "kv-lookup"]
    assert {row["suite"] for row in found} == {"audit"}
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Give one of --compressor NAME"),
        (("--compressor", "kv-match", "--store", "x"), "Give one of --compressor NAME"),
        (("--compressor", "kv-match", "--attacker", "gei"), "There is no attacker 'gei'"),
        (("--store", "x", "--answers"), "--answers needs questions"),
        (("--store", "no/such/store"), "no/such/store"),
        (("--compressor", "kv-match", "--questions"), "--questions attacks an embedder's vectors"),
        (("--compressor", "longllmlingua"), "compresses for a question"),
    ],
)
def test_mistakes_are_told_in_a_sentence(zoo: ModuleType, tmp_path: Path, arguments, said):
    done = CliRunner().invoke(app, ["audit", *arguments, "--reader", str(zoo.saved("llama", tmp_path / "reader"))])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_defences_change_what_is_stored_and_noise_alone_hinders_the_lookup(zoo: ModuleType):
    reader = zoo.reader("llama")
    passages = [dense(reader, text) for text in TEXTS]
    target, attacker = Target("all pairs", 1, "kv", TEXTS, passages), KVLookup(reader)
    read = {
        name: audit(defended(target, name), attacker).row["recall"] for name in ("noise=0", "noise=4", "int8", "int4")
    }
    assert read["noise=0"] == read["int8"] == 1
    assert read["noise=4"] < 0.5 < read["int4"]
    for wrong in ("noise", "noise=-1", "noise=nan", "int2", "rotation"):
        with pytest.raises(ValueError, match=r"noise=SIZE|no defence|retrieval vectors"):
            defended(target, wrong)
    vectors = Target("e", None, "vector", TEXTS, list(torch.randn(3, 1, 16).unbind()))
    turned = torch.cat(defended(vectors, "rotation").stolen)
    before = torch.cat(vectors.stolen)
    assert torch.allclose(turned @ turned.T, before @ before.T, atol=1e-4)
    assert not torch.allclose(turned, before, atol=0.1)
    with pytest.raises(ValueError, match="rounding of slots"):
        defended(vectors, "int8")


def test_a_defence_costs_answers(zoo: ModuleType):
    reader = zoo.reader("llama")
    asked = [Record(f"What is in {text[:9]}?", ("a b c",), (text,), ("",), 0, "toy") for text in TEXTS]
    target = Target("identity", None, "embeds", TEXTS, [reader.identity(text) for text in TEXTS])
    told = [reader.generate([question_prompt([r.gold_text], r.question)], 24, stop=["\n"])[0].strip() for r in asked]
    perfect = [replace(record, answers=(answer,)) for record, answer in zip(asked, told) if answer]
    row = answering(target, reader, perfect)
    assert (row["answer_f1"], row["answers"]) == (1, len(perfect))
    assert answering(defended(target, "noise=2"), reader, perfect)["answer_f1"] < 1
    assert answering(Target("v", None, "vector", TEXTS, [torch.zeros(1, 4)] * 3), reader, perfect) == {}


def test_a_probe_reads_words_from_mean_embeddings_and_statistics_from_noise(zoo: ModuleType):
    reader = zoo.reader("llama", hidden_size=64)
    public = [f"{a} likes {b} and {c}." for a in NAMES for b in NAMES for c in NAMES]
    texts = [f"{a} likes {b} and {c}." for a, b, c in (NAMES[:3], NAMES[2:5], NAMES[1:4])]
    (target,) = compressed(make_compressor("full-text", reader, tune_reader=False), [None], texts)
    attacker = BagOfWords(reader)
    with pytest.raises(ValueError, match="learns from public text"):
        attacker.attack(target.stolen)
    attacker.learn(public, target)
    assert audit(target, attacker).row["token_f1"] >= 0.95
    noise = Target("noise", None, "embeds", texts, [one.map(torch.randn_like) for one in target.stolen])
    assert audit(noise, attacker).row["token_f1"] <= 0.8  # two words of five are in every text
