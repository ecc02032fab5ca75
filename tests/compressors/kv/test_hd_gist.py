"""HD-Gist: gists of sentences and lines, as many as there are, against plain torch and by hand."""

from __future__ import annotations

import pytest
import torch
from nutgraf.compressors import make_compressor
from nutgraf.compressors.slots.structure import LINE, SENTENCE, find_units, keep_best
from oracles import lora_pass

PASSAGE = (
    "Marie Curie was born in Warsaw. She won two Nobel Prizes.\nRivers carry sediment to the sea; the Amazon is long.\n"
    "The treaty was signed in 1648. It ended a war. Many signed it."
)


def build(reader, **settings):
    torch.manual_seed(0)
    compressor = make_compressor("hd-gist", reader, **{"r": 4, "alpha": 8.0, **settings})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return compressor.eval()


def texts(units):
    return [(unit.level, unit.text.strip()) for unit in units]


def test_units_are_lines_and_the_sentences_of_lines_with_several():
    assert texts(find_units(PASSAGE, range(len(PASSAGE)), 999)) == [
        (SENTENCE, "Marie Curie was born in Warsaw."),
        (SENTENCE, "She won two Nobel Prizes."),
        (LINE, "Marie Curie was born in Warsaw. She won two Nobel Prizes."),
        (LINE, "Rivers carry sediment to the sea; the Amazon is long."),
        (SENTENCE, "The treaty was signed in 1648."),
        (SENTENCE, "It ended a war."),
        (SENTENCE, "Many signed it."),
        (LINE, "The treaty was signed in 1648. It ended a war. Many signed it."),
    ]
    assert [unit.end for unit in find_units(" \n ", range(3), 9)] == [3]
    assert find_units("", [], 9) == []
    assert [(unit.start, unit.end) for unit in find_units("a" * 20, range(20), 8)] == [(0, 7), (7, 14), (14, 20)]


@pytest.mark.parametrize(
    ("query", "most", "kept"),
    [
        (None, 3, [2, 3, 7]),  # the lines
        (None, 4, [2, 3, 4, 7]),  # and the longest sentence of the longest line
        ("Which Prizes did she win?", 4, [1, 2, 3, 7]),
        ("Which Prizes did she win?", 1, [2]),
        ("Who signed the treaty?", 2, [2, 7]),
        (None, 99, list(range(8))),
    ],
)
def test_the_budget_goes_to_lines_and_then_to_sentences_of_the_best(query, most, kept):
    units = find_units(PASSAGE, range(len(PASSAGE)), 999)
    keep_best(units, query, most)
    assert [i for i, unit in enumerate(units) if unit.kept] == kept


def test_keys_and_values_at_the_gists_equal_plain_torch(zoo):
    reader = zoo.reader()
    compressor = build(reader)
    ids, places = reader.tokenize_with_offsets(PASSAGE)
    units = find_units(PASSAGE, [start for start, _ in places], 512)
    rows, gists = [*reader.embed(torch.tensor(reader.bos_ids))], []
    for t in range(len(ids) + 1):
        for unit in units:
            if unit.end == t:
                gists.append(len(rows))
                rows.append(compressor.gist[unit.level])
        rows += [reader.embed(torch.tensor(i)) for i in ids[t : t + 1]]
    where = dict.fromkeys(("q_proj", "v_proj"), torch.ones(len(rows), dtype=torch.bool))
    made = lora_pass.run(reader, compressor.encoder, torch.stack(rows), torch.arange(len(rows)), where, scale=2.0)
    (passage,) = compressor.compress([PASSAGE], ratio=1)
    assert passage.positions.tolist() == gists
    for layer, (keys, values) in enumerate(made):
        assert torch.allclose(passage.keys[layer], lora_pass.rotate(keys, torch.arange(len(rows)))[:, gists], atol=1e-4)
        assert torch.allclose(passage.values[layer], values[:, gists], atol=1e-4)
    (fewer,) = compressor.compress([PASSAGE], ratio=len(ids) / 3)
    lines = [i for i, unit in enumerate(units) if unit.level == LINE]
    assert torch.equal(fewer.values[1], passage.values[1][:, lines])


def test_the_question_decides_and_segments_end_with_units(zoo):
    reader = zoo.reader()
    compressor = build(reader, query_aware=True, segment_tokens=30)
    ids = reader.tokenize(PASSAGE)
    one, other = (compressor.compress([PASSAGE], query=q, ratio=len(ids))[0] for q in ("Nobel Prizes?", "What treaty?"))
    assert one.slots == other.slots == 1
    assert not torch.allclose(one.values[1], other.values[1], atol=1e-3)
    (whole,) = compressor.compress([PASSAGE * 3], query="Who?", ratio=1)
    assert int(whole.positions.max()) < 30 + 20
