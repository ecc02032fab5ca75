"""Pooled contexts: slots in a reader's training rows are what `SlotMatchingLoss` draws a compressor's slots towards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nutgraf import CompressedPassage
from nutgraf.compressors.objectives.matching import TOKENS, SlotMatchingLoss
from nutgraf.recipes.reader.pooled_contexts import PooledText, flatten_slots, put_slots

PAD = 3


def test_slots_are_the_targets_of_slot_matching(zoo):
    reader = zoo.reader()
    counts = torch.arange(reader.vocab_size).float() % 50
    ids = reader.tokenize("Marie Curie was born in Warsaw and won two Nobel Prizes, in physics and in chemistry.")
    weights = np.square(np.log(100 / (1 + counts.numpy())).clip(min=0))
    pooled = PooledText()
    pooled.add_pooled(ids, -(-len(ids) // 3), weights, PAD)
    assert pooled.ids == [PAD] * 3
    table = reader.model.get_input_embeddings().weight
    found = put_slots(reader.embed(torch.tensor([pooled.ids])).float(), table, **flatten_slots([pooled.slots], 3))
    passage = CompressedPassage("embeds", len(ids), "x", reader.fingerprint, embeds=found[0].detach())
    loss, slots = SlotMatchingLoss(reader, counts, 100)([passage], [ids])
    assert slots == 3
    assert loss.item() == pytest.approx(0, abs=1e-4)


def test_tokens_beside_slots_stay_and_each_token_is_found_again():
    weights = np.arange(40.0)
    text = PooledText()
    text.add_tokens([9, 8])
    text.add_pooled(list(range(20, 30)), 10, weights, PAD)
    text.add_tokens([7])
    assert text.ids == [9, 8, PAD, 7]
    assert [token for token, _ in text.slots[2]] == list(range(29, 29 - TOKENS, -1))
    assert text.place == [0, 1, -1, -1, *[2] * TOKENS, 3]
    silent = PooledText()
    silent.add_pooled([4, 4, 5], 8, np.zeros(40), PAD)
    assert silent.slots == {0: [(4, 1.0), (5, 1.0)]}


def test_slots_land_in_their_rows_and_let_gradients_through():
    table = torch.nn.Parameter(torch.randn(40, 6))
    tensors = flatten_slots([{1: [(5, 1.0)]}, {}, {0: [(6, 2.0), (7, 1.0)]}], 4)
    embeds = torch.zeros(3, 4, 6)
    out = put_slots(embeds, table, **tensors)
    filled = out.norm(dim=-1) > 0
    assert filled.nonzero().tolist() == [[0, 1], [2, 0]]
    torch.testing.assert_close(out[filled].norm(dim=-1), table.norm(dim=-1).mean().expand(2))
    torch.testing.assert_close(torch.cosine_similarity(out[0, 1], table[5], dim=0), torch.tensor(1.0))
    out[2].sum().backward()
    assert set(table.grad.abs().sum(-1).nonzero().flatten().tolist()) == {6, 7}
