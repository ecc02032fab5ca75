"""Query-aware compression: the question changes the slots, is needed, and takes no slots of its own."""

from __future__ import annotations

import json

import pytest
import torch
from nutgraf.compressors import SoftCompressor, make_compressor
from nutgraf.compressors.slots.question import QUESTION
from nutgraf.recipes.data.records import load_records
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.tasks.evaluation import compressed_scores
from nutgraf.recipes.training.schema import parse_recipe
from nutgraf.recipes.training.trainer import run_recipe

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
LONG = " ".join([PASSAGE] * 4)
ASKED = ("Where was Marie Curie born?", "In which year did she win the prize in chemistry?")
SETTINGS = {
    "icae": {"mem_size": 8, "ratio": 4.0, "r": 2},
    "pisco": {"ratio": 4.0, "segment_tokens": 40, "memory_tokens": 12, "r": 2},
    "mean-pool": {"ratio": 4.0, "r": 2, "chunk_tokens": 40, "weighting": "learned"},
    "gist": {"n_gist": 8, "ratio": 4.0, "r": 2},
    "500x": {"num_mem": 8, "ratio": 4.0, "r": 2},
}
methods = pytest.mark.parametrize("method", sorted(SETTINGS))


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader()


def build(method, reader, **changes) -> SoftCompressor:
    torch.manual_seed(0)
    compressor = make_compressor(method, reader, **{**SETTINGS[method], "query_aware": True, **changes})
    with torch.no_grad():
        for p in compressor.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return compressor.eval()


def tensors(passage):
    return torch.cat([t.flatten().float() for name, t in passage.tensors().items() if name != "positions"])


@pytest.mark.slow
@methods
def test_the_question_changes_the_slots_and_not_their_number(method, reader):
    compressor, plain = build(method, reader), build(method, reader, query_aware=False)
    assert compressor.query_aware
    assert not plain.query_aware
    one, other = (compressor.compress([PASSAGE, LONG], query=query) for query in ASKED)
    for a, b, c in zip(one, other, plain.compress([PASSAGE, LONG])):
        assert a.slots == b.slots == c.slots
        assert (tensors(a) - tensors(b)).abs().max() > 1e-3
    mixed = compressor.compress([PASSAGE, LONG], query=[ASKED[0], ASKED[1]])
    assert torch.allclose(tensors(mixed[0]), tensors(one[0]), atol=1e-5)
    assert torch.allclose(tensors(mixed[1]), tensors(other[1]), atol=1e-5)
    assert torch.equal(tensors(plain.compress([PASSAGE], query=ASKED[0])[0]), tensors(plain.compress([PASSAGE])[0]))


@pytest.mark.slow
@methods
def test_without_a_question_it_refuses_and_training_reads_the_passage_alone(method, reader):
    compressor, plain = build(method, reader), build(method, reader, query_aware=False)
    for query in (None, "", "  ", [ASKED[0], None]):
        with pytest.raises(ValueError, match=r"for a question.*query="):
            compressor.compress([PASSAGE, LONG], query=query)
    assert compressor.compress([]) == []
    plain.load_state_dict(compressor.state_dict())
    with torch.no_grad():
        alone, same = compressor.encode([PASSAGE, LONG]), plain.encode([PASSAGE, LONG])
    assert all(torch.allclose(tensors(a), tensors(b), atol=1e-6) for a, b in zip(alone, same))


def test_the_encoder_reads_the_question_between_bos_and_the_passage(reader):
    compressor = build("mean-pool", reader)
    ids, question = reader.tokenize(PASSAGE), reader.tokenize(QUESTION.format(query=ASKED[0]))
    row = torch.tensor([[*reader.bos_ids, *question, *ids]])
    with torch.no_grad():
        want = compressor.encoder(reader.embed(row), torch.ones_like(row))[0, -len(ids) :]
        found = compressor.states(compressor.encoder, [ids], [question])
    assert torch.allclose(found, want, atol=1e-5)
    icae = build("icae", reader, positions="append", residual=False, projector="none", mem_size=40)
    with torch.no_grad():
        slots = icae.segments(len(ids))[0][1]
        embeds = torch.cat([reader.embed(row)[0], icae.memory[:slots]])[None]
        want = icae.encoder(embeds, torch.ones(embeds.shape[:2], dtype=torch.long))[0, -slots:]
    assert torch.allclose(icae.compress([PASSAGE], query=ASKED[0])[0].embeds, want, atol=1e-5)


@methods
def test_a_question_that_leaves_no_room_is_refused(method, zoo):
    small = zoo.reader(max_position_embeddings=64)
    compressor = build(method, small)
    assert compressor.compress([LONG], query=ASKED[0])[0].slots > 8
    with pytest.raises(ValueError, match=r"question of \d+ tokens"):
        compressor.compress([LONG], query=" ".join(ASKED * 4))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("icae", {"query_aware": 1}, "true or false"),
        ("mean-pool", {"encoder": "embeddings"}, "cannot read a question"),
    ],
)
def test_forms_that_read_no_question(method, settings, message, reader):
    with pytest.raises(ValueError, match=message):
        build(method, reader, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, (person, city) in enumerate({"Ada": "Bergen", "Ivar": "Oslo", "Mary": "Lima", "Omar": "Cairo"}.items()):
        text = f"{person} lives in {city} by the river, in a house of {number + 2} rooms with a garden and a well."
        for asked, answer in ((f"Where does {person} live?", city), (f"Who lives in {city}?", person)):
            row = {"id": asked, "question": asked, "answers": [answer], "source": "toy", "gold": 0}
            rows.append({**row, "passages": [{"title": "", "text": text}]})
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe_for(folder, data=None, **compressor):
    stage = {"name": "answers", "steps": 2, "batch_size": 4, "lr": 1e-2, "objectives": {"lm": 1.0, "ae": 0.1}}
    raw = {
        "name": "toy",
        "kind": "compressor",
        "reader": "unused",
        "data": {"dir": str(folder), "questions": ["qa.jsonl"], "max_chars": 300, **(data or {})},
        "compressor": {"method": "icae", **SETTINGS["icae"], **compressor},
        "stages": [{**stage, "mix": {"human": 0.8, "repeat": 0.2}, "log_every": 1}],
    }
    return parse_recipe(raw)


@pytest.mark.slow
def test_training_hands_each_passage_its_own_question(folder, tmp_path, zoo):
    recipe = recipe_for(folder, query_aware=True)
    task = CompressorTask(recipe, zoo.reader())
    stage = recipe.stages[0]
    items = task.dataset(stage)
    drawn = [items[i] for i in range(12)]
    assert all(len(item.readings) == 1 for item in drawn)
    batch = task.collator(stage)(drawn)["batch"]
    assert batch.queries == [reading.question or None for reading in batch.readings]
    assert any(batch.queries)
    assert not all(batch.queries), "repeating asks nothing"
    run_recipe(recipe, task, tmp_path / "run")
    scores = compressed_scores(task.compressor.eval(), load_records(["qa.jsonl"], folder)[:4], max_new_tokens=2)
    assert set(scores) == {"f1", "f1_se", "f1_shuffled", "f1_full", "f1_none", "ratio"}
    plain = CompressorTask(recipe_for(folder), zoo.reader())
    assert plain.collator(stage)(drawn)["batch"].queries is None
    with pytest.raises(ValueError, match=r"compressor\.query_aware=true"):
        CompressorTask(recipe_for(folder, {"query_aware": True}), zoo.reader())
