"""SCC: names, numbers and dates stay, the rest is compressed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.compressors import make_compressor

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
INNER = {"inner": "icae", "inner_settings": {"mem_size": 200, "r": 4}}  # a gap is one segment


@pytest.fixture(scope="module")
def compressor(zoo):
    torch.manual_seed(0)
    return make_compressor("scc", zoo.reader(), **INNER).eval()


def test_key_spans_are_their_own_embeddings_and_gaps_are_slots(compressor):
    reader = compressor.base_reader
    ids, offsets = reader.tokenize_with_offsets(PASSAGE)
    parts, gap_ratio = compressor.cut(PASSAGE, offsets, 2)
    kept = [PASSAGE[offsets[a][0] : offsets[b - 1][1]].strip() for a, b, key in parts if key]
    assert "1903" in kept
    assert any(not key for _, _, key in parts)
    assert [a for a, _, _ in parts] == [0, *(b for _, b, _ in parts[:-1])]
    assert parts[-1][1] == len(ids)
    rows = []
    for a, b, key in parts:
        if key:
            rows.append(reader.embed(torch.tensor(ids[a:b])))
        else:
            rows.append(compressor.inner.encode_ids([ids[a:b]], gap_ratio)[0].embeds)
    (passage,) = compressor.compress([PASSAGE], ratio=2)
    assert torch.allclose(passage.embeds, torch.cat(rows), atol=1e-5)


def test_without_room_for_keys_it_is_the_inner_method(compressor):
    for text, ratio in ((PASSAGE, 30), ("a plain line of words", 4)):
        (passage,) = compressor.compress([text], ratio=ratio)
        assert torch.equal(passage.embeds, compressor.inner.compress([text], ratio=ratio)[0].embeds)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("Ab 19.,x\n"), max_size=200), ratio=st.floats(1, 20))
def test_kept_tokens_and_slots_stay_within_the_budget(compressor, text, ratio):
    offsets = compressor.base_reader.tokenize_with_offsets(text)[1]
    parts, gap_ratio = compressor.cut(text, offsets, ratio)
    rows = sum(b - a if key else math.ceil((b - a) / gap_ratio - 1e-6) for a, b, key in parts)
    assert rows <= math.ceil(len(offsets) / ratio - 1e-6)
    assert sum(b - a for a, b, _ in parts) == len(offsets)
    if offsets:
        assert compressor.compress([text], ratio=ratio)[0].slots == rows


def test_a_tuned_reader_of_the_inner_method_reads(zoo):
    reader = zoo.reader()
    inner = {"inner": "icae", "inner_settings": {**INNER["inner_settings"], "tune_reader": True, "reader_r": 3}}
    compressor = make_compressor("scc", reader, **inner)
    assert compressor.reader is compressor.inner.reader is not reader
    asks = make_compressor("scc", reader, inner="qgc", inner_settings={"layers": 1})
    assert asks.query_aware
    assert asks.compress([PASSAGE], query="Who?", ratio=2)[0].slots


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({}, "inner must be the name"),
        ({"inner": "scc"}, "inner must be the name"),
        ({"inner": "gist"}, "gives kv"),
        ({"inner": "nothing"}, "Unknown compression method"),
        ({"inner": "icae", "keep_share": 1.5}, "keep_share"),
        ({"inner": "icae", "inner_settings": {"mem": 3}}, "no settings"),
        ({"inner": "icae", "inner_settings": "mem_size"}, "inner_settings"),
    ],
)
def test_settings_are_checked(zoo, wrong, match):
    with pytest.raises(ValueError, match=match):
        make_compressor("scc", zoo.reader(), **wrong)
