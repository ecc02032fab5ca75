"""Compressive memory: the convolution and attention reconstruction, against plain torch."""

from __future__ import annotations

import random

import pytest
import torch
from nutgraf.compressors import make_compressor
from nutgraf.compressors.kv.probing import read, write_probes
from oracles import lora_pass

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
QUESTION = "\n\nQuestion: who?\nAnswer:"


def build(reader, trained=True, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("compressive", reader, **settings)
    with torch.no_grad():
        for p in compressor.parameters() if trained else ():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def pooled(x, kernel, slots):
    """``[n, size]`` vectors to ``[slots, size]`` by one head's ``[taps, size, size]`` kernel, token by token."""
    n, taps = len(x), len(kernel)
    runs = [[t for t in range(n) if t * slots // n == k] for k in range(slots)]
    rows = [sum(x[t] @ kernel[i * taps // len(run)] for i, t in enumerate(run)) * taps / len(run) for run in runs]
    return (
        torch.stack(rows),
        torch.tensor([float(len(run)) for run in runs]),
        [run[(len(run) - 1) // 2] for run in runs],
    )


@pytest.mark.parametrize("ratio", [4, 2.5, 6])
def test_pairs_equal_the_convolution_of_unrotated_keys_and_values(zoo, ratio):
    reader = zoo.reader()
    compressor = build(reader)
    ids, front = reader.tokenize(PASSAGE), len(reader.bos_ids)
    rows = reader.embed(torch.tensor([*reader.bos_ids, *ids]))
    no_lora = type("NoLoRA", (), {"lora": {}})
    made = lora_pass.run(reader, no_lora, rows, torch.arange(len(rows)), {})
    (passage,) = compressor.compress([PASSAGE], ratio=ratio)
    slots = passage.slots
    assert slots == -(-len(ids) // ratio)
    keys, values = (part[0].unflatten(0, (3, 2, slots)) for part in (passage.keys, passage.values))
    for layer, (k, v) in enumerate(made):
        for head in range(2):
            key, sizes, middle = pooled(k[head, front:], compressor.key_kernel[layer, head], slots)
            value, _, _ = pooled(v[head, front:], compressor.value_kernel[layer, head], slots)
            at = torch.tensor(middle) + front
            assert torch.allclose(keys[layer, head], lora_pass.rotate(key[None], at)[0], atol=1e-4)
            assert torch.allclose(values[layer, head], value, atol=1e-4)
            assert torch.equal(passage.positions[:slots].long(), at)
            assert torch.allclose(passage.bias[:slots], sizes.log())


def test_at_ratio_one_it_starts_as_the_reader_itself(zoo):
    reader = zoo.reader()
    (passage,) = build(reader, trained=False).compress([PASSAGE], ratio=1)
    found = reader.target_logits([[passage, QUESTION]], [" it"])[0]
    ids = [*reader.bos_ids, *reader.tokenize(PASSAGE), *reader.tokenize(QUESTION)]
    assert torch.allclose(found[0], reader.model(input_ids=torch.tensor([ids])).logits[0, -1], atol=1e-4)


def test_the_objective_is_the_relative_difference_of_attention_outputs(zoo):
    reader = zoo.reader()
    compressor = build(reader)
    (passage,) = compressor.compress([PASSAGE], ratio=4)
    ids = reader.tokenize(PASSAGE)
    evidence = read(reader, [ids], [write_probes(reader, PASSAGE, "questions", 16, None)])
    keys, values = (part[0].unflatten(0, (3, 2, -1)) for part in (passage.keys, passage.values))
    want = []
    for number, layer in enumerate(evidence.layers):
        outputs = [[], []]
        for head in range(4):
            q = layer.queries[0, head]
            whole = (q @ layer.keys[0, head // 2].T / 8**0.5).softmax(-1) @ layer.values[0, head // 2]
            scores = q @ keys[number, head // 2].T / 8**0.5 + passage.bias[: passage.slots]
            outputs[0].append(whole)
            outputs[1].append(scores.softmax(-1) @ values[number, head // 2])
        whole, ours = map(torch.stack, outputs)
        want.append((whole - ours).square().sum() / whole.square().sum())
    objective = compressor.own_objectives()["attention"]
    total, tokens = objective(compressor, [PASSAGE], random.Random(0), 4)
    assert tokens == len(ids)
    assert torch.allclose(total / tokens, torch.stack(want).mean(), atol=1e-4)


def test_training_it_brings_attention_nearer(zoo):
    compressor = build(zoo.reader(), trained=False)
    objective = compressor.own_objectives()["attention"]
    optimizer = torch.optim.Adam(compressor.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        loss, tokens = objective(compressor, [PASSAGE], random.Random(0), 4)
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
        losses.append(float(loss.detach()) / tokens)
    assert losses[-1] < 0.8 * losses[0]
