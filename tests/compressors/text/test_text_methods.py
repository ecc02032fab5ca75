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


@methods
@pytest.mark.parametrize(
    "settings", [*({"unit": unit} for unit in LEVELS), {"keep": ("3", "e"), "keep_patterns": (r"\d\d",)}]
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
