"""AutoCompressor: summaries over segments, and language modelling over them."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from nutgraf.compressors import Reader, ReaderMismatchError, load_compressor
from nutgraf.compressors.importers.autocompressor import PublishedAutoCompressor, PublishedAutoCompressorConfig
from nutgraf.compressors.objectives.document_segments import document_segment_losses, random_segments
from nutgraf.compressors.slots.segments import Segment
from nutgraf.compressors.soft.autocompressor import AutoCompressor, AutoCompressorConfig
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.training.schema import parse_recipe
from nutgraf.recipes.training.trainer import run_recipe
from torch.nn.functional import cross_entropy

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. "
TEXTS = [OTHER * 3, PASSAGE, "a", "", PASSAGE + OTHER]
RELEASED = {"summary_length": 3, "ratio": 12.0, "fixed_slots": True, "scale": "none", "bos": False}


def build(reader: Reader, **settings) -> AutoCompressor:
    torch.manual_seed(0)
    defaults = {"summary_length": 6, "r": 4, "ratio": 4.0}
    released = "fixed_slots" in settings
    config = (PublishedAutoCompressorConfig if released else AutoCompressorConfig)(**{**defaults, **settings})
    compressor = (PublishedAutoCompressor if released else AutoCompressor)(config, reader).eval()
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return compressor


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


class ByHand:
    """The paper's equations in plain torch: one document, one segment after the other."""

    def __init__(self, compressor: AutoCompressor, model) -> None:
        assert compressor.encoder is not None
        model.load_state_dict(compressor.encoder.lm.state_dict())  # a model of its own, with the tuned weights
        self.config, self.model, self.summary = compressor.config, model, compressor.summary
        self.bos = compressor.opening
        self.scale = 1.0 if compressor.log_scale is None else compressor.log_scale.exp()

    def segment(self, soft, ids, slots):
        """Hidden states at BOS, the segment and the summary tokens, and logits at all of them."""
        embed = self.model.get_input_embeddings()
        parts = [embed(torch.tensor(self.bos, dtype=torch.long)), soft, embed(torch.tensor(ids)), self.summary[:slots]]
        embeds = torch.cat(parts)[None]
        out = self.model(inputs_embeds=embeds, output_hidden_states=True)
        return out.hidden_states[-1][0], out.logits[0]

    def run(self, ids, cut, detach_every=None):
        """Slots after the last segment, and the sum of the token losses."""
        soft = self.summary.new_zeros(0, self.summary.shape[1])
        start, loss, previous = 0, 0.0, None
        for number, (length, slots) in enumerate(cut):
            segment = ids[start : start + length]
            hidden, logits = self.segment(soft, segment, slots)
            first = len(self.bos) + len(soft)
            if number == 0 and self.bos:
                previous = logits[len(self.bos) - 1]
            if previous is not None:
                loss = loss + cross_entropy(previous, torch.tensor(segment[0]))
            for j in range(1, length):
                loss = loss + cross_entropy(logits[first + j - 1], torch.tensor(segment[j]))
            previous = logits[first + length - 1]
            start += length
            made = hidden[len(hidden) - slots :] * self.scale
            soft = torch.cat([soft, made]) if self.config.accumulate_summary else made
            if detach_every and (number + 1) % detach_every == 0:
                soft = soft.detach()
        return soft, loss


CASES = {
    "paper": RELEASED,
    "paper, last segment only": {**RELEASED, "accumulate_summary": False},
    "default": {"segment_tokens": 15},
    "default, last segment only": {"segment_tokens": 15, "accumulate_summary": False},
}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "case"), [*(("llama", case) for case in CASES), ("opt", "default")])
def test_summaries_and_losses_are_the_papers_equations(zoo, architecture, case):
    reader = zoo.reader(architecture)
    compressor = build(reader, tuning="full", **CASES[case])
    hand = ByHand(compressor, zoo.model(architecture))
    documents = reader.tokenize_batch(TEXTS)
    for passage, ids in zip(compressor.compress(TEXTS), documents):
        with torch.no_grad():
            soft, _ = hand.run(ids, compressor.segments(len(ids)))
        assert len(compressor.segments(len(ids))) > 1 or len(ids) < 40
        assert passage.slots == len(soft)
        assert torch.allclose(passage.embeds, soft, atol=1e-4)
    # the same losses, and the same gradients, which stop between substeps of two segments
    compressor.train()
    total, count = document_segment_losses(compressor, TEXTS, random.Random(7))
    total.backward()
    got = {name: p.grad.clone() for name, p in compressor.named_parameters() if p.grad is not None}
    compressor.zero_grad()
    rng, wanted, n = random.Random(7), 0.0, 0
    longest = compressor.longest_segment(compressor.config.ratio)
    for ids in documents:
        lengths = random_segments(len(ids), 4, longest, rng)
        cut = [(length, compressor.slots_of(length, compressor.config.ratio)) for length in lengths]
        if cut:
            cut[-1] = (cut[-1][0], 0)
        wanted = wanted + hand.run(ids, cut, detach_every=2)[1]
        n += max(len(ids) - (not compressor.opening), 0)
    assert count == n
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted.backward()
    own = {f"encoder.lm.{name}": p.grad for name, p in hand.model.named_parameters()}
    own |= {"summary": compressor.summary.grad}
    assert got["summary"].abs().max() > 0
    own = {name: g for name, g in own.items() if g is not None}
    largest = max(float(g.abs().max()) for g in own.values())
    for name, grad in own.items():
        assert torch.allclose(got[name], grad, atol=1e-5 * largest), name


