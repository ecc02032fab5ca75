"""Extensible Tokenization and ReadOnce: slots are states of the reader's first layers, strided or averaged."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from nutgraf.compressors import make_compressor
from nutgraf.compressors.encoders.layer_stack import LayerStack
from nutgraf.compressors.objectives.two_stream import two_stream_losses

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth. "


def states_of(reader, ids: list[int], layers: int) -> torch.Tensor:
    """``[tokens, hidden]``: the reader's own states after some layers and its final norm."""
    read = torch.tensor([[*reader.bos_ids, *ids]])
    hidden = reader.model(input_ids=read, output_hidden_states=True).hidden_states[layers]
    body = reader.model.get_decoder()
    norm = next(getattr(body, name) for name in ("norm", "final_layer_norm", "ln_f") if hasattr(body, name))
    return norm(hidden)[0, len(reader.bos_ids) :]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_extensible_takes_the_state_at_the_last_token_of_each_window(zoo, architecture):
    reader = zoo.reader(architecture)
    compressor = make_compressor("extensible", reader, layers=2).eval()
    for ratio in (2, 4, 4.5):
        (passage,) = compressor.compress([PASSAGE], ratio=ratio)
        ids = reader.tokenize(PASSAGE)
        states = states_of(reader, ids, 2) * compressor.log_scale.exp()
        ends = [min(int(k * ratio), len(ids)) - 1 for k in range(1, passage.slots)] + [len(ids) - 1]
        assert torch.allclose(passage.embeds, states[ends], atol=1e-4)


def test_long_passages_are_read_in_stretches(zoo):
    reader = zoo.reader()
    compressor = make_compressor("extensible", reader, layers=1, chunk_tokens=16).eval()
    ids = reader.tokenize(OTHER * 2)
    count = -(-len(ids) // 16)
    length = -(-len(ids) // count)
    states = torch.cat([states_of(reader, ids[i : i + length], 1) for i in range(0, len(ids), length)])
    (passage,) = compressor.compress([OTHER * 2], ratio=4)
    assert torch.allclose(
        passage.embeds[:-1], states[3::4][: passage.slots - 1] * compressor.log_scale.exp(), atol=1e-4
    )


def test_two_streams_equal_one_prompt_for_each_chunk(zoo):
    reader = zoo.reader()
    compressor = make_compressor("extensible", reader, layers=2, stream_tokens=10).eval()
    texts = [OTHER, "a", PASSAGE]
    found, count = two_stream_losses(compressor, texts, random.Random(0), 4)
    want, tokens = torch.zeros(()), 0
    for text in texts:
        ids = reader.tokenize(text)
        (passage,) = compressor.encode([text], ratio=4)
        for start in range(10, len(ids), 10):
            slots = start // 4  # whole windows before the chunk; the tokens since then are read as text
            text_ids = torch.tensor(ids[4 * slots : start + 10])
            rows = [reader.embed(torch.tensor(reader.bos_ids)), passage.embeds[:slots], reader.embed(text_ids)]
            logits = reader.model(inputs_embeds=torch.cat(rows)[None]).logits[0]
            chunk = torch.tensor(ids[start : start + 10])
            at = len(reader.bos_ids) + slots + (start - 4 * slots) - 1
            want = want + F.cross_entropy(logits[at : at + len(chunk)], chunk, reduction="sum")
            tokens += len(chunk)
    assert count == tokens
    assert torch.allclose(found, want, rtol=1e-4)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in compressor.parameters())
    nothing, none = two_stream_losses(compressor, ["a"], random.Random(0), 4)
    assert (float(nothing), none) == (0.0, 0)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_readonce_projects_means_of_windows(zoo, architecture):
    reader = zoo.reader(architecture)
    torch.manual_seed(0)
    compressor = make_compressor("readonce", reader, layers=2).eval()
    with torch.no_grad():
        for p in compressor.linear.parameters():
            p.add_(0.1 * torch.randn_like(p))
    (passage,) = compressor.compress([PASSAGE], ratio=5)
    ids = reader.tokenize(PASSAGE)
    read = torch.tensor([[*reader.bos_ids, *ids]])
    states = compressor.encoder.decoder(input_ids=read, use_cache=False).last_hidden_state[0, len(reader.bos_ids) :]
    if architecture != "opt":
        assert torch.allclose(states, states_of(reader, ids, 2), atol=1e-5)
    want = torch.stack([w.mean(0) for w in states.split(5)]) @ compressor.linear.weight.T + compressor.linear.bias
    assert torch.allclose(passage.embeds, want, atol=1e-4)


def test_readonce_takes_half_of_the_layers(zoo):
    assert len(make_compressor("readonce", zoo.reader()).encoder.layers) == 2  # of three


def test_a_stack_of_later_layers_goes_on_from_their_input(zoo):
    reader = zoo.reader("gemma3_text")
    read = torch.tensor([[*reader.bos_ids, *reader.tokenize(PASSAGE)]])
    out = reader.model.get_decoder()(input_ids=read, output_hidden_states=True, use_cache=False)
    stack = LayerStack(reader.model, 1, 3)
    assert torch.allclose(stack(out.hidden_states[1], torch.ones_like(read)), out.last_hidden_state, atol=1e-5)
    half = LayerStack(reader.model, 0, 1, norm=False)
    assert torch.allclose(half(reader.embed(read), torch.ones_like(read)), out.hidden_states[1], atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "gpt2"])
def test_a_bidirectional_stack_sees_what_follows_and_no_padding(zoo, architecture):
    reader = zoo.reader(architecture)
    stack = LayerStack(reader.model, 0, 2, bidirectional=True)
    embeds = torch.randn(2, 6, reader.width)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    found = stack(embeds, mask)
    assert torch.allclose(found[0, :4], stack(embeds[:1, :4], mask[:1, :4])[0], atol=1e-5)
    changed = embeds.clone()
    changed[1, 5] = torch.randn(reader.width)
    assert not torch.allclose(stack(changed, mask)[1, 0], found[1, 0], atol=1e-3)


def test_more_layers_than_there_are_are_refused(zoo):
    with pytest.raises(ValueError, match="fewer layers"):
        make_compressor("extensible", zoo.reader(), layers=9)
