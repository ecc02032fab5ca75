"""KV matching: every score, budget and repair against a plain computation, and what a reader makes of the result."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from nutgraf import Reader, load_compressor
from nutgraf.compressors import ReaderMismatchError
from nutgraf.compressors.fidelity.questions import make_questions
from nutgraf.compressors.kv.encode import cached_layers
from nutgraf.compressors.kv.pairs import shared_reading
from nutgraf.compressors.kv.probing import read
from nutgraf.compressors.kv.repair import HIGH, LOW, VALUE_RIDGE, WEIGHT_RIDGE, match_weights, repair
from nutgraf.compressors.kv.selection import FLOOR, SCORES, attention, select
from oracles.ragged_pass import one_pass
from scipy.optimize import lsq_linear

TEXT = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."
OTHER = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
QUESTION = "\n\nQuestion: when?\nAnswer:"
PROBES = [["\n\nQuestion: who?\nAnswer: it", " When was it?"], ["What prizes?"]]
MOVABLE = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2", "mixtral"]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(got, want, atol=tolerance * max(1.0, float(want.abs().max())), rtol=0)


def recorded(reader: Reader):
    ids, probes = reader.tokenize_batch([TEXT, OTHER]), [reader.tokenize_batch(asked) for asked in PROBES]
    with torch.no_grad():
        return ids, probes, read(reader, ids, probes)


def plain_attention(reader: Reader, ids: list[int], probes: list[list[int]]) -> list[torch.Tensor]:
    """Per layer ``[2, heads, rows, n]``: each probe read alone after the passage, by the model's own eager attention.

    Twice: as it is, with the probe's attention to itself left out, and with the rest scaled to 1.
    """
    bos, layers = list(reader.bos_ids), []
    model = copy.deepcopy(reader.model)
    model.set_attn_implementation("eager")
    start, end = len(bos), len(bos) + len(ids)
    for probe in probes:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([[*bos, *ids, *probe]]), output_attentions=True).attentions
        seen = [weights[0, :, end:, :end] for weights in found]
        layers.append([torch.stack([part, part / part.sum(-1, keepdim=True)])[..., start:] for part in seen])
    return [torch.cat(parts, 2) for parts in zip(*layers)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVABLE)
def test_probes_read_in_one_batch_attend_as_each_does_alone(zoo, name):
    reader = zoo.reader(name)
    ids, probes, evidence = recorded(reader)
    for row in range(2):
        want = plain_attention(reader, ids[row], probes[row])
        for index, layer in enumerate(evidence.layers):
            heads = layer.keys.shape[1]
            got = attention(layer, evidence)[row].unflatten(1, (-1, evidence.rows.shape[1]))
            rows = int(evidence.rows[row].sum())
            got = got[:, :, :rows, : len(ids[row])].flatten(0, 1)
            assert close(got, want[index][1])
            own, grouped = (part.unflatten(0, (heads, -1)).flatten(1, 2) for part in want[index])
            for score, plain in (
                ("probes", grouped.pow(4).mean(1).pow(0.25) * layer.values[row, :, : len(ids[row])].norm(dim=-1)),
                ("kvzip", own.amax(1)),
                ("snapkv", neighbours(own.mean(1))),
            ):
                found = SCORES[score][0](layer, evidence, reader.kv_placement, index)[row]
                assert close(found[:, : len(ids[row])], plain), score


def neighbours(scores: torch.Tensor) -> torch.Tensor:
    """The mean over five neighbours, zeros beyond the ends."""
    n = scores.shape[1]
    return torch.stack([scores[:, max(0, i - 2) : i + 3].sum(1) / 5 for i in range(n)], 1)


def test_scores_without_probes_equal_a_plain_computation(zoo):
    reader = zoo.reader("llama")
    ids, _, evidence = recorded(reader)
    model, bos = reader.model.model, list(reader.bos_ids)
    for row, passage in enumerate(ids):
        whole = torch.tensor([[*bos, *passage]])
        n, start, end = len(passage), len(bos), whole.shape[1]
        with torch.no_grad():
            layers = cached_layers(model, reader.embed(whole), torch.ones_like(whole), torch.arange(end)[None])
            hidden = model(input_ids=whole, output_hidden_states=True).hidden_states
        for index, (keys, values) in enumerate(layers):
            keys, values = keys[0, :, start:], values[0, :, start:]
            apply = {score: SCORES[score][0] for score in ("keydiff", "expected")}
            got = {
                score: f(evidence.layers[index], evidence, reader.kv_placement, index)[row, :, :n]
                for score, f in apply.items()
            }
            for head in range(2):
                unit = keys[head] / keys[head].norm(dim=-1, keepdim=True)
                mean = unit.mean(0)
                assert close(got["keydiff"][head], -(unit @ (mean / mean.norm())))
            module = model.layers[index]
            with torch.no_grad():
                queries = module.self_attn.q_proj(module.input_layernorm(hidden[index]))[0, start:].view(n, 4, 8)
            want = torch.zeros(2, n)
            for head in range(4):
                q = queries[:, head]
                average = rotations(model, torch.arange(end, end + 512)).mean(0)
                mu = average @ q.mean(0)
                sigma = average @ torch.cov(q.T, correction=0) @ average.T
                k = keys[head // 2]
                logits = k @ mu / math.sqrt(8) + torch.einsum("ni,ij,nj->n", k, sigma, k) / 16
                want[head // 2] += logits.softmax(0) / 2
            assert close(got["expected"], want * values.norm(dim=-1))


def rotations(model, positions: torch.Tensor) -> torch.Tensor:
    """``[positions, 8, 8]`` rotation matrices of Llama's RoPE."""
    angles = positions[:, None] * model.rotary_emb.inv_freq
    out = torch.zeros(len(positions), 8, 8)
    for i in range(4):
        cos, sin = angles[:, i].cos(), angles[:, i].sin()
        out[:, i, i], out[:, i, i + 4], out[:, i + 4, i], out[:, i + 4, i + 4] = cos, -sin, sin, cos
    return out


