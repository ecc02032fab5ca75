"""A tuned reader beside a method with a frozen one, and full text read by a reader that is tuned alike."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from nutgraf.compressors import Reader, ReaderMismatchError, load_compressor, make_compressor
from nutgraf.recipes.data.records import load_records
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.tasks.evaluation import compressed_scores
from nutgraf.recipes.training.schema import load_recipe, parse_recipe
from nutgraf.recipes.training.trainer import run_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

PASSAGE = "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911)."
ASK = "\n\nQuestion: Where was she born?\nAnswer:"
SETTINGS = {
    "icae": {"mem_size": 8, "r": 2},
    "mean-pool": {"r": 2},
    "500x": {"num_mem": 8, "r": 2},
    "full-text": {},
}
methods = pytest.mark.parametrize("method", sorted(SETTINGS))


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader()


def build(method, reader, **changes):
    torch.manual_seed(0)
    return make_compressor(method, reader, **{**SETTINGS[method], "tune_reader": True, **changes}).eval()


def logits(reader, prompt):
    return reader.target_logits([prompt], [" Warsaw"])[0]


@pytest.mark.slow
@methods
def test_the_tuned_reader_begins_as_the_reader_and_has_a_rank_of_its_own(method, reader, tmp_path):
    compressor = build(method, reader, reader_r=3, reader_target_modules=["q_proj", "up_proj"])
    plain = build(method, reader, tune_reader=False)
    assert plain.reader is plain.base_reader
    assert plain.reader_twin is None
    assert compressor.reader is not reader
    matrices = compressor.reader_twin.lora
    assert {name.split("/")[-2] for name in matrices} == {"q_proj", "up_proj"}
    assert {min(p.shape) for p in matrices.values()} == {3}
    (passage,), (other,) = compressor.compress([PASSAGE]), plain.compress([PASSAGE])
    assert torch.allclose(logits(compressor.reader, [passage, ASK]), logits(reader, [other, ASK]), atol=1e-4)
    with pytest.raises(ReaderMismatchError):
        reader.generate([[passage, ASK]], 1)
    text = logits(reader, [PASSAGE, ASK])
    with torch.no_grad():
        for p in matrices.values():
            p.add_(0.2 * torch.randn_like(p))
    (passage,) = compressor.compress([PASSAGE])
    tuned = logits(compressor.reader, [passage, ASK])
    assert not torch.allclose(tuned, logits(reader, [other, ASK]), atol=1e-3)
    assert torch.equal(logits(reader, [PASSAGE, ASK]), text), "the tuning leaked into the reader"
    compressor.save_pretrained(tmp_path)
    loaded = load_compressor(tmp_path, reader)
    assert loaded.fingerprint == compressor.fingerprint
    assert torch.allclose(logits(loaded.reader, [passage, ASK]), tuned, atol=1e-5)


def test_full_text_is_the_text(reader):
    compressor = build("full-text", reader)
    texts = [PASSAGE, "", "a"]
    found = compressor.compress(texts, ratio=8)
    assert [p.slots for p in found] == [len(reader.tokenize(t)) for t in texts]
    assert torch.allclose(logits(compressor.reader, [found[0], ASK]), logits(reader, [PASSAGE, ASK]), atol=1e-4)
    untuned = make_compressor("full-text", reader, tune_reader=False)
    assert untuned.reader is reader
    assert not list(untuned.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune_reader": "yes"}, "tune_reader must be true or false"),
        ({"reader_r": 0}, "reader_r"),
        ({"reader_alpha": 0.0}, "reader_alpha"),
        ({"reader_target_modules": "q_proj"}, "list of module names"),
        ({"reader_target_modules": ["nowhere"]}, "nowhere"),
    ],
)
def test_settings_that_cannot_be(settings, message, reader):
    with pytest.raises(ValueError, match=message):
        build("icae", reader, **settings)


@pytest.mark.slow
def test_a_recipe_tunes_the_reader_beside_the_compressor_and_alone(tmp_path, zoo):
    rows = [
        {"id": str(i), "question": f"Where does {name} live?", "answers": [city], "source": "toy", "gold": 0}
        | {
            "passages": [
                {"title": "", "text": f"{name} lives in {city} by the river, in a house of {i} rooms with a garden."}
            ]
        }
        for i, (name, city) in enumerate({"Ada": "Bergen", "Ivar": "Oslo", "Mary": "Lima"}.items())
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for method, trainable in (("icae", "all"), ("icae", "reader_twin"), ("full-text", "all")):
        stage = {"name": "answers", "steps": 4, "batch_size": 3, "lr": 2e-2, "schedule": "constant", "log_every": 1}
        stage |= {"objectives": {"lm": 1.0, "kl": 0.1}, "mix": {"human": 1.0}, "trainable": trainable}
        raw = {
            "name": "toy",
            "kind": "compressor",
            "reader": "unused",
            "data": {"dir": str(tmp_path), "questions": ["qa.jsonl"]},
            "compressor": {"method": method, **SETTINGS[method], "tune_reader": True},
            "stages": [stage],
        }
        recipe, reader = parse_recipe(raw), zoo.reader()
        task = CompressorTask(recipe, reader)
        before = {name: p.detach().clone() for name, p in task.compressor.named_parameters()}
        run_recipe(recipe, task, tmp_path / f"{method}-{trainable}")
        moved = {
            name.split(".")[0] for name, p in task.compressor.named_parameters() if not torch.equal(p, before[name])
        }
        assert "reader_twin" in moved
        assert ("memory" in moved) == (trainable == "all" and method == "icae")
        lines = (tmp_path / f"{method}-{trainable}" / "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        assert log[-1]["loss/lm"] < log[0]["loss/lm"]
        scores = compressed_scores(task.compressor.eval(), load_records(["qa.jsonl"], tmp_path), max_new_tokens=2)
        assert scores["ratio"] == pytest.approx(1.0 if method == "full-text" else 4.0, abs=0.6)


def test_the_full_text_recipe_ships():
    recipe = load_recipe("full_text")
    assert recipe.compressor["method"] == "full-text"
    assert all(not stage.objectives.get("ae") for stage in recipe.stages)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_tuned_reader_is_saved_as_a_plain_model(zoo, architecture, tmp_path):
    base = zoo.reader(architecture)
    compressor = build("mean-pool", base)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with torch.no_grad():
        for p in compressor.reader_twin.lora.values():
            p.add_(0.2 * torch.randn_like(p))
    compressor.reader.save_pretrained(tmp_path / "tuned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    (passage,) = compressor.compress([PASSAGE])
    assert type(model) is type(base.model)
    served = Reader(model, tokenizer)
    untied = dataclasses.replace(passage, reader=served.fingerprint)
    wanted = logits(compressor.reader, [passage, ASK])
    assert torch.allclose(logits(served, [untied, ASK]), wanted, atol=1e-4)
    assert not torch.allclose(
        logits(base, [dataclasses.replace(passage, reader=base.fingerprint), ASK]), wanted, atol=1e-2
    )
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name in compressor.reader.model.state_dict() if "lora" in name]  # still tuned, not merged
    with pytest.raises(FileExistsError, match="another folder"):
        base.save_pretrained(tmp_path / "tuned")
