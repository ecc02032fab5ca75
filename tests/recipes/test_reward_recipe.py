"""Training by the reader's answers: rewards, samples and the policy gradient equal a second computation; recipes run."""

from __future__ import annotations

import json
import math

import pytest
import torch
import zoo
from nutgraf import load_compressor
from nutgraf.compressors import ReaderMismatchError, make_compressor
from nutgraf.compressors.fidelity.questions import ASKED
from nutgraf.compressors.text.facts import supported
from nutgraf.recipes.tasks.rewards import Reward, RewardData, RewardItem, RewardTask
from nutgraf.recipes.training.schema import load_recipe, parse_recipe
from nutgraf.recipes.training.trainer import run_recipe

TEXT = "The treaty was signed in 1648 in Westphalia. It ended thirty years of war."
PAIRS = (("When was it signed?", "1648"), ("Where?", "Westphalia"))


@pytest.fixture(scope="module")
def reader():
    return zoo.reader("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    rows = [
        {"id": f"{n}{i}", "question": q, "answers": [a], "passages": [{"text": f"{n}. {TEXT}"}], "gold": 0}
        for n in range(4)
        for i, (q, a) in enumerate(PAIRS)
    ]
    (folder / "qa.jsonl").write_text("\n".join(json.dumps({**row, "source": "toy", "half": "tune"}) for row in rows))
    zoo.save_encoder(folder / "encoder")
    return folder


def recipe_for(folder, method: str, stage=None, data=None, **compressor):
    own = {"encoder": str(folder / "encoder")} if method == "pcrl" else {}
    stages = [
        {
            **{"name": "rewards", "steps": 2, "batch_size": 2, "lr": 1e-3, "precision": "fp32", "log_every": 1},
            **{"save_every": 2, "eval_every": 2, **(stage or {})},
        }
    ]
    files = {"dir": str(folder), "questions": ["qa.jsonl"], "dev": "qa.jsonl", "samples": 2, **(data or {})}
    raw = {"name": "t", "kind": "rewards", "reader": "unused", "data": files, "stages": stages}
    return parse_recipe({**raw, "compressor": {"method": method, "r": 2, **own, **compressor}})


def log_p(reader, prompt: str, target: str, end: bool = False, temperature: float = 1.0) -> list[float]:
    ids = [*reader.bos_ids, *reader.tokenize(prompt)]
    wanted = [*(reader.tokenize(target) if target else []), *([reader.eos_id] if end else [])]
    with torch.no_grad():
        logits = reader.model(input_ids=torch.tensor([[*ids, *wanted]])).logits[0]
        logits = (logits / temperature).log_softmax(-1)
    return [float(logits[len(ids) + i - 1, token]) for i, token in enumerate(wanted)]


# -- rewards -------------------------------------------------------------------------------------------------------------


def test_faithfulness_compares_the_answers_likelihood_with_and_without_compression(reader):
    texts = ["signed in 1648", "", TEXT]
    item = RewardItem(TEXT, PAIRS, "k")
    reward = Reward(reader, RewardData())
    want = []
    for text in texts:
        ratios = []
        for question, answer in PAIRS:
            asked = ASKED.format(question=question)
            ours, full = (log_p(reader, passage + asked, f" {answer}") for passage in (text, TEXT))
            ratios.append(min(1.0, math.exp(sum(ours) / len(ours) - sum(full) / len(full))))
        want.append(sum(ratios) / len(ratios))
    (found,) = reward.faithfulness([item], [texts])
    assert found == pytest.approx(want, abs=1e-4)
    assert found[2] == pytest.approx(1.0, abs=1e-5)
    assert reward([item], [texts])[0].tolist() == pytest.approx(want, abs=1e-4)
    # PCRL: the share of tokens that went, where the answer stays
    strict = Reward(reader, RewardData(faithful=0.999))
    share = [len(reader.tokenize(text)) / len(reader.tokenize(TEXT)) for text in texts]
    pcrl = [1 - s if f > 0.999 else -0.01 for s, f in zip(share, want)]
    assert strict([item], [texts])[0].tolist() == pytest.approx(pcrl, abs=1e-4)


def test_likeness_to_the_passage_adds_to_the_reward(reader):
    plain, near = Reward(reader, RewardData()), Reward(reader, RewardData(semantic=0.5))
    item, texts = RewardItem(TEXT, PAIRS, "k"), [TEXT, "Cats hunt mice."]
    added = (near([item], [texts]) - plain([item], [texts]))[0].tolist()
    assert added[0] == pytest.approx(0.5, abs=1e-4)
    assert added[1] < 0.3


# -- samples -------------------------------------------------------------------------------------------------------------


def test_the_policy_draws_words_with_their_probabilities(reader, folder):
    compressor = make_compressor("pcrl", reader, encoder=str(folder / "encoder"), r=2).eval()
    (samples,) = compressor.sample([TEXT], [None], None, 40, seed=1)
    assert samples[0].text == TEXT  # untrained, every word is likelier kept than not
    ((spans, logits),) = compressor.logits([TEXT], [None])
    p = logits.sigmoid()
    assert float(samples[0].log_prob) == pytest.approx(float(p.log().sum().detach()), abs=1e-4)
    words = [TEXT[a:b].strip() for a, b in spans]
    for sample in samples[1:6]:
        left = sample.text.split()
        marks = [
            bool(left) and left[0].startswith(word) and (left.pop(0) or True) for word in words if word[0].isalnum()
        ]
        assert any(marks)
    kept = sum(len(sample.text.split()) for sample in samples[1:]) / 40 / len(TEXT.split())
    assert abs(kept - float(p.mean())) < 0.12
    again = compressor.sample([TEXT], [None], None, 40, seed=1)[0]
    assert [s.text for s in again] == [s.text for s in samples]
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert float(samples[0].entropy) == pytest.approx(float(entropy.detach()), abs=1e-4)
    free = make_compressor("pcrl", reader, encoder=str(folder / "encoder"), r=2, mode="published").eval()
    assert free.compress([TEXT])[0].text == TEXT


