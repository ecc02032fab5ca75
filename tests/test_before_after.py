"""Earlier ways and present ones do the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from nutgraf.benchmarks import before_after, shapes
from nutgraf.benchmarks.rows import read_rows
from nutgraf.compressors import Reader
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def reader() -> Reader:
    return shapes.random_reader("llama-tiny", device="cpu", dtype="float32")


def test_the_ways_read_every_passage(reader: Reader) -> None:
    rows: list[torch.Size] = []
    handle = reader.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        seen = []
        for run in before_after.batches(reader, passages=9).values():
            rows.clear()
            run()
            seen.append((sum(n for n, _ in rows), sum(n * length for n, length in rows)))
    handle.remove()
    assert [n for n, _ in seen] == [9] * 3
    assert seen[0][1] >= seen[1][1] == seen[2][1]


def test_both_heads_give_the_same_gradient(reader: Reader) -> None:
    ways = before_after.head(reader, tokens=700)
    gradients = []
    for run in ways.values():
        (hidden,) = {c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, torch.Tensor)  # type: ignore[union-attr]
                     and c.cell_contents.requires_grad}  # fmt: skip
        hidden.grad = None
        run()
        gradients.append(hidden.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)


def test_rows(reader: Reader, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(before_after.main)
    out = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, ["--change", "head", "--repeats", "1", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = read_rows(out)
    assert [row["way"] for row in rows] == ["recomputed", "once"]
    assert rows[0]["share_of_before"] == 1
    assert all({"ms", "threads", "command", "device"} <= set(row) for row in rows)
    with pytest.raises(ValueError, match="Changes are batches, head, classifier"):
        before_after.measure(reader, "luck", 1)
