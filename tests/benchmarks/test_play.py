"""`nutgraf play`: the comparison, its routes, and the page in a real browser."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Browser, find_browser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf import load_compressor, make_compressor
from nutgraf.benchmarks.loading import SAMPLE_QUESTIONS
from nutgraf.benchmarks.play.app import create_play
from nutgraf.benchmarks.play.comparison import FULL, NONE, Comparison, kept
from nutgraf.recipes.data.corpus import read_records
from nutgraf.recipes.data.templates import question_prompt
from serving import Running
from texts import CURIE, RIVERS, TREATY

MATCH, WORDS = "kv-match:probes=4", "selective-context"


@pytest.fixture(scope="module")
def reader(zoo):
    return zoo.reader("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def served(reader):
    comparison = Comparison(reader, [MATCH, WORDS])
    server = Running(None, create_play(comparison, read_records(SAMPLE_QUESTIONS, "tune", 3)))
    yield server
    server.stop()


def events(server: Running, **body: Any) -> list[dict[str, Any]]:
    asked = {"question": "Who signed it?", "passages": [TREATY, RIVERS], "ratio": None, **body}
    answer = server.http.post("/api/ask", json=asked)
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line]


# -- the comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [FULL, NONE, MATCH, WORDS])
def test_each_way_gives_the_readers_own_answer_and_true_costs(served, reader, way):
    ratio = None if way in (FULL, NONE) else 2.0
    context, *pieces, end = events(served, way=way, ratio=ratio)
    given_: list[Any] = {FULL: [TREATY, RIVERS], NONE: []}.get(way, [])
    if ratio:
        given_ = load_compressor(way, reader).compress([TREATY, RIVERS], ratio=ratio)
    prompt = question_prompt(given_, "Who signed it?")
    assert "".join(piece["text"] for piece in pieces) == reader.generate([prompt], 48, stop=["\n"])[0]
    assert end["ttft_ms"] > 0
    sizes = [one.nbytes if ratio else len(one.encode()) for one in given_]
    assert context["bytes"] == sum(sizes)
    inside = sum(one.places for one in given_) if way == MATCH else 0  # the reader does not compute these
    assert context["read"] == reader.length(prompt) - inside
    if ratio:
        assert context["ratio"] == pytest.approx(2.0, rel=0.2)
        assert len(context["kept"]) == 2


def test_what_was_kept_is_what_the_passage_holds(reader):
    (pairs,) = load_compressor(MATCH, reader).compress([CURIE], ratio=3)
    found = kept(reader, CURIE, pairs)
    assert sum(share * pairs.counts.numel() for *_, share in found) == pytest.approx(int(pairs.counts.sum()), abs=0.01)
    assert "".join(CURIE[start:end] for start, end, _ in found) == CURIE
    (again,) = load_compressor("kv-match:reread=6,probes=4", reader).compress([CURIE], ratio=3)
    found = kept(reader, CURIE, again)
    assert [share for *_, share in found[:6]] == [1.0] * 6
    heads = sum(share * again.counts.numel() for *_, share in found[6:])
    assert heads == pytest.approx(int(again.counts.sum()), abs=0.01)
    restored = make_compressor("restore-kv", reader, r=2, restore_tokens=2, probes=4).compress([CURIE], ratio=3)[0]
    assert kept(reader, CURIE, restored) is None  # some of its pairs are of no word
    (text,) = load_compressor(WORDS, reader).compress([CURIE], ratio=2)
    shares = kept(reader, CURIE, text)
    assert [(start, end) for start, end, _ in shares] == list(text.spans)
    soft = make_compressor("mean-pool", reader, encoder="embeddings").compress([CURIE], ratio=4)[0]
    assert kept(reader, CURIE, soft) is None


@pytest.mark.slow
@given(st.text(min_size=1, max_size=60))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kept_spans_of_any_text_lie_in_it_and_in_order(reader, text):
    for name in (MATCH, WORDS):
        (passage,) = load_compressor(name, reader).compress([text], ratio=2)
        found = kept(reader, text, passage)
        assert all(0 <= start <= end <= len(text) and 0 <= share <= 1 for start, end, share in found)
        assert found == sorted(found, key=lambda span: span[:1])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"way": "no-such"}, "There is no way 'no-such'"),
        ({"way": MATCH, "passages": ["word " * 3000]}, "positions"),
        ({"way": FULL, "passages": ["word " * 3900]}, "positions"),
    ],
)
def test_errors_are_events_with_a_sentence(served, body, said):
    (event,) = events(served, **body)
    assert event["event"] == "error"
    assert said in event["text"]
    assert events(served, way=NONE)[-1]["event"] == "end"


@pytest.mark.parametrize(
    "body", [{"question": " "}, {"passages": []}, {"passages": [""]}, {"passages": "a"}, {"ratio": 0.5}, {"more": 1}]
)
def test_bad_questions_are_refused(served, body):
    asked = {"question": "Who?", "passages": [TREATY], "way": FULL, **body}
    answer = served.http.post("/api/ask", json=asked)
    assert answer.status_code == 400
    assert next(iter(body)) in answer.json()["error"]


def test_other_sites_cannot_use_it(served):
    assert served.http.get("/api/setup", headers={"Host": "example.org"}).status_code == 400
    answer = httpx.post(f"{served.url}/api/ask", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400, "a form of another site may send text, but no JSON"
    page = served.http.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    whole = page.text + served.http.get("/page.css").text + served.http.get("/page.js").text
    assert "//" not in whole.replace("// ", ""), "the page loads nothing from elsewhere"


def test_the_default_ways_need_no_training(reader):
    ways = Comparison(reader).ways
    assert {"kv-match", WORDS} < {way.name for way in ways}
    chosen = [way.interface for way in ways if way.chosen]
    assert chosen[0] == chosen[-1] == ""
    assert {"kv", "text"} <= set(chosen)
    assert len(set(chosen[1:-1])) == len(chosen[1:-1]), "the first of each interface"


# -- the page ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_browser() is None:
        pytest.skip("no Chromium is installed")
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser, served):
    browser.errors.clear()
    browser.resize(1280, 900)
    browser.open("about:blank")
    browser.open(served.url)
    browser.until("document.querySelectorAll('.way').length === 4")
    return browser


STATUS = "document.getElementById('status').textContent"
ANSWERED = (
    "/answered\\.$/.test(document.getElementById('status').textContent) && document.getElementById('stop').disabled"
)


def ask(page: Browser) -> None:
    page.run("document.getElementById('ask').click()")
    page.until(ANSWERED)


def fill(page: Browser, **fields: str) -> None:
    for name, text in fields.items():
        page.run(f"document.getElementById('{name}').value = {json.dumps(text)}")
        page.run(f"document.getElementById('{name}').dispatchEvent(new Event('input'))")


@pytest.mark.slow
def test_ask_compare_and_change_the_ratio(page, reader):
    fill(page, passages=f"{TREATY}\n\n{CURIE}", question="Who signed it?")
    ask(page)
    assert page.run(STATUS) == "4 of 4 answered."
    titles = page.run("[...document.querySelectorAll('#answers h3')].map(e => e.textContent)")
    assert [title.partition(",")[0] for title in (titles[0], titles[3])] == ["Full text", "No context"]
    wanted = reader.generate([question_prompt([TREATY, CURIE], "Who signed it?")], 48, stop=["\n"])[0].strip()
    assert page.run("document.querySelector('#answers .answer').textContent") == (wanted or "(nothing)")
    assert page.run("document.querySelectorAll('#costs table').length") == 3
    assert page.run("document.querySelectorAll('#costs .bar span').length") == 12
    marks = "[...document.querySelectorAll('#map mark')].map(e => e.textContent).join('')"
    assert page.run(marks) == TREATY + CURIE, "keys and values: every token has its share"
    page.run(
        "const s = document.getElementById('map-way'); s.value = 'selective-context'; s.dispatchEvent(new Event('change'))"
    )
    words = load_compressor(WORDS, reader)
    spans = [[text[a:b] for a, b in one.spans] for text in (TREATY, CURIE) for one in words.compress([text])]
    assert page.run(marks) == "".join(word for kept_ in spans for word in kept_)
    before = page.run(marks)
    page.run(
        "const r = document.querySelectorAll('.way')[2].querySelector('[type=range]');"
        "r.value = 6; r.dispatchEvent(new Event('input')); r.dispatchEvent(new Event('change'))"
    )
    ask(page)
    page.run("document.getElementById('map-way').value = 'selective-context'; drawMap()")
    assert 0 < len(page.run(marks)) < len(before)
    assert not page.errors


@pytest.mark.slow
def test_the_link_holds_settings_and_no_data(page, served):
    fill(page, passages="my secret passage", question="my secret question?")
    page.run(
        "const b = document.querySelectorAll('.way [type=checkbox]')[0]; b.click();"
        "const r = document.querySelectorAll('.way')[1].querySelector('[type=range]');"
        "r.value = 2; r.dispatchEvent(new Event('input')); r.dispatchEvent(new Event('change'));"
        "document.getElementById('share').click()"
    )
    page.until(STATUS)
    address = page.run("location.href")
    assert "secret" not in address
    page.open("about:blank")
    page.open(address)
    page.until("document.querySelectorAll('.way').length === 4")
    checked = "[...document.querySelectorAll('.way [type=checkbox]')].map(e => e.checked)"
    assert page.run(checked) == [False, True, True, True]
    assert page.run("document.querySelectorAll('.way')[1].querySelector('output').value") == "2×"
    assert "secret" not in page.run("document.body.innerHTML + document.getElementById('passages').value")
    page.open("about:blank")
    page.open(f"{served.url}/#ways=nonsense@x;@;kv-match%3Aprobes%3D4@1e9&example=99")
    page.until("document.querySelectorAll('.way').length === 4")
    assert page.run("document.querySelectorAll('.way')[1].querySelector('output').value") == "16×"
    assert not page.errors


@pytest.mark.slow
def test_errors_are_shown_where_they_belong_and_text_is_no_markup(page):
    fill(page, passages="  ", question="Who?")
    page.run("document.getElementById('ask').click()")
    assert "Give a passage" in page.run(STATUS)
    fill(page, passages="word " * 3000, question="Who?")
    ask(page)
    failed = page.run("[...document.querySelectorAll('.failed')].map(e => e.textContent)")
    assert failed
    assert all("positions" in text for text in failed)
    fill(page, passages="<img src=x onerror=alert(1)> 🦊👩‍👩‍👧 \ud7ff </mark>", question="<b>Who</b>?")
    ask(page)
    assert page.run("document.querySelectorAll('#map img, #answers b').length") == 0
    assert (
        page.run("document.querySelector('#map p').textContent")
        == "<img src=x onerror=alert(1)> 🦊👩‍👩‍👧 \ud7ff </mark>"
    )
    assert not page.errors


@pytest.mark.slow
def test_stop_ends_the_answers_and_the_next_question_is_answered(page):
    page.run("document.getElementById('ask').click(); document.getElementById('stop').click()")
    page.until("document.getElementById('status').textContent.startsWith('Stopped')")
    assert page.run("document.getElementById('stop').disabled")
    ask(page)
    assert page.run(STATUS) == "4 of 4 answered."
    assert not page.errors


@pytest.mark.slow
def test_keyboard_alone_is_enough_and_everything_has_a_name(page):
    for selector in ("input", "select", "textarea", "button"):
        named = "e.labels?.length || e.ariaLabel || e.textContent.trim()"
        assert page.run(f"[...document.querySelectorAll('{selector}')].every(e => {named})"), selector
    page.run("document.getElementById('question').focus()")
    page.run("document.getElementById('question').select()")
    page.type("Who signed it?")
    reached = []
    for _ in range(8):
        page.press("Tab", 9)
        reached.append(page.run("document.activeElement.id || document.activeElement.type"))
    assert reached == ["checkbox", "checkbox", "range", "checkbox", "range", "checkbox", "ask", "share"]
    page.run("document.querySelector('.way:nth-child(2) [type=range]').focus()")
    before = page.run("document.activeElement.value")
    page.press("ArrowRight", 39)
    assert int(page.run("document.activeElement.value")) == int(before) + 1
    page.run("document.getElementById('question').focus()")
    page.press("Enter", 13, "\r")
    page.until(ANSWERED)
    assert page.run("document.getElementById('status').getAttribute('aria-live')") == "polite"
    assert page.run("document.querySelectorAll('[aria-busy=true]').length") == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone_and_a_desk_in_both_colours(page, width, scheme):
    page.resize(width, 800, scheme)
    ask(page)
    assert page.run("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('button')].filter(e => e.offsetHeight < 40).length"
    assert page.run(small) == 0
    back = page.run(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    )
    assert (back < 200) == (scheme == "dark")
    if folder := os.environ.get("NUTGRAF_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{width}_{scheme}.png")
