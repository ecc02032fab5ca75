"""Dodo and KV-Distill: a scorer picks tokens, whose keys and values are kept, against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nutgraf.compressors import make_compressor
from oracles import lora_pass
from torch.nn.functional import cross_entropy, relu

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
QUESTION = "\n\nQuestion: who?\nAnswer:"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def build(method, reader, trained=True, **settings):
    torch.manual_seed(0)
    compressor = make_compressor(method, reader, **{"r": 4, "alpha": 8.0, "scorer_layers": 2, **settings})
    with torch.no_grad():
        for p in compressor.parameters() if trained else ():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def scores_by_hand(reader, scorer, ids):
    with torch.no_grad():
        states = reader.model(torch.tensor([[*reader.bos_ids, *ids]]), output_hidden_states=True).hidden_states[2][0]
    states = states[len(reader.bos_ids) :]
    states = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    (a, b), (c, d) = scorer.first.parameters(), scorer.second.parameters()
    return (relu(states @ a.T + b) @ c.T + d)[:, 0]


@pytest.mark.parametrize("segment_tokens", [512, 20])
@pytest.mark.parametrize("method", ["dodo", "kv-distill"])
def test_kept_pairs_equal_plain_torch(zoo, method, segment_tokens):
    reader = zoo.reader()
    compressor = build(method, reader, segment_tokens=segment_tokens)
    ids, start, want = reader.tokenize(PASSAGE), 0, []
    front = len(reader.bos_ids)
    for length, slots in compressor.segments(len(ids), 4):
        segment = ids[start : start + length]
        scores = scores_by_hand(reader, compressor.scorer, segment)
        always = [length - 1] if method == "dodo" else list(range(4))[:slots]
        others = [t for t in scores.argsort(descending=True).tolist() if t not in always]
        kept = torch.tensor(sorted([*always, *others[: slots - len(always)]]))
        rows = reader.embed(torch.tensor([*reader.bos_ids, *segment]))
        every = torch.ones(len(rows), dtype=torch.bool)
        chosen = torch.isin(torch.arange(len(rows)), kept + front) if method == "kv-distill" else every
        where = {"q_proj": chosen, "k_proj": every, "v_proj": every, "o_proj": chosen}
        made = lora_pass.run(reader, compressor.encoder, rows, torch.arange(len(rows)), where, scale=2.0)
        factor = scores[kept].sigmoid()[:, None] if method == "kv-distill" else 1.0
        at = kept + front + start
        want.append([(lora_pass.rotate(k[:, kept + front] * factor, at), v[:, kept + front], at) for k, v in made])
        start += length
    (passage,) = compressor.compress([PASSAGE], ratio=4)
    assert passage.span == (front, len(ids))
    assert passage.bias is None
    for number, (kind, found) in enumerate((("keys", passage.keys[0]), ("values", passage.values[0]))):
        wanted = torch.cat([torch.cat([part[layer][number] for part in want], 1).flatten(0, 1) for layer in range(3)])
        assert torch.allclose(found, wanted, atol=1e-4), kind
    assert passage.positions.tolist() == torch.cat([part[0][2] for part in want]).tolist() * 6


def test_dodo_starts_as_the_reader_itself(zoo):
    reader = zoo.reader()
    compressor = build("dodo", reader, trained=False)
    (passage,) = compressor.compress([PASSAGE], ratio=1)
    found = reader.target_logits([[passage, QUESTION]], [" it"])[0]
    ids = [*reader.bos_ids, *reader.tokenize(PASSAGE), *reader.tokenize(QUESTION)]
    want = reader.model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(found[0], want, atol=1e-4)


def test_a_score_has_the_gradient_of_a_bias_on_its_slot(zoo):
    reader = zoo.reader()
    reader.model.double()
    compressor = build("dodo", reader).double()
    (passage,) = compressor.encode([PASSAGE], ratio=8)

    def loss(passage):
        found = reader.target_hidden([[passage, QUESTION]], [" it is"])
        return cross_entropy(reader.head(found.hidden), found.ids)

    (gradient,) = torch.autograd.grad(loss(passage), passage.bias)
    for slot in (0, passage.slots - 1):
        step = torch.zeros_like(passage.bias)
        step[slot] = 3e-3
        with torch.no_grad():
            up, down = (loss(replace(passage, bias=sign * step).detach()) for sign in (1, -1))
        assert torch.allclose(gradient[slot], (up - down) / 6e-3, rtol=2e-2)  # norms are float32
    assert gradient.abs().max() > 1e-6


def test_too_few_layers_are_refused(zoo):
    with pytest.raises(ValueError, match="set scorer_layers to 2 to 3"):
        build("kv-distill", zoo.reader(), scorer_layers=6)
