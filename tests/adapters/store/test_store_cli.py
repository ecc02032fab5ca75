"""`nutgraf compress` and `nutgraf store`, and the corpora they read."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import sys
from pathlib import Path

import pytest
import torch
from nutgraf import Reader, load_compressor, make_compressor
from nutgraf.adapters.store import LanceStore, MemoryStore, keys_for
from nutgraf.adapters.store import corpus as corpus_module
from nutgraf.adapters.store.base import batched
from nutgraf.adapters.store.corpus import compress_corpus, read_corpus
from nutgraf.cli import app
from typer.testing import CliRunner

TEXTS = [f"In {1600 + i} delegate number {i} signed the treaty of Westphalia, and there was peace." for i in range(7)]


@pytest.fixture(scope="module")
def models(zoo, tmp_path_factory) -> tuple[str, str, str]:
    """Folders of a tiny reader and of two compressors for it."""
    folder = tmp_path_factory.mktemp("models")
    zoo.model("llama", num_hidden_layers=1).save_pretrained(folder / "reader")
    zoo.tokenizer().save_pretrained(folder / "reader")
    reader = Reader.from_pretrained(str(folder / "reader"))
    for name, ratio in (("one", 4.0), ("two", 8.0)):
        make_compressor("icae", reader, ratio=ratio).save_pretrained(folder / name)
    return str(folder / "reader"), str(folder / "one"), str(folder / "two")


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": f"t{i}"}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def fail(*arguments: object, status: int = 2) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())


# -- corpora -------------------------------------------------------------------------------------------------------------


def test_files_and_folders_packed_or_not(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first\nparagraph\n\n\n \nsecond\n")
    (tmp_path / "b" / "c.md").write_text("\n\nthird")
    with lzma.open(tmp_path / "d.jsonl.xz", "wt") as file:
        file.write('{"text": "fourth", "page": 4}\n\n{"passages": [{"title": "x", "text": "fifth"}, "sixth"]}\n')
    with gzip.open(tmp_path / "e.ndjson.gz", "wt") as file:
        file.write('{"text": "seventh"}\n')
    (tmp_path / "ignored.py").write_text("x = 1")
    (tmp_path / ".git").mkdir()
    for hidden in (".secret.txt", ".git/b.md", ".env"):
        (tmp_path / hidden).write_text("no passage")
    with pytest.warns(UserWarning, match="1 files in .* left out.*ignored.py"):
        found = list(read_corpus(tmp_path))
    assert [p.text for p in found] == ["first\nparagraph", "second", "third", "fourth", "fifth", "sixth", "seventh"]
    assert found[1].about == {"file": "a.txt", "passage": 1}
    assert found[2].about["file"] == "b/c.md"
    assert found[3].about == {"file": "d.jsonl.xz", "line": 1, "page": 4}
    assert found[4].about == {"file": "d.jsonl.xz", "line": 3, "title": "x"}
    assert [len(some) for some in batched(iter(found), 3)] == [3, 3, 1]


@pytest.mark.parametrize(
    ("name", "content", "error", "sentence"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text":', ValueError, "line 2 is not JSON"),
        ("x.jsonl", b'{"body": "a"}', ValueError, "--field"),
        ("x.jsonl", b'{"text": 3}', ValueError, "line 1 has no text"),
        ("x.jsonl", b"[1, 2]", ValueError, "line 1 has no text"),
        ("x.txt", b"\xff\xfe\xfa", ValueError, "UTF-8"),
        ("x.txt.xz", b"no xz", ValueError, "cannot be unpacked"),
        ("x.pdf", b"", ValueError, r"\.jsonl"),
        ("nothing/here", None, FileNotFoundError, "no file"),
    ],
)
def test_bad_corpora(tmp_path, name, content, error, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=sentence):
        list(read_corpus(tmp_path / name))


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no"):
        list(read_corpus(tmp_path))


# -- compressing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_corpus_is_compressed_shown_verified_and_compacted(models, corpus, tmp_path):
    reader, one, _ = models
    store = tmp_path / "store"
    make = ("compress", corpus, "--store", store, "--compressor", one, "--reader", reader, "--batch-size", 3)
    assert "7 passages compressed" in run(*make)
    assert "0 passages compressed (0 tokens to 0 slots), 7 were stored already" in run(*make)
    shown = run("store", "show", store)
    assert "7 passages" in shown
    assert "layout: slabs" in shown
    assert "0 damaged" in run("store", "verify", store)
    assert "after" in run("store", "compact", store)
    loaded = load_compressor(one, Reader.from_pretrained(reader))
    stored = LanceStore(store).get_many(keys_for(loaded, TEXTS))
    for passage, again in zip(stored, loaded.compress(TEXTS)):
        assert torch.allclose(passage.embeds, again.embeds, atol=1e-5)
    assert {e.about["title"] for e in LanceStore(store).entries()} == {f"t{i}" for i in range(7)}


@pytest.mark.slow
def test_shorter_texts_have_a_budget_in_tokens(models, corpus, tmp_path):
    reader, soft, _ = models
    asked = ["compress", corpus, "-s", tmp_path / "s", "-r", reader, "--max-tokens", 7]
    said = run(*asked, "-c", "selective-context")
    slots = int(re.search(r"7 passages compressed \([\d,]+ tokens to (\d+) slots\)", said)[1])
    assert 7 * 4 < slots <= 7 * 7
    assert "not both" in fail(*asked, "-c", "selective-context", "--ratio", 2)
    assert "max_tokens needs a compressor to text" in fail(*asked, "-c", soft)


def test_facts_follow_the_newest_corpus_and_a_document_is_deleted(models, corpus, tmp_path):
    reader, one, _ = models
    store = tmp_path / "store"
    options = ("--store", store, "--compressor", one, "--reader", reader)
    run("compress", corpus, *options)
    newer = tmp_path / "newer.jsonl"
    newer.write_text("".join(json.dumps({"text": text, "title": "new"}) + "\n" for text in TEXTS[:3]))
    assert "3 were stored already (3 of them brought up to date)" in run("compress", newer, *options)
    assert sorted(e.about["title"] for e in LanceStore(store).entries()) == ["new"] * 3 + ["t3", "t4", "t5", "t6"]
    assert "NAME=VALUE" in fail("store", "delete", store, "--about", "newer.jsonl")
    assert "1 passages deleted" in run("store", "delete", store, "--about", "file=newer.jsonl", "--about", "line=2")
    assert "2 passages deleted" in run("store", "delete", store, "--about", "file=newer.jsonl")
    assert {e.about["title"] for e in LanceStore(store).entries()} == {f"t{i}" for i in range(7)}  # the older file's
    assert "7 passages deleted" in run("store", "delete", store, "--about", "file=corpus.jsonl")
    assert "7 passages compressed" in run("compress", corpus, *options)


@pytest.mark.slow
def test_damage_is_told_dropped_and_made_good(models, corpus, tmp_path):
    reader, one, _ = models
    store = tmp_path / "store"
    make = ("compress", corpus, "--store", store, "--compressor", one, "--reader", reader)
    run(*make)
    (slab,) = (store / "slabs").iterdir()
    data = bytearray(slab.read_bytes())
    data[-1] ^= 0x55
    slab.write_bytes(data)
    assert "checksum is wrong" in fail("store", "verify", store, status=1)
    assert "1 damaged passages were dropped" in run("store", "verify", store, "--drop")
    assert "1 passages compressed" in run(*make)
    assert "0 damaged" in run("store", "verify", store)


@pytest.mark.slow
def test_migration_to_another_encoding_and_to_another_compressor(models, corpus, tmp_path):
    reader, one, two = models
    store = tmp_path / "store"
    run("compress", corpus, "--store", store, "--compressor", one, "--reader", reader)
    assert "7 passages copied" in run("store", "migrate", store, "--to", tmp_path / "small", "--quantize", "int8")
    small, large = LanceStore(tmp_path / "small"), LanceStore(store)
    assert small.stats.nbytes < large.stats.nbytes / 2
    moved = run("store", "migrate", store, "--compressor", two, "--reader", reader, "--drop-old")
    assert "7 passages compressed" in moved
    assert "7 passages of the compressor" in moved
    (left,) = LanceStore(store).stats.makers
    assert left.maker.compressor == load_compressor(two, Reader.from_pretrained(reader)).fingerprint
    assert "either --to" in fail("store", "migrate", store)


@pytest.mark.slow
def test_a_stopped_run_goes_on(models, corpus, tmp_path, monkeypatch):
    reader, one, _ = models
    make = ("compress", corpus, "--store", tmp_path / "s", "--compressor", one, "--reader", reader, "--batch-size", 2)
    fill, calls = corpus_module.fill, []

    def stopped(store, compressor, texts, **kwargs):
        def done(number):
            kwargs["done"](number)
            calls.append(number)
            if len(calls) == 2:
                raise KeyboardInterrupt

        return fill(store, compressor, texts, **(kwargs | {"done": done}))

    monkeypatch.setattr(corpus_module, "fill", stopped)
    assert "Run the same command again" in fail(*make, status=130)
    monkeypatch.undo()
    assert "3 passages compressed" in run(*make)  # 7 less two batches of 2


def test_errors_are_one_sentence(models, tmp_path):
    reader, one, _ = models
    (tmp_path / "bad.jsonl").write_text("{")
    common = ("--store", tmp_path / "s", "--compressor", one, "--reader", reader)
    assert "line 1 is not JSON" in fail("compress", tmp_path / "bad.jsonl", *common)
    assert "no file" in fail("compress", tmp_path / "none.jsonl", *common)
    assert "must be local or ray" in fail("compress", tmp_path / "bad.jsonl", *common, "--engine", "spark")
    assert "holds no store" in fail("store", "show", tmp_path / "none")
    assert not (tmp_path / "s").exists()


def test_compressing_holds_a_few_batches_alone(models, corpus):
    """A corpus larger than memory: what is read ahead is bounded."""
    reader, one, _ = models
    compressor = load_compressor(one, Reader.from_pretrained(reader))
    read, ahead = [0], []

    def passages():
        for passage in list(read_corpus(corpus)) * 8:
            read[0] += 1
            yield passage

    store = MemoryStore()
    done = [0]

    def count(number):
        done[0] += number
        ahead.append(read[0] - done[0])

    filled = compress_corpus(passages(), store, compressor, batch_size=2, done=count)
    assert (filled.compressed, done[0]) == (7, 56)
    assert max(ahead) <= 2 * 8


@pytest.mark.long
def test_ray_gives_the_same_store(models, corpus, tmp_path):
    pytest.importorskip("ray")
    reader, one, _ = models
    store = tmp_path / "ray"
    make = ("compress", corpus, "--store", store, "--compressor", one, "--reader", reader, "--batch-size", 2)
    assert "7 passages compressed" in run(*make, "--engine", "ray", "--workers", 2)
    assert "7 were stored already" in run(*make, "--engine", "ray", "--workers", 2)
    loaded = load_compressor(one, Reader.from_pretrained(reader))
    stored = LanceStore(store).get_many(keys_for(loaded, TEXTS))
    for passage, again in zip(stored, loaded.compress(TEXTS)):
        assert torch.allclose(passage.embeds, again.embeds, atol=1e-5)
    assert "ray" in sys.modules
