"""Stores of compressed passages: round trips, encodings, keys, the command line's upkeep."""

from __future__ import annotations

import json
import pickle
import threading

import numpy as np
import pytest
import torch
from fakes import Fixed
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf import CompressedPassage
from nutgraf.adapters.store import (
    Encoding,
    Entry,
    Facts,
    LanceStore,
    Maker,
    MemoryStore,
    PassageKey,
    StoreError,
    documents,
    fill,
    get_or_compress,
    keys_for,
    lance,
)
from nutgraf.adapters.store.codec import decode, encode
from nutgraf.adapters.store.quantize import LEVELS, dequantise, quantise
from nutgraf.adapters.store.upkeep import compact, copy, drop, forget, recompress, verify

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("embeds", "kv", "ragged", "text")


def made(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, slots: int = 5, **changes) -> CompressedPassage:
    draw = torch.Generator().manual_seed(seed)
    about = dict(source_tokens=40 + seed, compressor="c", reader="r", info={"method": "test", "n": 1.5}) | changes
    if kind == "embeds":
        return CompressedPassage("embeds", **about, embeds=torch.randn(slots, 100, generator=draw).to(dtype))
    if kind == "kv":
        keys = tuple(torch.randn(2, slots, 24, generator=draw).to(dtype) for _ in range(3))
        values = tuple(torch.randn(2, slots, 16, generator=draw).to(dtype) for _ in range(3))
        return CompressedPassage("kv", **about, keys=keys, values=values, positions=torch.arange(slots) * 3)
    if kind == "ragged":  # 3 layers of 2 heads
        counts = torch.tensor([[slots, 2], [0, 3], [1, slots]])
        pairs = int(counts.sum())
        pair = (torch.randn(pairs, 24, generator=draw).to(dtype), torch.randn(pairs, 16, generator=draw).to(dtype))
        return CompressedPassage(
            "kv",
            **about,
            keys=pair[:1],
            values=pair[1:],
            positions=torch.arange(pairs, dtype=torch.int32) % 40 + 1,
            counts=counts.int(),
            bias=torch.randn(pairs, generator=draw).to(dtype),
            span=(1, 40),
        )
    about["reader"] = None
    return CompressedPassage("text", **about, text=f"short {seed} \ud800", spans=((0, 5), (7, 9)), n_tokens=3)


def entry(passage: CompressedPassage, text: str, **kwargs) -> Entry:
    return Entry(PassageKey.of(text, compressor=passage.compressor, reader="r"), passage, text, **kwargs)


def same(a: CompressedPassage | None, b: CompressedPassage) -> bool:
    facts = ("interface", "source_tokens", "compressor", "reader", "text", "spans", "n_tokens", "slots", "span")
    if a is None or any(getattr(a, name) != getattr(b, name) for name in facts) or dict(a.info) != dict(b.info):
        return False
    ours, theirs = a.tensors(), b.tensors()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


@pytest.fixture(params=["memory", "slabs", "table"])
def store(request, tmp_path):
    with MemoryStore() if request.param == "memory" else LanceStore(tmp_path / "s", layout=request.param) as opened:
        yield opened


# -- round trips ---------------------------------------------------------------------------------------------------------


def test_what_was_put_comes_back_bit_for_bit(store):
    entries = [entry(made(k, i, d), f"{k} {d}") for i, (k, d) in enumerate((k, d) for k in KINDS for d in DTYPES)]
    entries.append(entry(made("embeds", slots=0), "nothing"))
    entries.append(entry(made("text", 99), "\ud800 badly decoded", about={"page": 3}, vector=[0.5, 1.0]))
    store.put_many(entries)
    keys = [one.key for one in entries]
    unknown = PassageKey.of("unknown", compressor="c", reader="r")
    found = store.get_many([*keys[::-1], unknown, keys[0]])
    assert all(same(got, one.passage) for got, one in zip(found, [*entries[::-1], entries[0]][: len(entries)]))
    assert found[len(entries)] is None
    assert same(found[-1], entries[0].passage)
    assert keys[3] in store
    assert store.missing([unknown, keys[1], unknown]) == [unknown]
    listed = {one.key: one for one in store.entries()}
    assert listed.keys() == set(keys)
    assert all(same(listed[one.key].passage, one.passage) and listed[one.key].text == one.text for one in entries)
    last = listed[keys[-1]]
    assert (last.about, list(last.vector)) == ({"page": 3}, [0.5, 1.0])
    store.put_many([entry(made("embeds", 7), entries[0].text)])  # a key that is taken stays as it is
    assert same(store.get_many(keys[:1])[0], entries[0].passage)
    assert store.stats.passages == len(entries)


