"""PISCO: encoder by LoRA or of its own, proportional slots, a tuned reader."""

from __future__ import annotations

import math

import pytest
import torch
from nutgraf import Reader, load_compressor, make_compressor
from nutgraf.compressors.encoders.small_lm import SmallLMEncoder
from nutgraf.compressors.soft.pisco import PISCOCompressor, PISCOConfig
from torch.nn.functional import cross_entropy, linear, relu

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


@pytest.fixture(scope="module")
def small(zoo, tmp_path_factory):
    """A smaller causal LM in a folder of its own."""
    folder = tmp_path_factory.mktemp("small")
    zoo.model("qwen3", seed=3, hidden_size=24, num_hidden_layers=2).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def build(reader, **settings) -> PISCOCompressor:
    torch.manual_seed(0)
    pisco = make_compressor("pisco", reader, **{"ratio": 4.0, "r": 4, **settings})
    with torch.no_grad():
        for name, p in pisco.named_parameters():
            if "lora" in name:
                p.add_(0.05 * torch.randn_like(p))
    return pisco.eval()


@pytest.mark.slow
@pytest.mark.parametrize("memory_tokens", [1, 5])
@pytest.mark.parametrize("ratio", [1, 1.7, 4, 16, 1000])
def test_slots_are_proportional_and_nothing_is_cut(reader, ratio, memory_tokens):
    pisco = build(reader, segment_tokens=32, memory_tokens=memory_tokens)
    for n in (0, 1, 2, 31, 32, 33, 100, 517):
        cut = pisco.segments(n, ratio)
        assert sum(length for length, _ in cut) == n
        assert all(length <= 32 and slots >= 1 for length, slots in cut)
        assert sum(slots for _, slots in cut) == (min(max(math.ceil(n / ratio), len(cut)), n) if n else 0)
        assert memory_tokens == 1 or all(slots <= memory_tokens for _, slots in cut)


def test_an_encoder_of_its_own_computes_what_the_equations_give(zoo, reader, small):
    pisco = build(reader, encoder=str(small), connector_width=16, decoder="none", segment_tokens=200)
    body = SmallLMEncoder.from_pretrained(small).body
    ids = zoo.tokenizer()(PASSAGE)["input_ids"]
    n = math.ceil((len(ids) - 1) / 4)
    with torch.no_grad():
        embeds = torch.cat([body.get_input_embeddings()(torch.tensor(ids)), pisco.memory.expand(n, -1)])[None]
        hidden = body(inputs_embeds=embeds).last_hidden_state[0, -n:]
        first, _, second = pisco.connector
        want = (
            linear(relu(linear(hidden, first.weight, first.bias)), second.weight, second.bias) * pisco.log_scale.exp()
        )
    (passage,) = pisco.compress([PASSAGE])
    assert torch.allclose(passage.embeds, want, atol=1e-5)
    assert pisco.reader is reader


def test_slots_start_on_the_readers_scale(reader, small):
    for settings in ({}, {"encoder": str(small)}):
        (passage,) = make_compressor("pisco", reader, **settings).compress([PASSAGE * 4])
        assert 0.5 < passage.embeds.norm(dim=-1).mean() / reader.embedding_norm < 2


def test_an_encoder_of_its_own_is_saved_and_loaded(zoo, reader, small, tmp_path):
    pisco = build(reader, encoder=str(small), connector_width=16)
    with torch.no_grad():
        for p in pisco.parameters():
            p.add_(0.01)
    pisco.save_pretrained(tmp_path)
    loaded = load_compressor(tmp_path, reader)
    assert torch.equal(loaded.compress([PASSAGE])[0].embeds, pisco.compress([PASSAGE])[0].embeds)
    assert loaded.fingerprint == pisco.fingerprint
    assert loaded.reader.fingerprint == pisco.reader.fingerprint != reader.fingerprint
    assert not list((tmp_path / "encoder").glob("*.safetensors"))  # weights stand once


def test_everything_learns_from_the_teachers_answer(zoo, small):
    reader = zoo.reader("llama")
    for encoder in ("lora", str(small)):
        pisco = build(reader, encoder=encoder, connector="mlp", connector_width=16, memory_tokens=8).train()
        passages = pisco.encode([PASSAGE, OTHER])
        found = pisco.reader.target_hidden([[p, "\nQ: who?\nA:"] for p in passages], [" Curie", " the Nile"])
        cross_entropy(pisco.reader.head(found.hidden), found.ids).backward()
        for name, p in pisco.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name
        assert all(p.grad is None for p in reader.model.parameters())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"connector": "linear"}, "connector must be one of"),
        ({"decoder": "full"}, "decoder must be one of"),
        ({"ratio": 0.5}, "ratio"),
        ({"memory_tokens": 0}, "memory_tokens"),
        ({"slots": "fixed"}, "no longer has the setting slots"),
        ({"encoder": "no/such/folder"}, "cannot be loaded"),
    ],
)
def test_bad_settings_are_refused(reader, settings, named):
    with pytest.raises(ValueError, match=named):
        make_compressor("pisco", reader, **settings)


def test_widths_that_do_not_fit_are_refused(reader, small):
    with pytest.raises(ValueError, match="set connector to 'mlp'"):
        make_compressor("pisco", reader, encoder=str(small), connector="none")
    assert PISCOConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)
