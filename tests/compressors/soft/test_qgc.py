"""QGC: windows pooled by the question, then reviewed."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import make_compressor
from nutgraf.compressors.slots.question import QUESTION

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
ASKED = "Who won two prizes?"


def build(reader, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("qgc", reader, **{"layers": 1, **settings})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def rms_norm(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * row / (row.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def run_whole(stack, rows: torch.Tensor) -> torch.Tensor:
    """A stack of layers over one sequence, in which every token sees every other one."""
    mask = torch.zeros(1, 1, len(rows), len(rows))
    types = set(getattr(stack.decoder.config, "layer_types", None) or [])
    given = dict.fromkeys(types, mask) if "sliding_attention" in types else mask
    return stack.decoder(inputs_embeds=rows[None], attention_mask=given, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("asked", [ASKED, None])
def test_slots_equal_the_papers_equations(zoo, architecture, asked):
    reader = zoo.reader(architecture)
    compressor = build(reader)
    ids = reader.tokenize(PASSAGE)
    question = reader.tokenize(QUESTION.format(query=asked)) if asked else []
    (passage,) = compressor.encode([PASSAGE], query=asked, ratio=5)
    front = [*reader.bos_ids, *question]
    states = run_whole(compressor.encoder, reader.embed(torch.tensor([*front, *ids])))
    asks = states[len(reader.bos_ids) : len(front)] if asked else states[: len(front)]
    query = compressor.query.weight @ rms_norm(asks.mean(0), compressor.query_norm.weight)
    values = rms_norm(states[len(front) :], compressor.key_norm.weight)
    slots, size = -(-len(ids) // 5), reader.width // 4
    owner = [t * slots // len(ids) for t in range(len(ids))]
    windows = []
    for slot in range(slots):
        tokens = [t for t in range(len(ids)) if owner[t] == slot]
        heads = []
        for head in range(4):
            part = slice(head * size, (head + 1) * size)
            keys = torch.stack([(compressor.key.weight @ values[t])[part] for t in tokens])
            weights = (keys @ query[part] / size**0.5).softmax(0)
            heads.append(weights @ values[tokens][:, part])
        windows.append(torch.cat(heads))
    reviewed = run_whole(compressor.review, torch.cat([states, torch.stack(windows)]))[-slots:]
    want = reviewed @ compressor.linear.weight.T + compressor.linear.bias
    assert torch.allclose(passage.embeds, want, atol=1e-4)


def test_the_question_decides_what_is_kept(zoo):
    compressor = build(zoo.reader())
    one, other = (compressor.compress([PASSAGE], query=q)[0].embeds for q in (ASKED, "Where was she born?"))
    assert not torch.allclose(one, other, atol=1e-3)


def test_layers_that_the_reader_does_not_have_are_refused(zoo):
    with pytest.raises(ValueError, match="fewer layers"):
        build(zoo.reader(), layers=2)  # of three


def test_half_of_the_positions_are_for_windows(zoo):
    compressor = build(zoo.reader("llama", max_position_embeddings=65))
    assert compressor.longest_segment(4) == 32
    (passage,) = compressor.compress([PASSAGE * 4], query="Who?", ratio=1)
    assert passage.slots == passage.source_tokens > 64
