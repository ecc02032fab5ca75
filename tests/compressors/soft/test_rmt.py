"""RMT: memory carried from segment to segment."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import make_compressor

TEXT = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. "


def build(reader, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("rmt", reader, **{"memory_tokens": 8, "segment_tokens": 12, "r": 4, **settings})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def by_hand(compressor, reader, ids: list[int], slots: int) -> torch.Tensor:
    count = -(-len(ids) // 12)
    length = -(-len(ids) // count)
    memory = compressor.memory[:slots]
    for start in range(0, len(ids), length):
        text = [reader.embed(torch.tensor(part)) for part in (reader.bos_ids, ids[start : start + length])]
        rows = torch.cat([text[0], memory, text[1], memory])
        states = compressor.encoder.decoder(inputs_embeds=rows[None]).last_hidden_state[0, -slots:]
        memory = states * compressor.log_scale.exp()
    return memory


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_memory_equals_a_loop_over_segments(zoo, architecture):
    reader = zoo.reader(architecture)
    compressor = build(reader)
    ids = [reader.tokenize(text) for text in (TEXT[:60], TEXT, "a")]
    found = compressor.encode_ids(ids, ratio=8)
    for passage, part in zip(found, ids):
        slots = -(-len(part) // 8)
        assert torch.allclose(passage.embeds, by_hand(compressor, reader, part, slots), atol=1e-4)


def test_a_passage_beyond_the_memory_has_several(zoo):
    reader = zoo.reader()
    compressor = build(reader)
    ids = reader.tokenize(TEXT * 2)
    count = -(-len(ids) // 32)
    length = -(-len(ids) // count)
    parts = [ids[i : i + length] for i in range(0, len(ids), length)]
    want = torch.cat([by_hand(compressor, reader, part, -(-len(part) // 4)) for part in parts])
    (passage,) = compressor.encode_ids([ids], ratio=4)
    assert torch.allclose(passage.embeds, want, atol=1e-4)


def test_gradients_flow_through_all_segments(zoo):
    reader = zoo.reader()
    compressor = build(reader, adapt_reader=False)
    assert compressor.reader is reader
    compressor.encode([TEXT], ratio=16)[0].embeds.sum().backward()
    assert compressor.memory.grad.abs().max() > 0
    assert "tuned" not in compressor.reader.name
    assert build(reader).reader is not reader
