"""PC: slots fitted to one passage by the divergence from the reader on the text."""

from __future__ import annotations

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors.fidelity.questions import ASKED, REPEAT
from nutgraf.compressors.objectives.fitting import SlotFitter
from nutgraf.compressors.slots.pooling import summed_runs
from nutgraf.compressors.slots.segments import Segment

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
OTHER = "Rivers carry sediment to the sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."


def divergence(reader, slots: torch.Tensor, text: str, probes) -> torch.Tensor:
    """Mean divergence over the probes' tokens, over the teacher's 64 likeliest tokens and the rest."""
    rows = []
    for probe, target in probes:
        # the teacher reads passage and probe as one text
        read = torch.tensor([*reader.bos_ids, *reader.tokenize(text + probe), *target[:-1]])
        p = reader.model(input_ids=read[None]).logits[0, -len(target) :].softmax(-1)
        front = reader.embed(torch.tensor(reader.bos_ids))
        tail = reader.embed(torch.tensor([*reader.tokenize(probe), *target[:-1]]))
        q = reader.model(inputs_embeds=torch.cat([front, slots, tail])[None]).logits[0, -len(target) :].softmax(-1)
        kept = p.topk(64).indices
        p, q = (torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1) for x in (p, q))
        rows.append((p * (p / q).log()).sum(-1))
    return torch.cat(rows).mean()


def test_the_loss_is_the_divergence_from_the_reader_of_the_text(zoo):
    reader = zoo.reader()
    fitter = SlotFitter(reader, steps=3, lr=0.1, patience=2, probes=8)
    torch.manual_seed(0)
    starts = [torch.randn(n, reader.width) for n in (5, 3)]
    fits = [fitter.begin(text, reader.tokenize(text), z) for text, z in zip((PASSAGE, OTHER), starts)]
    assert fits[0].probes[0] == (REPEAT, reader.tokenize(PASSAGE))
    assert fits[0].probes[1][0].startswith(ASKED[:12])
    assert not any(probe in fits[0].probes for probe in fits[0].held_out)
    for held_out in (False, True):
        found = fitter.divergences(fits, held_out)
        for fit, text, loss in zip(fits, (PASSAGE, OTHER), found):
            want = divergence(reader, fit.slots, text, fit.held_out if held_out else fit.probes)
            assert torch.allclose(loss, want, atol=1e-4, rtol=1e-3)


def test_fitting_lowers_the_divergence_and_keeps_the_best(zoo):
    reader = zoo.reader()
    few, many = (load_compressor("pc", reader=reader, steps=steps, probes=0) for steps in (1, 60))
    ids = reader.tokenize(PASSAGE)
    before, after = (c.compress([PASSAGE], ratio=2)[0].embeds for c in (few, many))
    first, last = (divergence(reader, z, PASSAGE, [(REPEAT, ids)]) for z in (before, after))
    assert last < 0.7 * first


def test_a_passage_that_gains_nothing_stops_early(zoo):
    reader = zoo.reader()
    compressor = load_compressor("pc", reader=reader, steps=10**6, patience=1, lr=1e-12)
    start = summed_runs(reader.model.get_input_embeddings(), [Segment(reader.tokenize(PASSAGE), 6, [])])
    assert torch.equal(compressor.compress([PASSAGE], ratio=4)[0].embeds, start)


def test_the_reader_is_left_alone(zoo):
    reader = zoo.reader()
    load_compressor("pc", reader=reader, steps=1).compress([PASSAGE, "", "a"])
    assert not any(p.requires_grad or p.grad is not None for p in reader.model.parameters())


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0}, {"patience": 0}, {"ratio": 0.5}, {"probes": -1}])
def test_settings_are_checked(zoo, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        load_compressor("pc", reader=zoo.reader(), **wrong)
