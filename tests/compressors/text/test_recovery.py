"""Words of the source in an answer that was read from a shorter text."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.compressors import CompressedPassage
from nutgraf.compressors.core.units import split_units
from nutgraf.compressors.text.budget import join, merge
from nutgraf.compressors.text.recovery import recover

TEXT = "In 1648 the Treaty of Westphalia was signed. It ended thirty years of war. Sweden and France won for 1,250,000 florins."


def passage(text: str, *kept: str) -> CompressedPassage:
    """What is left if of a text only some pieces stay, in order."""
    spans, at = [], 0
    for piece in kept:
        at = text.index(piece, at)
        spans.append((at, at + len(piece)))
        at += len(piece)
    return CompressedPassage("text", 9, "c", text=join(text, spans), spans=tuple(spans), n_tokens=5)


def test_fragments_become_the_words_of_the_source():
    short = passage(TEXT, "16", "Treaty", "Westphalia", "signed", "thirty", "war", "Sweden", "France", "250")
    for answer, want in [
        ("the Treaty Westphalia", "the Treaty of Westphalia"),
        ("treaty Westphalia signed, they say", "Treaty of Westphalia was signed, they say"),
        ("In 16", "In 1648"),
        ("Sweden France", "Sweden and France"),
        ("thirty war", "thirty years of war"),
        ("It lasted thirty years.", "It lasted thirty years."),  # verbatim already
        ("signed thirty", "signed thirty"),  # two sentences
        ("war", "war"),
        ("Nothing of it", "Nothing of it"),
        ("", ""),
    ]:
        assert recover(answer, [TEXT], [short]) == want


def test_places_that_differ_and_long_gaps_change_nothing():
    text = (
        "Ann Lee met Bob Ray. Ann and Lee left. Anna of the house by the river near the old mill under the hill is Zoe."
    )
    short = passage(text, "Ann", "Bob", "Ann", "Lee", "Anna", "Zoe")
    assert recover("Ann Lee", [text], [short]) == "Ann Lee"
    assert recover("Anna Zoe", [text], [short]) == "Anna Zoe"
    one, two = "Kim de Vries won.", "Kim van Vries won."
    both = [passage(one, "Kim", "Vries"), passage(two, "Kim", "Vries")]
    assert recover("Kim Vries", [one, two], both) == "Kim Vries"
    assert recover("Kim Vries", [one], both[:1]) == "Kim de Vries"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 0.9), answer=st.text("thirtyTreaty of16 .", max_size=30))
def test_an_answer_keeps_its_words_in_order(seed, share, answer):
    rng = random.Random(seed)
    units = split_units(TEXT, "word")
    spans = merge(TEXT, [unit for unit in units if rng.random() < share])
    short = CompressedPassage("text", 9, "c", text=join(TEXT, spans), spans=spans, n_tokens=5)
    words = (short.text or "").split()
    start = rng.randrange(len(words) + 1)
    for given_ in (answer, " ".join(words[start : start + 4])):
        found = recover(given_, [TEXT], [short])
        rest = iter(found.casefold())
        assert all(c in rest for c in given_.casefold())
        if given_.strip() and given_ in TEXT:
            assert found == given_
    assert recover(TEXT, [TEXT], [short]) == TEXT


def test_bad_input_is_refused():
    short = passage(TEXT, "Treaty")
    with pytest.raises(TypeError, match="source texts"):
        recover("a", TEXT, [short])
    with pytest.raises(ValueError, match="got 1 for 2 texts"):
        recover("a", [TEXT, TEXT], [short])
    assert recover("Treaty 16", [TEXT], [CompressedPassage("text", 9, "c", text="Treaty", n_tokens=1)]) == "Treaty 16"