def test_passages_are_listed_by_id_in_pages(store):
    entries = [entry(made(k, i), f"{k} {i}", about={"i": i}) for i, k in enumerate(KINDS * 3)]
    store.put_many(entries)
    ids = sorted(one.key.id for one in entries)
    pages = [store.ids(limit=5)]
    while pages[-1]:
        pages.append(store.ids(after=pages[-1][-1], limit=5))
    assert [len(page) for page in pages] == [5, 5, 2, 0]
    assert [name for page in pages for name in page] == ids
    found = store.listed([*ids, "f" * 32, "it's none"])
    assert found.keys() == set(ids)
    for one in entries:
        seen = found[one.key.id]
        passage = one.passage
        assert seen.key == one.key
        assert (seen.interface, seen.slots) == (passage.interface, passage.slots)
        assert (seen.source_tokens, seen.about) == (passage.source_tokens, one.about)
        assert seen.nbytes >= passage.nbytes or passage.interface == "text"  # a text stands in the row
    store.delete([entries[0].key])
    assert entries[0].key.id not in store.listed(ids)
    assert len(store.ids()) == 11


def test_a_store_is_opened_again(tmp_path):
    entries = [entry(made(k), k) for k in KINDS]
    with LanceStore(tmp_path / "s") as first:
        first.put_many(entries)
        held = first.get_many([entries[0].key])[0]
    assert same(held, entries[0].passage)  # what was given out outlives the store
    for again in (LanceStore(tmp_path / "s", create=False), pickle.loads(pickle.dumps(first))):
        assert all(map(same, again.get_many([one.key for one in entries]), [one.passage for one in entries]))
        assert again.name == first.name
    with pytest.raises(StoreError, match="holds no store"):
        LanceStore(tmp_path / "other", create=False)
    assert not (tmp_path / "other").exists()


def test_a_worker_in_another_folder_finds_the_store(tmp_path, monkeypatch):
    one = entry(made("embeds"), "x")
    monkeypatch.chdir(tmp_path)
    store = LanceStore("s")
    store.put_many([one])
    sent = pickle.dumps(store)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = pickle.loads(sent)
    assert same(again.get_many([one.key])[0], one.passage)
    assert again.name == store.name


def test_stored_slots_are_views_and_writing_into_them_changes_no_file(tmp_path):
    one = entry(made("embeds"), "x")
    store = LanceStore(tmp_path / "s")
    store.put_many([one])
    (got,) = store.get_many([one.key])
    (twin,) = store.get_many([one.key])
    assert got.embeds.data_ptr() == twin.embeds.data_ptr()  # neither is a copy
    got.embeds.zero_()
    assert same(LanceStore(tmp_path / "s").get_many([one.key])[0], one.passage)


@pytest.mark.slow
def test_threads_share_a_store(store):
    entries = [entry(made("embeds", i), f"{i}") for i in range(24)]
    wrong: list[int] = []

    def work(part: int) -> None:
        for i in range(part, 24, 4):
            store.put_many([entries[i], entries[(i + 1) % 24]])
            if not same(store.get_many([entries[i].key])[0], entries[i].passage):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.stats.passages == 24


def test_a_memory_store_is_bounded():
    store = MemoryStore(max_bytes=5000)
    entries = [entry(made("embeds", i), f"{i}") for i in range(3)]  # 2000 bytes each
    store.put_many(entries[:2])
    store.get_many([entries[0].key])
    store.put_many(entries[2:])
    assert [one.key in store for one in entries] == [True, False, True]
    store.put_many([entry(made("embeds", slots=50), "large")])
    assert store.stats.passages == 2
    with pytest.raises(ValueError, match="at least one byte"):
        MemoryStore(0)


# -- keys: nothing is ever mixed -----------------------------------------------------------------------------------------


