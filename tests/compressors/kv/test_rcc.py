"""RCC: deep states of the encoder, added layer by layer while the reader runs over the slots."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import load_compressor, make_compressor
from transformers import MambaConfig, MambaModel

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


def build(reader, trained: bool = True, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("rcc", reader, **{"r": 4, **settings})
    with torch.no_grad():
        for p in compressor.parameters() if trained else ():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def read_slots(compressor, read, states, ends):
    """Keys and values of every layer at the slots: the reader runs layer by layer over ``[BOS][slots]``."""
    reader, slots = compressor.base_reader, len(ends)
    bos = reader.embed(torch.tensor(reader.bos_ids))
    hidden = torch.cat([bos, states[0][ends] @ compressor.first.weight.T])
    body = reader.model.get_decoder()
    rotary = body.rotary_emb(hidden[None], torch.arange(len(hidden))[None])
    mask = torch.full((len(hidden), len(hidden)), torch.finfo(torch.float32).min).triu(1)[None, None]
    pairs = []
    for number, layer in enumerate(body.layers):
        normed = layer.input_layernorm(hidden)
        values = layer.self_attn.v_proj(normed)[-slots:]
        keys = layer.self_attn.k_proj(normed)[-slots:]
        pairs.append((keys.unflatten(-1, (2, 8)).transpose(0, 1), values.unflatten(-1, (2, 8)).transpose(0, 1)))
        hidden = layer(hidden[None], attention_mask=mask, position_embeddings=rotary)[0]
        if number < len(compressor.added):
            hidden[-slots:] += states[read[number]][ends] @ compressor.added[number].weight.T
    return pairs


def check(passage, compressor, want):
    """A passage holds the pairs of its segments, the keys at their positions."""
    placement, front = compressor.base_reader.kv_placement, len(compressor.base_reader.bos_ids)
    for number in range(3):
        values = torch.cat([pairs[number][1] for pairs in want], dim=1)
        assert torch.allclose(passage.values[number], values, atol=1e-4)
        turned = [placement.rotate(k, torch.arange(k.shape[1]) + front, number) for k, _ in (p[number] for p in want)]
        assert torch.allclose(passage.keys[number], torch.cat(turned, dim=1), atol=1e-4)


def last_of_runs(front, length, slots):
    return [front + max(t for t in range(length) if t * slots // length == k) for k in range(slots)]


@pytest.mark.parametrize("segment_tokens", [512, 10])
def test_keys_and_values_equal_a_run_layer_by_layer(zoo, segment_tokens):
    reader = zoo.reader()
    compressor = build(reader, segment_tokens=segment_tokens)
    ids, want = reader.tokenize(PASSAGE), []
    for length, slots in compressor.segments(len(ids), 4):
        read = torch.tensor([*reader.bos_ids, *ids[:length]])
        ids = ids[length:]
        encoder, states = compressor.encoder.decoder, [reader.embed(read)]
        at = torch.arange(len(read))[None]
        rotary = encoder.rotary_emb(states[0][None], at)
        mask = torch.full((len(read), len(read)), torch.finfo(torch.float32).min).triu(1)[None, None]
        hidden = states[0][None]
        for layer in encoder.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            states.append(hidden[0])
        want.append(read_slots(compressor, (1, 2), states, last_of_runs(len(reader.bos_ids), length, slots)))
    (passage,) = compressor.compress([PASSAGE], ratio=4)
    check(passage, compressor, want)


@pytest.mark.slow
def test_a_state_space_encoder_of_another_depth_and_width(zoo, tmp_path):
    """Mamba of five layers for a reader of three: its layers 1 and 3 are read."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 5, "state_size": 4, "time_step_rank": 4}
    mamba = MambaModel(MambaConfig(vocab_size=len(zoo.tokenizer()), **sizes)).eval()
    mamba.save_pretrained(tmp_path / "mamba")
    zoo.tokenizer().save_pretrained(tmp_path / "mamba")
    reader = zoo.reader()
    compressor = build(reader, encoder=str(tmp_path / "mamba"))
    body = compressor.encoder.decoder
    assert [len(body.layers), compressor.first.weight.shape, compressor.added[0].weight.shape] == [
        3,
        (32, 24),
        (32, 24),
    ]
    texts = [PASSAGE, "", "Rivers carry sediment to the sea."]
    passages = compressor.compress(texts, ratio=4)
    assert [p.slots for p in passages] == [-(-len(reader.tokenize(text)) // 4) for text in texts]
    with torch.no_grad():
        for text, passage in zip(texts[::2], passages[::2]):
            bos, ids = reader.bos_ids, reader.tokenize(text)
            states = [body.get_input_embeddings()(torch.tensor([*bos, *ids]))]
            for layer in body.layers:
                states.append(layer(states[-1][None])[0])
            ends = last_of_runs(len(bos), len(ids), passage.slots)
            check(passage, compressor, [read_slots(compressor, (1, 3), states, ends)])
    compressor.save_pretrained(tmp_path / "saved")
    loaded = load_compressor(tmp_path / "saved", reader).compress(texts, ratio=4)
    for a, b in zip(loaded, passages):
        assert a.compressor == b.compressor
        assert all(map(torch.equal, (*a.keys, *a.values), (*b.keys, *b.values)))
    (passage,) = compressor.train().encode([PASSAGE], ratio=4)
    sum(t.sum() for t in (*passage.keys, *passage.values)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressor.parameters())


def test_it_starts_by_reading_every_fourth_token(zoo):
    reader = zoo.reader()
    compressor = build(reader, trained=False)
    ids = reader.tokenize(PASSAGE)[:20]
    (passage,) = compressor.encode_ids([ids], ratio=4)
    as_text = torch.tensor([*reader.bos_ids, *ids[3::4], 9, 5])
    want = reader.model(input_ids=as_text[None]).logits[0, -2:]
    found = reader.target_logits([[passage, reader.decode([9])]], [[5, 6]])[0]
    assert reader.tokenize(reader.decode([9])) == [9]
    assert torch.allclose(found, want, atol=1e-4)


def test_the_reader_itself_has_no_hooks(zoo):
    reader = zoo.reader()
    build(reader)
    assert not any(module._forward_hooks for module in reader.model.modules())