def test_the_writer_knows_the_probability_of_what_it_wrote(reader):
    compressor = make_compressor("nano-capsulator", reader, r=2, verify=False).eval()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (samples,) = compressor.sample([TEXT], [None], 4, 3, seed=2)
    budget = len(reader.tokenize(TEXT)) // 4
    prompt = compressor.prompt(TEXT, None, budget)
    for sample in samples:
        want = log_p(compressor.writer, prompt, f" {sample.text}" if sample.text else "", end=True, temperature=0.8)
        found = float(sample.log_prob.detach())
        assert any(found == pytest.approx(sum(some), rel=1e-4) for some in (want, want[:-1]))  # the end, unless cut
        assert len(reader.tokenize(sample.text)) <= budget
    assert compressor.compress([TEXT], ratio=4)[0].text == samples[0].text
    assert compressor.compress([TEXT], max_tokens=0)[0].text == ""
    found = compressor._log_probs([[prompt]] * 2, ["a", "a"], [True, False]).tolist()
    assert found[0] == pytest.approx(sum(log_p(compressor.writer, prompt, " a", end=True, temperature=0.8)), rel=1e-4)
    assert found[1] == pytest.approx(sum(log_p(compressor.writer, prompt, " a", temperature=0.8)), rel=1e-4)


def test_a_saved_writer_takes_another_budget(reader, tmp_path):
    make_compressor("nano-capsulator", reader, r=2).save_pretrained(tmp_path / "writer")
    loaded = load_compressor(tmp_path / "writer", reader=reader, max_tokens=5)
    assert loaded.compress([TEXT])[0].n_tokens <= 5
    with pytest.raises(ValueError, match="takes the settings ratio and max_tokens; got verify"):
        load_compressor(tmp_path / "writer", reader=reader, verify=False)
    with pytest.raises(ValueError, match="max_tokens must be an integer of at least 0"):
        loaded.compress([TEXT], max_tokens=-1)


def test_an_empty_passage_has_no_entropy(reader, folder):
    compressor = make_compressor("pcrl", reader, encoder=str(folder / "encoder"), r=2).eval()
    assert float(compressor.sample([""], [None], None, 1, seed=0)[0][0].entropy.detach()) == 0


def test_invented_facts_are_dropped():
    assert supported("In 1648 it was signed. It was signed in 1700 by Emil. War ended.", TEXT) == (
        "In 1648 it was signed. War ended."
    )
    assert supported("", TEXT) == ""


def test_the_loss_is_the_self_critical_policy_gradient(reader, folder):
    recipe = recipe_for(folder, "pcrl", data={"entropy": 0.1})
    task = RewardTask(recipe, reader)
    stage = recipe.stages[0]
    batch = task.collator(stage)([task.dataset(stage)[i] for i in range(2)])
    found = task.module(**batch)
    task.compressor.eval()
    texts = [item.passage for item in batch["items"]]
    samples = task.compressor.sample(texts, [None, None], batch["ratio"], 2, batch["seed"])
    rewards = task.module.reward(batch["items"], [[s.text for s in several] for several in samples])
    terms = [-(float(rewards[i, j]) - float(rewards[i, 0])) * samples[i][j].log_prob for i in range(2) for j in (1, 2)]
    want = sum(terms) / 4 - 0.1 * (samples[0][0].entropy + samples[1][0].entropy) / 2
    assert float(found["loss"].detach()) == pytest.approx(float(want.detach()), abs=1e-4)


# -- recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ratios"), [("pcrl", None), ("nano-capsulator", [2, 4])])
def test_recipes_train_save_and_load(folder, reader, tmp_path, method, ratios):
    recipe = recipe_for(folder, method, {"ratios": ratios}, {"faithful": None if ratios else 0.5})
    task = RewardTask(recipe, reader)
    start = {name: tensor.clone() for name, tensor in task.compressor.trainable_state().items()}
    final = run_recipe(recipe, task, tmp_path)
    assert any(not torch.equal(start[name], tensor) for name, tensor in task.compressor.trainable_state().items())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (scores,) = [row for row in log if "eval/reward" in row]
    assert math.isfinite(scores["eval/faithfulness"])
    loaded = load_compressor(final, reader)
    assert loaded.fingerprint == task.compressor.fingerprint
    if method == "nano-capsulator":
        with pytest.raises(ReaderMismatchError, match="made for another reader"):
            load_compressor(final, zoo.reader("llama", seed=5))


def test_what_cannot_be_trained_is_refused(folder, reader):
    with pytest.raises(ValueError, match="selective-context does not"):
        RewardTask(
            recipe_for(folder, "pcrl").model_copy(update={"compressor": {"method": "selective-context"}}), reader
        )
    with pytest.raises(ValueError, match="kind 'rewards' is needed"):
        RewardTask(load_recipe("llmlingua2"), reader)
    with pytest.raises(ValueError, match="trains 'all'"):
        RewardTask(recipe_for(folder, "pcrl"), reader).begin_stage(
            recipe_for(folder, "pcrl", {"trainable": "head"}).stages[0]
        )
    with pytest.raises(ValueError, match="got none"):
        make_compressor("nano-capsulator", reader, r=2, query_aware=True).compress([TEXT])