@pytest.mark.parametrize("budget", ["global", "per-layer", "uniform"])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 3.7, 16.0, 1000.0])
@pytest.mark.parametrize("sink", [True, False])
def test_budgets_equal_a_plain_loop(budget, ratio, sink):
    layers, heads, n = 3, 2, 20
    scores, lengths = torch.rand(2, layers, heads, n), [20, 11]
    kept = select(scores.clone(), torch.tensor(lengths), ratio, budget, sink=sink)
    for row, length in enumerate(lengths):
        pairs = {
            (a, h, i): float(scores[row, a, h, i]) for a in range(layers) for h in range(heads) for i in range(length)
        }
        if sink:
            pairs |= {key: math.inf for key in pairs if key[2] == 0}
        share = length / ratio
        chosen = set()
        for a in range(layers):
            for h in range(heads):
                own = sorted((key for key in pairs if key[:2] == (a, h)), key=pairs.get, reverse=True)
                chosen |= set(own[: max(1, int(FLOOR * share))])
        groups = {
            "global": [lambda key: True],
            "per-layer": [lambda key, a=a: key[0] == a for a in range(layers)],
            "uniform": [lambda key, a=a, h=h: key[:2] == (a, h) for a in range(layers) for h in range(heads)],
        }[budget]
        for group in groups:
            members = [key for key in pairs if group(key)]
            most = max(layers * heads // len(groups), int(len(members) / ratio + 1e-6))
            rest = sorted((key for key in members if key not in chosen), key=pairs.get, reverse=True)
            chosen |= set(rest[: max(0, most - sum(key in chosen for key in members))])
        assert {tuple(key) for key in kept[row].nonzero().tolist()} == chosen
        if ratio < n:
            assert kept[row].sum() <= max(layers * heads, length * layers * heads / ratio + 1e-6)


def test_repair_equals_bounded_least_squares_head_by_head():
    torch.manual_seed(0)
    heads, rows, n, width = 3, 40, 12, 5
    every = torch.randn(heads, rows, n + 1, dtype=torch.float64).mul(1.5).softmax(-1)  # the last one is the BOS
    attended, values = every[..., :n], torch.randn(heads, n, width, dtype=torch.float64)
    kept = torch.zeros(heads, n, dtype=torch.bool)
    for head, count in enumerate((7, 3, 1)):
        kept[head, torch.randperm(n)[:count]] = True
    bias, fitted = repair(attended, values, kept, "bias+values")
    assert torch.equal(repair(attended, values, kept, "bias")[0], bias)
    assert torch.equal(fitted[~kept], values[~kept])
    assert not bias[~kept].any()
    for head in range(heads):
        part = kept[head]
        a, c = attended[head][:, part].numpy(), attended[head].sum(-1).numpy()
        ridge = WEIGHT_RIDGE * np.trace(a.T @ a) / part.sum().item()
        stacked = np.vstack([a, math.sqrt(ridge) * np.eye(a.shape[1])])
        wanted = lsq_linear(stacked, np.append(c, np.full(a.shape[1], math.sqrt(ridge))), (LOW, HIGH), tol=1e-14).x
        assert np.allclose(bias[head, part].exp().numpy(), wanted, atol=1e-5)
        p = a * wanted / (a @ wanted + 1 - c)[:, None]
        ridge = VALUE_RIDGE * np.trace(p.T @ p) / part.sum().item()
        start = values[head, part].numpy()
        missing = attended[head].numpy() @ values[head].numpy() - p @ start
        moved = start + np.linalg.solve(p.T @ p + ridge * np.eye(p.shape[1]), p.T @ missing)
        assert np.allclose(fitted[head, part].numpy(), moved, atol=1e-5)


def test_repair_in_float32_reads_as_in_float64():
    torch.manual_seed(1)
    attended = torch.randn(2, 200, 60, dtype=torch.float64).mul(2.5).softmax(-1)
    values, kept = torch.randn(2, 60, 16, dtype=torch.float64), torch.rand(2, 60) < 0.4
    outputs = []
    for dtype in (torch.float64, torch.float32):
        bias, fitted = repair(attended.to(dtype), values.to(dtype), kept, "bias+values")
        assert fitted.dtype == dtype
        weights = (attended.to(dtype) * bias.exp()[:, None]).masked_fill(~kept[:, None], 0.0)
        outputs.append((weights / weights.sum(-1, keepdim=True)) @ fitted)
    assert close(outputs[1].double(), outputs[0], 1e-4)


def test_weights_stay_within_bounds():
    columns = torch.tensor([[[1e-4, 0.9], [1e-4, 0.8]]])
    weights = match_weights(columns, torch.tensor([[[0.0], [0.0]]]), torch.ones(1, 2, dtype=torch.bool))
    assert LOW <= float(weights.min()) <= float(weights.max()) <= HIGH


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVABLE)
def test_at_ratio_1_the_reader_gives_its_own_logits(zoo, name, monkeypatch):
    reader = zoo.reader(name)
    passage = load_compressor("kv-match", reader=reader, probes=4).compress([TEXT], ratio=1)[0]
    want = reader.target_logits([[reader.identity(TEXT), QUESTION]], [" it was"])[0]
    assert close(reader.target_logits([[passage, QUESTION]], [" it was"])[0], want)
    assert passage.slots == passage.places == passage.source_tokens


