"""Every text method: numbers, ids and addresses go or stay whole, and no text becomes nothing."""

from __future__ import annotations

import random

import pytest
from nutgraf import make_compressor
from nutgraf.compressors.core.units import LEVELS

QUESTION = "What is the invoice total?"
THINGS = [
    *(
        "1,234,567",
        "2,345,678",
        "$12,345.67",
        "−3.5 °C",
        "±0.25",
        "12,50 €",
        "CHF 12'000",
        "1 234 567 km",
        "5%–10%",
        "98.6%",
    ),
    *(
        "2019-05-03T12:30:00Z",
        "03.05.2019",
        "March 5, 2021",
        "12:45 p.m.",
        "1990–1995",
        "AB-123/45",
        "B-MW 1234",
        "v1.2.3-rc.4",
    ),
    *("550e8400-e29b-41d4-a716-446655440000", "192.168.0.1:8080", "jane.doe+x@mail.example.co.uk", "+49 30 1234567"),
    *("https://shop.example/a_(b)/c-1?x=1,2&y=%20#top", "/usr/local/lib64", "978-3-16-148410-0", "10.1000/xyz123"),
]
WORDS = """
    the total of population was about in Esteria and rose to after people paid for invoice (see it) river, so.
"""
METHODS = ["selective-context", "llmlingua", "longllmlingua", "llmlingua2"]
METHODS += ["provence", "filco", "recomp", "exit", "token-elimination", "semantic", "prompt-saw", "pcrl"]
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def made(zoo):
    reader = zoo.reader("llama")

    def make(method: str, **settings):
        return make_compressor(method, reader, **settings)

    return make


def compress(compressor, texts, **options):
    return compressor.compress(texts, query=QUESTION if compressor.query_aware else None, **options)


def texts_and_things(n: int) -> list[tuple[str, list[tuple[int, int]]]]:
    rng = random.Random(n)
    out = []
    for _ in range(n):
        text, spans = "", []
        for thing in rng.sample(THINGS, 6):
            text += " ".join(rng.choices(WORDS.split(), k=4)) + rng.choice([" ", " (", ": ", " “"])
            spans.append((len(text), len(text) + len(thing)))
            text += thing + rng.choice([" ", ". ", ") ", ", ", "; "])
        out.append((text, spans))
    return out


@pytest.mark.slow
@methods
@pytest.mark.parametrize(
    "settings", [*({"unit": unit} for unit in LEVELS), {"keep": ("mail",), "keep_patterns": (r"23",)}]
)
def test_numbers_ids_and_addresses_go_or_stay_whole(made, method, settings):
    rows = texts_and_things(10)
    extra = {"complete_words": False} if "lingua" in method and method != "llmlingua2" else {}
    compressor = made(method, **settings, **extra)
    seen = 0
    for (text, things), passage in zip(rows, compress(compressor, [text for text, _ in rows], ratio=2)):
        borders = {i for span in passage.spans for i in span}
        for a, b in things:
            assert not borders & set(range(a + 1, b)), text[a:b]
        seen += any(i in range(a, b) for a, b in things for i in borders)
    assert seen


SHORT = [
    "Yes",
    "42 km",
    "Paid: no",
    "1,234,567",
    "No.",
    "🦊",
    "2019-05-03",
    "…",
    "A",
    "-",
    "是",
    "a@b.example",
    "Photosynthesis.",
]


@pytest.mark.slow
@methods
@pytest.mark.parametrize("ratio", [2, 4, 30])
def test_a_short_text_does_not_become_nothing(made, method, ratio):
    compressor = made(method)
    reader = compressor.reader
    for text, passage in zip(SHORT, compress(compressor, SHORT, ratio=ratio)):
        assert passage.text in (text, *text.split(), text[:-1], "Paid", ": no"), text
        assert any(map(str.isalnum, passage.text)) == any(map(str.isalnum, text))
        assert passage.n_tokens == len(reader.tokenize(passage.text)) <= passage.source_tokens
        beyond = passage.n_tokens - int(passage.source_tokens / ratio)
        assert passage.info.get("over_budget", 0) == max(beyond, 0)
    blank, empty = compress(compressor, [" \n", ""], ratio=ratio)
    assert (blank.text, empty.text) == ("", "")


@pytest.mark.slow
@methods
def test_a_budget_in_tokens_is_never_exceeded(made, method):
    for target in (0, 1, 3):
        for passage in compress(made(method), SHORT, max_tokens=target):
            assert passage.n_tokens <= target
            assert "over_budget" not in passage.info
            assert passage.text or "Not even one word" in passage.info["reason"] or "0 tokens" in passage.info["reason"]


def test_dynamic_ratios_leave_no_passage_empty(made):
    compressor = made("longllmlingua", dynamic_ratio=0.4)
    texts = ["Yes", "42 km", *(text for text, _ in texts_and_things(4))]
    assert all(passage.text for passage in compress(compressor, texts, ratio=8))
