"""The inversion decoder: trained by the one trainer, resumable, conditioned on what is stored, and on nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from nutgraf.benchmarks.audit.audit import audit
from nutgraf.benchmarks.audit.defences import defended
from nutgraf.benchmarks.audit.geia import GEIA, train, trained
from nutgraf.benchmarks.audit.targets import Target, compressed
from nutgraf.benchmarks.audit.targets import vectors as vectors_of
from nutgraf.benchmarks.audit.transfer import transferred
from nutgraf.benchmarks.audit.vec2text import Vec2Text
from nutgraf.compressors import CheckpointError, Reader, ReaderMismatchError, make_compressor
from nutgraf.compressors.encoders.embedder import load_embedder
from nutgraf.recipes.data.templates import autoencoding_prompt
from nutgraf.recipes.tasks.inversion import InversionDecoder, InversionSettings, InversionTask
from nutgraf.recipes.training.schema import parse_recipe
from nutgraf.recipes.training.trainer import run_recipe

TEXTS = [
    "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers.",
    "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest.",
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics and in chemistry, it is said.",
]
FREE = {"compressor": "full-text"}


def recipe(folder: Path, steps: int = 4, model: dict | None = None, **stage):
    (folder / "public.txt").write_text("\n<|doc|>\n".join(TEXTS))
    stage = {"name": "decode", "steps": steps, "batch_size": 3, "lr": 1e-2, "schedule": "constant", **stage}
    data = {"dir": str(folder), "texts": ["public.txt"]}
    raw = {"name": "t", "kind": "inversion", "reader": "zoo", "data": data, "model": model or FREE, "stages": [stage]}
    return parse_recipe(raw)


def untuned(reader):
    return make_compressor("full-text", reader, tune_reader=False)


def learn_by_heart(decoder: InversionDecoder, reader: Reader, vectors: list[torch.Tensor], steps: int = 150) -> None:
    """Trains a decoder until it writes the texts for these vectors."""
    torch.manual_seed(0)
    targets = [[*reader.tokenize(text), reader.eos_id] for text in TEXTS]
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=2e-2, weight_decay=0)
    for _ in range(steps):
        loss = decoder(vectors, targets)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def vectors(texts) -> list[torch.Tensor]:
    return [torch.nn.functional.one_hot(torch.tensor([TEXTS.index(t)]), 3).float() for t in texts]


def test_the_loss_is_that_of_teacher_forcing(zoo: ModuleType):
    reader = zoo.reader("llama")
    decoder = InversionDecoder(reader, InversionSettings(**FREE), None, "v")
    targets = [reader.tokenize(text) for text in TEXTS[:2]]
    got = decoder([reader.identity(text) for text in TEXTS[:2]], targets)
    total = 0.0
    for text, target in zip(TEXTS, targets):
        prompt, asked = autoencoding_prompt(text)
        ids = torch.tensor([[*reader.bos_ids, *reader.tokenize(prompt), *reader.tokenize(asked), *target]])
        with torch.no_grad():
            logits = reader.model(ids).logits[0, -len(target) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
    assert float(got["loss"].detach()) == pytest.approx(total / sum(map(len, targets)), rel=1e-4)
    got["loss"].backward()
    assert any(p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_vectors_go_through_one_linear_map(zoo: ModuleType):
    reader = zoo.reader("llama")
    decoder = InversionDecoder(reader, InversionSettings(embedder="e", slots=5), 3, "v")
    (read,) = decoder.read([2.0 * torch.eye(3)[:1]])
    wanted = (decoder.project.weight[:, 0] + decoder.project.bias).view(5, -1) * decoder.scale * 3**0.5
    assert torch.allclose(read.embeds, wanted, atol=1e-6)  # the length of a vector does not matter
    assert float(read.embeds.detach().norm(dim=-1).mean()) == pytest.approx(reader.embedding_norm, rel=0.5)
    for wrong in (torch.zeros(1, 4), torch.zeros(3), reader.identity("a")):
        with pytest.raises(ValueError, match="vectors"):
            decoder.read([wrong])


@pytest.mark.slow
def test_a_decoder_learns_to_read_vectors_and_reads_nothing_from_others(zoo: ModuleType):
    reader = zoo.reader("llama")
    torch.manual_seed(0)
    decoder = InversionDecoder(reader, InversionSettings(embedder="e", r=16, slots=4), 3, "v")
    learn_by_heart(decoder, reader, vectors(TEXTS))
    target = Target("one-hot", None, "vector", TEXTS, vectors(TEXTS))
    row = audit(target, GEIA(reader, decoder)).row
    assert row["token_f1"] >= 0.95
    assert row["token_f1_other"] <= 0.3


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(zoo: ModuleType, tmp_path: Path):
    reader = zoo.reader("llama")
    whole = InversionTask(recipe(tmp_path), reader, untuned(reader))
    run_recipe(recipe(tmp_path), whole, tmp_path / "whole")
    stopped = recipe(tmp_path, save_every=2)
    halves = [InversionTask(stopped, reader, untuned(reader)) for _ in range(2)]
    begun = recipe(tmp_path, save_every=2)
    run_recipe(begun, halves[0], tmp_path / "halves", max_minutes=1e-9)
    run_recipe(stopped, halves[1], tmp_path / "halves")
    for a, b in zip(whole.module.parameters(), halves[1].module.parameters()):
        assert torch.equal(a, b)
    loaded = InversionDecoder.from_pretrained(tmp_path / "whole" / "final", reader)
    for a, b in zip(whole.module.parameters(), loaded.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ReaderMismatchError, match="trained for the reader"):
        InversionDecoder.from_pretrained(tmp_path / "whole" / "final", zoo.reader("llama", seed=1))


@pytest.mark.slow
def test_an_audit_trains_saves_and_finds_its_decoder(zoo: ModuleType, tmp_path: Path):
    reader = Reader.from_pretrained(zoo.model("llama"), tokenizer=zoo.tokenizer())
    (tmp_path / "public.txt").write_text("\n<|doc|>\n".join(TEXTS))
    (target,) = compressed(make_compressor("mean-pool", reader), [2], TEXTS)
    made = train(target, reader, tmp_path / "public.txt", 10, 1e-3, tmp_path / "runs")
    assert made.about["training_steps"] >= 1
    assert audit(target, made).row["training_minutes"] > 0
    folder = str(tmp_path / "runs" / "mean-pool@2x" / "decoder")
    found = trained(target, reader, [folder])
    assert found is not None
    assert found.attack(target.stolen) == made.attack(target.stolen)
    (other,) = compressed(make_compressor("mean-pool", reader), [4], TEXTS)
    assert trained(other, reader, [folder]) is None
    with pytest.raises(ValueError, match="--budget"):
        GEIA(reader).attack(target.stolen)
    target.victim = None
    with pytest.raises(ValueError, match="--decoder"):
        train(target, reader, tmp_path / "public.txt", 10, 1.0, tmp_path / "runs")


def test_a_decoder_of_question_vectors_learns_to_write_questions(zoo: ModuleType, tmp_path: Path):
    asked = ["Who signed the treaty?", "Where is the sea?", "When was she born?"]
    rows = [{"question": one, "answers": ["x"], "passages": ["x y"], "gold": 0} for one in asked]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(tmp_path)
    data = {"dir": str(tmp_path), "questions": ["asked.jsonl"], "documents": 2}
    task = InversionTask(made.model_copy(update={"data": data}), zoo.reader("llama"), untuned(zoo.reader("llama")))
    stage = made.stages[0]
    items = task.dataset(stage)
    written = [task.reader.decode(ids[:-1]) for ids in task.collator(stage)([items[i] for i in range(12)])["targets"]]
    assert set(written) == set(asked[:2])
    for wrong in ({}, {"texts": ["public.txt"], "questions": ["asked.jsonl"]}):
        with pytest.raises(ValueError, match=r"one of data\.texts and data\.questions"):
            InversionTask(made.model_copy(update={"data": wrong}), zoo.reader("llama"), untuned(zoo.reader("llama")))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "model.compressor and model.embedder"),
        ({"compressor": "a", "embedder": "b"}, "model.compressor and model.embedder"),
        ({"compressor": "selective-context"}, "makes text"),
        ({"compressor": "full-text", "rank": 3}, "rank"),
        ({"compressor": "full-text", "ratio": 0.5}, "ratio"),
    ],
)
def test_recipes_that_attack_nothing_are_refused(zoo: ModuleType, tmp_path: Path, model: dict, message: str):
    wrong = recipe(tmp_path).model_copy(update={"model": model})
    with pytest.raises(ValueError, match=message):
        InversionTask(wrong, zoo.reader("llama"))


def test_a_compressor_is_no_decoder(zoo: ModuleType, tmp_path: Path):
    reader = zoo.reader("llama")
    make_compressor("mean-pool", reader).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no inversion decoder"):
        InversionDecoder.from_pretrained(tmp_path, reader)


@pytest.mark.slow
def test_corrected_guesses_are_never_farther(zoo: ModuleType):
    """With the real MiniLM: of random guesses the nearest stays."""
    reader, embedder = zoo.reader("llama"), load_embedder("all-MiniLM-L6-v2", "cpu")
    target = vectors_of(embedder, TEXTS)
    decoder = InversionDecoder(reader, InversionSettings(embedder="e", slots=2), embedder.dim, embedder.fingerprint)
    first = GEIA(reader, decoder)
    corrected = Vec2Text(reader, decoder, embedder=embedder, rounds=1, candidates=2)

    def likeness(guesses):
        made = torch.stack([embedder.embed_shards([text or "."], 200, [1])[0].mean(0) for text in guesses])
        return torch.cosine_similarity(torch.cat(target.stolen), made)

    before, after = likeness(first.attack(target.stolen)), likeness(corrected.attack(target.stolen))
    assert (after >= before - 1e-5).all()
    assert (after > before + 1e-3).any()
    with pytest.raises(ValueError, match="--embedder"):
        Vec2Text(reader, decoder).attack(target.stolen)


@pytest.mark.slow
def test_a_decoder_reads_another_embedders_vectors_through_leaked_pairs(zoo: ModuleType, tmp_path: Path):
    """With the real MiniLM; the other embedder is a random linear map of it."""
    reader, embedder = zoo.reader("llama"), load_embedder("all-MiniLM-L6-v2", "cpu")
    known = vectors_of(embedder, TEXTS)
    torch.manual_seed(0)
    settings = InversionSettings(embedder="all-MiniLM-L6-v2", r=16, slots=4)
    decoder = InversionDecoder(reader, settings, embedder.dim, embedder.fingerprint)
    learn_by_heart(decoder, reader, known.stolen, steps=250)
    decoder.save_pretrained(tmp_path)

    secret = torch.randn(embedder.dim, 256, generator=torch.Generator().manual_seed(1))
    draw, some = random.Random(0), " ".join(TEXTS).split()
    others = [" ".join(draw.sample(some, 8)) for _ in range(200)]
    pairs = list(zip(others, vectors_of(embedder, others).stolen))
    leaked = [(text, one @ secret) for text, one in pairs]
    target = Target("other", None, "vector", TEXTS, [one @ secret for one in known.stolen], leaked=leaked)
    attacker = transferred(reader, [str(tmp_path)])
    assert attacker is not None
    with pytest.raises(ValueError, match="leaked pairs first"):
        attacker.attack(target.stolen)
    with pytest.raises(ValueError, match="other texts with their vectors"):
        attacker.learn(TEXTS, known)
    attacker.learn([], target)
    row = audit(target, attacker).row
    assert row["token_f1"] >= 0.95
    assert row["leaked_pairs"] == 200

    turned = defended(Target("m", None, "vector", TEXTS, known.stolen, embedder, leaked=pairs), "rotation")
    assert audit(turned, GEIA(reader, decoder)).row["token_f1"] <= 0.6  # of three texts one is guessed by chance
    attacker.learn([], turned)
    assert audit(turned, attacker).row["token_f1"] >= 0.95

    mixed = [(text, one) for (text, _), (_, one) in zip(leaked, [*leaked[50:], *leaked[:50]])]
    attacker.learn([], Target("other", None, "vector", TEXTS, target.stolen, leaked=mixed))
    noise = Target("noise", None, "vector", TEXTS * 4, list(torch.randn(12, 1, 256)))
    assert audit(noise, attacker).row["token_f1"] <= 0.6
