"""Nugget: last states at the tokens that a scorer picks, against plain torch."""

from __future__ import annotations

import torch
from nutgraf.compressors import make_compressor
from torch.nn.functional import relu

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


def test_slots_equal_the_projected_states_of_the_best_tokens(zoo):
    reader = zoo.reader()
    torch.manual_seed(0)
    compressor = make_compressor("nugget", reader, r=4, scorer_layers=2).eval()  # LoRA starts as no change
    ids = torch.tensor([[*reader.bos_ids, *reader.tokenize(PASSAGE)]])
    with torch.no_grad():
        found = reader.model.model(ids, output_hidden_states=True)
    early, last = (x[0, len(reader.bos_ids) :] for x in (found.hidden_states[2], found.last_hidden_state))
    early = early / (early.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    (a, b), (c, d) = compressor.scorer.first.parameters(), compressor.scorer.second.parameters()
    scores = (relu(early @ a.T + b) @ c.T + d)[:, 0]
    scores[-1] = torch.inf
    slots = -(-len(scores) // 4)
    kept = scores.topk(slots).indices.sort().values
    want = last[kept] @ compressor.projector.weight.T + compressor.projector.bias
    (passage,) = compressor.compress([PASSAGE], ratio=4)
    assert passage.embeds.shape == (slots, 32)
    assert torch.allclose(passage.embeds, want, atol=1e-4)
    ratio = float(passage.embeds.norm(dim=-1).mean()) / reader.embedding_norm
    assert 0.5 < ratio < 2


def test_the_gradient_of_a_score_is_that_of_its_slot_scaled(zoo):
    reader = zoo.reader()
    torch.manual_seed(0)
    compressor = make_compressor("nugget", reader, r=4, scorer_layers=2)
    (passage,) = compressor.encode([PASSAGE], ratio=8)
    weights = torch.randn_like(passage.embeds)
    (passage.embeds * weights).sum().backward()
    slots = passage.embeds.detach() - compressor.projector.bias
    # The derivative by all scores at once, which the last bias shifts alike.
    assert torch.allclose(compressor.scorer.second.bias.grad, (slots * weights).sum(), rtol=1e-4)
