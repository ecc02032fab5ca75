"""The quality suite over slots as a store gives them back: what int8 and int4 cost."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nutgraf.benchmarks import loading, names, rows
from nutgraf.benchmarks import methods as lines
from nutgraf.benchmarks.cli.app import bench_app
from nutgraf.benchmarks.quality import quality
from nutgraf.compressors import Compressor, Reader, make_compressor
from nutgraf.recipes.data.corpus import Record
from typer.testing import CliRunner

QUIET = quality.Settings(dataset="toy", max_new_tokens=4, batch_size=4, progress=False)
PLACES = ["Warsaw", "Prague", "Vienna", "Lisbon"]
RECORDS = [
    Record(
        f"Where was traveller {i} born?",
        (place,),
        (f"Traveller {i} was born in {place}. Rain fell on day {i}, and more.", f"It was cold in {place}."),
        ("", ""),
        0,
        "toy",
        id=str(i),
    )
    for i, place in enumerate(PLACES)
]


@pytest.fixture(scope="module")
def reader(zoo: ModuleType) -> Reader:
    return zoo.reader("llama")


@pytest.fixture(scope="module")
def compressor(reader: Reader) -> Compressor:
    return make_compressor("mean-pool", reader, encoder="embeddings")


def test_stored_slots_are_read_as_the_store_gives_them_back(reader: Reader, compressor: Compressor) -> None:
    compressed = lines.Compressed(compressor, 3)
    encodings = [loading.store_encoding(name) for name in ("int8", "int4", "float32")]
    methods = lines.lines([compressed], baselines=[], shuffled=False, encodings=encodings)
    found = {line.method: line for line in quality.evaluate(reader, methods, RECORDS, QUIET)}
    made = ["mean-pool", "mean-pool-int8", "mean-pool-int4", "mean-pool-float32"]
    assert list(found) == ["full", "none", *made]
    plain, eight, four, exact = (found[name] for name in made)

    stored = lines.prompts(methods[4], reader, RECORDS)
    assert four.predictions == [a.strip() for a in reader.generate(stored, 4, stop=["\n"])]
    slots = compressed.contexts(reader, RECORDS)[0][0].embeds
    for method, levels in ((methods[3], 127), (methods[4], 7)):
        error = (method.contexts(reader, RECORDS)[0][0].embeds - slots).abs()
        assert 0 < error.max() <= 0.51 * slots.abs().max() / levels
    assert np.array_equal(exact.scores["nll"], plain.scores["nll"])
    change = {line.method: np.abs(line.scores["nll"] - plain.scores["nll"]).mean() for line in (eight, four)}
    assert 0 < change[eight.method] < change[four.method]

    for line, precision in ((eight, "int8"), (four, "int4"), (exact, "float32")):
        assert line.row["store_precision"] == precision
        assert line.row["stored_of"] == "mean-pool"
        assert line.row["compressor"] == compressor.fingerprint
        assert line.row["ratio"] == plain.row["ratio"]
        assert line.row["f1_change"] == pytest.approx(line.row["f1"] - plain.row["f1"], abs=1e-6)
        same = [a == b for a, b in zip(line.predictions, plain.predictions)]
        assert line.row["same_answers"] == pytest.approx(np.mean(same))
    assert exact.row["same_answers"] == 1
    assert four.row["bytes_per_passage"] < eight.row["bytes_per_passage"] < exact.row["bytes_per_passage"]
    assert [names.is_beside(line.row) for line in (plain, eight)] == [False, True]
    assert names.line_name(eight.row) == "stored as int8"


def test_a_tuned_reader_reads_its_own_keys_and_values_quantised(reader: Reader) -> None:
    gist = make_compressor("gist", reader, r=4, ratio=3.0).eval()
    with torch.no_grad():
        for parameter in gist.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    method = lines.Stored(lines.Compressed(gist), loading.store_encoding("int8"))
    assert method.reads(reader) is gist.reader
    _, _, line = quality.evaluate(reader, [lines.FullText(), lines.NoContext(), method], RECORDS, QUIET)
    prompts = lines.prompts(method, reader, RECORDS)
    assert line.predictions == [a.strip() for a in gist.reader.generate(prompts, 4, stop=["\n"])]
    assert "same_answers" not in line.row  # nothing to compare with


def test_stores_round_slots_alone(reader: Reader) -> None:
    with pytest.raises(ValueError, match="int8, int4, float16, bfloat16 or float32, got --store-precision int2"):
        loading.store_encoding("int2")
    text = lines.Compressed(make_compressor("selective-context", reader), 2)
    with pytest.raises(ValueError, match="makes text"):
        lines.Stored(text, loading.store_encoding("int8"))
    methods = lines.lines([text], baselines=[], shuffled=False, encodings=[loading.store_encoding("int8")])
    assert [method.name for method in methods] == ["full", "none", "selective-context"]


@pytest.mark.slow
def test_store_precision_on_the_command_line(zoo: ModuleType, reader: Reader, tmp_path: Any) -> None:
    reader.model.save_pretrained(tmp_path / "reader")
    zoo.tokenizer().save_pretrained(tmp_path / "reader")
    loaded = Reader.from_pretrained(str(tmp_path / "reader"))
    make_compressor("mean-pool", loaded, encoder="embeddings").save_pretrained(tmp_path / "pool")
    questions = [
        {"question": r.question, "answers": list(r.answers), "passages": [{"title": "", "text": t} for t in r.passages],
         "gold": r.gold, "source": "toy", "id": r.id}
        for r in RECORDS
    ]  # fmt: skip
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    out = tmp_path / "rows.jsonl"
    run = ["quality", str(tmp_path / "toy.jsonl"), "--reader", str(tmp_path / "reader"), "--baseline", "none"]
    run += ["--compressor", f"{tmp_path / 'pool'}@4", "--no-shuffled", "--max-new-tokens", "3", "--out", str(out)]
    done = CliRunner().invoke(bench_app, [*run, "--store-precision", "int8", "--store-precision", "int4"])
    assert done.exit_code == 0, done.output
    assert "stored as int4" in done.output
    written = rows.read_rows(out)
    assert [row["method"] for row in written] == ["full", "none", "mean-pool", "mean-pool-int8", "mean-pool-int4"]
    assert written[3]["store_group"] == 64
    text = [*run[:6], "--compressor", "selective-context@2", "--store-precision", "int8"]
    done = CliRunner().invoke(bench_app, text)
    assert done.exit_code == 2
    assert "makes slots" in done.output
