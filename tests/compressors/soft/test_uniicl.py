"""UniICL: one vector, the frozen reader and one matrix."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import make_compressor

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_slots_equal_the_papers_equations(zoo, architecture):
    reader = zoo.reader(architecture)
    torch.manual_seed(0)
    compressor = make_compressor("uniicl", reader, segment_tokens=20).eval()
    with torch.no_grad():
        compressor.linear.weight.add_(0.1 * torch.randn(reader.width, reader.width))
    (passage,) = compressor.compress([PASSAGE], ratio=5)
    ids, want = reader.tokenize(PASSAGE), []
    for length, slots in compressor.segments(len(ids), 5):
        read = torch.tensor([*reader.bos_ids, *ids[:length]])
        rows = torch.cat([reader.embed(read), compressor.memory.expand(slots, -1)])
        states = reader.model.get_decoder()(inputs_embeds=rows[None]).last_hidden_state[0, -slots:]
        want.append(states @ compressor.linear.weight.T + compressor.linear.bias)
        ids = ids[length:]
    assert torch.allclose(passage.embeds, torch.cat(want), atol=1e-4)


def test_one_vector_and_one_matrix_train(zoo):
    reader = zoo.reader()
    compressor = make_compressor("uniicl", reader)
    sizes = {name: p.numel() for name, p in compressor.named_parameters()}
    assert sizes == {"memory": reader.width, "linear.weight": reader.width**2, "linear.bias": reader.width}


def test_slots_start_on_the_readers_scale(zoo):
    reader = zoo.reader()
    norms = make_compressor("uniicl", reader).compress([PASSAGE], ratio=4)[0].embeds.norm(dim=-1)
    assert 0.5 < float(norms.mean()) / reader.embedding_norm < 2


def test_passages_are_ranked_by_the_cosine_of_mean_slots(zoo):
    compressor = make_compressor("uniicl", zoo.reader(), ratio=4.0)
    texts = ["", PASSAGE, "Rivers carry sediment to the sea.", "The treaty was signed in Paris.", ""]
    slots = {text: compressor.compress([text])[0].embeds.double().mean(0) for text in texts[1:4]}
    for text in texts[1:4]:
        near = sorted(slots, key=lambda other: -float(slots[text] @ slots[other] / slots[other].norm()))
        assert near[0] == text
        order = compressor.rank(text, texts)
        assert [texts[i] for i in order[:3]] == near
        assert order[3:] == [0, 4]
    with pytest.raises(ValueError, match="at least one slot"):
        compressor.rank("", texts)
