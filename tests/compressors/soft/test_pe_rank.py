"""PE-RANK: one vector per passage, ranked by a tuned reader."""

from __future__ import annotations

import functools

import pytest
import torch
from nutgraf.compressors import make_compressor
from nutgraf.compressors.encoders.embedder import load_embedder
from nutgraf.compressors.reader.ranking import rank_passages

TEXTS = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes.",
    "",
    "Rivers carry sediment to the sea; the Amazon is among the longest.",
    "The treaty was signed in 1648 in Westphalia.",
]


@functools.cache
def embedder():
    return load_embedder("all-MiniLM-L6-v2", "cpu")


@pytest.fixture(scope="module")
def compressor(zoo):
    torch.manual_seed(0)
    return make_compressor("pe-rank", zoo.reader(), embedder=embedder(), reader_r=4).eval()


def test_a_slot_is_a_projected_vector(compressor):
    (passage,) = compressor.compress(TEXTS[:1])
    vector = embedder().embed(TEXTS[:1])[0]
    unit = vector / vector.square().mean().sqrt()
    first, second = compressor.projector[0], compressor.projector[2]
    hidden = torch.nn.functional.gelu(first.weight @ unit + first.bias)
    want = (second.weight @ hidden + second.bias) * compressor.log_scale.exp()
    assert torch.allclose(passage.embeds[0], want, atol=1e-4)
    assert compressor.reader is not compressor.base_reader


def test_it_ranks_texts_by_their_slots(compressor):
    order = compressor.rank("who signed it?", TEXTS)
    full = [0, 2, 3]
    found = rank_passages(compressor.reader, "who signed it?", compressor.compress([TEXTS[i] for i in full]))
    assert order == [*(full[i] for i in found), 1]
    assert compressor.rank("who?", []) == []
