"""Overlap of segments: context in front of every segment but the first, and no slots of its own."""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import SoftCompressor, make_compressor
from nutgraf.compressors.core.batching import watch_lengths
from nutgraf.compressors.slots.question import QUESTION
from nutgraf.compressors.slots.segment_overlap import overlaps
from nutgraf.compressors.soft.mean_pool import MeanPoolCompressor, window_lengths
from oracles.gist_mask import Gisted, masked_logits
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
LONG = " ".join([PASSAGE] * 5)
SHORT = "The treaty was signed."
ASKED = "Where was Marie Curie born?"
SETTINGS = {
    "icae": {"mem_size": 8, "ratio": 4.0, "r": 2},
    "pisco": {"ratio": 4.0, "segment_tokens": 40, "memory_tokens": 12, "r": 2},
    "mean-pool": {"ratio": 4.0, "r": 2, "chunk_tokens": 40},
    "gist": {"n_gist": 8, "ratio": 4.0, "r": 2, "shared_embedding": False},
    "500x": {"num_mem": 8, "ratio": 4.0, "r": 2, "positions": "spread"},
}
methods = pytest.mark.parametrize("method", sorted(SETTINGS))


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader()


def build(method, reader, overlap=0, **changes) -> SoftCompressor:
    torch.manual_seed(0)
    settings = {**SETTINGS[method], **({"segment_overlap": overlap} if overlap else {}), **changes}
    compressor = make_compressor(method, reader, **settings)
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return compressor.eval()


def slots_of(passage) -> torch.Tensor:
    """``[slots, values]``: each slot's embedding, or its keys and values of all layers."""
    if passage.embeds is not None:
        return passage.embeds
    return torch.cat([t.transpose(0, 1).flatten(1) for t in (*passage.keys, *passage.values)], dim=1)


