"""LCLM: means of an encoder's last states over runs of tokens through an MLP, against plain torch."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import load_compressor, make_compressor
from torch.nn.functional import gelu

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


@pytest.mark.parametrize("own", [False, True])
def test_slots_equal_pooled_states_through_the_mlp(zoo, tmp_path, own):
    reader = zoo.reader()
    encoder = str(zoo.saved("qwen3", tmp_path / "small")) if own else "lora"
    torch.manual_seed(0)
    compressor = make_compressor("lclm", reader, encoder=encoder, adapter_width=16, r=4).eval()
    tokens = reader if encoder == "lora" else compressor.source.prompts
    bos, ids = tokens.bos_ids, tokens.tokenize(PASSAGE) if encoder == "lora" else tokens.encode(PASSAGE)
    model = reader.model.model if encoder == "lora" else zoo.model("qwen3").model
    with torch.no_grad():
        states = model(torch.tensor([[*bos, *ids]])).last_hidden_state[0, len(bos) :]
    slots = -(-len(reader.tokenize(PASSAGE)) // 4)
    owner = torch.arange(len(ids)) * slots // len(ids)
    means = torch.stack([states[owner == k].mean(0) for k in range(slots)])
    normed = means / (means.square().mean(-1, keepdim=True) + 1e-6).sqrt() * compressor.norm.weight
    (a, b), (c, d) = compressor.mlp[0].parameters(), compressor.mlp[2].parameters()
    want = (gelu(normed @ a.T + b) @ c.T + d) * compressor.log_scale.exp()
    (passage,) = compressor.compress([PASSAGE], ratio=4)
    assert torch.allclose(passage.embeds, want, atol=1e-4)
    assert 0.5 < float(passage.embeds.norm(dim=-1).mean()) / reader.embedding_norm < 2
    compressor.save_pretrained(tmp_path / "saved")
    loaded = load_compressor(tmp_path / "saved", reader)
    assert torch.equal(loaded.compress([PASSAGE], ratio=4)[0].embeds, passage.embeds)