def test_joined_at_ratio_1_they_equal_the_block_mask_of_independent_passages(zoo, monkeypatch):
    tokenizer = copy.deepcopy(zoo.tokenizer())
    tokenizer.backend_tokenizer.post_processor = copy.deepcopy(tokenizer.backend_tokenizer.post_processor).__class__(
        single="$A", special_tokens=[]
    )
    reader = Reader.from_pretrained(zoo.model("llama"), tokenizer=tokenizer)
    assert not reader.bos_ids
    first, second = load_compressor("kv-match", reader=reader, repair="none").compress([TEXT, OTHER], ratio=1)
    prompt = ["Read: ", first, "\n\n", second, QUESTION]
    pieces = [("Read: ", None), (TEXT, first), ("\n\n", None), (OTHER, second), (QUESTION, None)]
    assert close(reader.target_logits([prompt], [" x"])[0][0], one_pass(reader, pieces, monkeypatch))
    # without a BOS the first token, the attention sink, is in every head
    kept = load_compressor("kv-match", reader=reader, score="random").compress([TEXT], ratio=8)[0]
    assert int((kept.positions == 0).sum()) == kept.counts.numel()


@pytest.mark.slow
@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("budget", ["global", "per-layer", "uniform"])
def test_every_score_with_every_budget_keeps_what_was_asked(zoo, score, budget):
    reader = zoo.reader("llama")
    for how in ("none", "bias", "bias+values"):
        compressor = load_compressor("kv-match", reader=reader, score=score, budget=budget, repair=how, probes=4)
        query = "when was it signed?" if compressor.query_aware else None
        found = compressor.compress([TEXT, OTHER], query=query, ratio=3)
        for passage, text in zip(found, (TEXT, OTHER)):
            n = len(reader.tokenize(text))
            assert int(passage.counts.sum()) <= n * passage.counts.numel() / 3
            assert passage.slots == math.ceil(int(passage.counts.sum()) / passage.counts.numel())
            assert (passage.bias is None) == (how == "none")
            assert (len(set(passage.counts.flatten().tolist())) == 1) == (budget == "uniform") or score == "first"
        again = compressor.compress([TEXT], query=query, ratio=3)[0]
        assert torch.equal(again.keys[0], found[0].keys[0])
        assert isinstance(reader.generate([[found[0], found[1], QUESTION]], 2)[0], str)