def cut_of(compressor, n, **question) -> list[tuple[int, int]]:
    """``(tokens, slots)`` of each segment; of mean pooling the slots that end in it."""
    if not isinstance(compressor, MeanPoolCompressor):
        return compressor.segments(n, **question)
    count = -(-n // compressor.config.chunk_tokens)
    size = -(-n // count)
    lengths = [min(size, n - start) for start in range(0, n, size)]
    ends = list(accumulate(window_lengths(n, compressor.config.ratio)))
    borders = [0, *accumulate(lengths)]
    return [(b - a, sum(a < end <= b for end in ends)) for a, b in zip(borders, borders[1:])]


def by_hand(compressor, ids, overlap, question=()) -> torch.Tensor:
    """The slots of a passage, segment after segment, each read in one plain pass behind its overlap."""
    reader, config = compressor.base_reader, compressor.config
    found, states, start = [], [], 0
    for length, n in cut_of(compressor, len(ids)):
        own = ids[start : start + length]
        front = [*reader.bos_ids, *question, *ids[max(start - overlap, 0) : start]]
        start += length
        embeds = reader.embed(torch.tensor([*front, *own]))
        positions = torch.arange(len(embeds) + n)
        if getattr(config, "positions", None) == "spread":
            positions[-n:] = len(front) + ((torch.arange(n) + 0.5) * length / n).long()
        if config.method == "mean-pool":
            states.append(compressor.encoder.decoder(inputs_embeds=embeds[None]).last_hidden_state[0, len(front) :])
            continue
        memory = compressor.memory_rows() if config.method in ("gist", "500x") else compressor.memory
        cache = DynamicCache()
        out = compressor.encoder.decoder(
            inputs_embeds=torch.cat([embeds, memory[:n]])[None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0, -n:]
        if config.method in ("gist", "500x"):
            layers = [getattr(layer, name)[0, :, -n:] for name in ("keys", "values") for layer in cache.layers]
            found.append(torch.cat([t.transpose(0, 1).flatten(1) for t in layers], dim=1))
            continue
        found.append(out * compressor.log_scale.exp())
        if config.method == "icae":
            found[-1] = found[-1] + compressor.pool([own], [n])
    if not states:
        return torch.cat(found)
    windows = window_lengths(len(ids), config.ratio)
    embeds = reader.embed(torch.tensor(ids)).split(windows)
    for e, h in zip(embeds, torch.cat(states).split(windows)):
        mlp = compressor.mlp(compressor.norm(h.mean(0)))
        found.append(compressor.linear(e.sum(0) / len(e) ** 0.5) + mlp * compressor.log_scale.exp())
    return torch.stack(found)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


def test_what_stands_in_front_of_each_segment():
    assert overlaps(range(9), [4, 4, 1], 2) == [[], [2, 3], [6, 7]]
    assert overlaps(range(9), [4, 4, 1], 0) == [[], [], []]
    assert overlaps(range(9), [3, 3, 3], 5) == [[], [0, 1, 2], [1, 2, 3, 4, 5]]
    assert overlaps([], [], 5) == []


@methods
@pytest.mark.parametrize("overlap", [0, 5, 60])
def test_every_segment_is_read_behind_the_tokens_in_front_of_it(method, overlap, reader):
    compressor, ids = build(method, reader, overlap), reader.tokenize(LONG)
    assert len(cut_of(compressor, len(ids))) > 2
    with torch.no_grad():
        assert close(slots_of(compressor.compress([LONG])[0]), by_hand(compressor, ids, overlap))


@methods
def test_only_later_segments_change(method, reader):
    plain, compressor = build(method, reader), build(method, reader, 5)
    texts = [LONG, SHORT, ""]
    for one, other in zip(plain.compress(texts), compressor.compress(texts)):
        assert one.slots == other.slots
        assert one.source_tokens == other.source_tokens
    n = len(reader.tokenize(LONG))
    cut = cut_of(plain, n)
    assert cut == cut_of(compressor, n)
    before, after = (slots_of(c.compress([LONG])[0]) for c in (plain, compressor))
    first = cut[0][1]
    assert close(after[:first], before[:first])
    assert (after[first:] - before[first:]).abs().amax(1).min() > 1e-4
    # A passage of one segment has no overlap.
    assert torch.equal(slots_of(plain.compress([SHORT])[0]), slots_of(compressor.compress([SHORT])[0]))


@methods
def test_a_batch_equals_its_passages_one_by_one(method, reader):
    compressor = build(method, reader, 5)
    texts = [SHORT, LONG, "", PASSAGE, LONG + SHORT]
    together = compressor.compress(texts)
    for text, passage, other in zip(texts, together, reversed(compressor.compress(texts[::-1]))):
        assert close(slots_of(passage), slots_of(other)) if text else not passage.slots
        assert close(slots_of(compressor.compress([text])[0]), slots_of(passage)) if text else True
    compressor.batch_positions = 1
    assert all(close(slots_of(a), slots_of(b)) for a, b in zip(together, compressor.compress(texts)) if a.slots)


@methods
def test_the_question_stands_in_front_of_the_overlap(method, reader):
    compressor = build(method, reader, 5, query_aware=True)
    question = reader.tokenize(QUESTION.format(query=ASKED))
    with torch.no_grad():
        want = by_hand(compressor, reader.tokenize(LONG), 5, question)
    assert close(slots_of(compressor.compress([LONG], query=ASKED)[0]), want)


@methods
def test_segments_are_shorter_where_positions_are_few(method, zoo):
    # Long segments, so that the positions alone decide.
    longer = {"mean-pool": {"chunk_tokens": 200}, "pisco": {"segment_tokens": 48}}
    changes = longer.get(method, {"ratio": 20.0})
    small = zoo.reader(max_position_embeddings=64)
    plain, compressor = (build(method, small, overlap, query_aware=True, **changes) for overlap in (0, 12))
    with watch_lengths() as seen:
        compressor.compress([LONG, LONG + SHORT], query=ASKED)
        compressor.encode([LONG, LONG + SHORT])
    assert 50 < max(seen) <= 64
    # What fits one segment stays one, though it would not behind an overlap.
    most = 60 if method == "mean-pool" else 46
    text = next(LONG[:n] for n in range(len(LONG), 0, -1) if len(small.tokenize(LONG[:n])) <= most)
    with watch_lengths() as seen, torch.no_grad():
        one, other = compressor.encode([text])[0], plain.encode([text])[0]
    assert len(seen) == 2
    assert torch.equal(slots_of(one), slots_of(other))
    with pytest.raises(
        ValueError, match=r"question of \d+ tokens and an overlap of 42 tokens.*smaller segment_overlap"
    ):
        build(method, small, 42, query_aware=True, **changes).compress([LONG], query=" ".join([ASKED] * 2))
    with pytest.raises(ValueError, match=r"overlap of 64 tokens.*smaller segment_overlap"):
        build(method, small, 64, **changes)


def test_stored_slots_equal_the_masked_pass(reader):
    gist = build("gist", reader, 5)
    prompts = [["Read this: ", Gisted(LONG), " and this: ", Gisted(SHORT), "\nWho?"], [Gisted(LONG + SHORT), "\nWho?"]]
    targets = [" Marie Curie", " the delegates"]
    found = iter(gist.compress([LONG, SHORT, LONG + SHORT]))
    filled = [[next(found) if isinstance(part, Gisted) else part for part in prompt] for prompt in prompts]
    with torch.no_grad():
        stored, masked = gist.reader.target_logits(filled, targets), masked_logits(gist, prompts, targets)
        plain = masked_logits(build("gist", reader), prompts, targets)
    assert all(close(a, b) for a, b in zip(stored, masked))
    assert not any(close(a, b) for a, b in zip(masked, plain))


@pytest.mark.parametrize("method", ["icae", "gist"])
def test_nested_slots_keep_their_windows(method, reader):
    changes = {"nested": True, "coarsest": 16.0, "ratio": 2.0}
    plain, compressor = build(method, reader, **changes), build(method, reader, 5, **changes)
    (before,), (after,) = plain.compress([LONG]), compressor.compress([LONG])
    assert after.info["nested"] == before.info["nested"]
    (coarser,) = compressor.compress([LONG], ratio=8.0)
    assert torch.equal(slots_of(after.first(coarser.slots)), slots_of(coarser))
    assert not close(slots_of(after), slots_of(before))


@methods
def test_it_is_saved_and_changes_the_fingerprint_only_where_it_is_set(method, reader, tmp_path):
    plain, compressor = build(method, reader), build(method, reader, 5)
    assert "segment_overlap" not in plain.config.to_dict()
    assert build(method, reader, segment_overlap=0).fingerprint == plain.fingerprint != compressor.fingerprint
    compressor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["segment_overlap"] == 5
    loaded = load_compressor(tmp_path, reader)
    assert loaded.fingerprint == compressor.fingerprint
    assert torch.equal(slots_of(loaded.compress([LONG])[0]), slots_of(compressor.compress([LONG])[0]))


@methods
def test_it_trains(method, zoo):
    reader = zoo.reader()
    grads = []
    for overlap in (0, 5):
        compressor = build(method, reader, overlap).train()
        passages = compressor.encode([LONG, SHORT])
        found = compressor.reader.target_hidden([[p, "\nWho?"] for p in passages], [" Marie Curie", " it"])
        cross_entropy(compressor.reader.head(found.hidden), found.ids).backward()
        grads.append({name: p.grad for name, p in compressor.named_parameters()})
        assert all(g is not None and g.isfinite().all() for g in grads[-1].values())
    changed = [name for name, g in grads[1].items() if "lora" in name and not torch.allclose(g, grads[0][name])]
    assert changed, "what the encoder learns depends on the overlap"


@torch.no_grad()
@pytest.mark.parametrize("slots", ["plus-one", "fixed"])
def test_the_authors_forms_of_pisco_take_it_too(slots, reader):
    settings = {"slots": slots, "memory_tokens": 10, "prefix": (5, 6), "suffix": (7,)}
    plain, compressor = build("pisco", reader, **settings), build("pisco", reader, 5, **settings)
    ids = reader.tokenize(LONG)
    (before,), (after,) = plain.encode_ids([ids]), compressor.encode_ids([ids])
    assert before.slots == after.slots
    whole = [5, 6, *ids, 7] if slots == "plus-one" else ids
    start, found = 0, []
    for length, n in compressor.segments(len(whole), source_tokens=len(whole)):
        part = whole[max(start - 5, 0) : start + length]
        start += length
        part = part if slots == "plus-one" else [5, 6, *part, 7]
        memory = compressor.memory[torch.arange(n) % 10]
        embeds = torch.cat([reader.embed(torch.tensor(part)), memory])[None]
        found.append(compressor.encoder.decoder(inputs_embeds=embeds).last_hidden_state[0, -n:])
    assert len(found) > 2
    assert close(after.embeds, torch.cat(found) * compressor.log_scale.exp())


@methods
@pytest.mark.parametrize("overlap", [-1, True, 1.5, "8", None])
def test_bad_values_are_refused(method, overlap, reader):
    with pytest.raises(ValueError, match="segment_overlap must be an integer of at least 0"):
        build(method, reader, segment_overlap=overlap)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("icae", {"truncate": 64, "fixed_slots": True}, "truncate"),
        ("500x", {"reference_positions": True}, "reference_positions"),
        ("mean-pool", {"encoder": "embeddings"}, "reads no overlap"),
        ("mean-pool", {"encoder": "minilm"}, "reads no overlap"),
    ],
)
def test_forms_that_read_no_overlap(method, settings, message, reader):
    with pytest.raises(ValueError, match=message):
        build(method, reader, 5, **settings)


@pytest.mark.parametrize("method", ["autocompressor", "xrag", "salient-pool"])
def test_methods_without_it_say_so(method, reader):
    with pytest.raises(ValueError, match=r"no settings \['segment_overlap'\]"):
        make_compressor(method, reader, segment_overlap=5)