def test_gradients_stop_between_substeps(reader):
    compressor = build(reader, tuning="none", segments_per_substep=2, train_segments=2)
    document_segment_losses(compressor, [OTHER], random.Random(0))[0].backward()
    assert compressor.summary.grad.abs().max() > 0  # the second segment is read after the first one's summary
    before = compressor.summary.grad.clone()
    compressor.zero_grad()
    compressor.config.segments_per_substep = 1
    document_segment_losses(compressor, [OTHER], random.Random(0))[0].backward()
    assert compressor.summary.grad is None or compressor.summary.grad.abs().max() == 0 < before.abs().max()


@pytest.mark.parametrize("adapt_reader", [True, False])
def test_losses_in_batches_equal_one_by_one(reader, adapt_reader):
    compressor = build(reader, adapt_reader=adapt_reader, segment_tokens=15)

    class Same:  # break points of a document that do not depend on the others
        def randint(self, low, high):
            return (low + high) // 2

    whole, count = document_segment_losses(compressor, TEXTS, Same())
    compressor.batch_positions = 1
    alone = [document_segment_losses(compressor, [text], Same()) for text in TEXTS]
    assert count == sum(n for _, n in alone) == sum(len(reader.tokenize(text)) for text in TEXTS)
    assert float(whole.detach()) == pytest.approx(sum(float(loss.detach()) for loss, _ in alone), rel=1e-5)
    assert document_segment_losses(compressor, [], Same())[1] == 0


def test_a_reader_that_stays_as_it_is_reads_the_segments(zoo, reader):
    compressor = build(reader, adapt_reader=False, train_segments=2)
    assert compressor.reader is compressor.base_reader is reader
    ids = reader.tokenize(OTHER)
    (a, n), (b, _) = [(length, math.ceil(length / 4)) for length in random_segments(len(ids), 2, 24, random.Random(1))]
    rows = compressor.read(compressor.encoder, [compressor.no_slots()], [Segment(ids[:a], n, reader.bos_ids)])
    soft = compressor.extend(compressor.no_slots(), rows[0], n)
    model = zoo.model("llama")
    bos = reader.embed(torch.tensor(reader.bos_ids))
    second = torch.cat([bos, soft, reader.embed(torch.tensor(ids[a:]))])[None]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[*reader.bos_ids, *ids[:a]]])).logits[0]
        logits = torch.cat([first, model(inputs_embeds=second).logits[0, len(bos) + n :]])
        wanted = cross_entropy(logits[:-1], torch.tensor(ids), reduction="sum")
        total, count = document_segment_losses(compressor, [OTHER], random.Random(1))
    assert (count, a + b) == (len(ids), len(ids))
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)


