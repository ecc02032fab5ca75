"""IC-Former, against a second computation from the paper's equations, one digest and one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from nutgraf.compressors import Reader
from nutgraf.compressors.soft.icformer import ICFormerCompressor, ICFormerConfig

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. "


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def build(reader: Reader, trained: bool = True, **settings) -> ICFormerCompressor:
    torch.manual_seed(0)
    compressor = ICFormerCompressor(ICFormerConfig(**{"digests": 6, "layers": 2, **settings}), reader).eval()
    with torch.no_grad():
        for p in compressor.parameters() if trained else ():
            p.add_(0.1 * torch.randn_like(p))
    return compressor


def rms_norm(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * row / (row.square().mean() + 1e-6).sqrt()


def turned(head: torch.Tensor, position: int) -> torch.Tensor:
    """A head's state as complex numbers, each turned by its own angle."""
    half = len(head) // 2
    rates = torch.tensor([10000 ** (-i / half) for i in range(half)])
    return torch.complex(head[:half], head[half:]) * torch.polar(torch.ones(half), position * rates)


def by_hand(compressor: ICFormerCompressor, reader: Reader, ids: list[int], slots: int, heads: int) -> torch.Tensor:
    """Slots of one segment."""
    state = {name: p.detach() for name, p in compressor.named_parameters()}
    start = list(state["digests"][:slots])
    tokens = list(reader.embed(torch.tensor([*reader.bos_ids, *ids])))
    size, digests = reader.width // heads, start
    for layer in range(compressor.config.layers):
        weights = {
            name.removeprefix(f"blocks.{layer}.").removesuffix(".weight"): p
            for name, p in state.items()
            if name.startswith(f"blocks.{layer}.")
        }
        context = [rms_norm(row, weights["context_norm"]) for row in [*tokens, *start]]
        after = []
        for j, digest in enumerate(digests):
            query = weights["query"] @ rms_norm(digest, weights["norm"])
            seen = len(tokens) + j + 1
            gathered = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                q = turned(query[part], len(tokens) + j)
                keys = [turned((weights["key"] @ row)[part], at) for at, row in enumerate(context[:seen])]
                scores = torch.stack([(q * k.conj()).sum().real / math.sqrt(size) for k in keys])
                values = torch.stack([(weights["value"] @ row)[part] for row in context[:seen]])
                gathered.append((scores.exp() / scores.exp().sum()) @ values)
            middle = digest + weights["out"] @ torch.cat(gathered)
            normed = rms_norm(middle, weights["mlp_norm"])
            gate = weights["gate"] @ normed
            after.append(middle + weights["down"] @ (gate * torch.sigmoid(gate) * (weights["up"] @ normed)))
        digests = after
    return torch.stack([rms_norm(row, state["norm.weight"]) for row in digests]) * state["log_scale"].exp()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "heads"), [("llama", None), ("llama", 2), ("gemma3_text", None), ("opt", 3)])
def test_slots_equal_the_papers_equations(zoo, architecture, heads):
    reader = zoo.reader(architecture)
    compressor = build(reader, heads=heads, segment_tokens=20)
    texts = [OTHER, PASSAGE, "a"]
    for text, passage in zip(texts, compressor.compress(texts, ratio=5)):
        ids, want = reader.tokenize(text), []
        for length, slots in compressor.segments(len(ids), 5):
            assert length <= 20
            assert slots == math.ceil(length / 5)
            segment, ids = ids[:length], ids[length:]
            want.append(by_hand(compressor, reader, segment, slots, heads or 4))
        assert torch.allclose(passage.embeds, torch.cat(want), atol=1e-4)


def test_fewer_slots_are_the_first_of_more(reader):
    compressor = build(reader, digests=64)
    many, few = (compressor.compress([PASSAGE], ratio=ratio)[0].embeds for ratio in (2, 9))
    assert len(many) > len(few)
    assert torch.allclose(many[: len(few)], few, atol=1e-5)


def test_positions_count(reader):
    compressor = build(reader)
    one, other = (compressor.encode_ids([ids], ratio=2)[0].embeds for ids in ([11, 12, 13, 14], [12, 11, 14, 13]))
    assert not torch.allclose(one, other, atol=1e-3)


def test_slots_start_on_the_readers_scale(reader):
    found = build(reader, trained=False).compress([PASSAGE])[0].embeds.norm(dim=-1)
    assert torch.allclose(found, torch.tensor(reader.embedding_norm), rtol=1e-3)


def test_the_readers_positions_do_not_limit_a_segment(zoo):
    compressor = build(zoo.reader("llama", max_position_embeddings=16), digests=64)
    assert compressor.segments(200, 4) == [(200, 50)]
    assert compressor.compress(["word " * 200], ratio=4)[0].slots > 16


def test_bfloat16_training_comes_close(reader):
    compressor = build(reader)
    whole = compressor.encode([PASSAGE, OTHER])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = compressor.encode([PASSAGE, OTHER])
    for a, b in zip(whole, rounded):
        assert torch.nn.functional.cosine_similarity(a.embeds, b.embeds).min() > 0.99


def test_heads_that_do_not_fit_are_refused(reader):
    for heads in (5, 32):
        with pytest.raises(ValueError, match="heads must divide half the width"):
            build(reader, heads=heads)


@pytest.mark.parametrize(
    "settings",
    [{"digests": 0}, {"layers": 0}, {"heads": 0}, {"ratio": 0.5}, {"segment_tokens": 0}, {"digests": 2.5}],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ICFormerConfig.from_dict(settings)
