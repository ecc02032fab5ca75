"""Batches of like length: every sequence once, within the budget, at the least cost that any split has."""

from __future__ import annotations

import itertools
import random
from types import ModuleType

import pytest
import torch
from nutgraf.compressors import make_compressor
from nutgraf.compressors.core.batching import pack, pass_positions


def cost(lengths: list[int], batches: list[list[int]], overhead: int) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) + overhead for batch in batches)


def every_split(order: list[int]) -> list[list[list[int]]]:
    out = []
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        borders = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), len(order)]
        out.append([order[a:b] for a, b in zip(borders, borders[1:])])
    return out


@pytest.mark.parametrize("overhead", [0, 7, 200])
def test_no_split_costs_less(overhead: int) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        lengths = [rng.randrange(1, 60) for _ in range(8)]
        order = sorted(range(8), key=lambda i: -lengths[i])
        fits = [s for s in every_split(order) if all(len(b) == 1 or len(b) * lengths[b[0]] <= 120 for b in s)]
        found = list(pack(lengths, 120, overhead))
        assert sorted(i for batch in found for i in batch) == list(range(8))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 120 for b in found)
        assert cost(lengths, found, overhead) == min(cost(lengths, split, overhead) for split in fits)


def test_longest_first_and_edges() -> None:
    assert list(pack([5, 9, 1, 9, 3], 18)) == [[1, 3], [0], [4], [2]]
    assert list(pack([5, 9, 1, 9, 3], 18, 100)) == [[1, 3], [0, 4, 2]]
    assert list(pack([4, 4, 4], 1000)) == [[0, 1, 2]]
    assert list(pack([50], 10)) == [[0]]
    assert list(pack([], 10)) == []


def test_passages_of_mixed_lengths_leave_little_padding() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(100, 400) for _ in range(64)]
    batches = list(pack(lengths, 16384, pass_positions(torch.device("cpu"), gradients=False)))
    padded = sum(len(b) * lengths[b[0]] for b in batches)
    assert padded <= 1.03 * sum(lengths)
    assert len(batches) <= 32


@pytest.mark.slow
@pytest.mark.parametrize("method", ["icae", "mean-pool", "gist", "pisco", "autocompressor"])
def test_the_encoder_runs_its_own_tokens_and_no_head(zoo: ModuleType, method: str) -> None:
    from nutgraf.benchmarks.costs.costs import decoder_shape
    from nutgraf.benchmarks.speed.timing import count_flops

    settings = {"gist": {"n_gist": 8, "ratio": 4.0}, "icae": {"mem_size": 32}}.get(method, {})
    if method == "autocompressor":
        settings = {"summary_length": 16, "ratio": 4.0}
    lora = {} if method == "pisco" else {"r": 1}
    reader = zoo.reader("llama")
    compressor = make_compressor(method, reader, **settings, **lora).eval()
    text = " ".join(["The treaty was signed in 1648 in Westphalia, ending thirty years of war."] * 6)
    rows: list[int] = []
    decoder = compressor.encoder.decoder
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    try:
        compressor.compress([text])
        once = sum(rows)
        counted = count_flops(lambda: compressor.compress([text]))
    finally:
        hook.remove()
    shape = decoder_shape(reader.model.config)
    body = shape.forward(once, logits=0, causal=False).flops  # one pass at least; several are shorter each
    tokens = len(reader.tokenize(text))
    slots = compressor.compress([text])[0].slots
    assert once <= (tokens + slots + 8) * (1 if method != "autocompressor" else 2)
    head = 2 * shape.head_weights * once
    assert counted < body + 0.5 * head + _beside(compressor, tokens, slots, once)


def _beside(compressor: torch.nn.Module, tokens: int, slots: int, positions: int) -> float:
    """Operations of everything that trains: LoRA on every position, the rest on every slot."""
    return sum(2 * p.numel() * (positions if "lora" in n else slots) for n, p in compressor.named_parameters())
