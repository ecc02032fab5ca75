"""Slot matching: slots drawn towards the pooled embeddings of the tokens they stand for, alone and in the trainer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nutgraf import CompressedPassage
from nutgraf.compressors.objectives.matching import NORM, TOKENS, SlotMatchingLoss

TEXT = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


def loss_of(reader, counts=None):
    counts = torch.arange(reader.vocab_size).float() % 50 if counts is None else counts
    return SlotMatchingLoss(reader, counts, 100)


def passage_of(reader, embeds, n):
    return CompressedPassage("embeds", n, "x", reader.fingerprint, embeds=embeds)


def test_the_pooled_embeddings_themselves_cost_nothing(zoo):
    reader = zoo.reader()
    ids = reader.tokenize(TEXT)
    loss = loss_of(reader)
    half = -(-len(ids) // 2)
    rows = []
    for part in (ids[:half], ids[half:]):  # by hand: the rarest tokens, squared idf, twice the mean norm
        idf = {i: max(0.0, torch.log(torch.tensor(100 / (1 + i % 50))).item()) for i in set(part)}
        kinds = sorted(idf, key=lambda i: -idf[i])[:TOKENS]
        weights = torch.tensor([idf[i] ** 2 for i in kinds])
        rows.append(F.normalize((reader.embed(torch.tensor(kinds)) * weights[:, None]).sum(0), dim=0))
    embeds = NORM * reader.embedding_norm * torch.stack(rows)
    value, slots = loss([passage_of(reader, embeds, len(ids))], [ids])
    assert slots == 2
    assert value.item() == pytest.approx(0, abs=1e-5)
    doubled, _ = loss([passage_of(reader, 2 * embeds, len(ids))], [ids])
    assert doubled.item() == pytest.approx(2 * torch.log(torch.tensor(2.0)).item() ** 2, rel=1e-4)
    swapped, _ = loss([passage_of(reader, embeds.flip(0), len(ids))], [ids])
    assert swapped.item() > 0.1


def test_common_tokens_alone_are_still_matched_and_empty_passages_are_skipped(zoo):
    reader = zoo.reader()
    everywhere = loss_of(reader, torch.full((reader.vocab_size,), 100.0))
    value, slots = everywhere([passage_of(reader, torch.ones(1, reader.width), 3)], [[5, 6, 7]])
    assert slots == 1
    assert torch.isfinite(value)
    value, slots = everywhere([passage_of(reader, torch.ones(0, reader.width), 0)], [[]])
    assert (value.item(), slots) == (0.0, 0)


def test_bad_input(zoo):
    reader = zoo.reader()
    with pytest.raises(ValueError, match="counts must be"):
        SlotMatchingLoss(reader, torch.ones(3), 10)
    text = CompressedPassage("text", 3, "x", None, text="a", spans=((0, 1),), n_tokens=1)
    with pytest.raises(ValueError, match="got 'text'"):
        loss_of(reader)([text], [[1, 2, 3]])
