"""The compressor task under the trainer: the loss falls, only what should train does, and the reader stays as it was."""

from __future__ import annotations

import json
import random

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors.objectives.distillation import KLDistillationLoss
from nutgraf.compressors.objectives.registry import OBJECTIVES
from nutgraf.recipes.data.corpus import Record
from nutgraf.recipes.data.records import Material, load_articles, load_records
from nutgraf.recipes.data.templates import question_prompt
from nutgraf.recipes.tasks.compressor import CompressorTask
from nutgraf.recipes.tasks.items import CompressorData, CompressorItems, ItemMaker, draw_ratio
from nutgraf.recipes.training.schema import Span, load_recipe, parse_recipe
from nutgraf.recipes.training.stage import PRIVATE, StageTrainer, check_trainer
from nutgraf.recipes.training.trainer import run_recipe
from torch import nn

CITIES = ["Bergen", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Turin", "Perth"]
PEOPLE = ["Ada", "Ivar", "Mary", "Omar", "Nora", "Hugo", "Vera", "Emil"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few questions and articles, about who lives where."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, (city, person) in enumerate(zip(CITIES, PEOPLE)):
        text = f"{person} lives in {city} by the river. The house of {person} has {number + 2} rooms and a garden."
        asked = [(f"Where does {person} live?", city), (f"Who lives in {city}?", person)]
        rows += [
            {"id": f"{number}-{i}", "question": q, "answers": [a], "passages": [{"title": "", "text": text}], "gold": 0}
            for i, (q, a) in enumerate(asked)
        ]
    (folder / "qa.jsonl").write_text("\n".join(json.dumps({**row, "source": "toy"}) for row in rows))
    paragraphs = [f"The town of {{}} stands on hill {n}. " * 3 + "Many people live there." for n in range(4)]
    articles = [f"# {city}\n\n" + "\n\n".join(p.replace("{}", city) for p in paragraphs) for city in CITIES]
    (folder / "text.txt").write_text("\n<|doc|>\n".join(articles))
    return folder


def recipe_for(folder, **changes):
    stage = {
        "name": "mixed",
        "steps": 12,
        "batch_size": 4,
        "lr": 1e-2,
        "schedule": "constant",
        "precision": "fp32",
        "objectives": {"ae": 0.3, "lm": 1.0, "kl": 1.0},
        "ratios": [2, 4],
        "mix": {"human": 0.6, "repeat": 0.2, "continue": 0.1, "made": 0.1},
        "log_every": 3,
        "save_every": 5,
    }
    data = {"dir": str(folder), "texts": ["text.txt"], "questions": ["qa.jsonl"], "max_chars": 300}
    compressor = {"method": "icae", "mem_size": 16, "r": 4}
    raw = {"name": "toy", "kind": "compressor", "reader": "unused", "data": data, "compressor": compressor}
    stages = changes.pop("stages", [{}])
    return parse_recipe({**raw, **changes, "stages": [{**stage, **s} for s in stages]})


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_reader_alone(folder, tmp_path, zoo):
    reader = zoo.reader()
    before = {name: p.clone() for name, p in reader.model.named_parameters()}
    task = CompressorTask(recipe_for(folder, stages=[{"steps": 40}]), reader)
    start = {name: p.detach().clone() for name, p in task.module.named_parameters()}
    final = run_recipe(task.recipe, task, tmp_path)
    assert final == tmp_path / "final"
    log = read_log(tmp_path)
    assert log[-1]["step"] == 40
    assert log[-1]["tokens"] > 0
    assert {"loss/ae", "loss/lm", "loss/kl", "ratio", "lr", "grad_norm", "tokens_per_s"} <= set(log[0])
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert all(torch.equal(p, before[name]) for name, p in reader.model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in reader.model.parameters())
    assert not reader.model.training
    changed = [name for name, p in task.module.named_parameters() if not torch.equal(p, start[name])]
    assert len(changed) == len(start)
    loaded = load_compressor(final, reader)
    text = "Ada lives in Bergen by the river."
    assert torch.equal(loaded.compress([text])[0].embeds, task.compressor.compress([text])[0].embeds)


@pytest.mark.slow
def test_slots_can_be_matched_to_their_tokens_before_anything_is_read(folder, tmp_path, zoo):
    stages = [{"steps": 30, "objectives": {"match": 1.0}, "mix": {"match": 1.0}, "ratios": None}]
    compressor = {"method": "icae", "mem_size": 16, "r": 4, "residual": False}
    task = CompressorTask(recipe_for(folder, stages=stages, compressor=compressor), zoo.reader())
    run_recipe(task.recipe, task, tmp_path)
    log = read_log(tmp_path)
    assert log[-1]["loss/match"] < 0.8 * log[0]["loss/match"]
    assert log[-1]["loss"] == pytest.approx(log[-1]["loss/match"], rel=1e-5)


@pytest.mark.slow
def test_an_objective_needs_only_its_class(folder, tmp_path, zoo, monkeypatch):
    class Doubled(KLDistillationLoss):
        def total(self, scored):
            return 2 * super().total(scored)

    monkeypatch.setitem(OBJECTIVES, "doubled", Doubled)
    stages = [{"steps": 1, "log_every": 1, "objectives": {"doubled": 1.0, "kl": 1.0}, "mix": {"human": 1.0}}]
    task = CompressorTask(recipe_for(folder, stages=stages), zoo.reader())
    run_recipe(task.recipe, task, tmp_path)
    (row,) = read_log(tmp_path)
    assert 0 < row["loss/doubled"] == pytest.approx(2 * row["loss/kl"])
    assert row["loss"] == pytest.approx(3 * row["loss/kl"])


@pytest.mark.slow
def test_only_the_intended_parameters_change(folder, tmp_path, zoo):
    stages = [{"name": "first", "trainable": ["memory"]}, {"name": "second", "trainable": ["lora"], "steps": 4}]
    task = CompressorTask(recipe_for(folder, stages=stages), zoo.reader())
    start = {name: p.detach().clone() for name, p in task.module.named_parameters()}
    run_recipe(task.recipe.model_copy(update={"stages": task.recipe.stages[:1]}), task, tmp_path / "one")
    changed = {n for n, p in task.module.named_parameters() if not torch.equal(p, start[n])}
    assert changed == {"compressor.memory"}
    run_recipe(task.recipe, task, tmp_path / "two")
    changed = {n.split(".")[1] for n, p in task.module.named_parameters() if not torch.equal(p, start[n])}
    assert changed == {"memory", "encoder"}
    with pytest.raises(ValueError, match="nothing called 'projektor'"):
        task.begin_stage(recipe_for(folder, stages=[{"trainable": "projektor"}]).stages[0])


def test_teacher_rows_belong_to_the_students_targets(folder, zoo):
    """With the passages' own embeddings as slots, the student is the teacher: no divergence, however rows are packed."""
    reader = zoo.reader()
    task = CompressorTask(recipe_for(folder, stages=[{"passages": [1, 2]}]), reader)
    stage = task.recipe.stages[0]
    task.begin_stage(stage)
    task.compressor.encode = lambda texts, query, ratio: [reader.identity(text) for text in texts]
    items = task.dataset(stage)
    out = task.module(**{"batch": task.collator(stage)([items[i] for i in range(12)])["batch"]})
    assert out["loss/kl"] < 1e-4
    assert out["loss/lm"] > 0.1
    assert out["ratio"] == 1.0


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(folder, tmp_path, zoo):
    losses = []
    for number, (batch, accumulate) in enumerate([(8, 1), (2, 4)]):
        stage = {"steps": 3, "batch_size": batch, "accumulate": accumulate, "ratios": [3], "log_every": 1}
        task = CompressorTask(recipe_for(folder, stages=[stage]), zoo.reader())
        order = CompressorTask(recipe_for(folder, stages=[{"batch_size": 8}]), task.reader)
        task.dataset = lambda stage, order=order: order.dataset(order.recipe.stages[0])
        run_recipe(task.recipe, task, tmp_path / str(number))
        losses.append([(row["loss"], row["grad_norm"]) for row in read_log(tmp_path / str(number))])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3)


def test_items_depend_on_their_index_alone(folder):
    recipe = recipe_for(folder)
    material = Material(load_records(["qa.jsonl"], folder), load_articles(["text.txt"], folder), 300)
    stage = recipe.stages[0]
    make = ItemMaker(material, CompressorData(questions=["qa.jsonl"]), stage).make
    one, other = (CompressorItems(make, 0, stage) for _ in range(2))
    indices = list(range(200))
    found = {i: one[i] for i in indices}
    random.Random(0).shuffle(indices)
    assert all(other[i] == found[i] for i in indices)
    assert {reading.kind for item in found.values() for reading in item.readings} >= {"plain", "repeat", "continue"}
    sizes = [[found[i].size for i in range(s, s + stage.batch_size)] for s in range(0, 64, stage.batch_size)]
    spread = sum(max(batch) - min(batch) for batch in sizes)
    assert spread < sum(max(max(b) for b in sizes) - min(min(b) for b in sizes) for _ in sizes) / 3
    ratios = [draw_ratio(Span(min=2, max=8), f"0/mixed/{i}") for i in range(50)]
    assert ratios == [draw_ratio(Span(min=2, max=8), f"0/mixed/{i}") for i in range(50)]
    assert 2 <= min(ratios) < 3 < 6 < max(ratios) <= 8
    assert draw_ratio(None, "0") is None


def test_sources_without_a_share_are_left_out():
    passages = [f"Passage {i} says that the answer is {i}." for i in range(40)]
    records = [
        Record("What is the answer?", (str(i),), (text,), ("",), 0, "rare-one" if i < 3 else "common")
        for i, text in enumerate(passages)
    ]
    rng = random.Random(0)
    drawn = [Material(records, [], shares={"rare": 0.5}).human(rng).source for _ in range(50)]
    assert set(drawn) == {"rare-one"}
    drawn = [Material(records, []).human(rng).source for _ in range(50)]
    assert drawn.count("common") > 35
    both = [Material(records, [], shares={"rare": 1.0, "common": 1.0}).human(rng).source for _ in range(100)]
    assert 30 < both.count("common") < 70


@pytest.mark.slow
def test_evaluation_is_logged_and_changes_nothing(folder, tmp_path, zoo):
    outcomes = []
    for name, every in [("with", 4), ("without", None)]:
        recipe = recipe_for(folder, stages=[{"eval_every": every, "steps": 8}])
        recipe.data.update(dev="qa.jsonl", dev_limit=4)
        task = CompressorTask(recipe, zoo.reader())
        run_recipe(recipe, task, tmp_path / name)
        outcomes.append([row["loss"] for row in read_log(tmp_path / name) if "loss" in row])
    scores = [row for row in read_log(tmp_path / "with") if "eval/f1" in row]
    assert [row["step"] for row in scores] == [4, 8]
    assert {"eval/f1", "eval/f1_full", "eval/f1_none", "eval/f1_shuffled", "eval/ratio"} <= set(scores[0])
    assert outcomes[0] == outcomes[1]


class _Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return {"loss": (self.w * x).square().mean()}


class _Toy:
    def __init__(self, value=1.0):
        self.module, self.value = _Quadratic(), value

    def dataset(self, stage):
        return [torch.full((3,), self.value)] * 1000

    def collator(self, stage):
        return lambda items: {"x": torch.stack(items)}

    def begin_stage(self, stage):
        self.module.requires_grad_(stage.trainable == "all")

    def save(self, folder):
        torch.save(self.module.state_dict(), folder / "w.pt")


def toy_recipe(**changes):
    stage = {"name": "only", "steps": 50, "lr": 0.1, "schedule": "constant", "warmup": 0, "log_every": 1, **changes}
    return parse_recipe({"name": "toy", "kind": "reader", "model": {}, "stages": [stage]})


@pytest.mark.slow
def test_a_stage_ends_when_its_metric_is_reached(tmp_path):
    run_recipe(toy_recipe(stop_when={"metric": "loss", "below": 0.2, "patience": 2}), _Toy(), tmp_path)
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert len(losses) < 50
    assert losses[-1] < 0.2
    assert losses[-2] < 0.2 <= losses[-3]


@pytest.mark.slow
def test_what_cannot_be_trained_is_said(tmp_path):
    with pytest.raises(ValueError, match="trains nothing"):
        run_recipe(toy_recipe(trainable="none"), _Toy(), tmp_path / "a")
    with pytest.raises(FloatingPointError, match="at step 1"):
        run_recipe(toy_recipe(), _Toy(float("nan")), tmp_path / "b")
    for clipped in (1.0, 0.0):  # a checkpoint would be written before the next log line
        rare = toy_recipe(steps=9, log_every=9, save_every=2, max_grad_norm=clipped)
        with pytest.raises(FloatingPointError, match="The gradient's norm of stage 'only' is nan at step 1"):
            run_recipe(rare, _Toy(float("nan")), tmp_path / f"{clipped}")
        assert not list((tmp_path / f"{clipped}" / "checkpoints").iterdir())
    with pytest.raises(ValueError, match="evaluates nothing"):
        run_recipe(toy_recipe(eval_every=1), _Toy(), tmp_path / "c")
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        run_recipe(toy_recipe(gradient_checkpointing=True), _Toy(), tmp_path / "d")


def test_private_methods_of_the_trainer_exist():
    check_trainer()
    assert all(name in vars(StageTrainer) for name in PRIVATE[:-1])
    with pytest.raises(ImportError, match=r"has no Trainer\._get_train_sampler"):
        check_trainer(object)


@pytest.mark.slow
def test_time_limit_stops_with_a_checkpoint(tmp_path):
    stopped = run_recipe(toy_recipe(steps=6), _Toy(), tmp_path, max_minutes=1e-6)
    assert stopped.parent == tmp_path / "checkpoints"
    final = run_recipe(toy_recipe(steps=6), _Toy(), tmp_path)
    assert final == tmp_path / "final"
    assert [row["step"] for row in read_log(tmp_path)] == list(range(1, 7))
    with pytest.raises(ValueError, match=r"another recipe: stages.0.lr is 0.1 there and 0.2 here"):
        run_recipe(toy_recipe(steps=6, lr=0.2), _Toy(), tmp_path)
    run_recipe(toy_recipe(steps=6, lr=0.2), _Toy(), tmp_path, resume=False)
    assert len(read_log(tmp_path)) == 6


def test_teacher_and_student_prompts_come_from_one_function(zoo):
    passage = zoo.reader().identity("It rained in Bergen.")
    student = question_prompt([passage, passage], "Where?")
    teacher = question_prompt(["It rained in Bergen."] * 2, "Where?")
    assert ["It rained in Bergen." if piece is passage else piece for piece in student] == teacher
    assert "".join(teacher) == "It rained in Bergen.\n\nIt rained in Bergen.\n\nQuestion: Where?\nAnswer:"
    assert question_prompt([], "Where?") == ["Question: Where?\nAnswer:"]


SURVEY = {
    "important_kl": {"human": 1.0, "continue": 1.0},
    "slot_ae": {"match": 1.0},
    "contrast": {"triple": 1.0},
    "rank": {"rank": 1.0},
    "lm": {"instruct": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", SURVEY)
def test_objectives_of_the_survey_train_from_a_recipe(objective, folder, tmp_path, zoo):
    stage = {"steps": 12, "objectives": {objective: 1.0}, "mix": SURVEY[objective], "reverse_kl": 0.4}
    task = CompressorTask(recipe_for(folder, stages=[stage]), zoo.reader())
    start = {name: p.detach().clone() for name, p in task.module.named_parameters()}
    final = run_recipe(task.recipe, task, tmp_path)
    log = read_log(tmp_path)
    assert min(row[f"loss/{objective}"] for row in log[1:]) < log[0][f"loss/{objective}"]
    assert all(not torch.equal(p, start[name]) for name, p in task.module.named_parameters())
    assert load_compressor(final, task.reader).compress(["Ada lives in Bergen."])[0].slots


@pytest.mark.slow
def test_a_stage_resumes_after_one_with_a_decoder_of_its_own(folder, tmp_path, zoo):
    stage = {"steps": 2, "objectives": {"slot_ae": 1.0}, "mix": {"match": 1.0}}
    recipe = recipe_for(folder, stages=[stage, {"name": "next", "steps": 4, "save_every": 2, "mix": {"human": 1.0}}])
    whole = CompressorTask(recipe, zoo.reader())
    run_recipe(recipe, whole, tmp_path / "whole")
    first = recipe.model_copy(update={"stages": [recipe.stages[0], recipe.stages[1]]})
    run_recipe(first, CompressorTask(first, zoo.reader()), tmp_path / "parts", max_minutes=0)
    again = CompressorTask(recipe, zoo.reader())
    run_recipe(recipe, again, tmp_path / "parts")
    for (name, p), (_, q) in zip(whole.module.named_parameters(), again.module.named_parameters()):
        assert torch.equal(p, q), name


def test_a_span_is_continued_from_its_words(folder, zoo):
    task = CompressorTask(recipe_for(folder), zoo.reader())
    stage = task.recipe.stages[0].model_copy(update={"mix": {"span": 1.0, "instruct": 1.0}})
    make = ItemMaker(task.material, task.data, stage).make
    kinds = set()
    for number in range(40):
        item = make(str(number))
        (reading,) = item.readings
        kinds.add(reading.kind)
        if reading.kind == "span":
            assert item.passages[0].endswith(reading.lead + reading.target)
            assert reading.objectives == ("ae",)
            assert reading.prompt(["P"])[0] == "P"
            assert reading.prompt(["P"])[1].endswith("\n" + reading.lead)
        else:
            question, _, answer = reading.target.partition("\nAnswer: ")
            assert item.passages[0].endswith(f"\n\nQuestion:{question}")
            assert answer in item.passages[0]
    assert kinds == {"span", "instruct"}


SMALL = {
    "extensible": ["compressor.layers=2", "compressor.stream_tokens=16"],
    "qgc": ["compressor.layers=1"],
    "kv_distill": ["compressor.scorer_layers=2"],
}
RECIPES = ["extensible", "readonce", "uniicl", "gist_coco", "rmt", "qgc", "scc", "pe_rank", "rcc", "compllm"]
RECIPES += ["beacon", "dodo", "nugget", "kv_distill", "lclm", "compressive", "restore_kv", "hd_gist"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_survey_train_every_stage(name, folder, tmp_path, zoo):
    overrides = [f"data.dir={folder}", "data.texts=[text.txt]", "data.questions=[qa.jsonl]", "data.shares=null"]
    overrides += ["stages.*.steps=1", "stages.*.batch_size=3", "stages.*.precision=fp32", *SMALL.get(name, [])]
    task = CompressorTask(load_recipe(name, overrides), zoo.reader())
    start = {key: p.detach().clone() for key, p in task.module.named_parameters()}
    final = run_recipe(task.recipe, task, tmp_path)
    changed = {key for key, p in task.module.named_parameters() if not torch.equal(p, start[key])}
    assert {key.split(".")[1] for key in changed} == {key.split(".")[1] for key in start}
    query = "Where does Ada live?" if task.compressor.query_aware else None
    (passage,) = load_compressor(final, task.reader).compress(["Ada lives in Bergen by the river."], query=query)
    assert 1 <= passage.slots < passage.source_tokens


@pytest.mark.slow
def test_attention_as_matrix_products_on_a_cpu_gives_the_same_loss(folder, zoo):
    task = CompressorTask(recipe_for(folder), zoo.reader())
    (stage,) = task.recipe.stages
    task.begin_stage(stage)
    items = task.dataset(stage)
    batch = task.collator(stage)([items[i] for i in range(4)])["batch"]
    models = [task.reader.model, task.compressor.encoder.decoder]
    losses = []
    for autocast, used in ((False, "sdpa"), (True, "eager")):
        with task.running(autocast):
            assert {model.config._attn_implementation for model in models} == {used}
            losses.append(float(task.module(batch)["loss"].detach()))
        assert {model.config._attn_implementation for model in models} == {"sdpa"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
