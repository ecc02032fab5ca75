"""Compress throughput beside the bare encoder, and what a store adds to the first token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nutgraf.benchmarks.cli.app import bench_app
from nutgraf.benchmarks.costs import shapes
from nutgraf.benchmarks.speed import compressing, store
from nutgraf.benchmarks.speed.entrants import find_entrants, make_passages
from nutgraf.compressors import Reader, make_compressor
from nutgraf.compressors.core.batching import pack, watch_lengths
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def reader() -> Reader:
    return shapes.random_reader("llama-tiny", device="cpu", dtype="float32")


def test_what_is_packed_is_seen_inside_alone() -> None:
    with watch_lengths() as seen:
        list(pack([3, 5], 100))
        list(pack([7], 100))
    list(pack([9], 100))
    assert seen == [3, 5, 7]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["icae", "mean-pool", "gist", "autocompressor"])
def test_rows_of_every_kind_of_encoder(reader: Reader, method: str) -> None:
    texts = [make_passages(reader, 1, n)[0] for n in (20, 45, 90)]
    entrants = find_entrants(reader, [f"{method}@4", "selective-context"], (), (), untrained=True)
    (row,) = compressing.compress_rows(reader, entrants, texts, repeats=1, warmup=0)
    assert row["method"] == method
    assert row["context_tokens"] == sum(map(len, reader.tokenize_batch(texts)))
    slots = sum(p.slots for p in entrants[0].compressor.compress(texts, ratio=4.0))  # type: ignore[union-attr]
    most = row["context_tokens"] + slots + 8 * len(texts)  # BOS, and what AutoCompressor reads again
    if method == "mean-pool":
        assert row["encoder_tokens"] <= row["context_tokens"] + len(texts)
    elif method != "autocompressor":
        assert row["context_tokens"] + slots <= row["encoder_tokens"] <= most
    assert row["compressor_weights"] == "random"
    with pytest.raises(ValueError, match="at least one text"):
        compressing.compress_rows(reader, entrants, [])


def test_pairs_are_compared_with_a_prefill_of_the_passages(reader: Reader) -> None:
    texts = [make_passages(reader, 1, n)[0] for n in (20, 45)]
    entrants = find_entrants(
        reader, ["kv-match:probes=1@4", "kv-match:score=first,repair=none@4"], (), (), untrained=False
    )
    rows = compressing.compress_rows(reader, entrants, texts, repeats=1, warmup=0)
    assert [row["method"] for row in rows] == ["kv-match:probes=1", "kv-match:score=first,repair=none"]
    for row in rows:
        assert row["encoder_tokens"] == row["context_tokens"] + len(texts) * len(reader.bos_ids)
        assert row["bare_share"] == pytest.approx(row["bare_ms"] / row["compress_ms"], rel=1e-3)


@pytest.mark.slow
def test_the_embedder_is_what_xrag_compresses_with(reader: Reader) -> None:
    texts = ["The treaty was signed in 1648.", "Rivers carry sediment to the sea, and some of it stays in the delta."]
    entrants = find_entrants(reader, ["xrag"], (), (), untrained=True)
    entrants[0].compressor.compress(texts)  # type: ignore[union-attr]  # remembered vectors are no measurement
    (row,) = compressing.compress_rows(reader, entrants, texts, repeats=1, warmup=0)
    embedder = entrants[0].compressor.embedder  # type: ignore[union-attr]
    assert row["encoder_tokens"] == sum(embedder.count(text) + 2 for text in texts)


def test_rectangles_hold_every_position_once(reader: Reader) -> None:
    like = reader.model.get_input_embeddings().weight
    sizes = [x.shape for x in compressing.rectangles([5, 9, 10], reader.width, 20, like)]
    assert [tuple(size) for size in sizes] == [(2, 8, reader.width), (1, 8, reader.width)]
    assert list(compressing.rectangles([], reader.width, 20, like)) == []
    assert make_compressor("selective-context", reader).encoder_body() is None


@pytest.mark.slow
def test_the_command_keeps_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    asked = ["compress", "--shape", "llama-tiny", "--compressor", "icae@8", "--passages", "2", "--repeats", "1"]
    for _ in range(2):
        result = CliRunner().invoke(bench_app, [*asked, "--device", "cpu", "--out", str(out)])
        assert result.exit_code == 0, result.output
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["suite"], row["test"], row["method"]) == ("speed", "compress", "icae")
    bad = CliRunner().invoke(bench_app, [*asked, "--passages", "100000", "--device", "cpu"])
    assert bad.exit_code == 2


def test_what_a_store_adds_to_the_first_token(reader: Reader, tmp_path: Path) -> None:
    stores = {name: store.STORES[name] for name in ("memory", "slabs")}
    rows = store.answer_rows(reader, stores, 6, 20, 8.0, 2, tmp_path)
    assert [row["method"] for row in rows] == ["memory", "slabs"]
    for row in rows:
        assert row["read_share_of_ttft"] > 0
        assert row["slots"] == 3
        assert row["read_gbps"] > 0
    assert rows[1]["bytes_per_passage"] == 3 * reader.width * 4
