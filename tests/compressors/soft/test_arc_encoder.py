"""ARC-Encoder on the reader's own layers, against plain torch."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import Reader
from nutgraf.compressors.soft.arc_encoder import ARCEncoderCompressor, ARCEncoderConfig
from oracles import arc_encoder as oracle

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. "
SIZE = 8
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def build(reader: Reader, **settings) -> ARCEncoderCompressor:
    torch.manual_seed(0)
    config = ARCEncoderConfig(**{"dropped_layers": 1, "bridge_width": 16, "r": 4, **settings})
    return ARCEncoderCompressor(config, reader).eval()


def weights_of(reader: Reader) -> list[dict[str, torch.Tensor]]:
    """The reader's first two layers under the authors' names, with pairs of neighbours where ours has halves."""
    state, layers = reader.model.state_dict(), []
    for i in range(2):
        layer = {name: state[f"model.layers.{i}.{ours}.weight"] for name, ours in NAMES.items()}
        for name in ("attention.wq", "attention.wk"):
            layer[name] = layer[name].unflatten(0, (-1, 2, SIZE // 2)).transpose(1, 2).flatten(0, 2)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("ratio", [1, 3, 5.0, 100])
def test_slots_equal_the_papers_equations(reader, ratio):
    compressor = build(reader)  # LoRA starts as no change
    first, second = (layer.weight.detach().double() for layer in compressor.bridge)
    theta = reader.model.config.rope_parameters["rope_theta"]
    sizes = {"size": SIZE, "theta": theta, "eps": reader.model.config.rms_norm_eps}
    for text, passage in zip((OTHER, PASSAGE, "a"), compressor.compress([OTHER, PASSAGE, "a"], ratio=ratio)):
        ids = reader.tokenize(text)
        states = oracle.states(reader.model.get_input_embeddings().weight, weights_of(reader), ids, ratio, **sizes)
        want = states @ first.T @ second.T * compressor.log_scale.detach().exp()
        assert torch.allclose(passage.embeds.double(), want, atol=1e-4)


def test_tokens_see_what_comes_after_them(reader):
    compressor = build(reader)
    ids = reader.tokenize(PASSAGE)
    one, other = compressor.encode_ids([ids, [*ids[:-1], ids[0]]], ratio=4)
    assert not torch.allclose(one.embeds[0], other.embeds[0], atol=1e-3)


def test_slots_start_on_the_readers_scale(reader):
    found = build(reader).compress([PASSAGE])[0].embeds.norm(dim=-1).mean()
    assert 0.5 < found / reader.embedding_norm < 2


def test_long_passages_become_even_segments(reader):
    compressor = build(reader, segment_tokens=40)
    assert compressor.segments(90, 4) == [(30, 7), (30, 8), (30, 8)]
    assert compressor.segments(1, 4) == [(1, 1)]


def test_a_smaller_model_encodes_with_its_own_tokenizer(zoo, reader, tmp_path):
    zoo.saved("qwen3", tmp_path / "small")
    compressor = build(reader, encoder=str(tmp_path / "small"))
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.02 * torch.randn_like(p))
    compressor.save_pretrained(tmp_path / "saved")
    assert not [n for n in compressor.trainable_state() if ".layers.2." in n or n.endswith("body.norm.weight")]
    loaded = ARCEncoderCompressor.from_pretrained(tmp_path / "saved", reader)
    assert torch.equal(loaded.compress([PASSAGE])[0].embeds, compressor.compress([PASSAGE])[0].embeds)


def test_too_few_layers_are_refused(reader):
    with pytest.raises(ValueError, match="set dropped_layers"):
        build(reader, dropped_layers=2)
