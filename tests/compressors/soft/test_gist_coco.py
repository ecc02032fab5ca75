"""Gist-COCO: gists of the passage and of the question, made together."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import make_compressor
from nutgraf.compressors.slots.question import QUESTION

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
ASKED = "Who won two prizes?"


def build(reader, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("gist-coco", reader, **{"passage_gists": 6, "question_gists": 3, "r": 4, **settings})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def test_slots_are_states_at_the_two_kinds_of_gists(zoo):
    reader = zoo.reader()
    compressor = build(reader)
    ids = reader.tokenize(PASSAGE)[:20]
    text = reader.decode(ids)
    (passage,) = compressor.compress([text], query=ASKED, ratio=4)
    ids = reader.tokenize(text)
    front = [*reader.bos_ids, *reader.tokenize(QUESTION.format(query=ASKED))]
    slots = -(-len(ids) // 4)
    asked = min(3, slots // 2)
    rows = [
        reader.embed(torch.tensor([*front, *ids])),
        compressor.passage_memory[: slots - asked],
        compressor.question_memory[:asked],
    ]
    states = compressor.encoder.decoder(inputs_embeds=torch.cat(rows)[None]).last_hidden_state[0, -slots:]
    assert torch.allclose(passage.embeds, states * compressor.log_scale.exp(), atol=1e-4)


@pytest.mark.parametrize("slots", range(1, 10))
def test_question_gists_are_half_at_most(zoo, slots):
    compressor = build(zoo.reader())
    assert compressor.most_slots == 9
    rows = compressor.gists(slots)
    asked = sum(any(torch.equal(row, other) for other in compressor.question_memory) for row in rows)
    assert len(rows) == slots
    assert asked <= slots // 2


def test_every_question_has_its_own_slots(zoo):
    compressor = build(zoo.reader())
    one, other = (compressor.compress([PASSAGE], query=q)[0].embeds for q in (ASKED, "Where was she born?"))
    assert not torch.allclose(one, other, atol=1e-3)
    with pytest.raises(ValueError, match="got none for passage 0"):
        compressor.compress([PASSAGE])


def test_embeddings_are_verbalised_as_their_own_tokens(zoo):
    reader = zoo.reader()
    compressor = build(reader)
    found = compressor.verbalise(reader.identity(PASSAGE), top=2)
    assert "".join(row[0] for row in found) == PASSAGE
    assert all(len(row) == 2 for row in found)
    with pytest.raises(ValueError, match="top"):
        compressor.verbalise(reader.identity(PASSAGE), top=0)
