"""Nested slots: what each slot stands for, that a prefix covers the passage, and that cutting equals compressing."""

from __future__ import annotations

import json
import random

import pytest
import torch
from nutgraf.adapters.store.codec import Encoding, decode, encode
from nutgraf.compressors import CompressedPassage, make_compressor
from nutgraf.compressors.objectives.matching import SlotMatchingLoss
from nutgraf.compressors.slots.nested import base_slots, nest, nest_passage, nested_slots
from nutgraf.compressors.slots.pooling import GatedPool
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.training.schema import parse_recipe
from nutgraf.recipes.training.trainer import run_recipe

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
LONG = " ".join([PASSAGE] * 3)
SETTINGS = {
    "icae": {"mem_size": 24, "ratio": 2.0, "r": 2, "nested": True, "coarsest": 16.0},
    "500x": {"num_mem": 24, "ratio": 2.0, "r": 2, "nested": True, "coarsest": 16.0, "positions": "spread"},
    "gist": {"n_gist": 24, "ratio": 2.0, "r": 2, "nested": True, "shared_embedding": False},
}
methods = pytest.mark.parametrize("method", sorted(SETTINGS))


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader()


def build(method, reader, **changes):
    torch.manual_seed(0)
    compressor = make_compressor(method, reader, **{**SETTINGS[method], **changes})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return compressor.eval()


def same(a: CompressedPassage, b: CompressedPassage) -> bool:
    return a._tensors().keys() == b._tensors().keys() and all(
        torch.equal(t, b._tensors()[name]) for name, t in a._tensors().items()
    )


def stored(passage: CompressedPassage) -> CompressedPassage:
    header, run = encode(passage, Encoding())
    return decode(json.loads(header), bytearray(run))


def finest_windows(slots, k, tokens):
    """The width of the narrowest window over each token among the first k slots; 0 where there is none."""
    widths = [0] * tokens
    for start, end, rank in slots:
        for t in range(start, end):
            if rank < k:
                widths[t] = min(widths[t] or tokens, end - start)
    return widths