def test_another_compressor_reader_ratio_or_question_has_another_key(store):
    keys = [
        PassageKey.of("t", compressor="c", reader="r"),
        PassageKey.of("t2", compressor="c", reader="r"),
        PassageKey.of("t", compressor="c2", reader="r"),
        PassageKey.of("t", compressor="c", reader="r2"),
        PassageKey.of("t", compressor="c", reader=None),
        PassageKey.of("t", compressor="c", reader="r", ratio=4),
        PassageKey.of("t", compressor="c", reader="r", query=""),
    ]
    assert len({key.id for key in keys}) == len(keys)
    assert PassageKey.of("t", compressor="c", reader="r", ratio=4) == PassageKey.of(
        "t", compressor="c", reader="r", ratio=4.0
    )
    assert keys[0].id == "174bef638191de85ec64bda4c5332715"  # stores that were written before stay readable
    store.put_many([Entry(keys[0], made("embeds"), "t"), Entry(keys[2], made("embeds", 1, compressor="c2"), "t")])
    assert [passage is not None for passage in store.get_many(keys)] == [True, False, True, *[False] * 4]
    assert {stat.maker for stat in store.stats.makers} == {Maker("c", "r", None), Maker("c2", "r", None)}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(key=PassageKey.of("t", compressor="other", reader="r")), "made by the compressor c"),
        (dict(key=PassageKey.of("t", compressor="c", reader="other")), "made for the reader r"),
        (dict(text="another text"), "not the one that its key was made of"),
        (dict(vector=[1.0, float("nan")]), "retrieval vector holds NaN"),
        (dict(about={"nutgraf:text": "another text"}), "the store's own"),
        (dict(about={"nutgraf:also": 3}), "the store's own"),
        (dict(about={"nutgraf:also": ["file"]}), "the store's own"),
        (dict(passage=made("embeds").to(dtype=torch.float32).map(lambda t: t / 0)), "NaN or infinite"),
    ],
)
def test_what_does_not_belong_together_is_refused(store, wrong, sentence):
    good = entry(made("embeds", 1), "good")
    bad = dict(key=PassageKey.of("t", compressor="c", reader="r"), passage=made("embeds"), text="t") | wrong
    with pytest.raises(ValueError, match=sentence):
        store.put_many([good, Entry(**bad)])
    assert good.key not in store


def test_get_or_compress_asks_for_what_is_missing_and_keeps_it(store):
    texts = ["a", "b", "c"]
    entries = [entry(made("embeds", i), text) for i, text in enumerate(texts)]
    store.put_many(entries[1:2])
    asked: list[list[int]] = []

    def compress(places: list[int]) -> list[CompressedPassage]:
        asked.append(places)
        return [entries[i].passage for i in places]

    keys = [one.key for one in entries]
    for compressed in ([0, 2], []):
        passages, places = get_or_compress(store, keys, texts, compress)
        assert places == compressed
        assert all(map(same, passages, [one.passage for one in entries]))
    assert asked == [[0, 2]]


# -- stored already: the facts follow the newest ingestion ---------------------------------------------------------------

GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "vector": st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=2),
        "about": st.dictionaries(st.sampled_from("ab"), st.integers(0, 3), min_size=1),
    },
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "slabs", "table"])
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), GIVEN), min_size=2, max_size=6))
@settings(max_examples=12, deadline=None)
def test_facts_given_later_replace_or_complete_the_stored_ones(tmp_path_factory, kind, puts):
    store = MemoryStore() if kind == "memory" else LanceStore(tmp_path_factory.mktemp("s") / "s", layout=kind)
    wanted: dict[PassageKey, dict] = {}
    for number, whole, facts in puts:
        one = entry(made("embeds", number), f"{number}", **facts)
        if whole:
            store.put_many([one])
            wanted.setdefault(one.key, {"text": one.text})
        else:
            store.describe({one.key: Facts(**facts)})
        if one.key in wanted:
            wanted[one.key] |= facts
    found = {one.key: one for one in store.entries()}
    assert found.keys() == wanted.keys()
    for key, facts in wanted.items():
        assert found[key].facts == Facts(**facts)
        assert same(found[key].passage, made("embeds", int(facts["text"])))
    assert store.facts(wanted) == {key: one.facts for key, one in found.items()}


def test_filling_again_adds_vectors_and_facts_without_compressing(store, reader):
    compressor, texts = Fixed(reader), ["one", "two", "three"]
    fill(store, compressor, texts)
    again = fill(store, compressor, texts, vectors=[[1.0, 0], [0, 1.0], None], abouts=[{"n": 1}, None, {"n": 3}])
    assert (again.found, again.compressed, again.updated) == (3, 0, 3)
    assert compressor.asked == texts
    facts = store.facts(keys_for(compressor, texts))
    assert [(one.vector, one.about) for one in facts.values()] == [((1, 0), {"n": 1}), ((0, 1), None), (None, {"n": 3})]
    assert fill(store, compressor, texts, vectors=[[1.0, 0], None, None]).updated == 0
    twice = fill(store, compressor, ["one", "one"], vectors=[[0.5, 0.5], None], abouts=[{"n": 4}, {"n": 5}])
    assert twice.updated == 1
    assert store.facts(keys_for(compressor, ["one"])).popitem()[1] == Facts("one", (0.5, 0.5), {"n": 5})
    with pytest.raises(ValueError, match="NaN"):
        fill(store, compressor, ["one"], vectors=[[float("nan"), 0.0]])
    with pytest.raises(TypeError, match="one string"):
        fill(store, compressor, "one")


