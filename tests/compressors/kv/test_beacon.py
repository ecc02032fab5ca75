"""Activation Beacon: interleaved beacons with projections of their own, window after window, against plain torch."""

from __future__ import annotations

import torch
from nutgraf.compressors import make_compressor
from oracles import lora_pass

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."


def build(reader, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("beacon", reader, **{"r": 4, "alpha": 8.0, **settings})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def test_windows_of_interleaved_beacons_equal_plain_torch(zoo):
    reader = zoo.reader()
    compressor = build(reader, segment_tokens=10)
    ids, past = reader.tokenize(PASSAGE), []
    windows = compressor.segments(len(ids), 4)
    assert len(windows) > 2
    for number, (length, slots) in enumerate(windows):
        window, ids = ids[:length], ids[length:]
        rows, beacons = [*reader.embed(torch.tensor(reader.bos_ids))], []
        for k in range(slots):  # beacon k stands after the tokens t with floor(t * slots / length) = k
            rows += [reader.embed(torch.tensor(t)) for i, t in enumerate(window) if i * slots // length == k]
            beacons.append(len(rows))
            rows.append(compressor.beacon[0])
        front, held = len(reader.bos_ids), 0 if not past else past[0][0].shape[1]
        at = torch.arange(len(rows))
        positions = at + (at >= front) * held
        before = [(*pair, torch.arange(held) + front) for pair in past] if past else None
        where = dict.fromkeys(("q_proj", "k_proj", "v_proj"), torch.isin(at, torch.tensor(beacons)))
        made = lora_pass.run(reader, compressor.encoder, torch.stack(rows), positions, where, before, scale=2.0)
        kept = [(k[:, beacons], v[:, beacons]) for k, v in made]
        past = [tuple(map(lambda *x: torch.cat(x, 1), a, b)) for a, b in zip(past, kept)] if number else kept
    (passage,) = compressor.compress([PASSAGE], ratio=4)
    assert passage.slots == sum(slots for _, slots in windows)
    for number, (keys, values) in enumerate(past):
        assert torch.allclose(passage.values[number], values, atol=1e-4)
        assert torch.allclose(passage.keys[number], lora_pass.rotate(keys, passage.positions), atol=1e-4)


def test_tokens_between_beacons_pass_through_the_readers_own_weights(zoo):
    reader = zoo.reader()
    compressor = build(reader)
    ids = torch.tensor([[*reader.bos_ids, *reader.tokenize(PASSAGE)]])
    embeds, nobody = reader.embed(ids), torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        plain = reader.model.get_decoder()(inputs_embeds=embeds).last_hidden_state
        with compressor.encoder.only_at(nobody):
            assert torch.equal(compressor.encoder(embeds, torch.ones_like(ids)), plain)
        assert not torch.allclose(compressor.encoder(embeds, torch.ones_like(ids)), plain, atol=1e-3)


def test_a_late_window_sees_the_last_beacons_that_fit(zoo):
    reader = zoo.reader(max_position_embeddings=40)
    compressor = build(reader)
    (passage,) = compressor.compress([PASSAGE * 5], ratio=2)
    assert passage.slots >= passage.source_tokens // 2 > 40
    assert int(passage.positions.max()) < 40