def test_repair_brings_the_probes_closer_to_the_full_text(zoo):
    reader = zoo.reader("llama")
    prompts = [f"\n\nQuestion: {question}\nAnswer:" for question, _ in make_questions(TEXT, 48, random.Random(0))]
    full = reader.target_logits([[reader.identity(TEXT), prompt] for prompt in prompts], [" it"] * len(prompts))
    want = torch.cat(full).log_softmax(-1)
    gaps = {}
    for how in ("none", "bias+values"):
        passage = load_compressor("kv-match", reader=reader, repair=how).compress([TEXT], ratio=3)[0]
        read = reader.target_logits([[passage, prompt] for prompt in prompts], [" it"] * len(prompts))
        got = torch.cat(read).log_softmax(-1)
        gaps[how] = float((want.exp() * (want - got)).sum(-1).mean())
    assert gaps["bias+values"] < 0.7 * gaps["none"]


def test_what_it_cannot_do_is_refused_with_a_sentence(zoo):
    reader = zoo.reader("llama")
    with pytest.raises(ValueError, match="mixes positions into its keys"):
        load_compressor("kv-match", reader=zoo.reader("gpt2"))
    with pytest.raises(ValueError, match=r"must go through transformers\.AttentionInterface"):
        load_compressor("kv-match", reader=zoo.reader("falcon"))
    with pytest.raises(ValueError, match="needs a reader"):
        load_compressor("kv-match")
    with pytest.raises(ValueError, match="needs the question"):
        load_compressor("kv-match", reader=reader, score="snapkv").compress([TEXT])
    short = load_compressor("kv-match", reader=zoo.reader("llama", max_position_embeddings=30))
    with pytest.raises(ValueError, match="cut the passage into shorter ones"):
        short.compress([TEXT])
    for wrong in ({"score": "best"}, {"budget": "all"}, {"repair": "keys"}, {"probes": 0}, {"ratio": 0.5}):
        with pytest.raises(ValueError, match=r"must be|ratio is"):
            load_compressor("kv-match", reader=reader, **wrong)
    passage = load_compressor("kv-match", reader=reader, probes=2).compress([TEXT])[0]
    with pytest.raises(ReaderMismatchError, match="was made for the reader"):
        zoo.reader("llama", seed=1).generate([[passage, QUESTION]], 1)


def test_a_reader_that_gives_nan_is_refused_with_a_sentence(zoo):
    reader = Reader.from_pretrained(copy.deepcopy(zoo.model("llama")), tokenizer=zoo.tokenizer())
    compressor = load_compressor("kv-match", reader=reader, probes=2)
    reader.model.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="are NaN or infinite; load the reader in float32"):
        compressor.compress([TEXT])


def test_several_ratios_at_once_are_what_each_gives_alone(zoo):
    compressor = load_compressor("kv-match", reader=zoo.reader("llama"), probes=4)
    found = compressor.compress_at([TEXT, OTHER, ""], [2, 8], batch_size=2)
    for ratio, passages in zip((2, 8), found):
        for passage, alone in zip(passages, compressor.compress([TEXT, OTHER, ""], ratio=ratio)):
            assert torch.equal(passage.keys[0], alone.keys[0])
            assert torch.equal(passage.values[0], alone.values[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        compressor.compress_at([TEXT], [2], batch_size=-1)


@pytest.mark.parametrize("score", [score for score in SCORES if SCORES[score][1] != "query"])
def test_a_reader_in_float64_keeps_the_pairs_of_one_in_float32(zoo, score):
    found = []
    for dtype in (torch.float32, torch.float64):
        reader = Reader.from_pretrained(zoo.model("llama").to(dtype), tokenizer=zoo.tokenizer())
        found += load_compressor("kv-match", reader=reader, score=score, probes=4).compress([TEXT], ratio=3)
    assert found[1].keys[0].dtype == torch.float64
    shared = (found[0].heads_per_token - found[1].heads_per_token).abs().sum() / 2
    assert int(shared) <= 0.02 * int(found[0].counts.sum())  # but for ties within rounding


def test_methods_that_share_a_reading_give_what_each_gives_alone(zoo):
    reader = zoo.reader("llama")
    methods = [
        load_compressor("kv-match", reader=reader, probes=4, **settings)
        for settings in ({}, {"budget": "uniform"}, {"score": "kvzip"}, {"repair": "none"})
    ]
    with shared_reading(methods):
        together = [method.compress([TEXT, OTHER], ratio=3) for method in methods]
    for method, found in zip(methods, together):
        for passage, alone in zip(found, method.compress([TEXT, OTHER], ratio=3)):
            assert torch.equal(passage.keys[0], alone.keys[0])
            assert torch.equal(passage.values[0], alone.values[0])
