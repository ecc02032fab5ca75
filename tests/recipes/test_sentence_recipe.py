"""Training a pruner of sentences: labels from answers and from the reader, and the recipe over the one trainer."""

from __future__ import annotations

import json

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.compressors import make_compressor
from nutgraf.compressors.fidelity.questions import ASKED
from nutgraf.recipes.tasks.pruning import SentenceTask
from nutgraf.recipes.tasks.sentence_labels import gain, holds, inclusion, lexical, needed
from nutgraf.recipes.training.schema import load_recipe, parse_recipe
from nutgraf.recipes.training.trainer import run_recipe

SENTENCES = ["The treaty was signed in 1648.", "It rained in 1648.", "Ter Borch, a painter, watched.", "Wars end."]
QUESTION = "When was the treaty signed?"
CITIES = ["Bergen", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Turin", "Perth"]
PEOPLE = ["Ada", "Ivar", "Mary", "Omar", "Nora", "Hugo", "Vera", "Emil"]


def test_one_sentence_is_needed():
    assert needed(SENTENCES, QUESTION, "1648") == [1.0, None, 0.0, 0.0]
    # without the words of the answer, those of question and answer decide
    assert needed(SENTENCES, "Who watched?", "the painter called Borch") == [0.0, 0.0, 1.0, 0.0]
    assert needed(SENTENCES, "Why?", "because") == [None] * 4
    assert needed([], QUESTION, "1648") == []


def test_oracles():
    assert inclusion(SENTENCES, QUESTION, "the 1648") == [1.0, 1.0, 0.0, 0.0]
    assert not holds("in 16480", "1648")
    assert not holds("anything", "the")
    # "rained in 1648" against "in 1648": two of the four words, both of the two
    assert lexical(SENTENCES, QUESTION, "in 1648")[1] == pytest.approx(2 * (2 / 4) * 1 / (2 / 4 + 1))


@torch.no_grad()
def test_gain_is_the_sigmoid_of_the_readers_mutual_information(zoo):
    reader = zoo.reader("llama")
    answer = "in 1648"

    def log_p(prompt: str) -> float:
        ids = [*reader.bos_ids, *reader.tokenize(prompt)]
        target = reader.tokenize(f" {answer}")
        logits = reader.model(input_ids=torch.tensor([[*ids, *target]])).logits[0].log_softmax(-1)
        return sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(target))

    asked = ASKED.format(question=QUESTION)
    alone = log_p(asked.lstrip("\n"))
    want = [float(torch.sigmoid(torch.tensor(log_p(s + asked) - alone))) for s in SENTENCES]
    assert gain(reader, SENTENCES, QUESTION, answer) == pytest.approx(want, abs=1e-4)
    assert gain(reader, SENTENCES, QUESTION, " ") == [None] * 4


# -- the recipe ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, zoo):
    """Questions about who lives where, and a tiny encoder."""
    folder = tmp_path_factory.mktemp("sentences")
    rows = []
    for number, (city, person) in enumerate(zip(CITIES, PEOPLE)):
        text = f"{person} lives in {city}. The house has {number + 2} rooms. A garden is green."
        for question, answer in ((f"Where does {person} live?", city), ("How many rooms?", f"{number + 2}")):
            rows.append({"question": question, "answers": [answer], "passages": [{"text": text}], "gold": 0})
        rows.append(
            {"question": f"What of {city}?", "answers": [city], "passages": [{"text": f"See {city}."}], "gold": 0}
        )
    lines = [json.dumps({**row, "id": str(i), "source": "toy", "half": "tune"}) for i, row in enumerate(rows)]
    (folder / "qa.jsonl").write_text("\n".join(lines[:18]))
    (folder / "dev.jsonl").write_text("\n".join(lines[18:]))
    zoo.save_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader("llama")


