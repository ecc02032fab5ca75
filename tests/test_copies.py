"""Copies and pickles of readers, compressors, stores and caches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nutgraf import make_compressor
from nutgraf.adapters.openai import ServedReader
from nutgraf.adapters.placeholders.cache import PassageCache
from nutgraf.adapters.store import MemoryStore, fill, keys_for

TEXTS = ["The treaty was signed in 1648.", "Rivers carry sediment."]


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader("llama")


@pytest.fixture(scope="module")
def compressor(reader):
    return make_compressor("mean-pool", reader, encoder="embeddings").eval()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_a_store_and_its_copy_go_apart(compressor, copied):
    store = MemoryStore()
    fill(store, compressor, TEXTS)
    keys = keys_for(compressor, TEXTS)
    other = copied(store)
    assert other.name != store.name
    store.delete(keys[:1])
    assert store.missing(keys) == keys[:1]
    assert other.missing(keys) == []
    assert torch.equal(other.get_many(keys)[1].embeds, store.get_many(keys)[1].embeds)
    assert other.delete(keys) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_cache_and_its_copy_go_apart(compressor, copied):
    cache = PassageCache()
    (passage,) = compressor.compress(TEXTS[:1])
    cache.put("a", passage)
    other = copied(cache)
    other.put("b", passage)
    assert torch.equal(other.get("a").embeds, passage.embeds)
    assert cache.get("b") is None


def test_a_copied_reader_reads_with_its_own_weights(zoo):
    reader = zoo.reader("llama")
    before = reader.target_logits(["Who?"], ["me"])[0]
    other = copy.deepcopy(reader)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(reader.target_logits(["Who?"], ["me"])[0], before)
    assert not torch.allclose(other.target_logits(["Who?"], ["me"])[0], before)
    assert copy.copy(reader).model is reader.model
    with pytest.raises(TypeError, match=r"Reader\.from_pretrained"):
        pickle.dumps(reader)


@pytest.mark.parametrize("method", ["mean-pool", "pisco", "arc-encoder", "readonce", "rmt"])
def test_a_copied_compressor_compresses_the_same(reader, method):
    settings = {"arc-encoder": {"dropped_layers": 1}}.get(method, {})
    made = make_compressor(method, reader, **settings).eval()
    other = copy.deepcopy(made)
    assert torch.equal(other.compress(TEXTS)[0].embeds, made.compress(TEXTS)[0].embeds)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert not torch.equal(other.compress(TEXTS)[0].embeds, made.compress(TEXTS)[0].embeds)
    with pytest.raises(TypeError, match=r"Reader\.from_pretrained"):
        pickle.dumps(made)


def test_a_served_reader_is_not_copied(reader):
    with ServedReader("http://localhost:1", "x", reader) as served:
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="make one there"):
                copied(served)
