"""Selective Context, and the exact budget that every text compressor shares."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.compressors import Reader, load_compressor
from nutgraf.compressors.core.units import LEVELS, split_units, unit_scores
from nutgraf.compressors.text.budget import join, merge, run_searches, search
from nutgraf.compressors.text.published.selective_context import _phrase_values
from nutgraf.compressors.text.selective_context import SelectiveContextCompressor, SelectiveContextConfig
from oracles.selection import losses_of

PASSAGE = (
    "Marie Curie was born in Warsaw and won two Nobel Prizes, in physics (1903) and in chemistry (1911). The treaty was "
    "signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe. Rivers carry sediment to the "
    "sea; the Amazon, the Nile and the Yangtze are among the longest on Earth."
)
ODD = {
    "cjk": "我爱北京天安门。你好吗？日本語の文章を読む。" * 6,
    "emoji": "👩‍👩‍👧 🦊🏽 🇫🇷🇩🇪 é́ ok " * 12,
    "rtl": "שלום עולם, זה מבחן. مرحبا بالعالم، هذا اختبار؟ " * 5,
    "surrogates": "a\ud800b lone \udfff halves of \ud83d\ude00 pairs. " * 5,
    "specials": "Ignore </s> and <|user|> and <s>, they are <pad> plain text <|end|>. " * 5,
    "one word": "x" * 2000,
    "one token": " the" * 600,
    "layout": "| a | b |\n|---|---|\n| 1 | 2 |\n\n\tdef f(x):\n\t\treturn x\n" * 6,
    "blank": " \n\t" * 60,
    "controls": "\x00\x01\u200b\ufeff word\u2028 " * 20,
}


@pytest.fixture(scope="module")
def reader(zoo) -> Reader:
    return zoo.reader("llama")


def build(reader: Reader, **settings) -> SelectiveContextCompressor:
    return SelectiveContextCompressor(SelectiveContextConfig.from_dict(settings), reader)


def check(reader: Reader, text: str, passage, target: int) -> None:
    assert passage.n_tokens == len(reader.tokenize(passage.text)) <= target
    if "structure" not in passage.info:
        assert passage.text == passage.info["joiner"].join(text[a:b] for a, b in passage.spans)
    ends = [i for span in passage.spans for i in span]
    assert ends == sorted(ends)
    assert all(a < b for a, b in passage.spans)
    assert passage.source_tokens == len(reader.tokenize(text))


@pytest.mark.slow
@pytest.mark.parametrize("unit", LEVELS)
@pytest.mark.parametrize("ratio", [1.0, 1.01, 1.5, 2, 3.3, 8, 1000])
def test_never_above_the_budget_and_close_to_it(reader, unit, ratio):
    (passage,) = build(reader, unit=unit).compress([PASSAGE], ratio=ratio)
    n = passage.source_tokens
    check(reader, PASSAGE, passage, max(math.floor(n / ratio + 1e-9), 1))
    slack = {"token": 1, "word": 3, "phrase": 6, "sentence": 60}[unit]
    assert passage.n_tokens >= n / ratio - slack - 1


@pytest.mark.parametrize("unit", LEVELS)
def test_a_short_passage_is_not_returned_whole(reader, unit):
    text = "The treaty was signed in 1648 in Westphalia, ending the war."
    n = len(reader.tokenize(text))
    assert n < 60
    (passage,) = build(reader, unit=unit).compress([text], ratio=2)
    assert 0 < passage.n_tokens <= n / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("unit", LEVELS)
def test_odd_texts(reader, unit, name):
    text, digits = ODD[name], name != "layout"  # every row of its tables has some
    passage, whole = (build(reader, unit=unit, keep_digits=digits).compress([text], ratio=r)[0] for r in (2.5, 1))
    check(reader, text, passage, math.floor(passage.source_tokens / 2.5))
    assert whole.text == text
    assert whole.spans == ((0, len(text)),)
    if name != "blank":
        assert passage.n_tokens > 0
    # no character that was not there, and none in parts
    assert set(passage.text) <= set(text) | {" "}
    assert "\ufffd" not in passage.text


@pytest.mark.slow
def test_a_hundred_thousand_characters(zoo):
    reader = zoo.reader("llama", num_hidden_layers=1)
    text = "The treaty was signed in Westphalia in 1648. " * 2300
    (passage,) = build(reader, window=256).compress([text], ratio=4)
    check(reader, text, passage, passage.source_tokens // 4)
    assert passage.n_tokens > 0.99 * passage.source_tokens / 4


def test_a_budget_in_tokens(reader):
    compressor = build(reader)
    texts = [PASSAGE, "", "ab"]
    for most in (0, 1, 7, 40, 10_000):
        found = compressor.compress(texts, max_tokens=most)
        for passage, text in zip(found, texts):
            check(reader, text, passage, most)
            assert passage.info["budget"] == most
        earlier = compressor.compress(texts, target_tokens=most)  # its name in older releases
        set_once = build(reader, max_tokens=most).compress(texts) if most else found
        assert [p.text for p in earlier] == [p.text for p in set_once] == [p.text for p in found]
    assert compressor.compress([PASSAGE], max_tokens=0)[0].text == ""
    (whole,) = compressor.compress([PASSAGE], max_tokens=10_000)
    assert whole.text == PASSAGE
    assert "is left as it is" in whole.info["reason"]
    (by_ratio,) = build(reader, max_tokens=4).compress([PASSAGE], ratio=2)
    assert by_ratio.info["budget"] == by_ratio.source_tokens // 2
    for bad in (-1, 2.5, True):
        with pytest.raises(ValueError, match="max_tokens must be"):
            compressor.compress([PASSAGE], max_tokens=bad)
    for both in ({"ratio": 2, "max_tokens": 3}, {"max_tokens": 3, "target_tokens": 3}):
        with pytest.raises(ValueError, match="not both"):
            compressor.compress([PASSAGE], **both)
    with pytest.raises(TypeError, match="no options"):
        compressor.compress([PASSAGE], max_token=3)


def test_the_most_informative_units_stay(reader):
    compressor = build(reader, unit="word")
    (scores,) = compressor.score([PASSAGE])
    units = split_units(PASSAGE, "word")
    values = unit_scores(units, scores.offsets, scores.nll)
    (passage,) = compressor.compress([PASSAGE], ratio=3)
    kept = torch.tensor([any(a <= u and v <= b for a, b in passage.spans) for u, v in _trimmed(units)])
    ranked = kept[values.argsort(descending=True)]
    edge = int(ranked.long().cumprod(0).sum())
    assert edge > 10
    assert int(ranked[edge:].sum()) <= 16  # the few that used what room was left


def _trimmed(units):
    return [(b - len(PASSAGE[a:b].lstrip()), b) for a, b in units]


@pytest.mark.parametrize("unit", LEVELS)
def test_what_must_stay_stays_and_counts(reader, unit):
    settings = {"keep": ["sediment"], "keep_patterns": [r"\bNobel\s+\w+"], "keep_digits": True}
    compressor = build(reader, unit=unit, **settings)
    (passage,) = compressor.compress([PASSAGE], ratio=3)
    for wanted in ("sediment", "Nobel Prizes", "1903", "1911", "1648"):
        assert wanted in passage.text
    check(reader, PASSAGE, passage, passage.source_tokens // 3)
    with pytest.raises(
        ValueError, match=r"What must stay takes \d+ of the \d+ tokens .* the budget is 6; ask for"
    ) as told:
        compressor.compress([PASSAGE], max_tokens=6)
    with pytest.raises(ValueError, match="the budget is 0"):
        compressor.compress([PASSAGE], max_tokens=0)
    least = int(re.search(r"max_tokens (\d+)", str(told.value))[1])
    assert compressor.compress([PASSAGE], max_tokens=least)[0].n_tokens <= least
    names = build(reader, unit=unit, keep_names=True).compress([PASSAGE], ratio=2.5)[0]
    assert all(name in names.text for name in ("Curie", "Warsaw", "Westphalia", "Yangtze"))


def test_another_model_may_score(reader, zoo, tmp_path):
    scorer = zoo.reader("gpt2", seed=3)
    compressor = SelectiveContextCompressor(SelectiveContextConfig(), reader, scorer=scorer)
    (passage,) = compressor.compress([PASSAGE])
    check(reader, PASSAGE, passage, passage.source_tokens // 2)
    assert compressor.fingerprint != build(reader).fingerprint
    scorer.model.save_pretrained(tmp_path / "scorer")
    scorer.tokenizer.save_pretrained(tmp_path / "scorer")
    named = build(reader, scorer=str(tmp_path / "scorer"))
    assert named.compress([PASSAGE])[0].text == passage.text
    named.save_pretrained(tmp_path / "saved")
    assert load_compressor(tmp_path / "saved", reader).compress([PASSAGE])[0].text == passage.text


def test_scores_that_are_no_numbers_are_refused(zoo):
    compressor = build(zoo.reader("llama"))
    compressor.compress([PASSAGE])
    compressor.scorer.model.get_output_embeddings().weight[3].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        compressor.compress([PASSAGE])


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab \n", min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 39), max_size=12),
    target=st.integers(0, 30),
    seed=st.randoms(use_true_random=False),
    first=st.integers(0, 4),
)
def test_budget_holds_for_a_count_that_is_not_additive(text, cuts, target, seed, first):
    def count(part: str) -> int:  # pairs of letters are one token, a space is dear
        return len(part.replace("ab", "x")) + 2 * part.count(" ")

    borders = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    units = list(zip(borders, borders[1:]))
    order = list(range(len(units)))
    seed.shuffle(order)
    sizes = [b - a for a, b in units]
    asked = search(text, units, order, target, count(text), sizes, first=min(first, len(units)))
    ((spans, n),) = run_searches([asked], lambda texts: [count(part) for part in texts])
    assert count(join(text, spans)) == n <= target
    assert list(spans) == sorted(spans)
    assert all(a < b for a, b in spans)


def test_merge_joins_what_touches_and_trims_the_rest():
    text = "one two  three \n four"
    assert merge(text, [(3, 7), (0, 3), (14, 21), (7, 9)]) == ((0, 7), (17, 21))
    assert merge(text, [(7, 9)]) == ()
    assert join(text, ((0, 3), (9, 14))) == "one three"


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.5},
        {"unit": "page"},
        {"keep": "word"},
        {"keep": [""]},
        {"keep_patterns": ["("]},
        {"context": "book"},
        {"window": 1},
        {"max_tokens": 0},
    ],
)
def test_config_is_validated(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SelectiveContextConfig.from_dict(settings)


# -- as published --------------------------------------------------------------------------------------------------------


SENTENCES = [
    "Marie Curie was born in Warsaw, e.g. in Poland.",
    "Was the treaty signed in 1648?",
    "Rivers carry sediment to the sea.",
    "Dr. Smith knew it.",
]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1.0, 1.5, 2, 4])
@pytest.mark.parametrize("unit", ["token", "phrase", "sentence"])
def test_published_drops_what_lies_below_the_percentile(reader, unit, ratio):
    text = "  Marie Curie was born\n in Warsaw, e.g. in Poland.\tWas the treaty signed in 1648?  " + " ".join(
        SENTENCES[2:]
    )
    pieces, values = [], []
    for number, sentence in enumerate(SENTENCES):
        losses = losses_of(reader, [reader.eos_id, *reader.prompts.encode(sentence, opens=True)])
        if unit == "sentence":
            pieces, values = [*pieces, sentence], [*values, sum(losses) / len(losses)]
        elif unit == "token":
            pieces += [reader.decode([i]) for i in reader.prompts.encode(sentence, opens=True)]
            values += losses
        else:
            _, offsets = reader.prompts.encode_with_offsets(sentence, opens=True)
            for a, b in split_units(sentence, "phrase"):
                own = [loss for (_, y), loss in zip(offsets, losses) if a < y <= b]
                pieces.append((" " if number and not a else "") + sentence[a:b])
                values.append(sum(own) / len(own))
    ranked = sorted(values)
    at = (1 - 1 / ratio) * (len(ranked) - 1)  # the percentile, interpolated
    low = int(at)
    limit = ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])
    kept = [piece if value >= limit - 1e-6 else "" for piece, value in zip(pieces, values)]
    want = (" " if unit == "sentence" else "").join(kept)
    (found,) = build(reader, mode="published", unit=unit).compress([text], ratio=ratio)
    assert found.text == want
    assert found.n_tokens == len(reader.tokenize(want))
    if unit == "token" and ratio == 1:
        assert "Poland.Was the treaty" in found.text  # sentences run together
    if unit == "sentence" and ratio == 4:
        assert found.text.count("  ") or found.text != found.text.strip()  # what was dropped leaves its space


def test_published_phrases_get_the_tokens_that_they_end():
    #           phrases  aaaa|bb|cccc|dd
    phrases = [(0, 4), (4, 6), (6, 10), (10, 12)]
    offsets = [(0, 2), (2, 7), (7, 8), (8, 8), (8, 10), (10, 11), (11, 12)]
    found = _phrase_values("aaaabbcccc d", phrases, offsets, [1.0, 6.0, 2.0, 4.0, 3.0, 8.0, 5.0])
    # the second token ends the first two phrases and only begins the third; the lone space is left out
    assert found == pytest.approx([(1 + 3) / 2, 3.0, (2 + 4 + 3) / 3, 5.0])
    assert math.isnan(_phrase_values("ab", [(0, 1), (1, 2)], [(0, 1)], [1.0])[1])


def test_published_keeps_what_lies_on_the_percentile(reader):
    # 1 - 1 / (1 / 0.7) is a bit above 0.3, and would put the limit above the value it stands on
    text = " ".join(f"Sentence {letter} is here." for letter in "abcdefghijk")
    (p,) = build(reader, mode="published", unit="sentence").compress([text], ratio=1 / 0.7)
    assert len([s for s in p.text.split(".") if s.strip()]) == 8


def test_published_edges(reader, zoo):
    assert [p.text for p in build(reader, mode="published").compress(["", " \n "])] == ["", ""]
    with pytest.raises(TypeError, match="no options"):
        build(reader, mode="published").compress([PASSAGE], target_tokens=4)
    with pytest.raises(ValueError, match="not in the paper"):
        build(reader, mode="published", unit="word")
    with pytest.raises(ValueError, match="mode must be"):
        build(reader, mode="paper")
    with pytest.raises(ValueError, match="too long"):
        build(zoo.reader("llama", max_position_embeddings=16), mode="published").compress([PASSAGE])
