"""Recipes: what YAML may say, overrides, and errors that name the key that was meant."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from nutgraf.recipes.data.corpus import parse_record
from nutgraf.recipes.data.records import Material, cut_at_sentence, load_articles, load_records
from nutgraf.recipes.tasks.items import CompressorData, ItemMaker
from nutgraf.recipes.training.schema import Span, dump_recipe, load_recipe, parse_recipe, recipe_names, validate
from nutgraf.recipes.training.stage import learning_rate, uses_bfloat16
from typer.testing import CliRunner

RAW = {
    "name": "toy",
    "kind": "reader",
    "model": {},
    "stages": [{"name": "one", "steps": 10, "lr": 1e-3}, {"name": "two", "steps": 20, "lr": 1e-4}],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(RAW))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.data["dir"] is None
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    if recipe.kind == "compressor":
        data = validate(CompressorData, recipe.data, name, "data")
        material = Material([], [["A paragraph about rain in Bergen, long enough to be kept by the loader of texts."]])
        for stage in recipe.stages:
            ItemMaker(material, data, stage)


def test_the_compressor_recipes_ship():
    assert {"xrag", "icae"} <= set(recipe_names())


def test_overrides(file):
    overrides = ["stage.0.steps=200", "stages.two.lr=1e-2", "seed=3", "data.dir=corpus", "stages.*.mix={a: [1, 2]}"]
    recipe = load_recipe(file, [*overrides, "stages.0.stop_when.metric=loss", "stages.0.stop_when.below=.5"])
    assert [stage.steps for stage in recipe.stages] == [200, 20]
    assert [stage.lr for stage in recipe.stages] == [1e-3, 1e-2]
    assert recipe.seed == 3
    assert recipe.data == {"dir": "corpus"}
    assert all(stage.mix == {"a": [1, 2]} for stage in recipe.stages)
    assert recipe.stages[0].stop_when.below == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.stps=3", "did you mean 'steps'"),
        ("stage.0.learning=3", "names no key of a stage"),
        ("sed=3", "did you mean 'seed'"),
        ("stages.three.lr=1", "the recipe's stages are 0 (one), 1 (two)"),
        ("seed", "not of the form key=value"),
        ("stages.0.lr=fast", "stages.0.lr: input should be a valid number"),
        ("stages.0.lr=-1", "stages.0.lr: input should be greater than 0, got -1"),
        ("stages.0.stop_when.belw=1", "did you mean 'below'"),
        ("stages.0.stop_when.metric=loss", "exactly one of below and above"),
        ("stages.0.schedule=exponential", "stages.0.schedule"),
        ("stages.0.ratios={min: 8, max: 2}", "min <= max"),
        ("stages.1.name=one", "two stages are called 'one'"),
        ("kind=compressor", "compressor.method"),
        ("kind=readr", "did you mean 'reader'"),
        ("output.folder=../other", "output.folder"),
        ("name.first=x", "which holds 'toy' and no keys"),
    ],
)
def test_wrong_overrides_say_what_is_wrong(file, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(file, [override])


def test_unreadable_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="the package ships"):
        load_recipe("no-such-recipe")
    path = tmp_path / "bad.yaml"
    path.write_text("name: toy\nname: other\n")
    with pytest.raises(ValueError, match="the key 'name' stands twice"):
        load_recipe(path)
    path.write_text("- a list")
    with pytest.raises(ValueError, match="it holds one list"):
        load_recipe(path)
    with pytest.raises(ValueError, match=r"unknown key data\.shars; did you mean 'shares'"):
        validate(CompressorData, {"shars": {}}, "toy", "data")


def test_schedules():
    def stage(**changes):
        return parse_recipe({**RAW, "stages": [{"name": "s", "steps": 100, "lr": 1.0, **changes}]}).stages[0]

    for schedule in ("linear", "cosine", "constant", "wsd"):
        rates = [learning_rate(i, stage(schedule=schedule, warmup=10, min_lr=0.1)) for i in range(100)]
        assert 0 < rates[0] < rates[5] < rates[10] == 1.0
        assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
        assert rates[-1] == (1.0 if schedule == "constant" else pytest.approx(0.1, abs=0.06))
    held = [learning_rate(i, stage(schedule="wsd", warmup=0.1, decay=0.2)) for i in range(101)]
    assert held[79] == held[80] == 1.0 > held[81]
    assert held[100] == 0.0
    assert uses_bfloat16("bf16", torch.device("cpu"))
    assert not uses_bfloat16("fp32", torch.device("cpu"))


def test_records_of_both_schemas(tmp_path):
    public = {"question": "Who?", "answers": ["Ada"], "passages": [{"title": "t", "text": "Ada wrote."}], "gold": 0}
    squad = {"question": "Who?", "context": "Ada wrote.", "answers": {"text": ["Ada"], "answer_start": [0]}}
    for row in (public, squad):
        record = parse_record(row)
        assert (record.question, record.answers, record.gold_text) == ("Who?", ("Ada",), "Ada wrote.")
    rows = [{**public, "half": half, "id": half} for half in ("tune", "report")]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [record.id for record in load_records(["*.jsonl"], tmp_path, half="tune")] == ["tune"]
    with pytest.raises(ValueError, match=r"needs data\.dir"):
        load_records(["qa.jsonl"])
    with pytest.raises(FileNotFoundError, match="no-such"):
        load_records(["no-such.jsonl"], tmp_path)
    with pytest.raises(ValueError, match="names no dataset of the hub"):
        load_records(["hub:squad"])
    (tmp_path / "text.txt").write_text("# One\n\nFirst.\n\nSecond.\n<|doc|>\n# Two\n\nThird.")
    assert list(load_articles(["text.txt"], tmp_path)) == [["First.", "Second."], ["Third."]]
    assert list(load_articles(["text.txt"], tmp_path, limit=1)) == [["First.", "Second."]]
    assert cut_at_sentence("One two. Three four. Five.", 22) == "One two. Three four."


def test_mixes_are_checked():
    def maker(**changes):
        stage = {"name": "s", "steps": 1, "lr": 1, "objectives": {"lm": 1.0}, "mix": {"human": 1.0}, **changes}
        raw = {"name": "t", "kind": "compressor", "reader": "r", "compressor": {"method": "icae"}, "stages": [stage]}
        return ItemMaker(Material([], []), CompressorData(), parse_recipe(raw).stages[0])

    with pytest.raises(ValueError, match="mix names 'humans'"):
        maker(mix={"humans": 1.0})
    with pytest.raises(ValueError, match="needs mix"):
        maker(mix={})
    with pytest.raises(ValueError, match="sets teacher_top_k but no objective with a teacher"):
        maker(teacher_top_k=5)
    with pytest.raises(ValueError, match="no usable question records"):
        maker().make("0")
    with pytest.raises(ValueError, match="no paragraphs"):
        maker(mix={"made": 1.0}).make("0")
    with pytest.raises(ValueError, match="at least one weight above 0"):
        maker(objectives={"lm": 0.0})
    with pytest.raises(ValueError, match="the objective 'match' and the kind 'match' in mix need each other"):
        maker(objectives={"lm": 1.0, "match": 1.0})
    with pytest.raises(ValueError, match="'document' target and the kind 'documents' in mix need each other"):
        maker(mix={"human": 1.0, "documents": 1.0})
    for wrong, hint in (("matsch", "did you mean 'match'"), ("segments", "known objectives are ")):
        with pytest.raises(ValueError, match=hint):  # segments belongs to another method
            maker(objectives={wrong: 1.0})
    assert maker(passages=Span(min=2, max=3).model_dump()).stage.passages == Span(min=2, max=3)


def test_command_line():
    from nutgraf.cli import app

    run = CliRunner().invoke
    shown = run(app, ["--help"])
    assert shown.exit_code == 0
    assert all(command in shown.output for command in ("train", "inspect", "bench", "demo"))
    wrong = run(app, ["train", "xrag", "-o", "nowhere", "stages.0.stps=3"])
    assert wrong.exit_code == 2
    assert "did you mean 'steps'" in " ".join(wrong.output.split())
    assert run(app, ["inspect", "Some text.", "-c", "no-such-compressor"]).exit_code == 2


def test_human_questions_are_filled_up_with_made_ones():
    passage = "Marie Curie was born in Warsaw in 1867, won two prizes in Sweden, and worked in Paris with Pierre Curie."
    row = {"question": "Where did she work?", "answers": ["Paris"], "passages": [passage], "gold": 0}
    stage = {"name": "s", "steps": 1, "lr": 1, "objectives": {"lm": 1.0}, "mix": {"both": 1.0}}
    raw = {"name": "t", "kind": "compressor", "reader": "r", "compressor": {"method": "icae"}, "stages": [stage]}
    maker = ItemMaker(
        Material([parse_record(row)], []), CompressorData(questions_per_passage=4), parse_recipe(raw).stages[0]
    )
    item = maker.make("0")
    assert item.passages == (passage,)
    assert len(item.readings) == 4
    assert (item.readings[0].question, item.readings[0].target) == (row["question"], " Paris")
    assert all(reading.target.strip() in passage for reading in item.readings)
    assert len({reading.question for reading in item.readings}) == 4