def test_slots_made_from_another_vector_are_made_again(store, reader):
    compressor = Fixed(reader)
    fill(store, compressor, ["a", "b"], vectors=[[1.0, 0.0], [0.0, 1.0]], reuse_vectors=True)
    again = fill(store, compressor, ["a", "b"], vectors=[[1.0, 1e-6], [0.6, 0.8]], reuse_vectors=True)
    assert (again.found, again.compressed) == (1, 1)
    assert compressor.asked == ["a", "b", "b"]
    (facts,) = store.facts(keys_for(compressor, ["b"])).values()
    assert facts.vector == pytest.approx((0.6, 0.8))


def test_recompression_completes_facts_and_never_replaces_them(store, reader):
    old, new = Fixed(reader, slots=2), Fixed(reader)
    fill(store, old, ["a", "b"], vectors=[[1.0, 0.0], [0.0, 1.0]], abouts=[{"n": 1}, {"n": 2}])
    fill(store, new, ["a"], abouts=[{"n": 9}])
    done = recompress(store, new)
    assert (done.found, done.compressed) == (1, 1)
    assert store.facts(keys_for(new, ["a", "b"])) == dict(
        zip(keys_for(new, ["a", "b"]), [Facts("a", (1.0, 0.0), {"n": 9}), Facts("b", (0.0, 1.0), {"n": 2})])
    )


def test_passages_and_documents_are_deleted(store):
    entries = [entry(made("embeds", i), f"{i}", about={"file": f"{i % 2}.txt", "line": i}) for i in range(5)]
    store.put_many(entries)
    assert store.delete([entries[0].key, entries[0].key, PassageKey.of("x", compressor="c", reader="r")]) == 1
    assert entries[0].key not in store
    assert store.get_many([entries[0].key]) == [None]
    assert forget(store, file="1.txt") == 2
    assert forget(store, file="0.txt", line=9) == 0
    assert [one.text for one in sorted(store.entries(), key=lambda one: one.text)] == ["2", "4"]
    store.put_many(entries[:1])
    assert same(store.get_many([entries[0].key])[0], entries[0].passage)
    with pytest.raises(ValueError, match="at least one"):
        forget(store)


@pytest.mark.parametrize("layout", ["slabs", "table"])
def test_what_another_process_deletes_is_neither_read_nor_taken_for_stored(tmp_path, monkeypatch, reader, layout):
    compressor = Fixed(reader)
    ours, theirs = LanceStore(tmp_path / "s", layout=layout), LanceStore(tmp_path / "s")
    fill(ours, compressor, ["one", "two"])
    keys = keys_for(compressor, ["one", "two"])
    assert None not in theirs.get_many(keys)
    assert ours.delete(keys[:1]) == 1
    assert fill(theirs, compressor, ["one", "two"]).compressed == 1
    assert ours.get_many(keys)[0] is not None
    assert None not in theirs.get_many(keys)
    monkeypatch.setattr(lance, "FOLLOW_S", 0.0)
    assert ours.delete(keys[:1]) == 1
    assert [passage is None for passage in theirs.get_many(keys)] == [True, False]
    assert theirs.listed([keys[0].id]) == {}
    for opened in (ours, theirs):
        opened.close()


