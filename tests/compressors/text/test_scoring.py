"""Self-information of tokens, and the units that scores are gathered in."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.compressors import Reader
from nutgraf.compressors.core.keep import keep_spans
from nutgraf.compressors.core.units import LEVELS, carve, split_units, unit_scores
from nutgraf.compressors.reader.tokenization import PromptTokenizer
from nutgraf.compressors.text.scoring import self_information
from oracles.selection import losses_of

TEXTS = [
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911).",
    "",
    "The treaty was signed.",
    "日本語 🦊\ud800 </s>",
    "Rivers carry sediment to the sea. " * 6,
]


def by_hand(reader: Reader, text: str, prefix: str = "") -> torch.Tensor:
    head = [*reader.bos_ids, *reader.tokenize(prefix)]
    return torch.tensor(losses_of(reader, head + reader.tokenize(text)))[len(head) - 1 :].double()


class Forwarded:
    """Counts the positions that a model reads, and the widest logits that its head makes."""

    def __init__(self, reader: Reader) -> None:
        self.positions = self.padded = self.rows = 0
        reader.head(torch.zeros(1, reader.model.config.hidden_size))  # checks itself once, which is not to be counted
        self.handles = [
            reader.model.get_decoder().register_forward_pre_hook(self._body, with_kwargs=True),
            reader.model.get_output_embeddings().register_forward_pre_hook(self._head),
        ]

    def _body(self, module, args, kwargs):
        self.positions += int(kwargs["attention_mask"].sum())
        self.padded += kwargs["input_ids"].numel()

    def _head(self, module, args):
        self.rows = max(self.rows, args[0].shape[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt", "gpt2"]
)
def test_batched_scores_equal_the_plain_computation(zoo, architecture):
    reader = zoo.reader(architecture)
    for positions in (1, 8192):
        for text, found in zip(TEXTS, self_information(reader, TEXTS, batch_positions=positions)):
            assert found.ids == reader.tokenize(text)
            assert len(found.offsets) == len(found.nll) == len(found.ids)
            if text:
                assert torch.allclose(found.nll.double(), by_hand(reader, text), atol=1e-4)


def test_soft_capped_logits_are_scored_as_the_model_makes_them(zoo):
    reader = zoo.reader("gemma3_text", final_logit_softcapping=3.0)
    assert torch.allclose(self_information(reader, TEXTS[:1])[0].nll.double(), by_hand(reader, TEXTS[0]), atol=1e-4)


def test_prefixes_are_read_and_not_scored(zoo):
    reader = zoo.reader("llama")
    question = "Question: who signed it?"
    found = self_information(reader, TEXTS, prefixes=[question] * len(TEXTS))
    for text, scores in zip(TEXTS, found):
        if text:
            assert torch.allclose(scores.nll.double(), by_hand(reader, text, question), atol=1e-4)
    with pytest.raises(ValueError, match="got 1 prefixes for 2 texts"):
        self_information(reader, ["a", "b"], prefixes=["c"])
    with pytest.raises(ValueError, match="leaves no room"):
        self_information(reader, ["a"], prefixes=["word " * 99], window=32)


def test_long_texts_are_read_in_windows_and_every_token_about_once(zoo):
    reader = zoo.reader("llama", max_position_embeddings=256)
    texts = ["The treaty was signed in 1648 in Westphalia. " * 400, "word " * 300]
    with Forwarded(reader) as seen:
        found = self_information(reader, texts)
    tokens = sum(len(scores.ids) for scores in found)
    assert seen.positions <= 1.05 * tokens
    assert seen.padded <= 1.10 * tokens
    for text, scores in zip(texts, found):
        ids = reader.tokenize(text)
        first, second = (
            torch.tensor(losses_of(reader, reader.bos_ids + ids[a:b])).double() for a, b in ((0, 256), (248, 504))
        )
        assert torch.allclose(scores.nll[:256].double(), first, atol=1e-4)
        assert torch.allclose(scores.nll[256:504].double(), second[8:], atol=1e-4)


def test_passages_of_many_lengths_are_forwarded_about_once(zoo):
    reader = zoo.reader("llama")
    texts = ["word " * n for n in range(30, 90)]
    with Forwarded(reader) as seen:
        found = self_information(reader, texts)
    tokens = sum(len(scores.ids) for scores in found)
    assert seen.positions <= tokens
    assert seen.padded <= 1.05 * tokens


def test_logits_exist_for_a_chunk_at_a_time(zoo, monkeypatch):
    reader = zoo.reader("llama")
    want = self_information(reader, TEXTS)
    monkeypatch.setattr("nutgraf.compressors.text.scoring._LOGITS", 7 * reader.vocab_size)
    with Forwarded(reader) as seen:
        found = self_information(reader, TEXTS)
    assert seen.rows <= 7
    assert all(torch.allclose(a.nll, b.nll, atol=1e-5) for a, b in zip(want, found))


def test_without_bos_the_end_of_text_token_opens_and_without_either_the_first_token_is_uniform(zoo):
    reader = zoo.reader("gpt2")
    reader.prompts.bos_ids = []
    scores = self_information(reader, TEXTS[:1])[0].nll
    reader.prompts.bos_ids = [reader.tokenizer.bos_token_id]
    assert torch.allclose(scores.double(), by_hand(reader, TEXTS[0]), atol=1e-4)


def test_no_opening_token_at_all(zoo, monkeypatch):
    reader = zoo.reader("llama")
    monkeypatch.setattr("nutgraf.compressors.text.scoring._opening", lambda scorer: [])
    found = self_information(reader, [TEXTS[0], "a", ""])
    assert float(found[0].nll[0]) == pytest.approx(math.log(reader.vocab_size))
    assert torch.allclose(
        found[0].nll[1:].double(), torch.tensor(losses_of(reader, reader.tokenize(TEXTS[0]))).double(), atol=1e-4
    )
    assert found[1].nll.shape == (1,)


# -- units ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(), max_size=80) | st.text("ab .,!?\n🦊👩\u200d🏽é\u0301日本。🇫🇷\r", max_size=60))
def test_units_are_a_partition(zoo, level, text):
    offsets = _offsets(zoo, text)
    units = split_units(text, level, offsets)
    assert "".join(text[a:b] for a, b in units) == text
    assert all(a < b for a, b in units)
    for a, _ in units[1:]:
        assert text[a] not in "\u0301\u200d🏽"
        assert text[a - 1] != "\u200d"
    scores = torch.rand(len(offsets))
    means = unit_scores(units, offsets, scores)
    assert means.shape == (len(units),)
    assert ((means >= -1e-6) & (means <= 1 + 1e-6)).all()


@functools.cache
def _prompts(zoo) -> PromptTokenizer:
    return PromptTokenizer(zoo.tokenizer())


def _offsets(zoo, text: str) -> list[tuple[int, int]]:
    return _prompts(zoo).encode_with_offsets(text)[1]


def pieces(text: str, level: str) -> list[str]:
    return [text[a:b].strip() for a, b in split_units(text, level)]


def test_sentences():
    text = (
        'Dr. J. Smith of the U.S. Army met Ms. Lee (at 5 p.m. on Monday). "Did he?" she asked! He paid $3.50, e.g. in cash.\n\n'
        "A heading\n- one item\n- another item\nWrapped\nline... and more. 我爱北京。你好吗？是 Version 2.0 is out."
    )
    assert pieces(text, "sentence") == [
        "Dr. J. Smith of the U.S. Army met Ms. Lee (at 5 p.m. on Monday).",
        '"Did he?"',
        "she asked!",
        "He paid $3.50, e.g. in cash.",
        "A heading",
        "- one item",
        "- another item\nWrapped\nline...",
        "and more.",
        "我爱北京。",
        "你好吗？",
        "是 Version 2.0 is out.",
    ]


def test_phrases_are_function_words_and_what_follows_them():
    text = "The treaty was signed in 1648 in Westphalia, ending thirty years of war."
    assert pieces(text, "phrase") == [
        "The treaty",
        "was signed",
        "in 1648",
        "in Westphalia,",
        "ending thirty years",
        "of war.",
    ]
    assert max(len(p.split()) for p in pieces("alpha beta gamma " * 40, "phrase")) <= 8
    assert max(map(len, pieces("日本語" * 50, "phrase"))) <= 8


def test_words():
    assert pieces("It's state-of-the-art, 3.5% (at most).", "word") == [
        "It's",
        "state-of-the-art",
        ",",
        "3.5%",
        "(",
        "at",
        "most",
        ").",
    ]


def test_tokens_of_one_character_are_one_unit(zoo):
    text = "a🦊日b"
    offsets = _offsets(zoo, text)
    assert len(offsets) > 4
    assert [text[a:b] for a, b in split_units(text, "token", offsets)] == ["a", "🦊", "日", "b"]


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        split_units("a", "paragraph")


def test_scores_of_a_token_in_two_units_are_shared_out():
    means = unit_scores([(0, 2), (2, 4), (4, 6)], [(0, 3), (3, 4), (4, 5)], torch.tensor([3.0, 5.0, 7.0]))
    # the first token lies two thirds in the first unit and one third in the second
    assert torch.allclose(means, torch.tensor([3.0, (1 + 5) / (1 / 3 + 1), 7.0], dtype=torch.float64))


def test_what_must_stay():
    text = "Yesterday Marie Curie won $3,000.50 and 12% in the EU. The end. NASA knew Bob."
    assert [text[a:b] for a, b in keep_spans(text, kinds=["numbers"])] == ["$3,000.50", "12%"]
    assert [text[a:b] for a, b in keep_spans(text, kinds=["names"])] == ["Yesterday Marie Curie", "EU", "NASA", "Bob"]
    assert [text[a:b] for a, b in keep_spans(text, ["won $3"], [r"\$[\d,]+", "x*"])] == ["won $3,000.50"]
    spans, parents, must = carve([(0, 10), (10, len(text))], [(8, 14)], text)
    assert spans == [(0, 8), (8, 14), (14, len(text))]
    assert parents == [0, 0, 1]
    assert must == [False, True, False]
