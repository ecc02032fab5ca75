"""Sweeps: the grid of the command line, one row a measurement, and what a second run leaves alone."""

from __future__ import annotations

import json

import pytest
import yaml
from nutgraf import load_compressor
from nutgraf.recipes.sweep import Evaluation, best_first, make_cells, parse_grid, run_sweep, split_values
from texts import write_people
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory, zoo):
    """Questions about who lives where, a tiny reader, and a recipe of two steps."""
    folder = tmp_path_factory.mktemp("sweep")
    write_people(folder / "qa_toy.jsonl")
    zoo.saved("llama", folder / "reader")
    stage = {
        "name": "answers",
        "steps": 2,
        "batch_size": 2,
        "lr": 1e-3,
        "objectives": {"lm": 1.0},
        "mix": {"human": 1.0},
    }
    recipe = {
        "name": "toy",
        "kind": "compressor",
        "reader": str(folder / "reader"),
        "data": {"dir": str(folder), "questions": ["qa_toy.jsonl"]},
        "compressor": {"method": "icae", "mem_size": 8, "r": 2, "ratio": 4.0},
        "stages": [stage],
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_the_grid_of_a_command_line():
    given = ["data.dir=x", "seed=0,1", "stages.*.ratios=[2, 4],{min: 2, max: 8}", "name='a,b'"]
    fixed, grid = parse_grid(given)
    assert fixed == ["data.dir=x", "name='a,b'"]
    assert grid == {"seed": ["0", "1"], "stages.*.ratios": ["[2, 4]", "{min: 2, max: 8}"]}
    assert split_values("[[1, 2], 3], 'x,y' ,") == ["[[1, 2], 3]", "'x,y'", ""]
    for wrong, message in ((["seed"], "key=value"), (["seed=1,"], "empty value"), (["a=1,2", "a=3,4"], "stands twice")):
        with pytest.raises(ValueError, match=message):
            parse_grid(wrong)


def test_cells_are_told_apart_by_what_decides_their_weights(folder, zoo):
    cells = make_cells(folder / "toy.yaml", ["seed=3"], {"stages.*.lr": ["1e-3", "2e-3"], "compressor.r": ["2", "4"]})
    assert [cell.settings["compressor.r"] for cell in cells] == ["2", "4", "2", "4"]
    assert all(cell.recipe.seed == 3 for cell in cells)
    assert cells[2].recipe.stages[0].lr == 2e-3
    reader, other = zoo.reader(), zoo.reader(seed=1)
    names = {cell.folder(reader) for cell in cells}
    assert len(names) == 4
    assert all("lr=" in name and "/" not in name for name in names)
    moved = make_cells(folder / "toy.yaml", ["seed=3", "data.dir=elsewhere", "stages.*.log_every=7"], {})[0]
    here = make_cells(folder / "toy.yaml", ["seed=3"], {})[0]
    assert moved.key(reader) == here.key(reader) != here.key(other)
    with pytest.raises(ValueError, match="trains a reader"):
        make_cells("reader", [], {})


@pytest.mark.slow
def test_two_cells_are_trained_scored_and_not_done_twice(folder, tmp_path, zoo):
    reader = zoo.reader()
    cells = make_cells(folder / "toy.yaml", [f"reader={folder / 'reader'}"], {"seed": ["0", "1"]})
    readers = {str(folder / "reader"): reader}
    asked = Evaluation(("qa_toy.jsonl",), limit=2, ratios=(None, 2.0), max_new_tokens=3)
    written: list[dict] = []
    said: list[str] = []

    def go(**more):
        return run_sweep(cells, tmp_path, asked, written.extend, readers=readers, say=said.append, **more)

    assert go(max_minutes=0) == []
    assert "Stopped in cell 1" in said[-1]
    rows = go()
    assert rows == written
    assert [(row["settings"]["seed"], row["ratio_asked"]) for row in rows] == [
        ("0", 4.0),
        ("0", 2.0),
        ("1", 4.0),
        ("1", 2.0),
    ]
    for row in rows:
        assert row["dataset"] == "qa_toy"
        assert row["n"] == 2
        assert row["steps"] == 2
        assert row["train_loss"] > 0
        assert all(0 <= row[name] <= 1 for name in ("f1", "f1_full", "f1_none", "f1_shuffled"))
    assert rows[1]["ratio"] < rows[0]["ratio"]
    (first,) = tmp_path.glob("seed=0-*")
    load_compressor(first / "final", reader)
    assert not list((first / "checkpoints").iterdir())
    stored = [json.loads(json.dumps(row)) for row in written]
    assert go(have=stored) == stored
    assert len(written) == 4, "a cell was measured twice"
    before = (first / "log.jsonl").read_bytes()
    again = go(have=stored[2:])
    assert (first / "log.jsonl").read_bytes() == before, "a finished cell was trained again"
    assert [row["f1"] for row in again] == [row["f1"] for row in rows]
    assert len(written) == 6


@pytest.mark.slow
def test_a_cell_that_diverges_is_told_and_the_others_go_on(folder, tmp_path, zoo):
    cells = make_cells(folder / "toy.yaml", [], {"stages.*.lr": ["1e-3", "1e38"]})
    asked = Evaluation(("qa_toy.jsonl",), limit=2, max_new_tokens=2)
    written: list[dict] = []
    given = dict(readers={str(folder / "reader"): zoo.reader()}, say=lambda line: None)
    rows = run_sweep(cells[::-1], tmp_path, asked, written.extend, **given)
    assert [("diverged" in row, "f1" in row) for row in rows] == [(True, False), (False, True)]
    assert "diverged" in best_first(rows)[-1]
    assert run_sweep(cells[::-1], tmp_path, asked, written.extend, have=rows, **given) == rows


def test_files_without_questions_of_the_half_are_refused(folder):
    with pytest.raises(ValueError, match="no questions of the half 'dev'"):
        Evaluation(("qa_toy.jsonl",), half="dev").records("qa_toy.jsonl", str(folder))
    assert len(Evaluation((), half=None, limit=4).records(str(folder / "qa_toy.jsonl"), None)) == 4


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    from nutgraf.cli import app

    results = tmp_path / "sweeps.jsonl"
    command = ["sweep", str(folder / "toy.yaml"), "-o", str(tmp_path / "runs"), "seed=0,1", "--eval", "qa_toy.jsonl"]
    command += ["--limit", "2", "--results", str(results)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert all({"command", "device", "dtype", "reader", "compressor", "date"} <= set(row) for row in rows)
    again = CliRunner().invoke(app, command)
    assert again.output.count("measured before") == 2
    assert len(results.read_text().splitlines()) == 2
    wrong = CliRunner().invoke(app, [*command, "stages.0.stps=1,2"])
    assert wrong.exit_code == 2
    assert "did you mean 'steps'" in " ".join(wrong.output.split())
