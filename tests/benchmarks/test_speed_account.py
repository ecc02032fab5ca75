"""The account of speed: costs counted from a config, the roofline, readers by shape, rows that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nutgraf.benchmarks import rows
from nutgraf.benchmarks.cli.app import bench_app
from nutgraf.benchmarks.costs import costs, roofline, shapes
from nutgraf.benchmarks.costs.costs import decoder_shape
from nutgraf.benchmarks.speed import account, clock, entrants, speed, timing
from nutgraf.compressors import Reader
from nutgraf.recipes.data.corpus import Record
from typer.testing import CliRunner

RATES = roofline.Roofline(1e11, 1e10, "float32", "given")


@pytest.fixture(scope="module")
def reader() -> Reader:
    return shapes.random_reader("llama-tiny", device="cpu", dtype="float32")


# -- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "opt", "falcon", "gpt_neox", "phi3", "qwen3"])
def test_flops_are_what_torch_counts(zoo: ModuleType, architecture: str) -> None:
    model = zoo.model(architecture)
    if architecture == "mixtral":
        model.set_experts_implementation("eager")  # torch does not count grouped products
    shape = decoder_shape(model.config)
    ids = torch.ones(2, 48, dtype=torch.long)
    with torch.no_grad():
        counted = timing.count_flops(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
        body = timing.count_flops(
            lambda: model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        )
    assert shape.forward(48, batch=2, logits=48, causal=False).flops == pytest.approx(counted, rel=0.003)
    bridge = 2 * 2 * 48 * shape.hidden * shape.width if shape.width != shape.hidden else 0  # OPT's is in the body
    assert shape.forward(48, batch=2, logits=0, causal=False).flops == pytest.approx(body - bridge, rel=0.003)


def test_a_step_behind_a_cache_is_what_torch_counts(zoo: ModuleType) -> None:
    model = zoo.model("llama")
    ids = torch.ones(1, 40, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        assert decoder_shape(model.config).kv_bytes(40, "float32") == sum(
            t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
        )
        step = timing.count_flops(lambda: model(input_ids=ids[:, :1], past_key_values=cache))
    assert decoder_shape(model.config).forward(1, 40).flops == pytest.approx(step, rel=0.003)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "falcon", "olmo2"])
def test_parameters_are_the_matrices(zoo: ModuleType, architecture: str) -> None:
    model = zoo.model(architecture)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "wpe" not in name)
    assert decoder_shape(model.config).parameters == matrices


def test_published_shapes_have_their_published_sizes() -> None:
    billions = {name: shapes.find_shape(name).parameters / 1e9 for name in ("llama-1b", "llama-3b", "llama-8b")}
    assert billions == pytest.approx({"llama-1b": 1.236, "llama-3b": 3.213, "llama-8b": 8.030}, rel=0.001)
    assert shapes.find_shape("llama-8b").kv_bytes(1, "bfloat16") == 131072  # 2 x 32 layers x 8 heads x 128 x 2 bytes


def test_causal_attention_and_windows_count_the_pairs_they_need(zoo: ModuleType) -> None:
    shape = decoder_shape(zoo.model("gemma3_text").config)
    assert shape.windows == (512, None, 512)
    for tokens, past in ((700, 0), (10, 600), (100, 480), (5, 0)):
        seen = [past + t + 1 for t in range(tokens)]
        left_out = 3 * tokens * (past + tokens) - sum(seen) - 2 * sum(min(n, 512) for n in seen)
        every, needed = (shape.forward(tokens, past, causal=causal).flops for causal in (False, True))
        assert every - needed == 4 * shape.heads * shape.head_dim * left_out


def test_bytes_of_a_step_are_weights_and_cache(zoo: ModuleType) -> None:
    shape = decoder_shape(zoo.model("llama").config)
    step = shape.forward(1, 99, dtype="float32").bytes
    read = shape.parameters - shape.vocab * shape.width + shape.width  # of the embedding table one row
    assert step == 4 * read + shape.kv_bytes(100, "float32")
    assert shape.forward(1, 99, batch=8, dtype="float32").bytes < 8 * step
    sparse = decoder_shape(zoo.model("mixtral").config)
    assert sparse.forward(1).bytes < sparse.forward(64).bytes - 60 * sparse.kv_bytes(1, "bfloat16")


def test_costs_refuse_what_they_cannot_count(zoo: ModuleType) -> None:
    from transformers import MambaConfig

    shape = decoder_shape(zoo.model("llama").config)
    with pytest.raises(ValueError, match="'mamba' model costs is not known"):
        decoder_shape(MambaConfig())
    with pytest.raises(ValueError, match="tokens must be a whole number >= 0, got -1"):
        shape.forward(-1)
    with pytest.raises(ValueError, match="cannot run on 5 of 4"):
        shape.forward(4, logits=5)
    with pytest.raises(ValueError, match="dtype must be one of"):
        shape.weight_bytes("int3")
    with pytest.raises(ValueError, match="no reader: give a shape"):
        shapes.find_shape("no-such-model")


# -- the device ------------------------------------------------------------------------------------------------------


def test_roofline_is_measured_and_bounds_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.MATRIX_SIZES, "cpu", (128, 256))
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", (1 << 24,))
    found = roofline.measure.__wrapped__("cpu", "float32", 0.2)
    assert 1e8 < found.flops < 1e14
    assert 1e7 < found.bandwidth < 1e13
    assert found.seconds(costs.Work(found.flops, 0)) == pytest.approx(1)
    assert found.seconds(costs.Work(found.flops, 3 * found.bandwidth)) == pytest.approx(3)


def test_roofline_refuses_bad_devices_and_rates() -> None:
    with pytest.raises(ValueError, match="must be float32"):
        roofline.measure("cpu", "int8")
    with pytest.raises(ValueError, match="cannot be used"):
        roofline.measure("nonsense", "float32")
    with pytest.raises(ValueError, match="must be a positive number, got 0"):
        roofline.Roofline(0.0, 1e9, "float32")


def test_parts_add_up_and_memory_is_seen(reader: Reader) -> None:
    parts = clock.answer_parts(reader, lambda: [["Some text to read."]], 3)
    assert parts.load + parts.plan + parts.prefill == pytest.approx(parts.ttft)
    assert parts.decode > 0
    assert clock.answer_parts(reader, lambda: [["Some text to read."]], 1).decode == 0
    small = clock.peak_memory(torch.device("cpu"), lambda: None)
    big = clock.peak_memory(torch.device("cpu"), lambda: torch.ones(1 << 26))
    if small is not None and big is not None:
        assert big - small > 200 << 20


# -- what is read ----------------------------------------------------------------------------------------------------


def test_passages_and_tail_have_the_wanted_length(reader: Reader) -> None:
    texts = entrants.make_passages(reader, 6, 50)
    assert len(set(texts)) == 6
    assert all(abs(len(ids) - 50) <= 2 for ids in reader.tokenize_batch(texts))
    assert 60 <= reader.length([entrants.make_tail(reader)]) <= 64


@pytest.mark.parametrize("interface", ["embeds", "kv"])
def test_random_slots_are_read(reader: Reader, interface: str) -> None:
    made = entrants.random_passage(reader, 40, 5, interface, torch.Generator().manual_seed(0))
    assert (made.slots, made.ratio) == (5, 8)
    answer = reader.generate([[made, " Question:"]], 2, min_new_tokens=2)
    assert isinstance(answer[0], str)
    plain = decoder_shape(reader.model.config)
    held = plain.kv_bytes(5, "float32") + 8 * 5 if interface == "kv" else plain.embed_bytes(5, "float32")
    assert made.nbytes == held


def test_entrants_are_found_or_refused(reader: Reader) -> None:
    found = entrants.find_entrants(reader, ["mean-pool@4,8"], [16, 512], ["embeds", "kv"], untrained=True)
    assert [(e.method, e.ratio, e.interface, e.trained) for e in found] == [
        ("random-slots", 16, "embeds", True),
        ("random-slots", 512, "embeds", True),
        ("random-slots", 16, "kv", True),
        ("random-slots", 512, "kv", True),
        ("mean-pool", 4, "embeds", False),
        ("mean-pool", 8, "embeds", False),
    ]
    with pytest.raises(ValueError, match="no trained compressors"):
        entrants.find_entrants(reader, ["icae-small"], [], [], untrained=True)
    with pytest.raises(ValueError, match="at least 1"):
        entrants.find_entrants(reader, [], [0.5], ["embeds"], untrained=True)
    with pytest.raises(ValueError, match="embeds or kv"):
        entrants.find_entrants(reader, [], [4], ["text"], untrained=True)


# -- rows ------------------------------------------------------------------------------------------------------------

PRESENT = {
    "suite", "test", "device", "dtype", "date", "command", "reader_shape", "weights", "context_tokens", "passages", "batch",
    "method", "ratio", "plan_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "ttft_full_ms", "ttft_speedup",
    "roofline_ms", "roofline_share", "flops", "bytes_per_passage", "requests_per_s", "matrix_tflops", "copy_gbps",
}  # fmt: skip


def measure(reader: Reader, given: list[entrants.Entrant], cases: list[account.Case], **more: Any) -> list[rows.Row]:
    shape = decoder_shape(reader.model.config, "llama-tiny")
    options = {"repeats": 1, "warmup": 0, "decode_tokens": 2, "random_weights": True} | more
    given_to_account = {key: options.pop(key) for key in ("have", "keep", "say") if key in options}
    how = account.Measurement(reader, shape, RATES, **options)
    return account.account(how, given, cases, **given_to_account)


@pytest.mark.slow
def test_rows_of_every_entrant_and_case(reader: Reader) -> None:
    given = entrants.find_entrants(reader, ["mean-pool@8"], [16], ["embeds", "kv"], untrained=True)
    found = measure(reader, given, [account.Case(200, 4), account.Case(200, 4, 2)])
    assert [(r["batch"], r["method"], r["interface"]) for r in found] == [
        (batch, method, interface)
        for batch in (1, 2)
        for method, interface in (
            ("full", "text"), ("random-slots", "embeds"), ("random-slots", "kv"), ("mean-pool", "embeds"),
        )
    ]  # fmt: skip
    for row in found:
        assert set(row) >= PRESENT
        assert row["weights"] == "random"
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert row["ttft_ms"] == pytest.approx(row["plan_ms"] + row["prefill_ms"] + row.get("load_ms", 0), rel=0.02)
        assert row["context_tokens"] == pytest.approx(200, abs=6)
    full, soft, kv, trained = found[:4]
    assert "compress_ms" not in full
    assert full["ratio"] == full["ttft_speedup"] == 1
    assert soft["slots"] == 16
    assert soft["slots_are"] == "random values"
    assert soft["compress_is"] == "bare encoder forward"
    assert "slots_are" not in trained
    assert trained["compressor_weights"] == "random"
    assert 60 <= soft["prompt_tokens"] <= 64
    assert soft["reader_tokens"] == 16 + soft["prompt_tokens"]
    assert soft["flops"] < full["flops"]
    assert kv["flops"] < soft["flops"]
    assert kv["bytes_per_passage"] > soft["bytes_per_passage"] > 0
    for row in (soft, kv, trained):
        assert row["compress_ms"] > 0
        assert row["load_ms"] > 0
    assert found[4]["flops"] == pytest.approx(2 * full["flops"], rel=1e-4)


@pytest.mark.slow
def test_rows_that_are_there_are_not_measured_again(reader: Reader, tmp_path: Path) -> None:
    file = tmp_path / "speed.jsonl"
    given = entrants.find_entrants(reader, [], [16], ["embeds"], untrained=True)
    cases = [account.Case(100, 2), account.Case(150, 2)]

    class Stopped(Exception):
        pass

    def stop_after_one(made: list[rows.Row]) -> None:
        rows.append_rows(file, made)
        raise Stopped

    with pytest.raises(Stopped):
        measure(reader, given, cases, keep=stop_after_one)
    assert [r["context_asked"] for r in rows.read_rows(file)] == [100, 100]
    again = measure(reader, given, cases, have=rows.read_rows(file), keep=lambda made: rows.append_rows(file, made))
    assert [r["context_asked"] for r in again] == [150, 150]
    assert measure(reader, given, cases, have=rows.read_rows(file)) == []
    wider = entrants.find_entrants(reader, [], [16, 32], ["embeds"], untrained=True)
    more = measure(reader, wider, cases, have=rows.read_rows(file))
    assert [(r["context_asked"], r["ratio_asked"]) for r in more] == [(100, 32), (150, 32)]
    assert all(r["ttft_full_ms"] > 0 for r in more)
    assert len(rows.latest([*rows.read_rows(file), *more])) == 6


def test_no_room_and_bad_numbers_are_said(reader: Reader, zoo: ModuleType) -> None:
    short = zoo.reader("gpt2")  # 2,048 positions
    said: list[str] = []
    found = measure(short, [], [account.Case(5000, 5), account.Case(100, 2)], say=said.append)
    assert [r["context_asked"] for r in found] == [100]
    assert "5000 tokens are left out" in said[0]
    with pytest.raises(ValueError, match="too few for any"):
        measure(short, [], [account.Case(5000, 5)])
    with pytest.raises(ValueError, match="at least one passage"):
        account.Case(10, 0)
    with pytest.raises(ValueError, match="repeats >= 1"):
        measure(reader, [], [account.Case(100, 2)], repeats=0)


# -- the command -----------------------------------------------------------------------------------------------------


def test_files_of_questions_have_the_roofline_too(reader: Reader) -> None:
    record = Record("Who was born?", ("Ada",), ("Ada was born here.", "It rained there."), ("", ""), 0, "toy")
    given = entrants.find_entrants(reader, ["gist@4"], [], [], untrained=True)[0]
    found = speed.speed(
        reader, [given], [record], passages=(2,), requests=1, repeats=1, decode_tokens=2, progress=False, roofline=RATES
    )  # fmt: skip
    for row in found:
        assert row["roofline_share"] > 0
        assert row["requests_per_s"] > 0
    assert found[1]["roofline_ms"] < found[0]["roofline_ms"]


def test_command_appends_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nutgraf.benchmarks.cli.app.measure", lambda device, dtype: RATES)
    out = tmp_path / "speed.jsonl"
    ask = ["speed", "--shape", "llama-tiny", "--context", "60", "--passages", "2", "--slots", "16", "--repeats", "1"]
    ask += ["--warmup", "0", "--decode-tokens", "2", "--device", "cpu", "--out", str(out)]
    first = CliRunner().invoke(bench_app, ask)
    assert first.exit_code == 0, first.output
    assert "random-slots" in first.output
    again = CliRunner().invoke(bench_app, ask)
    assert again.exit_code == 0, again.output
    assert "0 rows" in again.output
    assert [row["method"] for row in rows.read_rows(out)] == ["full", "random-slots"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a file"),
        (["--shape", "llama-tiny"], "Give a file"),
        (["sample", "--context", "100"], "not both"),
        (["--shape", "llama-9000b", "--context", "100"], "no shape 'llama-9000b'"),
        (["--shape", "llama-tiny", "--context", "5"], "token for each passage"),
        (["--shape", "llama-tiny", "--context", "100", "--slots", "0"], "at least 1"),
        (["--shape", "llama-tiny", "--context", "100", "--interface", "text"], "embeds or kv"),
    ],
)
def test_command_refuses_bad_requests(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(bench_app, ["speed", "--device", "cpu", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
