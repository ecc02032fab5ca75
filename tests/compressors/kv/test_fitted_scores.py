"""Scores that need the residual stream or fitted weights, against plain computations on the model alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.compressors import ReaderMismatchError, make_compressor
from nutgraf.compressors.kv.encode import cached_layers
from nutgraf.compressors.kv.probing import read, write_probes
from nutgraf.compressors.kv.selection import SCORES
from nutgraf.compressors.kv.surrogate import LEAST, RIDGE
from nutgraf.recipes.kv_surrogate import draw_passages

TEXT = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."
OTHER = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
GENERIC = [TEXT, OTHER, "Rivers carry sediment to the sea; the Amazon and the Nile are among the longest on Earth."] * 3


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(got, want, atol=tolerance * max(1.0, float(want.abs().max())), rtol=0)


@torch.no_grad()
def passes(reader: Reader, ids: list[int]):
    """The model's own pass over BOS and tokens: residual streams, attention, keys and values."""
    model = copy.deepcopy(reader.model)
    model.set_attn_implementation("eager")
    whole = torch.tensor([[*reader.bos_ids, *ids]])
    out = model(input_ids=whole, output_hidden_states=True, output_attentions=True)
    at = torch.arange(whole.shape[1])[None]
    pairs = cached_layers(model.get_decoder(), reader.embed(whole), torch.ones_like(whole), at)
    return out.hidden_states, out.attentions, pairs


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "gemma2"])
def test_kvzip_plus_equals_a_plain_computation(zoo, name):
    reader = zoo.reader(name)
    ids = reader.tokenize_batch([TEXT, OTHER])
    probes = [write_probes(reader, text, "repetition", 1, None) for text in (TEXT, OTHER)]
    evidence = read(reader, ids, probes, states=True)
    for row, (passage, (again,)) in enumerate(zip(ids, probes)):
        n, start = len(passage), len(reader.bos_ids)
        hidden, weights, pairs = passes(reader, passage + again)
        for index, layer in enumerate(evidence.layers):
            block = reader.model.get_decoder().layers[index]
            project = block.attention.dense if name == "gpt_neox" else block.self_attn.o_proj
            values, heads = pairs[index][1][0], weights[index].shape[1]
            groups = heads // values.shape[0]
            want = torch.zeros(values.shape[0], n)
            for head in range(heads):
                one = torch.zeros(n, heads, values.shape[-1])
                one[:, head] = values[head // groups, start : start + n]
                with torch.no_grad():
                    size = (project(one.flatten(1)) - project(torch.zeros(1, one.flatten(1).shape[1]))).norm(dim=-1)
                part = weights[index][0, head, start + n :, start : start + n]
                part = part * size / hidden[index][0, start + n :].norm(dim=-1)[:, None]
                want[head // groups] = torch.maximum(want[head // groups], part.amax(0))
            got = SCORES["kvzip+"][0](layer, evidence, reader.kv_placement, index)[row, :, :n]
            assert close(got, want)
    made = load_compressor("kv-match", reader=reader, score="kvzip+").compress([TEXT], ratio=3)[0]
    assert 0 < int(made.counts.sum()) <= len(ids[0]) * made.counts.numel() / 3


def features(reader: Reader, ids: list[int]) -> torch.Tensor:
    """``[layers, n, hidden + 5]`` of a passage, from the model's own pass."""
    hidden, _, pairs = passes(reader, ids)
    states = torch.stack([h[0, len(reader.bos_ids) :] for h in hidden[: len(pairs)]])
    states = states / states.pow(2).mean(-1, keepdim=True).sqrt()
    n = len(ids)
    places = [[1.0, math.log(n), i / n, math.log(i + 1), math.log(n - i)] for i in range(n)]
    return torch.cat([states, torch.tensor(places).expand(len(states), -1, -1)], -1)


def test_a_surrogate_equals_ridge_regression_on_the_probes_scores(zoo):
    reader = zoo.reader("llama")
    compressor = make_compressor("kv-match", reader, score="surrogate")
    with pytest.raises(ValueError, match="they were not fitted"):
        compressor.compress([TEXT])
    about = compressor.fitted.fit(reader, GENERIC, probes=3)
    x, y = [], []
    for i, text in enumerate(sorted(GENERIC, key=len)):
        (ids,) = reader.tokenize_batch([text])
        evidence = read(reader, [ids], [write_probes(reader, text, "questions", 3, None)])
        scores = [
            SCORES["probes"][0](layer, evidence, reader.kv_placement, 0) / layer.values.norm(dim=-1)
            for layer in evidence.layers
        ]
        if i % 8 != 7:
            x.append(features(reader, ids))
            y.append(torch.stack(scores)[:, 0].clamp(min=LEAST).log().mT)
    x, y = torch.cat(x, 1).double(), torch.cat(y, 1).double()
    for index in range(3):
        normal = x[index].T @ x[index]
        ridge = RIDGE * normal.diagonal().mean()
        want = torch.linalg.solve(normal + ridge * torch.eye(len(normal)).double(), x[index].T @ y[index])
        assert close(compressor.fitted.weight[index].double(), want, 1e-4)
    evidence = read(reader, reader.tokenize_batch([OTHER, "Rivers"]), [[], []], states=True)
    for row, text in enumerate((OTHER, "Rivers")):
        found = features(reader, reader.tokenize(text))
        for index, layer in enumerate(evidence.layers):
            got = compressor.fitted(layer, evidence, reader.kv_placement, index)[row, :, : found.shape[1]]
            got = got / layer.values[row, :, : found.shape[1]].norm(dim=-1)
            assert close(got.log(), (found[index] @ compressor.fitted.weight[index]).mT, 1e-4)
    assert about["passages"] == len(GENERIC)
    assert about["r2"] > 0.5  # the held-out passage is one of the others, too


def test_query_statistics_give_expected_attention_of_generic_queries(zoo):
    reader = zoo.reader("llama")
    compressor = make_compressor("kv-match", reader, score="expected-stats")
    compressor.fitted.fit(reader, [TEXT])
    ids = reader.tokenize_batch([TEXT])
    evidence = read(reader, ids, [[]])
    for index, layer in enumerate(evidence.layers):  # on the same text they are the passage's own statistics
        own = SCORES["expected"][0](layer, evidence, reader.kv_placement, index)
        factor = (len(ids[0]) - 1) / len(ids[0])  # the covariance over n - 1, as in kvpress
        compressor.fitted.covariance.data[index] *= factor
        assert close(compressor.fitted(layer, evidence, reader.kv_placement, index), own, 1e-4)
    compressor.fitted.fit(reader, [TEXT, OTHER])
    with torch.no_grad():
        for index, (block, layer) in enumerate(zip(reader.model.model.layers, range(3))):
            queries = []
            for text in (TEXT, OTHER):
                hidden = passes(reader, reader.tokenize(text))[0][layer][0, 1:]
                queries.append(block.self_attn.q_proj(block.input_layernorm(hidden)).view(-1, 4, 8))
            every = torch.cat(queries)
            assert close(compressor.fitted.mean[index], every.mean(0), 1e-4)
            for head in range(4):
                assert close(compressor.fitted.covariance[index, head], torch.cov(every[:, head].T), 1e-4)


@pytest.mark.parametrize("score", ["surrogate", "expected-stats"])
def test_fitted_scores_are_saved_and_belong_to_their_reader(zoo, tmp_path, score):
    reader = zoo.reader("llama")
    compressor = make_compressor("kv-match", reader, score=score, probes=2)
    compressor.fitted.fit(reader, GENERIC)
    compressor.save_pretrained(tmp_path / "fitted")
    again = load_compressor(tmp_path / "fitted", reader=reader)
    assert again.fingerprint == compressor.fingerprint
    made, want = (c.compress([TEXT, OTHER], ratio=3) for c in (again, compressor))
    for a, b in zip(made, want):
        assert torch.equal(a.keys[0], b.keys[0])
        assert torch.equal(a.values[0], b.values[0])
    other = load_compressor(tmp_path / "fitted", reader=reader, ratio=2, keep_digits=True, repair="none")
    assert (other.config.ratio, other.config.keep_digits, other.config.probes) == (2, True, 2)
    assert other.compress([TEXT])[0].bias is None
    assert other.fingerprint != compressor.fingerprint
    with pytest.raises(ValueError, match="it has no other score"):
        load_compressor(tmp_path / "fitted", reader=reader, score="keydiff")
    with pytest.raises(ReaderMismatchError, match="was made for the reader"):
        load_compressor(tmp_path / "fitted", reader=zoo.reader("llama", seed=1))


def test_passages_for_fitting_have_all_lengths():
    documents = [
        f"# Title {i}\n\n" + "\n\n".join(f"Sentence {j} of {i} is here. " * 20 for j in range(5)) for i in range(40)
    ]
    found = draw_passages(documents, 30)
    assert found == draw_passages(documents, 30)
    assert len(set(found)) == 30
    sizes = sorted(map(len, found))
    assert sizes[0] < 300 < 1000 < sizes[-1] <= 2000
    with pytest.raises(ValueError, match="need as many documents"):
        draw_passages(documents, 50)