def test_a_text_of_two_documents_is_found_and_deleted_for_each(store, reader):
    compressor = Fixed(reader)
    shared, own = "In both files.", "In the first file."
    fill(store, compressor, [own, shared], abouts=[{"file": "a", "line": 1}, {"file": "a", "line": 2}])
    fill(store, compressor, [shared], abouts=[{"file": "b", "line": 7}])
    (key,) = keys_for(compressor, [shared])
    assert documents(store.facts([key])[key].about) == [{"file": "b", "line": 7}, {"file": "a", "line": 2}]
    # Ingested in turn, nothing changes; a document's own facts follow its newest ingestion.
    for about in ({"file": "a", "line": 2}, {"file": "b", "line": 7}):
        assert fill(store, compressor, [shared], abouts=[about]).updated == 0
    assert fill(store, compressor, [shared], abouts=[{"file": "a", "line": 3}]).updated == 1
    assert documents(store.facts([key])[key].about) == [{"file": "a", "line": 3}, {"file": "b", "line": 7}]
    assert forget(store, file="a") == 2
    assert store.missing(keys_for(compressor, [own, shared])) == keys_for(compressor, [own])
    assert documents(store.facts([key])[key].about) == [{"file": "b", "line": 7}]
    assert forget(store, file="a") == 0
    assert forget(store, file="b") == 1
    assert store.missing([key]) == [key]


def test_compacting_loses_no_facts_of_two_writers(tmp_path):
    one, two = LanceStore(tmp_path / "s"), LanceStore(tmp_path / "s")
    bare, full = entry(made("embeds"), "t"), entry(made("embeds"), "t", vector=[1.0, 0.0], about={"n": 1})
    one.missing = two.missing = lambda keys: list(keys)  # both look before the other one writes
    one.put_many([bare])
    two.put_many([full])
    third = LanceStore(tmp_path / "s")
    third.put_many([entry(made("embeds", 1), "u", vector=[0.0, 1.0])])
    assert third.facts([full.key]) == {full.key: full.facts}
    assert compact(third).duplicates == 1
    assert {found.text: found.facts.vector for found in third.entries()} == {"t": (1.0, 0.0), "u": (0.0, 1.0)}
    assert verify(third) == []


def test_facts_of_a_read_only_store_are_refused(tmp_path, reader):
    compressor = Fixed(reader)
    fill(LanceStore(tmp_path / "s"), compressor, ["a"], abouts=[{"n": 1}])
    store = LanceStore(tmp_path / "s", read_only=True)
    assert fill(store, compressor, ["a"], abouts=[{"n": 1}]).updated == 0
    with pytest.raises(StoreError, match="read-only"):
        fill(store, compressor, ["a"], abouts=[{"n": 2}])
    with pytest.raises(StoreError, match="read-only"):
        store.delete(keys_for(compressor, ["a"]))


# -- encodings -----------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(LEVELS)),
    st.integers(2, 70),
    st.integers(1, 150),
    st.integers(-30, 15),
    st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_quantisation_stays_within_its_bound(kind, group, width, exponent, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, width, generator=draw) * 2.0**exponent
    x[1] = 0
    quantised = quantise(x, kind, group)
    back = dequantise(quantised, kind, group, width)
    assert back.shape == x.shape
    scales = quantised.scales.float().repeat_interleave(group, -1)[:, :width]
    assert ((back - x).abs() <= scales / 2 * (1 + 1e-5) + 1e-30).all()
    largest = torch.nn.functional.pad(x, (0, -width % group)).unflatten(-1, (-1, group)).abs().amax(-1)
    assert (quantised.scales.double() <= largest.double() / LEVELS[kind] * (1 + 2**-10) + 2**-24).all()
    assert (back[1] == 0).all()


def test_quantising_twice_changes_nothing_more():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for kind in ("int8", "int4"):
        once = dequantise(quantise(x, kind, 32), kind, 32, 64)
        assert torch.equal(dequantise(quantise(once, kind, 32), kind, 32, 64), once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["embeds", "kv", "ragged"])
