"""The cache of compressed passages and the placeholders that stand for them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf import CompressedPassage, load_compressor
from nutgraf.adapters.placeholders import placeholder as placeholders
from nutgraf.adapters.placeholders.cache import PassageCache
from nutgraf.adapters.placeholders.placeholder import (
    Found,
    PlaceholderError,
    PlaceholderStore,
    escape_placeholders,
    holds_placeholder,
    read_placeholders,
    scan,
    shared_store,
)
from nutgraf.adapters.placeholders.source import PassageSource


class FakeReader:
    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint


def passage(slots: int = 2, width: int = 4, reader: str = "r") -> CompressedPassage:
    return CompressedPassage("embeds", 10, "c", reader, embeds=torch.zeros(slots, width))


# -- cache ---------------------------------------------------------------------------------------------------------------


def test_bounds_and_order_of_eviction():
    cache = PassageCache(max_passages=2)
    for key in "ab":
        cache.put(key, passage())
    assert cache.get("a") is not None  # now b is the oldest
    cache.put("c", passage())
    assert "b" not in cache
    assert "a" in cache
    assert "c" in cache
    assert cache.stats.evictions == 1
    assert cache.nbytes == 2 * 2 * 4 * 4

    small = PassageCache(max_bytes=40)
    small.put("a", passage())
    small.put("b", passage())
    assert len(small) == 1
    assert small.nbytes == 32
    small.put("big", passage(slots=100))  # handed through, and nothing else is thrown out for it
    assert "big" not in small
    assert "b" in small
    small.clear()
    assert (len(small), small.nbytes) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5)), max_size=40))
@settings(max_examples=50, deadline=None)
def test_size_is_what_is_held(puts):
    cache = PassageCache(max_passages=4, max_bytes=150)
    held = {}
    for key, slots in puts:
        held[key] = passage(slots)
        cache.put(key, held[key])
        sizes = [p.nbytes for k, p in held.items() if k in cache]
        assert cache.nbytes == sum(sizes) <= 150
        assert len(cache) == len(sizes) <= 4


def test_passages_that_share_a_budget_are_compressed_with_each_other(zoo):
    texts = ["The treaty was signed in 1648. Rain fell.", "Wars end. It was late in the year.", "Ada signed it."]
    compressor = load_compressor("exit", zoo.reader("llama"), pooled=True)
    source = PassageSource(compressor, PassageCache(), batch_size=1)
    for some in (texts, texts[:2], [*texts, texts[0]]):
        found, made = source.get(some, query="Who signed?", ratio=3)
        assert made == len(some)
        assert [p.text for p in found] == [p.text for p in compressor.compress(some, "Who signed?", 3)]


def test_a_view_does_not_keep_its_batch_alive():
    batch = torch.zeros(100, 2, 4)
    cache = PassageCache()
    cache.put("a", CompressedPassage("embeds", 10, "c", "r", embeds=batch[0]))
    held = cache.get("a")
    assert held is not None
    assert held.embeds is not None
    assert held.embeds.untyped_storage().nbytes() == 2 * 4 * 4


def test_get_or_compress_compresses_each_passage_once():
    cache = PassageCache()
    calls: list[list[int]] = []

    def compress(places):
        calls.append(places)
        return [passage(slots=place + 1) for place in places]

    got = cache.get_or_compress(["a", "b", "a"], compress)
    assert calls == [[0, 1]]
    assert [p.slots for p in got] == [1, 2, 1]
    assert [p.slots for p in cache.get_or_compress(["c", "b"], compress)] == [1, 2]
    assert calls == [[0, 1], [0]]
    with pytest.raises(ValueError, match="returned 0"):
        cache.get_or_compress(["d"], lambda _: [])


def test_threads_compress_a_passage_once():
    cache = PassageCache()
    calls: list[int] = []

    def compress(places):
        calls.extend(places)
        time.sleep(0.02)
        return [passage() for _ in places]

    def work():
        assert len(cache.get_or_compress(["a", "b"], compress)) == 2

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"max_passages": 0}, "at least one passage"), ({"max_bytes": 0}, "one byte")],
)
def test_bad_bounds(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        PassageCache(**wrong)


# -- placeholders --------------------------------------------------------------------------------------------------------


def test_placeholders_are_read_in_place():
    store = PlaceholderStore()
    one, two = passage(1), passage(300)
    a, b = store.issue([one, two])
    assert all(" " not in p and "\n" not in p and p.isascii() for p in (a, b))
    assert len(b) > 300 > len(a)  # a long one counts as long
    pieces = read_placeholders(f"x {a}\n{b}{a} y", "r")
    assert pieces[0] == "x "
    assert pieces[2] == "\n"
    assert pieces[5] == " y"
    assert [p.slots for p in (pieces[1], pieces[3], pieces[4])] == [1, 300, 1]
    assert read_placeholders("", "r") == []


def test_each_request_has_its_own_placeholders():
    store = PlaceholderStore()
    one = passage()
    assert store.issue([one]) != store.issue([one])


@given(st.text(alphabet="[]nutgraf:0123456789abcdef-XY ", max_size=80))
@settings(max_examples=200, deadline=None)
def test_made_up_placeholders_stay_text(text):
    store = PlaceholderStore()
    (real,) = store.issue([passage()])
    head, tag = real[:-2].rsplit(":", 1)
    last = "A" if tag[-1] != "A" else "B"
    for forged in (text, f"[[nutgraf:{text}]]", f"{head}:{tag[:-1]}{last}]]", head.replace(":2", ":3") + f":{tag}]]"):
        assert list(scan(forged)) == ([forged] if forged else [])


def test_a_claim_of_many_slots_costs_nothing(monkeypatch):
    store = PlaceholderStore()
    (real,) = store.issue([passage()])
    forged = real.replace(":2:", ":9999999:") * 200
    monkeypatch.setattr(placeholders.hashlib, "shake_256", None)  # the MAC grows with the slots: it is not computed
    assert list(scan(forged)) == [forged]


def test_torn_placeholders_are_refused_and_heads_alone_are_text():
    store = PlaceholderStore()
    (real,) = store.issue([passage(100)])
    for cut in (40, len(real) // 2, len(real) - 1):
        assert holds_placeholder(real[:cut] + "\n----")
        with pytest.raises(PlaceholderError, match="torn"):
            read_placeholders("x " + real[:cut] + "']", "r")
    assert read_placeholders("[[nutgraf:", "r") == ["[[nutgraf:"]
    assert read_placeholders("[[nutgraf:00000000-000000000000-0:1:", "r") == ["[[nutgraf:00000000-000000000000-0:1:"]


def test_reading_needs_no_cache():
    store = PlaceholderStore(PassageCache(max_passages=1))
    a, b = store.issue([passage(1), passage(2)])
    store.cache.clear()
    assert [p.slots for p in read_placeholders(a + b + a, "r")] == [1, 2, 1]


def test_old_requests_are_forgotten_by_bytes_and_shared_passages_count_once():
    store = PlaceholderStore(max_bytes=100)
    one, two = passage(2), passage(4)  # 32 and 64 bytes
    requests = [store.issue([one, two, one]) for _ in range(3)]
    assert all(len(read_placeholders("".join(r), "r")) == 3 for r in requests)
    (large,) = store.issue([passage(100)])
    assert read_placeholders(large, "r"), "the newest request stays"
    for old in requests:
        with pytest.raises(PlaceholderError, match=r"100 bytes.*larger bounds"):
            read_placeholders(old[0], "r")
    store.issue([one])
    with pytest.raises(PlaceholderError, match="expired"):
        read_placeholders(large, "r")
    again = store.issue([two])
    assert read_placeholders(again[0], "r")


def test_text_and_empty_passages_are_issued_as_text():
    store = PlaceholderStore()
    text = CompressedPassage("text", 5, "c", text="see [[nutgraf:x", n_tokens=3)
    first, empty, last = store.issue([text, passage(0), passage(2)])
    assert (first, empty) == ("see [ [nutgraf:x", "")
    assert [p.slots for p in read_placeholders(last, "r")] == [2]


def test_other_readers_and_expired_placeholders_are_refused():
    store = PlaceholderStore(max_age=0.01)
    (a,) = store.issue([passage()])
    with pytest.raises(PlaceholderError, match="same reader"):
        read_placeholders(a, "another")
    time.sleep(0.02)
    with pytest.raises(PlaceholderError, match="expired"):
        read_placeholders(a, "r")
    few = PlaceholderStore(max_requests=1)
    (old,), (new,) = few.issue([passage()]), few.issue([passage()])
    assert isinstance(next(scan(old)), Found)
    with pytest.raises(PlaceholderError, match="expired"):
        read_placeholders(old, "r")
    assert read_placeholders(new, "r")


def test_a_placeholder_error_is_no_value_error():
    # LlamaIndex swallows ValueErrors in its default response mode.
    assert not issubclass(PlaceholderError, ValueError)


def test_escaping_makes_real_ones_harmless():
    store = PlaceholderStore()
    (a,) = store.issue([passage()])
    escaped = escape_placeholders(f"see {a}")
    assert list(scan(escaped)) == [escaped]
    assert not holds_placeholder(escaped)
    assert escape_placeholders("plain [[wiki]] text") == "plain [[wiki]] text"


def test_the_shared_store_lives_as_long_as_a_reader():
    one, same, other = map(FakeReader, ("some", "some", "another"))
    name = shared_store(one).name
    assert shared_store(same).name == name
    assert shared_store(other).name != name
    del one
    assert shared_store(same).name == name
    del same
    assert name not in placeholders._STORES