def test_every_prefix_covers_the_passage_and_every_doubling_narrows_half_of_it():
    rng = random.Random(0)
    for _ in range(60):
        tokens = rng.randint(1, 120)
        slots = rng.randint(1, tokens)
        base = base_slots(tokens, slots, rng.uniform(1, 64))
        found = nest(tokens, slots, base)
        assert sorted(slot.rank for slot in found) == list(range(slots))
        assert all(0 <= start < end <= tokens for start, end, _ in found)
        assert [slot.start for slot in found] == sorted(slot.start for slot in found)
        assert all(finest_windows(found, k, tokens).count(0) == 0 for k in (base, (base + slots) // 2, slots))
    found = nest(64, 32, base_slots(64, 32, 16.0))
    assert [s[:2] for s in sorted(found, key=lambda s: s.rank) if s.rank < 4] == [(0, 16), (32, 48), (16, 32), (48, 64)]
    for k in (8, 16, 32):
        widths = finest_windows(found, k, 64)
        assert widths.count(64 // k) == widths.count(2 * 64 // k) == 32
    # within a doubling what is new is spread over the passage
    new = [slot.start // 16 for slot in found if 4 <= slot.rank < 6]
    assert new == [0, 2]


def test_the_base_is_never_coarser_than_asked():
    assert base_slots(256, 64, 16.0) == 16
    assert base_slots(256, 64, 32.0) == 8
    assert base_slots(100, 25, 32.0) == 3
    assert base_slots(1, 1, 32.0) == 1
    assert base_slots(256, 64, 1.0) == 64


def test_a_prefix_takes_its_share_of_every_segment():
    slots = nest_passage([(40, 20, 5), (40, 20, 5), (20, 10, 2)])
    assert sorted(slot.rank for slot in slots) == list(range(50))
    assert max(slot.end for slot in slots) == 100
    first = [slot for slot in slots if slot.rank < 10]
    counts = [sum(a <= slot.start < b for slot in first) for a, b in ((0, 40), (40, 80), (80, 100))]
    assert counts == [4, 4, 2]


@methods
def test_cutting_equals_compressing_at_the_coarser_ratio(method, reader):
    compressor = build(method, reader)
    whole = compressor.compress([LONG, "", "a", PASSAGE])
    for ratio in (2.0, 3.0, 4.0, 16.0, 1e6):
        for passage, other in zip(whole, compressor.compress([LONG, "", "a", PASSAGE], ratio=ratio)):
            k = max(-(-passage.source_tokens // ratio), 1)
            assert same(passage.first(int(k)), other)
            assert other.slots == min(k, passage.slots)
    passage = whole[0]
    assert same(passage.first(12).first(5), passage.first(5))
    assert same(CompressedPassage.from_bytes(passage.first(12).to_bytes()).first(5), passage.first(5))
    assert same(stored(passage).first(5), passage.first(5))
    answer = compressor.reader.target_logits([[passage.first(5), "\nWho?"]], [" she"])[0]
    assert not torch.allclose(answer, compressor.reader.target_logits([[passage, "\nWho?"]], [" she"])[0], atol=1e-4)


@methods
def test_what_cannot_be_cut_is_refused(method, reader):
    (passage,) = build(method, reader, nested=False).compress([PASSAGE])
    with pytest.raises(ValueError, match="not nested"):
        passage.first(3)
    compressor = build(method, reader)
    with pytest.raises(ValueError, match=r"lower compressor\.ratio"):
        compressor.compress([PASSAGE], ratio=1.5)
    for k in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="at least 1 slot"):
            compressor.compress([PASSAGE])[0].first(k)
    with pytest.raises(ValueError, match="leave fixed_slots"):
        build(method, reader, fixed_slots=True)
    with pytest.raises(ValueError, match="coarsest"):
        build(method, reader, coarsest=0.5)
    with pytest.raises(ValueError, match="nested must be true or false"):
        build(method, reader, nested="yes")


def test_text_has_no_slots_to_cut():
    text = CompressedPassage("text", 3, "x", text="a b", n_tokens=2)
    with pytest.raises(ValueError, match="not nested"):
        text.first(1)


def test_each_slot_pools_its_own_window(reader):
    pool = GatedPool(reader)
    ids = [(reader.tokenize(LONG) * 4)[a:b] for a, b in ((0, 24), (24, 40))]
    nests = [nest(24, 6, 3), nest(16, 4, 1)]
    found = pool(ids, [6, 4], nests)
    windows = [ids[i][start:end] for i in range(2) for start, end, _ in nests[i]]
    want = torch.stack([reader.embed(torch.tensor(w)).float().sum(0) / len(w) ** 0.5 for w in windows])
    assert torch.allclose(found, want, atol=1e-5)
    even = pool(ids, [6, 4], [None, nests[1]])
    assert torch.allclose(even[:6], pool(ids[:1], [6]), atol=1e-6)
    assert torch.allclose(even[6:], want[6:], atol=1e-5)


def test_matching_compares_each_slot_with_its_own_window(reader):
    ids = (reader.tokenize(LONG) * 4)[:60]
    mark = {"segments": [[60, 12, 3]], "slots": 12}
    loss = SlotMatchingLoss(reader, torch.zeros(reader.vocab_size), 10)
    slots = nested_slots({"nested": mark})
    target = torch.zeros(12, reader.width)
    for row, (start, end, _) in enumerate(slots):
        kept = torch.tensor(sorted(set(ids[start:end]))[:8])
        target[row] = reader.embed(kept).float().sum(0)
    target *= reader.embedding_norm / target.norm(dim=-1, keepdim=True)
    passage = CompressedPassage("embeds", 60, "x", reader.fingerprint, embeds=target, info={"nested": mark})
    for cut in (passage, passage.first(5)):
        value, count = loss([cut], [ids])
        assert count == cut.slots
        assert float(value) < 1e-4 * count
    plain = CompressedPassage("embeds", 60, "x", reader.fingerprint, embeds=target)
    assert float(loss([plain], [ids])[0]) > 0.1


def test_settings_that_came_later_change_no_fingerprint(reader):
    torch.manual_seed(0)
    plain = make_compressor("icae", reader, mem_size=8, r=2)
    assert not {"nested", "coarsest", "query_aware"} & set(plain.config.to_dict())
    nested = build("icae", reader)
    assert nested.config.to_dict()["nested"] is True
    assert type(nested.config).from_dict(nested.config.to_dict()) == nested.config


def test_a_recipe_trains_prefixes_of_random_length(tmp_path, zoo):
    rows = [
        {"id": str(i), "question": f"Who is number {i}?", "answers": [name], "source": "toy", "gold": 0}
        | {
            "passages": [
                {"title": "", "text": f"{name} is number {i}. The house by the river has {i} rooms and a garden."}
            ]
        }
        for i, name in enumerate(["Ada", "Ivar", "Mary", "Omar"])
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stage = {
        "steps": 4,
        "batch_size": 2,
        "lr": 1e-2,
        "ratios": {"min": 2, "max": 12},
        "log_every": 1,
        "mix": {"human": 1.0},
    }
    match = {**stage, "name": "match", "objectives": {"match": 1.0}, "mix": {"match": 1.0}}
    raw = {
        "name": "toy",
        "kind": "compressor",
        "reader": "unused",
        "data": {"dir": str(tmp_path), "questions": ["qa.jsonl"], "max_chars": 300},
        "compressor": {"method": "icae", **SETTINGS["icae"]},
        "stages": [match, {**stage, "name": "answers", "objectives": {"lm": 1.0}}],
    }
    recipe = parse_recipe(raw)
    task = CompressorTask(recipe, zoo.reader())
    before = task.compressor.memory.detach().clone()
    run_recipe(recipe, task, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    ratios = [row["ratio"] for row in log]
    assert max(ratios) > 1.3 * min(ratios)
    assert not torch.equal(task.compressor.memory[0], before[0])
