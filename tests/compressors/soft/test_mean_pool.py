"""Mean-pooled windows, with the reader and its embeddings as encoders."""

from __future__ import annotations

import math

import pytest
import torch
from nutgraf.compressors import Reader, load_compressor
from nutgraf.compressors.slots.segments import window_lengths
from nutgraf.compressors.soft.mean_pool import MeanPoolCompressor, MeanPoolConfig
from torch import nn
from torch.nn.functional import cross_entropy, gelu

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. "
TEXTS = [OTHER * 3, PASSAGE, "a", "", " \n\t ", "日本語 🦊👩‍👩‍👧 עברית é\ud800 </s>", PASSAGE + OTHER]
ENCODERS = ["reader", "embeddings"]


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def build(reader: Reader, trained: bool = True, **settings) -> MeanPoolCompressor:
    torch.manual_seed(0)
    compressor = MeanPoolCompressor(MeanPoolConfig(**{"r": 4, **settings}), reader).eval()
    with torch.no_grad():
        for p in compressor.parameters() if trained else ():
            p.add_(0.05 * torch.randn_like(p))
    return compressor


@pytest.mark.parametrize("ratio", [1, 1.5, 2, math.pi, 4, 7.3, 16, 1000, 1e9])
def test_windows_are_ratio_tokens_and_the_last_one_shorter(ratio):
    assert window_lengths(0, ratio) == []
    for n in (1, 2, 5, 31, 64, 517):
        windows = window_lengths(n, ratio)
        assert sum(windows) == n
        assert len(windows) == math.ceil(n / ratio)
        assert all(math.floor(ratio) <= w <= math.ceil(ratio) for w in windows[:-1])
        assert 1 <= windows[-1] <= math.ceil(ratio)
    assert window_lengths(10, 4) == [4, 4, 2]
    assert window_lengths(6, 1.5) == [1, 2, 1, 2]