def test_random_segments():
    rng = random.Random(0)
    for length in [*range(80), 500, 6144]:
        for count in (2, 4, 7):
            for longest in (1, 2, 3, 5, 16, 2048):
                cut = random_segments(length, count, longest, rng)
                assert sum(cut) == length
                assert all(1 <= n <= longest for n in cut)
                if longest >= 16 and length >= 2 * count:
                    assert min(cut) >= 2
                    assert len(cut) == max(count, -(-length // longest)) or length > longest * (count - 1)
    drawn = [random_segments(6144, 4, 2048, rng) for _ in range(200)]
    assert all(min(cut) >= math.ceil((6144 - 2048) / 3) and len(cut) == 4 for cut in drawn)
    assert len({tuple(cut) for cut in drawn}) > 190
    means = torch.tensor(drawn, dtype=torch.float).mean(dim=0)
    assert torch.allclose(means, torch.full((4,), 1536.0), atol=40)  # no place is favoured


@pytest.mark.parametrize("ratio", [1, 1.7, 4, 9.5, 1e8])
def test_slots_follow_the_segments_length(reader, ratio):
    compressor = build(reader)
    for n in (0, 1, 2, 7, 31, 100, 301):
        cut = compressor.segments(n, ratio)
        assert sum(length for length, _ in cut) == n
        assert all(slots == min(6, math.ceil(length / ratio)) for length, slots in cut)
        assert sum(slots for _, slots in cut) <= n
    assert compressor.compress([PASSAGE], ratio=ratio)[0].slots == sum(
        slots for _, slots in compressor.segments(len(reader.tokenize(PASSAGE)), ratio)
    )


def test_batches_of_unequal_segments_equal_one_by_one(reader):
    compressor = build(reader)
    whole = compressor.compress(TEXTS)
    assert sorted({len(compressor.segments(p.source_tokens)) for p in whole})[-1] > 2
    compressor.batch_positions = 1
    for a, b, text in zip(whole, compressor.compress(TEXTS), TEXTS):
        assert torch.allclose(a.embeds, b.embeds, atol=1e-5)
        assert torch.allclose(a.embeds, compressor.compress([text])[0].embeds, atol=1e-5)


def test_slots_start_on_the_readers_scale(zoo):
    reader = zoo.reader("gemma3_text")
    compressor = AutoCompressor(AutoCompressorConfig(summary_length=8, r=4), reader)
    norm = compressor.compress([OTHER])[0].embeds.norm(dim=-1).mean() / reader.embedding_norm
    assert 0.7 < norm < 1.4


@pytest.mark.slow
@pytest.mark.parametrize(("tuning", "adapts"), [("lora", True), ("full", True), ("lora", False), ("none", True)])
def test_the_tuned_reader_reads_what_is_its_own(tmp_path, reader, tuning, adapts):
    compressor = build(reader, tuning=tuning, adapt_reader=adapts)
    plain = reader.target_logits([PASSAGE], [" it"])[0]
    passages = compressor.compress(TEXTS)
    own = compressor.reader
    assert (own is reader) == (tuning == "none" or not adapts)
    assert passages[0].reader == own.fingerprint
    question = "\nQuestion: who?\nAnswer:"
    read = own.target_logits([[passages[0], question]], [" it"])[0]
    assert torch.isfinite(read).all()
    assert not torch.allclose(read, own.target_logits([[passages[1], question]], [" it"])[0], atol=1e-3)
    if own is not reader:
        assert not torch.allclose(own.target_logits([PASSAGE], [" it"])[0], plain, atol=1e-3)
        with pytest.raises(ReaderMismatchError, match="made for"):
            reader.generate([[passages[0], question]], 1)
    assert torch.equal(reader.target_logits([PASSAGE], [" it"])[0], plain)
    compressor.save_pretrained(tmp_path)
    loaded = load_compressor(tmp_path, reader)
    assert loaded.reader.fingerprint == own.fingerprint
    for a, b in zip(passages, loaded.compress(TEXTS)):
        assert torch.equal(a.embeds, b.embeds)
    assert torch.equal(loaded.reader.target_logits([[passages[0], question]], [" it"])[0], read)


@pytest.mark.parametrize("tuning", ["lora", "none"])
def test_gradients_reach_what_trains_and_leave_the_reader(reader, tuning):
    compressor = build(reader, tuning=tuning).train()
    passages = compressor.encode([TEXTS[0], TEXTS[1]])
    found = compressor.reader.target_hidden([[p, "\n"] for p in passages], [PASSAGE, PASSAGE])
    loss = cross_entropy(compressor.reader.head(found.hidden), found.ids)
    (loss + document_segment_losses(compressor, [OTHER], random.Random(0))[0]).backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in reader.model.parameters())


def test_what_does_not_fit_is_refused(zoo):
    small = zoo.reader("llama", max_position_embeddings=60)
    compressor = build(small, ratio=1.0, segment_tokens=8)
    assert compressor.segments(24)
    with pytest.raises(ValueError, match="higher ratio"):
        compressor.compress([OTHER * 4])
    compressor = build(small, ratio=1.0, segment_tokens=8, accumulate_summary=False)
    assert compressor.compress([OTHER * 4])[0].slots <= 8
    with pytest.raises(ValueError, match="fewer memory tokens"):
        build(small, summary_length=60)


@pytest.mark.parametrize(
    "settings",
    [
        {"summary_length": 0},
        {"ratio": 0.5},
        {"scale": "none"},
        {"positions": "paper"},
        {"tuning": "half"},
        {"segment_tokens": 0},
        {"train_segments": 1},
        {"segments_per_substep": 1},
        {"dropout": 1.0},
        {"alpha": 0},
        {"r": 0},
        {"target_modules": "q_proj"},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AutoCompressorConfig.from_dict(settings)


# -- in a recipe -------------------------------------------------------------------------------------------------------


def task_for(folder, reader, stage=None, **compressor) -> CompressorTask:
    articles = ["# Story\n\n" + f"{PASSAGE} {OTHER}\n\n{OTHER}" * 2, "# Other\n\n" + f"{OTHER}\n\n{PASSAGE}" * 2]
    (folder / "text.txt").write_text("\n<|doc|>\n".join(articles))
    settings = {
        "name": "documents",
        "steps": 12,
        "batch_size": 4,
        "lr": 1e-2,
        "schedule": "constant",
        "precision": "fp32",
    }
    settings |= {"objectives": {"segments": 1.0}, "mix": {"documents": 1.0}, "ratios": [2, 4], "log_every": 4}
    recipe = parse_recipe(
        {
            "name": "toy",
            "kind": "compressor",
            "reader": "unused",
            "data": {"dir": str(folder), "texts": ["text.txt"], "max_chars": 200, "document_chars": 300},
            "compressor": {"method": "autocompressor", "summary_length": 8, "r": 4, **compressor},
            "stages": [{**settings, **(stage or {})}],
        }
    )
    return CompressorTask(recipe, reader)


@pytest.mark.slow
def test_a_recipe_trains_on_segments(tmp_path, reader):
    task = task_for(tmp_path, reader)
    plain = reader.target_logits([PASSAGE], [" it"])[0]
    before = {name: p.detach().clone() for name, p in task.compressor.named_parameters()}
    folder = run_recipe(task.recipe, task, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss/segments"] < log[0]["loss/segments"]
    assert log[-1]["loss"] == pytest.approx(log[-1]["loss/segments"], rel=1e-5)
    for name, p in task.compressor.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert torch.equal(reader.target_logits([PASSAGE], [" it"])[0], plain)
    loaded = load_compressor(folder, reader)
    assert loaded.reader.fingerprint == task.compressor.eval().reader.fingerprint != reader.fingerprint


def test_documents_mix_with_what_is_read(tmp_path, reader):
    stage = {
        "objectives": {"segments": 0.5, "lm": 1.0, "kl": 0.5},
        "mix": {"documents": 1.0, "continue": 1.0},
        "batch_size": 8,
    }
    task = task_for(tmp_path, reader, stage)
    task.begin_stage(task.recipe.stages[0])
    items = task.dataset(task.recipe.stages[0])
    batch = task.collator(task.recipe.stages[0])([items[i] for i in range(8)])["batch"]
    documents = [r.target for r in batch.readings if r.kind == "documents"]
    assert 0 < len(documents) < 8
    assert not set(documents) & set(batch.texts)
    out = task.module(batch)
    parts = 0.5 * out["loss/segments"] + out["loss/lm"] + 0.5 * out["loss/kl"]
    assert float(out["loss"].detach()) == pytest.approx(float(parts), rel=1e-5)
    assert batch.count("segments") == sum(len(reader.tokenize(d)) for d in documents)
    total, count = document_segment_losses(
        task.compressor, documents, random.Random(f"{batch.key}/segments"), batch.ratio
    )
    assert float(out["loss/segments"]) == pytest.approx(float(total.detach()) / count, rel=1e-5)


def test_a_method_without_segments_says_so(tmp_path, reader):
    task = task_for(tmp_path, reader)
    task.recipe.compressor = {"method": "icae", "mem_size": 8, "r": 4}
    other = CompressorTask(task.recipe, reader)
    with pytest.raises(ValueError, match="segments, which the method 'icae' does not have"):
        other.begin_stage(task.recipe.stages[0])
    lonely = task_for(tmp_path, reader, {"mix": {"continue": 1.0}})
    with pytest.raises(ValueError, match="need each other"):
        lonely.dataset(lonely.recipe.stages[0])