def recipe_for(folder, method: str = "provence", stage=None, **data):
    stages = [
        {
            **{"name": "sentences", "steps": 16, "batch_size": 4, "lr": 1e-2, "schedule": "constant"},
            **{"precision": "fp32", "log_every": 4, "save_every": 8, "eval_every": 16, **(stage or {})},
        }
    ]
    files = {"dir": str(folder), "questions": ["qa.jsonl"], "dev": "dev.jsonl"}
    compressor = {"method": method, "encoder": str(folder / "encoder"), "r": 4}
    raw = {"name": "t", "kind": "sentences", "reader": "unused", "compressor": compressor, "stages": stages}
    return parse_recipe({**raw, "data": {**files, **data}})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["provence", "filco", "recomp"])
def test_training_lowers_the_loss_and_saves_what_it_trained(folder, reader, tmp_path, method):
    recipe = recipe_for(folder, method)
    task = SentenceTask(recipe, reader)
    final = run_recipe(recipe, task, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert min(losses[1:]) < losses[0]
    (scores,) = [row for row in log if "eval/best" in row]
    assert all(0 <= scores[f"eval/{name}"] <= 100 for name in ("best", "best_first", "ranked"))
    assert load_compressor(final, reader).fingerprint == task.compressor.fingerprint


def test_items_are_passages_of_the_question_or_of_another(folder, reader):
    recipe = recipe_for(folder)
    task = SentenceTask(recipe, reader)
    items = [task.dataset(recipe.stages[0])[i] for i in range(40)]
    assert [item.key for item in items] == [task.dataset(recipe.stages[0])[i].key for i in range(40)]
    examples = [task.example(item) for item in items]
    assert {item.relevant for item in items} == {True, False}
    for item, example in zip(items, examples):
        assert "".join(item.passage[a:b] for a, b in example.sentences) == item.passage
        assert len(example.values) == len(example.sentences)
        if item.relevant:
            (best,) = [i for i, value in enumerate(example.values) if value == 1.0]
            assert item.answer in item.passage[slice(*example.sentences[best])]
            assert any(example.kept)
        else:
            assert not any(example.values)
            assert not any(example.kept)
            assert not holds(item.passage, item.answer)
    # a passage of one sentence is put among others
    assert all(len(e.sentences) > 1 for item, e in zip(items, examples) if "See" in item.passage and item.relevant)


def test_a_word_classifier_is_where_the_pruner_starts(folder, reader, tmp_path):
    torch.manual_seed(1)
    words = make_compressor("llmlingua2", reader, encoder=str(folder / "encoder"), r=4, query_aware=True).eval()
    with torch.no_grad():
        for parameter in words.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    words.save_pretrained(tmp_path)
    task = SentenceTask(recipe_for(folder, start=str(tmp_path)), reader)
    text, asked = " ".join(SENTENCES), [QUESTION]
    ((_, theirs),) = words.words.probabilities([text], asked)
    ((_, ours),) = task.compressor.eval().probabilities([text], asked)
    assert torch.allclose(ours[:, 0], theirs, atol=1e-5)
    assert torch.allclose(ours[:, 1], theirs, atol=1e-5)
    (tmp_path / "other").mkdir()
    other = make_compressor("llmlingua2", reader, encoder=str(folder / "encoder"), r=3)
    other.words.tagger.head = torch.nn.Linear(3, 4)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="no tensor that fits"):
        SentenceTask(recipe_for(folder, start=str(tmp_path / "other")), reader)


def test_what_cannot_be_trained_is_refused(folder, reader):
    other = recipe_for(folder).model_copy(update={"compressor": {"method": "selective-context"}})
    with pytest.raises(ValueError, match="selective-context is none"):
        SentenceTask(other, reader)
    with pytest.raises(ValueError, match="kind 'sentences' is needed"):
        SentenceTask(load_recipe("llmlingua2"), reader)
    task = SentenceTask(recipe_for(folder), reader)
    stage = recipe_for(folder).stages[0]
    with pytest.raises(ValueError, match="mix names 'pairs'"):
        task.dataset(stage.model_copy(update={"mix": {"pairs": 1.0}}))
    with pytest.raises(ValueError, match="trains 'all'"):
        task.begin_stage(stage.model_copy(update={"trainable": "head"}))
    with pytest.raises(ValueError, match="labels"):
        SentenceTask(recipe_for(folder, labels="guess"), reader)