@pytest.mark.parametrize("weighting", ["uniform", "learned"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_training_starts_at_the_windows_own_embeddings(reader, encoder, weighting):
    compressor = build(reader, trained=False, encoder=encoder, weighting=weighting)
    for passage, text in zip(compressor.compress(TEXTS, ratio=1), TEXTS):
        assert torch.allclose(
            passage.embeds, reader.embed(torch.tensor(reader.tokenize(text), dtype=torch.long)), atol=1e-5
        )
    ids = torch.tensor(reader.tokenize(PASSAGE))
    (passage,) = compressor.compress([PASSAGE], ratio=5)
    want = [reader.embed(window).sum(0) / len(window) ** 0.5 for window in ids.split(5)]
    assert torch.allclose(passage.embeds, torch.stack(want), atol=1e-5)


def test_slots_start_on_the_readers_scale(zoo):
    reader = zoo.reader("gemma3_text")  # its embeddings are scaled by the module
    compressor = build(reader, trained=False)
    for ratio in (1, 2, 8):
        norm = compressor.compress([OTHER * 3], ratio=ratio)[0].embeds.norm(dim=-1).mean() / reader.embedding_norm
        assert 0.6 < norm < 2
    rms = reader.embedding_norm / reader.width**0.5
    assert float(compressor.log_scale.detach().exp()) == pytest.approx(rms, rel=1e-4)


@pytest.mark.parametrize("weighting", ["uniform", "learned"])
@pytest.mark.parametrize("encoder", ["reader", "embeddings"])
def test_slots_are_the_formula_worked_out_token_by_token(reader, encoder, weighting):
    compressor = build(reader, encoder=encoder, weighting=weighting, chunk_tokens=11)
    ids = reader.tokenize(PASSAGE)
    embeds = reader.embed(torch.tensor(ids))
    states = embeds
    if encoder == "reader":
        size, states = math.ceil(len(ids) / math.ceil(len(ids) / 11)), []
        for start in range(0, len(ids), size):
            stretch = torch.tensor([reader.bos_ids + ids[start : start + size]])
            states.append(compressor.encoder.decoder(input_ids=stretch).last_hidden_state[0, 1:])
        states = torch.cat(states)
    slots, start, uneven = [], 0, 0.0
    for length in window_lengths(len(ids), 3.5):
        part = slice(start, start + length)
        start += length
        e, h = embeds[part], states[part]
        weights = torch.full((length,), 1 / length)
        if weighting == "learned":
            normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            scores = compressor.token_score[ids[part]] + normed @ compressor.state_score.weight[0]
            weights = scores.softmax(0)
            uneven = max(uneven, float((weights.detach() - 1 / length).abs().max()))
        pooled = (weights[:, None] * e).sum(0) / weights.square().sum().sqrt()
        mean = (weights[:, None] * h).sum(0)
        mean = mean / (mean.square().mean() + 1e-6).sqrt() * compressor.norm.weight
        first, _, last = compressor.mlp
        mlp = last.weight @ gelu(first.weight @ mean + first.bias) + last.bias
        slots.append(compressor.linear.weight @ pooled + compressor.log_scale.exp() * mlp)
    assert (uneven > 0.01) == (weighting == "learned")
    (passage,) = compressor.compress([PASSAGE], ratio=3.5)
    assert torch.allclose(passage.embeds, torch.stack(slots), atol=1e-4)


def test_a_readers_state_knows_what_comes_before_and_not_after(reader):
    compressor = build(reader)
    one, other = (compressor.compress([text], ratio=4)[0].embeds for text in (PASSAGE, PASSAGE + OTHER))
    shared = len(reader.tokenize(PASSAGE)) // 4 - 1
    assert torch.allclose(one[:shared], other[:shared], atol=1e-5)
    behind = compressor.compress([OTHER + PASSAGE], ratio=1)[0].embeds[-20:]
    assert not torch.allclose(behind, compressor.compress([PASSAGE], ratio=1)[0].embeds[-20:], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["uniform", "learned"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_batches_equal_one_by_one_and_save_and_load(reader, encoder, weighting, tmp_path):
    compressor = build(reader, encoder=encoder, weighting=weighting, chunk_tokens=40)
    whole = compressor.compress(TEXTS, ratio=2.5)
    compressor.batch_positions = 1
    for text, passage in zip(TEXTS, whole):
        alone = compressor.compress([text], ratio=2.5)[0]
        assert torch.allclose(passage.embeds, alone.embeds, atol=1e-5)
        assert passage.slots == math.ceil(passage.source_tokens / 2.5)
    compressor.batch_positions = 16384
    compressor.save_pretrained(tmp_path)
    loaded = load_compressor(tmp_path, reader)
    assert loaded.fingerprint == compressor.fingerprint
    for a, b in zip(whole, loaded.compress(TEXTS, ratio=2.5)):
        assert torch.equal(a.embeds, b.embeds)
    reader.generate([[whole[1], "\nQuestion: who?\nAnswer:"]], 2)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_reach_what_trains_and_the_reader_stays(reader, encoder):
    compressor = build(reader, encoder=encoder, weighting="learned").train()
    before = {name: p.clone() for name, p in reader.model.state_dict().items()}
    passages = compressor.encode([TEXTS[0], PASSAGE], ratio=4)
    found = reader.target_hidden([[p, "\n"] for p in passages], [PASSAGE, OTHER])
    cross_entropy(reader.head(found.hidden), found.ids).backward()
    for name, p in compressor.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert ("encoder" in {name.split(".")[0] for name, _ in compressor.named_parameters()}) == (encoder == "reader")
    torch.optim.SGD(compressor.parameters(), lr=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in reader.model.state_dict().items())


@pytest.mark.slow
def test_a_few_steps_teach_it_to_repeat(reader):
    compressor = build(reader, trained=False, weighting="learned").train()
    optimizer = torch.optim.Adam(compressor.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        passage = compressor.encode([PASSAGE], ratio=4)[0]
        found = reader.target_hidden([[passage, "\n"]], [PASSAGE])
        losses.append(cross_entropy(reader.head(found.hidden), found.ids))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert compressor.state_score.weight.abs().max() > 0
    assert compressor.token_score.abs().max() > 0


def test_projector_parts(reader):
    compressor = build(reader, encoder="embeddings", hidden_size=7)
    assert [m.weight.shape[0] for m in compressor.mlp if isinstance(m, nn.Linear)] == [7, reader.width]
    assert set(compressor.trainable_state()) == {
        "norm.weight",
        "linear.weight",
        "log_scale",
        *(f"mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": "bert"},
        {"weighting": "idf"},
        {"ratio": 0.5},
        {"hidden_size": 0},
        {"chunk_tokens": 0},
        {"r": 0},
        {"alpha": -1},
        {"dropout": 1},
        {"target_modules": "q_proj"},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MeanPoolConfig.from_dict(settings)


def test_fewer_layers_encode(reader):
    compressor = build(reader, dropped_layers=1)
    ids = reader.tokenize(PASSAGE)
    (passage,) = compressor.compress([PASSAGE], ratio=len(ids))
    body, inputs = compressor.encoder.decoder, reader.embed(torch.tensor([[*reader.bos_ids, *ids]]))
    at = torch.arange(inputs.shape[1])[None]
    states = inputs
    for layer in body.layers:
        found = layer(states, position_embeddings=body.rotary_emb(inputs, at))
        states = found[0] if isinstance(found, tuple) else found
    states = states[0, len(reader.bos_ids) :]
    normed = nn.functional.rms_norm(states.mean(0), states.shape[-1:], compressor.norm.weight, 1e-6)
    pooled = reader.embed(torch.tensor(ids)).sum(0) / len(ids) ** 0.5
    want = compressor.linear(pooled) + compressor.mlp(normed) * compressor.log_scale.exp()
    assert torch.allclose(passage.embeds[0], want, atol=1e-4)
    assert len(body.layers) == 2
    assert len(reader.model.get_decoder().layers) == 3
    with pytest.raises(ValueError, match="dropped_layers"):
        build(reader, dropped_layers=2)
    with pytest.raises(ValueError, match="dropped_layers must be an integer"):
        MeanPoolConfig(dropped_layers=-1)
