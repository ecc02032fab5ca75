"""Training a token classifier: labels from questions and from pairs, and the recipe over the one trainer."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from nutgraf import load_compressor
from nutgraf.recipes.tasks.registry import make_task
from nutgraf.recipes.tasks.token_labels import (
    IGNORE,
    align,
    alike,
    answer_labels,
    question_labels,
    stem,
    trusted,
    words_of,
)
from nutgraf.recipes.tasks.tokens import TokenData, TokenItem, TokenTask
from nutgraf.recipes.training.schema import load_recipe, parse_recipe, validate
from nutgraf.recipes.training.trainer import run_recipe
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

CITIES = ["Bergen", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Turin", "Perth"]
PEOPLE = ["Ada", "Ivar", "Mary", "Omar", "Nora", "Hugo", "Vera", "Emil"]
PASSAGE = (
    "The treaty was signed in 1648 in Westphalia. It ended thirty years of war among the powers of Europe. "
    "Nobody remembers who paid for the dinners. The painter Gerard ter Borch watched the ceremony."
)
PAIRS = [
    ("When was the treaty signed?", "1648"),
    ("How long had the war lasted?", "thirty years"),
    ("Who watched the ceremony?", "the painter ter Borch"),
]


def kept_words(labels, text: str, value: int = 1) -> list[str]:
    return [text[a:b] for (a, b), v in zip(labels.spans, labels.values) if v == value]


# -- labels --------------------------------------------------------------------------------------------------------------


def test_words_and_stems():
    text = "It's 1,000.5 km; state-of-the-art."
    assert [text[a:b] for a, b in words_of(text)] == ["It's", "1,000.5", "km", ";", "state-of-the-art", "."]
    assert stem("signed") == stem("signs") == stem("Signing") == "sign"
    assert stem("was") == "was"
    assert alike("curious", "curio")
    assert not alike("war", "warsaw")
    assert not alike("in", "inn")


def test_questions_say_what_is_worth_keeping():
    labels = question_labels(PASSAGE, PAIRS, whole=9)
    assert kept_words(labels, PASSAGE) == [
        *["treaty", "signed", "1648", "Westphalia"],
        *["thirty", "years", "war", "Europe"],
        *["painter", "Gerard", "ter", "Borch", "watched", "ceremony"],
    ]
    # nothing is known of the sentence that no question touched
    assert kept_words(labels, PASSAGE, IGNORE) == ["Nobody", "remembers", "who", "paid", "for", "the", "dinners", "."]
    # unless the passage was asked out; a name that nothing is known of stays unknown
    asked_out = question_labels(PASSAGE, PAIRS, whole=3)
    assert kept_words(asked_out, PASSAGE, IGNORE) == ["Nobody"]
    assert "dinners" in kept_words(asked_out, PASSAGE, 0)
    assert "Westphalia" not in kept_words(question_labels(PASSAGE, PAIRS, names=False), PASSAGE)
    # several questions are united
    single = [set(kept_words(question_labels(PASSAGE, [pair]), PASSAGE)) for pair in PAIRS]
    assert set.union(*single) == set(kept_words(labels, PASSAGE))


def test_one_question_says_what_to_keep_for_it():
    question, answer = PAIRS[0]
    bare = answer_labels(PASSAGE, question, answer, random.Random(0), beside=0.0)
    assert kept_words(bare, PASSAGE) == ["treaty", "signed", "1648"]
    assert kept_words(bare, PASSAGE, IGNORE) == []  # all else is dropped
    # what stands beside the answer is kept now and then, the nearest most often, never in other sentences
    drawn = [kept_words(answer_labels(PASSAGE, question, answer, random.Random(i)), PASSAGE) for i in range(400)]
    counts = Counter(word for words in drawn for word in words)
    assert counts["1648"] == counts["treaty"] == 400
    assert 400 > counts["Westphalia"] > counts["The"] > 0
    assert "war" not in counts


def test_an_answer_counts_where_it_shares_most_with_the_question():
    text = "In 1911 it rained. Curie won the chemistry prize in 1911. Nothing came of it."
    labels = question_labels(text, [("When did Curie win the prize in chemistry?", "1911")])
    assert [a for (a, _), v in zip(labels.spans, labels.values) if v == 1] == [
        text.index(word, 19) for word in ("Curie", "chemistry", "prize", "1911")
    ]
    assert set(question_labels(text, []).values) == {IGNORE}
    assert question_labels("", [("a?", "b")]).values == ()


def test_labels_of_tokens_are_those_of_their_words():
    labels = question_labels("A treaty of 1648.", [("Which treaty?", "1648")], whole=1)
    assert kept_words(labels, "A treaty of 1648.") == ["treaty", "1648"]
    offsets = [(0, 1), (1, 5), (5, 8), (8, 9), (9, 11), (11, 13), (13, 14), (14, 16), (16, 17)]
    assert labels.of_tokens(offsets) == [0, 1, 1, IGNORE, 0, 1, 1, 1, 0]


def test_pairs_are_aligned_near_the_last_match():
    original = "The man saw the dog and the dog saw the man who was walking in the rain."
    found = align(original, "man saw dog, dog saw man walked rain")
    words = [original[a:b] for a, b in found.labels.spans]
    at = [i for i, v in enumerate(found.labels.values) if v]
    assert [words[i] for i in at] == ["man", "saw", "dog", "dog", "saw", "man", "walking", "rain"]
    assert at == [1, 2, 4, 7, 8, 10, 13, 16]
    assert found.variation == pytest.approx(1 / 9)  # the comma
    assert found.gap == pytest.approx(0.0)
    invented = align(original, "a cat slept")
    assert sum(invented.labels.values) == 0
    assert invented.variation == 1.0
    # words that occur and could not be placed: one "dog" labels one of two
    assert align(original, "dog").gap == pytest.approx(1 / len(words))
    # beyond half a window nothing is found
    far = "start " + "filler " * 40 + "end"
    assert sum(align(far, "start end", window=20).labels.values) == 1
    assert sum(align(far, "start end", window=100).labels.values) == 2


def test_pairs_that_cannot_be_trusted_are_left_out():
    original = "one two three four five six seven eight nine ten"
    found = [align(original, "one two three")] * 16
    found += [align(original, "alpha beta")] + [align("dog " * 8, "dog")] * 2 + [align(original, "one")]
    assert trusted(found, 0.05, 0.11) == [*range(16), 19]
    assert trusted(found, 0, 0) == list(range(20))


# -- the recipe ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions about who lives where, pairs, and a tiny encoder."""
    folder = tmp_path_factory.mktemp("tokens")
    rows, pairs = [], []
    for number, (city, person) in enumerate(zip(CITIES, PEOPLE)):
        text = (
            f"{person} lives in {city} by the river. The old house has {number + 2} rooms and a garden that is green."
        )
        asked = [
            (f"Where does {person} live?", city),
            (f"Who lives in {city}?", person),
            ("How many rooms?", f"{number + 2}"),
        ]
        rows += [
            {"id": f"{number}-{i}", "question": q, "answers": [a], "passages": [{"title": "", "text": text}], "gold": 0}
            for i, (q, a) in enumerate(asked)
        ]
        pairs.append({"original": text, "compressed": f"{person} lives {city}, {number + 2} rooms"})
    lines = [json.dumps({**row, "source": "toy", "half": "tune"}) for row in rows]
    (folder / "qa.jsonl").write_text("\n".join(lines[:18]))
    (folder / "dev.jsonl").write_text("\n".join(lines[18:]))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([pair["original"] for pair in pairs], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertModel(BertConfig(vocab_size=140, max_position_embeddings=64, **small)).save_pretrained(folder / "encoder")
    return folder


def recipe_for(folder, stage=None, **data):
    stages = [
        {
            **{"name": "tokens", "steps": 12, "batch_size": 4, "lr": 2e-2, "schedule": "constant", "precision": "fp32"},
            **{"log_every": 4, "save_every": 5, "eval_every": 6, **(stage or {})},
        }
    ]
    files = {"dir": str(folder), "questions": ["qa.jsonl"], "dev": "dev.jsonl", "pairs": ["pairs.jsonl"]}
    compressor = {"method": "llmlingua2", "encoder": str(folder / "encoder"), "r": 4}
    raw = {"name": "t", "kind": "tokens", "reader": "unused", "compressor": compressor, "stages": stages}
    return parse_recipe({**raw, "data": {**files, **data}})


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader("llama")


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_encoder_alone(folder, reader, tmp_path):
    recipe = recipe_for(folder)
    task = TokenTask(recipe, reader)
    frozen = {n: t.clone() for n, t in task.compressor.words.frozen.state_dict().items()}
    start = {n: t.clone() for n, t in task.compressor.trainable_state().items()}
    final = run_recipe(recipe, task, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    scores = [row for row in log if "eval/f1" in row]
    assert len(scores) == 2
    assert scores[-1]["eval/f1"] > scores[-1]["eval/f1_random"]
    assert 0.1 < scores[-1]["eval/keep_rate"] < 0.9
    assert all(torch.equal(t, frozen[n]) for n, t in task.compressor.words.frozen.state_dict().items())
    assert all(not torch.equal(t, start[n]) for n, t in task.compressor.trainable_state().items())
    loaded = load_compressor(final, reader)
    assert loaded.fingerprint == task.compressor.fingerprint
    # what was taught: people and places before "by the"
    text = "Nora lives in Kyoto by the river."
    (p,) = loaded.compress([text], ratio=2)
    assert p.n_tokens <= p.source_tokens // 2


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(folder, reader, tmp_path):
    recipe = recipe_for(folder, {"steps": 6, "eval_every": None, "save_every": 3})
    whole = TokenTask(recipe, reader)
    run_recipe(recipe, whole, tmp_path / "whole")
    run_recipe(recipe, TokenTask(recipe, reader), tmp_path / "parts", max_minutes=0)
    again = TokenTask(recipe, reader)
    final = run_recipe(recipe, again, tmp_path / "parts")
    assert (final / "config.json").is_file()
    for name, tensor in whole.compressor.trainable_state().items():
        assert torch.equal(tensor, again.compressor.trainable_state()[name]), name


def test_batches_hold_rows_and_labels_that_fit(folder, reader):
    recipe = recipe_for(folder, {"mix": {"questions": 0.5, "pairs": 0.5}})
    task = TokenTask(recipe, reader)
    stage = recipe.stages[0]
    items = [task.dataset(stage)[i] for i in range(8)]
    assert [item.key for item in items] == [task.dataset(stage)[i].key for i in range(8)]
    batch = task.collator(stage)(items)
    assert batch["ids"].shape == batch["mask"].shape == batch["labels"].shape
    assert batch["num_items"] == int((batch["labels"] != IGNORE).sum()) > 0
    assert (batch["labels"][batch["mask"] == 0] == IGNORE).all()
    assert (batch["labels"][:, 0] == IGNORE).all()
    batch.pop("num_items")
    out = task.module(**batch)
    logits = task.compressor.words.logits(batch["ids"], batch["mask"])
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    long = "The old house has rooms. " * 40
    item = TokenItem(long, question_labels(long, [("What has rooms?", "house")]), "key")
    rows = list(task.rows(item))
    assert len(rows) > 2
    assert max(len(ids) for ids, _ in rows) <= 64


def test_a_classifier_that_reads_questions_gets_one_with_each_passage(folder, reader):
    plain = recipe_for(folder, {"mix": {"questions": 1.0}})
    asking = plain.model_copy(update={"compressor": {**plain.compressor, "query_aware": True}})
    task = TokenTask(asking, reader)
    items = [task.dataset(asking.stages[0])[i] for i in range(6)]
    assert all(item.question for item in items)
    batch = task.collator(asking.stages[0])(items)
    for item, ids, labels in zip(items, batch["ids"], batch["labels"]):
        head = task.compressor.words.head(item.question)
        assert ids[: len(head)].tolist() == head
        assert (labels[: len(head)] == IGNORE).all()
        assert (labels[len(head) :] == 1).any()
    assert all(
        item.question is None for item in (TokenTask(plain, reader).make(str(i), {"questions": 1.0}) for i in range(3))
    )


def test_parts_can_train_alone(folder, reader):
    task = TokenTask(recipe_for(folder), reader)
    for trainable, part in (("head", "head"), (["lora"], "lora")):
        task.begin_stage(recipe_for(folder, {"trainable": trainable}).stages[0])
        assert {part in name for name, p in task.compressor.named_parameters() if p.requires_grad} == {True}
    with pytest.raises(ValueError, match="nothing called 'encoder'"):
        task.begin_stage(recipe_for(folder, {"trainable": "encoder"}).stages[0])


def test_wrong_recipes_say_what_is_wrong(folder, reader):
    with pytest.raises(ValueError, match=r"compressor\.method"):
        parse_recipe({**recipe_for(folder).model_dump(), "compressor": None})
    with pytest.raises(ValueError, match="did you mean 'min_questions'"):
        TokenTask(recipe_for(folder, min_question=3), reader)
    with pytest.raises(ValueError, match="no passage with 9"):
        _ = TokenTask(recipe_for(folder, min_questions=9), reader).material
    with pytest.raises(ValueError, match="no passage with 3"):
        _ = TokenTask(recipe_for(folder, shares={"squad": 1.0}), reader).material
    with pytest.raises(ValueError, match="mix names 'poems'"):
        TokenTask(recipe_for(folder), reader).dataset(recipe_for(folder, {"mix": {"poems": 1}}).stages[0])
    with pytest.raises(ValueError, match=r"needs data\.dev"):
        TokenTask(recipe_for(folder, dev=None), reader).evaluate(recipe_for(folder).stages[0])
    (folder / "bad.jsonl").write_text('{"original": "a"}')
    with pytest.raises(ValueError, match="line 1 lacks compressed"):
        _ = TokenTask(recipe_for(folder, pairs=["bad.jsonl"]), reader).pairs
    other = recipe_for(folder).model_copy(update={"compressor": {"method": "llmlingua"}})
    with pytest.raises(ValueError, match="trains llmlingua2"):
        TokenTask(other, reader)
    with pytest.raises(ValueError, match="kind 'tokens' is needed"):
        TokenTask(recipe_for(folder).model_copy(update={"kind": "compressor"}), reader)


def test_the_shipped_recipe_is_of_this_kind(monkeypatch):
    recipe = load_recipe("llmlingua2")
    validate(TokenData, recipe.data, "llmlingua2", "data")
    made = []
    monkeypatch.setattr("nutgraf.recipes.tasks.tokens.TokenTask", lambda recipe: made.append(recipe) or "task")
    assert make_task(recipe) == "task"
    assert made == [recipe]