@pytest.mark.parametrize(("encoding", "share"), [("int8", 0.02), ("int4", 0.25)])
def test_quantised_passages_keep_shape_dtype_and_most_of_their_numbers(kind, dtype, encoding, share):
    passage = made(kind, 3, dtype)
    header, data = encode(passage, Encoding(quantize=encoding, group=16))
    back = decode(json.loads(header), bytearray(data))
    assert back.info["quantized"] == encoding
    for name, tensor in passage.tensors().items():
        got = back.tensors()[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        if tensor.is_floating_point():
            assert (got.float() - tensor.float()).abs().max() < share * tensor.float().abs().max()
            assert torch.equal(got, tensor) == (name == "bias")
        else:
            assert torch.equal(got, tensor)
    bits = {"int8": 8, "int4": 4}[encoding]
    numbers = sum(t.numel() for t in passage.tensors().values() if t.is_floating_point() and t.dim() > 1)
    exact = sum(t.numel() * t.element_size() for t in passage.tensors().values() if t.dim() == 1)
    assert len(data) < numbers * (bits + 4) / 8 + exact + 64 * 2 * (len(passage.tensors()) + 1)


def test_a_store_has_one_encoding(tmp_path):
    one = entry(made("embeds"), "t")
    with LanceStore(tmp_path / "s", quantize="int8", group=32) as store:
        store.put_many([one])
        assert store.stats.nbytes < one.passage.nbytes / 2.5
    again = LanceStore(tmp_path / "s")
    assert again.encoding == Encoding(quantize="int8", group=32)
    assert torch.allclose(again.get_many([one.key])[0].embeds, one.passage.embeds, atol=0.02)
    with pytest.raises(ValueError, match="holds slots int8, groups of 32, not int4"):
        LanceStore(tmp_path / "s", quantize="int4")
    with pytest.raises(ValueError, match="has the layout 'slabs'"):
        LanceStore(tmp_path / "s", layout="table")
    half = LanceStore(tmp_path / "half", dtype="float16")
    assert copy(again, half) == 1
    assert half.get_many([one.key])[0].embeds.dtype == torch.float16


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        (dict(dtype="int32"), "float16, bfloat16, float32"),
        (dict(quantize="int2"), "one of"),
        (dict(dtype="float16", quantize="int8"), "not both"),
        (dict(quantize="int8", group=1), "2 to 4096"),
        (dict(layout="heap"), "slabs"),
    ],
)
def test_bad_settings(tmp_path, settings_, sentence):
    with pytest.raises(ValueError, match=sentence):
        LanceStore(tmp_path / "s", **settings_)
    assert not (tmp_path / "s").exists()


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    large = made("embeds").map(lambda t: t * 1e6)
    with pytest.raises(ValueError, match="do not fit float16"):
        LanceStore(tmp_path / "half", dtype="float16").put_many([entry(large, "t")])
    huge = made("embeds").map(lambda t: t * 1e30)
    with pytest.raises(ValueError, match="without quantisation"):
        LanceStore(tmp_path / "int8", quantize="int8").put_many([entry(huge, "t")])
    brim = made("embeds", dtype=torch.float16).map(lambda t: t.clamp(1, 1) * 65504)
    with pytest.raises(ValueError, match="near the end of float16"):
        LanceStore(tmp_path / "int8").put_many([entry(brim, "t")])
    with pytest.raises(ValueError, match="are float64"):
        LanceStore(tmp_path / "s").put_many([entry(made("embeds").to(dtype=torch.float64), "t")])


# -- retrieval and upkeep ------------------------------------------------------------------------------------------------


def test_one_table_serves_retrieval_and_reading(tmp_path):
    store = LanceStore(tmp_path / "s")
    with pytest.raises(ValueError, match="no retrieval vectors"):
        store.search([1.0, 0.0])
    store.put_many([entry(made("embeds"), "without")])
    circle = [(np.cos(a), np.sin(a)) for a in np.linspace(0, 3, 8)]
    with_vectors = [
        entry(made("embeds", i), f"{i}", vector=[*map(float, v)], about={"n": i}) for i, v in enumerate(circle)
    ]
    store.put_many(with_vectors)
    store.put_many([entry(made("embeds", compressor="c2"), "0", vector=[1.0, 0.0])])
    hits = LanceStore(tmp_path / "s").search([1.0, 0.05], 3, Maker("c", "r", None))
    assert [hit.entry.about["n"] for hit in hits] == [0, 1, 2]
    assert hits[0].distance < hits[1].distance
    assert same(hits[1].entry.passage, with_vectors[1].passage)
    assert len(store.search([1.0, 0.0], 2)) == 2
    with pytest.raises(ValueError, match="of 2 dimensions, got one of 3"):
        store.put_many([entry(made("embeds"), "t", vector=[1.0, 2.0, 3.0])])
    with pytest.raises(ValueError, match="vectors of 2 dimensions"):
        store.search([1.0])


def test_upkeep_frees_what_is_dropped_and_keeps_the_rest(tmp_path):
    store = LanceStore(tmp_path / "s")
    kept = [entry(made("kv", i), f"{i}") for i in range(4)]
    store.put_many(kept)
    store.put_many([entry(made("kv", i, compressor="old", slots=50), f"{i}") for i in range(4)])
    drop(store, Maker("old", "r", None))
    freed = compact(store)
    assert freed.after < freed.before / 3
    assert all(map(same, store.get_many([one.key for one in kept]), [one.passage for one in kept]))
    assert verify(store) == []
    assert [stat.maker.compressor for stat in store.stats.makers] == ["c"]
