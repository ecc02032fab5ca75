"""CompLLM: segments of a few tokens, each read alone before end-of-text tokens."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import make_compressor

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_slots_equal_the_papers_equations(zoo, architecture):
    reader = zoo.reader(architecture)
    torch.manual_seed(0)
    compressor = make_compressor("compllm", reader, r=4).eval()
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    (passage,) = compressor.compress([PASSAGE])
    ids, want = reader.tokenize(PASSAGE), []
    count = -(-len(ids) // 20)
    length = -(-len(ids) // count)
    for start in range(0, len(ids), length):
        part = ids[start : start + length]
        slots = -(-len(part) // 2)
        read = torch.tensor([[*reader.bos_ids, *part, *[reader.eos_id] * slots]])
        states = compressor.encoder.decoder(input_ids=read).last_hidden_state[0, -slots:]
        want.append(states @ compressor.linear.weight.T + compressor.linear.bias)
    assert torch.allclose(passage.embeds, torch.cat(want), atol=1e-4)


def test_a_segment_does_not_depend_on_its_neighbours(zoo):
    reader = zoo.reader()
    compressor = make_compressor("compllm", reader, r=4).eval()
    first, second = reader.tokenize(PASSAGE)[:20], reader.tokenize(PASSAGE[::-1])[:20]
    both, alone = (compressor.encode_ids([ids])[0].embeds for ids in ([*first, *second], second))
    assert torch.allclose(both[10:], alone, atol=1e-5)
