"""xRAG, with the real MiniLM embedder in front of a tiny random reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nutgraf.compressors import Reader, load_compressor
from nutgraf.compressors.encoders.embedder import Embedder, load_embedder
from nutgraf.compressors.soft.xrag import XRAGCompressor, XRAGConfig
from torch import nn

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder("all-MiniLM-L6-v2", "cpu")


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


@pytest.fixture
def xrag(reader, embedder) -> XRAGCompressor:
    return XRAGCompressor(XRAGConfig(), reader, embedder=embedder).eval()


def test_slot_is_the_projected_vector(xrag, embedder):
    vector = torch.from_numpy(embedder.model.encode(PASSAGE))
    want = xrag.projector(nn.functional.normalize(vector, dim=-1) * 384**0.5) * xrag.log_scale.exp()
    (passage,) = xrag.compress([PASSAGE])
    assert passage.slots == 1
    assert torch.allclose(passage.embeds[0], want, atol=1e-5)
    assert passage.ratio == passage.source_tokens


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_depth_and_output_norm(zoo, embedder, layers):
    reader = zoo.reader("gemma3_text")  # its embeddings are scaled by the module
    xrag = XRAGCompressor(XRAGConfig(layers=layers), reader, embedder=embedder)
    assert sum(isinstance(m, nn.Linear) for m in xrag.projector) == layers
    wide = XRAGCompressor(XRAGConfig(layers=layers, hidden=96), reader, embedder=embedder)
    shapes = [tuple(m.weight.shape) for m in wide.projector if isinstance(m, nn.Linear)]
    ends = [wide.vector_size, *[96] * (layers - 1), reader.width]
    assert shapes == list(zip(ends[1:], ends[:-1]))
    norms = [p.embeds.norm() for p in xrag.compress([PASSAGE, OTHER])]
    assert all(0.5 < n / reader.embedding_norm < 2 for n in norms)


def test_a_long_passage_becomes_equal_shards_and_nothing_is_lost(xrag, embedder):
    long = " ".join(f"{PASSAGE} {OTHER}" for _ in range(12))
    spans = embedder.shard(long, 180)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(long)
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    sizes = [embedder.count(long[a:b]) for a, b in spans]
    assert max(sizes) <= 180
    assert max(sizes) - min(sizes) <= 12
    assert all(long[a - 1].isspace() or not long[a].isalnum() for a, _ in spans[1:])
    (passage,) = xrag.compress([long])
    assert passage.slots == len(spans) == -(-sum(sizes) // 180)
    for row, (a, b) in zip(passage.embeds, spans):
        assert torch.allclose(row, xrag.compress([long[a:b]])[0].embeds[0], atol=1e-5)


def test_shards_are_never_above_the_embedders_limit(reader, embedder):
    xrag = XRAGCompressor(XRAGConfig(shard_tokens=10_000), reader, embedder=embedder)
    assert embedder.max_tokens == 254
    text = "word " * 600
    assert xrag.compress([text])[0].slots == 3
    prompted = XRAGCompressor(XRAGConfig(shard_tokens=10_000, prompt="passage: " * 50), reader, embedder=embedder)
    assert prompted.compress([text])[0].slots == 4 + (600 > 4 * 154)
    hopeless = XRAGCompressor(XRAGConfig(prompt="passage: " * 500), reader, embedder=embedder)
    with pytest.raises(ValueError, match="leaves no room"):
        hopeless.compress([text])


@pytest.mark.parametrize("text", ["x" * 3000, "日本語の文章です。" * 200, "a,b;" * 500, "🦊" * 700, "un­believ" * 300])
def test_shards_of_odd_texts_fit_and_cover(embedder, text):
    spans = embedder.shard(text, 40, at_least=3)
    assert all(a < b for a, b in spans)
    assert all(embedder.count(text[a:b]) <= 40 for a, b in spans)
    assert "".join(text[a:b] for a, b in spans) == text


def test_ratio_makes_shards_shorter(xrag):
    text = f"{PASSAGE} {OTHER}"
    for ratio in (4, 8.5, 30):
        (passage,) = xrag.compress([text], ratio=ratio)
        assert passage.slots == -(-passage.source_tokens // ratio)
    assert xrag.compress(["a b"], ratio=1)[0].slots <= len(xrag.reader.tokenize("a b"))


def test_given_vectors_are_used_and_nothing_is_embedded(xrag, embedder, monkeypatch):
    want = xrag.compress([PASSAGE, OTHER])
    vectors = embedder.embed([PASSAGE, OTHER])
    monkeypatch.setattr(embedder.model, "encode", lambda *a, **k: pytest.fail("embedded again"))
    for given in (vectors, vectors.numpy(), vectors.tolist(), [v[None] for v in vectors], list(vectors.double())):
        for a, b in zip(xrag.compress([PASSAGE, OTHER], vectors=given), want):
            assert torch.allclose(a.embeds, b.embeds, atol=1e-6)
    scaled = xrag.compress([PASSAGE, OTHER], vectors=7 * vectors)
    assert torch.allclose(scaled[1].embeds, want[1].embeds, atol=1e-5)  # `normalize` makes their length irrelevant
    assert xrag.compress([PASSAGE, ""], vectors=[torch.ones(5, 384), vectors[0]])[0].slots == 5
    assert [p.slots for p in xrag.compress(["a", ""], vectors=[torch.ones(5, 384), vectors[0]])] == [1, 0]
    assert xrag.compress([PASSAGE, OTHER], vectors=[None, vectors[1]])[0].slots == 1  # from the cache


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 2.0]], r"got \[2\]"),
        ([np.zeros((1, 2, 384))], r"got \[1, 2, 384\]"),
        ([np.zeros(())], r"got \[\]"),
        ([[float("nan")] * 384], "NaN"),
        (["abc"], "not numbers"),
        ([], "got 0 for 1"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(xrag, vectors, message):
    with pytest.raises(ValueError, match=message):
        xrag.compress([PASSAGE], vectors=vectors)


def test_each_text_is_embedded_once_and_the_cache_is_bounded(monkeypatch):
    embedder = load_embedder(load_embedder("all-MiniLM-L6-v2", "cpu").model)
    embedder.cache_entries = 2
    seen: list[str] = []
    encode = embedder.model.encode
    monkeypatch.setattr(embedder.model, "encode", lambda texts, **k: seen.extend(texts) or encode(texts, **k))
    first = embedder.embed(["a", "b", "a"])
    assert torch.equal(first[0], first[2])
    embedder.embed(["b", "a"])
    assert seen == ["a", "b"]
    embedder.embed(["c"])  # pushes "b" out
    embedder.embed(["a", "c"])
    assert seen == ["a", "b", "c"]
    assert embedder.embed(["a", "b", "c", "d"]).shape == (4, 384)
    assert len(embedder._cache) == 2
    assert embedder.embed([]).shape == (0, 384)


def test_a_loaded_compressor_that_is_given_vectors_loads_no_embedder(xrag, reader, embedder, tmp_path, monkeypatch):
    xrag.save_pretrained(tmp_path)
    monkeypatch.setattr("nutgraf.compressors.slots.vectors.load_embedder", lambda *a: pytest.fail("loaded"))
    loaded = load_compressor(tmp_path, reader)
    vectors = embedder.embed([PASSAGE])
    assert torch.equal(loaded.compress([PASSAGE], vectors=vectors)[0].embeds, xrag.compress([PASSAGE])[0].embeds)
    assert loaded.fingerprint == xrag.fingerprint


@pytest.mark.slow
def test_another_embedder_is_refused(xrag, reader, tmp_path):
    xrag.save_pretrained(tmp_path)
    model = load_embedder("all-MiniLM-L6-v2", "cpu").model
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    with pytest.raises(ValueError, match="is not the one"):
        load_compressor(tmp_path, reader, embedder=model)


def test_encode_trains_the_projector_alone(xrag, embedder):
    xrag.train()
    (passage,) = xrag.encode([PASSAGE])
    passage.embeds.square().sum().backward()
    assert all(p.grad is not None for p in xrag.parameters())
    assert all(p.grad is None and not p.requires_grad for p in embedder.model.parameters())
    assert sum(p.numel() for p in xrag.parameters()) == 384 * 32 + 32 + 32 * 32 + 32 + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"shard_tokens": 0},
        {"layers": 0},
        {"layers": True},
        {"hidden": 0},
        {"scale": "none"},
        {"embedder": ""},
        {"vector_size": 0},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        XRAGConfig.from_dict(settings)


def test_an_embedder_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_embedder(str(tmp_path / "nowhere"))
