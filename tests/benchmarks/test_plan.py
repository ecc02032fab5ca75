"""`nutgraf plan`: the verdict follows from the numbers, and bad numbers are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from nutgraf.adapters.store import Encoding
from nutgraf.adapters.store.codec import round_trip
from nutgraf.benchmarks.cli.plan import plan as command
from nutgraf.benchmarks.costs import plan, shapes, storage
from nutgraf.benchmarks.costs.roofline import Roofline
from nutgraf.compressors import COMPRESSORS, make_compressor
from typer import Typer
from typer.testing import CliRunner

FAST = Roofline(8e14, 3e12, "bfloat16", "given")
BIG = shapes.find_shape("llama-8b")
APP = Typer()
APP.command()(command)
GIVEN = ["--tflops", "800", "--gbps", "3000"]
ASK = ["--reader", "llama-8b", "--passage-tokens", "512", "--passages", "32", *GIVEN]


def work_out(hits: float = 10, ratios: tuple[float, ...] = (16,), tokens: int = 512, **more: Any) -> list[plan.Line]:
    load = plan.Load((tokens,), 32, hits)
    return plan.work_out(BIG, load, plan.Hardware(FAST, **more), ratios)


def by_family(lines: list[plan.Line]) -> dict[str, plan.Line]:
    return {line.family: line for line in lines}


def test_a_long_context_read_often_pays() -> None:
    lines = work_out(hits=50)
    found = by_family(lines)
    full, slots, kv = found["full text"], found["memory slots"], found["keys and values"]
    flops = BIG.forward(512 * 32 + 64).flops
    assert full.ttft_ms == pytest.approx(1000 * flops / FAST.flops)
    assert slots.slots == 32
    assert slots.ttft_speedup > 10
    assert slots.bytes_per_passage == 32 * 4096 * 2
    assert kv.bytes_per_passage == 32 * (131072 + 8)  # with positions
    assert found["one vector"].slots == 1
    assert found["one vector"].compress_ms < 0.01 * slots.compress_ms
    assert found["text for the question"].ttft_speedup < 1  # it reads everything itself, each time
    assert not found["text for the question"].pays
    assert plan.best(lines).pays


def test_break_even_is_where_the_verdict_turns() -> None:
    reads = by_family(work_out())["memory slots"].break_even_reads
    assert reads is not None
    assert reads > 0.1
    before, after = (by_family(work_out(hits=reads * k))["memory slots"] for k in (0.99, 1.01))
    assert (before.pays, after.pays) == (False, True)
    assert before.saved_ms < 0 < after.saved_ms
    nothing = work_out(hits=0)
    assert plan.best(nothing) is nothing[0]


def test_a_slow_store_or_a_large_overhead_eats_the_gain() -> None:
    kv = "keys and values"
    assert by_family(work_out())[kv].break_even_reads is not None
    assert by_family(work_out(store=1e6))[kv].break_even_reads is None
    assert by_family(work_out(overhead=10.0))["memory slots"].ttft_speedup == pytest.approx(1, abs=0.1)
    half = by_family(work_out(efficiency=0.5))["full text"]
    assert half.ttft_ms == pytest.approx(2 * by_family(work_out())["full text"].ttft_ms)


def test_what_does_not_fit_is_no_advice() -> None:
    lines = work_out(tokens=5000, ratios=(1.01, 16))
    found = by_family(lines[:1] + [line for line in lines if line.ratio > 10])
    assert not found["full text"].fits
    assert not [line for line in lines if 1 < line.ratio < 1.1 and line.fits]
    assert plan.best(lines).fits


# llama-8b: 32 layers of 8 key-value heads of width 128, embeddings of 4,096.
@pytest.mark.parametrize(
    ("form", "precision", "nbytes"),
    [
        (storage.TEXT, "as made", 10 * 4),
        (storage.SOFT, "as made", 10 * 4096 * 2),
        (storage.SOFT, "int8", 10 * 64 * (64 + 2)),
        (storage.DENSE, "as made", 10 * (256 * 2 * 128 * 2 + 8)),
        (storage.DENSE, "int4", 10 * (256 * 2 * 2 * (32 + 2) + 8)),
        (storage.RAGGED, "as made", 10 * 256 * (2 * 128 * 2 + 2 + 4) + 256 * 4),
        (storage.RAGGED, "int8", 10 * 256 * (2 * 2 * (64 + 2) + 2 + 4) + 256 * 4),
    ],
)
def test_bytes_of_a_stored_passage(form: str, precision: str, nbytes: int) -> None:
    assert storage.stored_bytes(BIG, form, 10, "bfloat16", precision) == nbytes


@pytest.mark.parametrize("precision", ["as made", "int8", "int4"])
@pytest.mark.parametrize("form", ["kv-match", "gist", "mean-pool"])
def test_bytes_are_those_that_the_store_writes(zoo: ModuleType, form: str, precision: str) -> None:
    reader = zoo.reader("llama")
    made = {"kv-match": {"probes": 2}, "mean-pool": {"encoder": "embeddings"}}.get(form, {})
    (passage,) = make_compressor(form, reader, **made).compress(["Ada Holm sailed to Tromsø in 1907. " * 4], ratio=4)
    shape = shapes.decoder_shape(reader.model.config)
    kind = {"kv-match": storage.RAGGED, "gist": storage.DENSE}.get(form, storage.SOFT)
    encoding = Encoding(quantize=None if precision == "as made" else precision)
    written = round_trip(passage, encoding)[1]
    counted = storage.stored_bytes(shape, kind, math.ceil(passage.slots), "float32", precision)
    assert counted == pytest.approx(written, rel=0.02, abs=64 * 2 * len(passage.tensors()))  # the store aligns tensors


def test_loading_wins_above_the_bandwidth_it_names() -> None:
    def row(gbps: float, hits: float = 10) -> storage.Loading:
        load = plan.Load((512,), 32, hits)
        hardware = plan.Hardware(FAST, store=gbps * 1e9)
        full = plan.work_out(BIG, load, hardware, (16,))[0]
        found = plan.loadings(BIG, load, hardware, (16,), full)
        (ragged,) = [r for r in found if (r.form, r.precision) == (storage.RAGGED, "as made")]
        assert len(found) == 3 * 3
        return ragged

    given = row(1.0)
    nbytes = 32 * 256 * (512 + 6) + 1024
    assert given.bytes_per_passage == nbytes
    assert given.load_ms == pytest.approx(1000 * 32 * nbytes / 1e9)
    past = BIG.forward(64, 32 * 32)
    assert given.prefill_ms == pytest.approx(1000 * FAST.seconds(past))
    assert given.text_ms == pytest.approx(1000 * FAST.seconds(BIG.forward(32 * 512 + 64)))
    least = given.least_gbps
    assert least == pytest.approx(32 * nbytes / (given.text_ms - given.prefill_ms) / 1e6)
    assert (row(0.99 * least).wins, row(1.01 * least).wins) == (False, True)
    assert "loading loses, and wins above" in storage.loading_sentence(row(0.9 * least), 0.9 * least)
    assert row(1.0, hits=1).saved_ms < given.saved_ms < given.text_ms - given.prefill_ms - given.load_ms
    lost = dataclasses.replace(given, least_gbps=None, wins=False)
    assert "loses at any bandwidth" in storage.loading_sentence(lost, 1.0)


def test_kv_match_is_charged_for_its_questions() -> None:
    found = by_family(work_out())
    work = BIG.forward(512 + 1200, batch=32, logits=0)
    assert found["selected keys and values"].compress_ms == pytest.approx(1000 * FAST.seconds(work) / 32)
    assert 3 < found["selected keys and values"].compress_ms / found["pooled states"].compress_ms < 4


def test_every_method_belongs_to_one_family() -> None:
    named = [title for family in plan.FAMILIES for title in family.methods.split(", ")]
    for name, cls in COMPRESSORS.items():
        if cls.__module__.startswith("nutgraf.") and cls.config_class.cost != "none":
            assert named.count(cls.config_class.title or name) == 1, name


def test_command_prints_the_verdict_and_json() -> None:
    done = CliRunner().invoke(APP, [*ASK, "--ratio", "16", "--hits", "100"])
    assert done.exit_code == 0, done.output
    assert "Compressing pays" in done.output
    assert "memory slots" in done.output
    assert "Keys and values, ragged at 16x" in done.output
    assert "loading wins, and loses below" in done.output
    done = CliRunner().invoke(APP, [*ASK, "--hits", "0", "--json"])
    told = json.loads(done.output)
    assert told["pays"] is False
    assert told["best"]["family"] == "full text"
    assert told["reader"]["parameters"] == BIG.parameters
    assert {line["ratio"] for line in told["lines"] if line["family"] == "memory slots"} == {4, 16}


def test_command_reads_configs_without_weights(tmp_path: Path) -> None:
    config = shapes.shape_config("llama-tiny")
    config.save_pretrained(tmp_path)
    for reader in (str(tmp_path), str(tmp_path / "config.json"), "reader-small"):
        done = CliRunner().invoke(APP, ["--reader", reader, "--passage-tokens", "100", *GIVEN, "--json"])
        assert done.exit_code == 0, done.output
    told = json.loads(
        CliRunner().invoke(APP, ["--reader", str(tmp_path), "--passage-tokens", "9", *GIVEN, "--json"]).output
    )
    assert told["reader"]["hidden"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0.5"], "at least 1, got"),
        (["--ratio", "nan"], "at least 1, got"),
        (["--hits", "-1"], "Hits a passage"),
        (["--passages", "0"], "passages must be at least 1"),
        (["--passage-tokens", "0"], "lengths of at least 1"),
        (["--tflops", "0"], "positive number"),
        (["--efficiency", "2"], "Efficiency must be"),
        (["--store-gbps", "0"], "store's GB/s"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--reader", "nobody"], "'nobody' is no reader"),
    ],
)
def test_command_refuses_bad_numbers(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(APP, [*ASK, *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_one_rate_alone_is_not_enough() -> None:
    done = CliRunner().invoke(APP, ["--reader", "llama-1b", "--passage-tokens", "100", "--tflops", "1"])
    assert done.exit_code == 2
    assert "Give both" in done.output
