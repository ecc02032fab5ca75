"""RestoreKV: the reader's best pairs and those of tokens that have read all of them, against plain torch."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import make_compressor
from oracles import lora_pass
from torch.nn.functional import cosine_similarity, normalize

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


def build(reader, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("restore-kv", reader, **{"r": 4, "alpha": 8.0, "score": "keydiff", **settings})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


@pytest.mark.parametrize("restore_tokens", [3, 20])
def test_pairs_equal_plain_torch(zoo, restore_tokens):
    reader = zoo.reader()
    compressor = build(reader, restore_tokens=restore_tokens)
    ids, front = reader.tokenize(PASSAGE), len(reader.bos_ids)
    slots = -(-len(ids) // 4)
    restored = min(restore_tokens, slots // 2)
    rows = torch.cat([reader.embed(torch.tensor([*reader.bos_ids, *ids])), compressor.memory[:restored]])
    at = torch.arange(len(rows))
    where = dict.fromkeys(("q_proj", "v_proj"), at >= front + len(ids))
    made = lora_pass.run(reader, compressor.encoder, rows, at, where, scale=2.0)
    (passage,) = compressor.compress([PASSAGE], ratio=4)
    assert passage.slots == slots
    assert passage.span == (front, len(ids) + restored)
    keys, values = (part[0].unflatten(0, (3, 2, slots)) for part in (passage.keys, passage.values))
    for layer, (k, v) in enumerate(made):
        turned = lora_pass.rotate(k, at)
        for head in range(2):
            own = normalize(turned[head, front : front + len(ids)], dim=-1)
            scores = -cosine_similarity(own, own.sum(0, keepdim=True), dim=-1)
            kept = scores.topk(slots - restored).indices.sort().values + front
            places = torch.cat([kept, at[front + len(ids) :]])
            assert torch.equal(passage.positions.unflatten(0, (3, 2, slots))[layer, head].long(), places)
            assert torch.allclose(keys[layer, head], turned[head, places], atol=1e-4)
            assert torch.allclose(values[layer, head], v[head, places], atol=1e-4)


def test_without_training_the_reader_reads_its_own_pairs(zoo):
    reader = zoo.reader()
    torch.manual_seed(0)
    compressor = make_compressor("restore-kv", reader, r=4)
    found = [compressor.compress([PASSAGE], ratio=ratio)[0] for ratio in (2, 4)]
    whole = reader.model(torch.tensor([[*reader.bos_ids, *reader.tokenize(PASSAGE)]])).past_key_values.layers
    for passage in found:
        values = passage.values[0].unflatten(0, (3, 2, -1))
        for layer in range(3):
            for head in range(2):
                for place, value in zip(
                    passage.positions.unflatten(0, (3, 2, -1))[layer, head].tolist(), values[layer, head]
                ):
                    if place < whole[layer].values.shape[2]:
                        assert torch.allclose(value, whole[layer].values[0, head, place], atol=1e-4)


def test_only_scores_without_the_question_rank(zoo):
    with pytest.raises(ValueError, match="score must be one of"):
        build(zoo.reader(), score="snapkv")
