"""The training account: a step beside its bare passes, the teacher apart, losses in bounded memory, rows kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nutgraf.benchmarks.cli.app import bench_app
from nutgraf.benchmarks.costs import shapes
from nutgraf.benchmarks.speed import training
from nutgraf.compressors import Reader, make_compressor
from nutgraf.recipes.tasks.items import Reading
from nutgraf.recipes.tasks.module import CompressorBatch, CompressorModule
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def reader() -> Reader:
    return shapes.random_reader("llama-tiny", device="cpu", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lm", "kl", "kl-cached"])
def test_a_step_is_timed_beside_its_bare_passes(reader: Reader, family: str) -> None:
    wanted = training.Wanted("icae", family, {"mem_size": 16, "r": 2}, steps=1, warmup=1, batch_size=2)
    row = training.measure_step(reader, wanted)
    assert min(row["step_ms"], row["bare_ms"], row["tokens_per_s"]) > 0
    assert row["positions"] > row["target_tokens"] > 0
    assert (row["teacher_ms"] is not None) == (family == "kl")


def test_the_bare_passes_run_the_batchs_own_positions(reader: Reader) -> None:
    torch.manual_seed(0)
    compressor = make_compressor("icae", reader, mem_size=8, r=2)
    module = CompressorModule(compressor)
    texts = ["The treaty was signed in 1648 in Westphalia.", "Rivers carry sediment to the sea, and some of it stays."]
    readings = [Reading("repeat", text, ("ae",)) for text in texts]
    targets = reader.tokenize_batch(texts)
    batch = CompressorBatch(texts, None, 4.0, readings, [[0], [1]], targets)
    encoded, read, scored = training.batch_positions(module, batch)
    slots = [p.slots for p in compressor.encode(texts, ratio=4.0)]
    assert encoded == [len(reader.bos_ids) + len(t) + n for t, n in zip(targets, slots)]
    assert scored == sum(map(len, targets))
    prompt = reader.length(readings[0].prompt(compressor.encode(texts[:1], ratio=4.0)))
    assert read[0] == prompt + len(targets[0]) - 1
    reader.head(torch.zeros(1, reader.width))  # its first use runs the model once
    shapes_run: list[torch.Size] = []
    handles = [
        body.register_forward_pre_hook(lambda m, a, k: shapes_run.append(k["inputs_embeds"].shape), with_kwargs=True)
        for body in (compressor.encoder_body(), reader.model.get_decoder())
    ]
    training.bare_step(module, encoded, read, scored)
    for handle in handles:
        handle.remove()
    assert [shape[0] * shape[1] for shape in shapes_run] == [2 * -(-sum(n) // 2) for n in (encoded, read)]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_methods_without_an_encoder_and_bad_numbers_are_refused(reader: Reader) -> None:
    with pytest.raises(ValueError, match="Objectives are ae, lm"):
        training.Wanted("icae", "mse")
    with pytest.raises(ValueError, match="must be at least 1"):
        training.Wanted("icae", "lm", steps=0)
    with pytest.raises(ValueError, match="losses with memory of their own"):
        training.loss_memory("ae", 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lm", "kl"])
def test_memory_of_the_losses_is_bounded_by_the_chunk(family: str) -> None:
    found = training.loss_memory(family, 640, vocabulary=60000, width=4, chunk=160)
    if found["extra_bytes"] is None:
        pytest.skip("This system does not tell how much memory is in use.")
    slack = 24 << 20  # of the allocator
    assert found["extra_bytes"] < found["bound_bytes"] + slack < found["whole_bytes"] / 3


@pytest.mark.slow
def test_rows_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    step = [
        "training",
        "--shape",
        "llama-tiny",
        "--objective",
        "ae",
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--device",
        "cpu",
    ]
    asked = [[*step, "--out", str(out)], ["training", "--memory", "8", "--objective", "lm", "--out", str(out)]]
    for arguments in [*asked, *asked]:
        result = CliRunner().invoke(bench_app, arguments)
        assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["test"] for row in rows] == ["step", "loss-memory"]
    assert rows[0]["weights"] == "random"
    assert {"step_cost", "tokens_per_s", "bare_tokens_per_s", "commit", "device", "date"} <= set(rows[0])
    bad = CliRunner().invoke(
        bench_app, ["training", "--shape", "llama-tiny", "--compressor", "xrag", "--device", "cpu"]
    )
    assert bad.exit_code == 2
