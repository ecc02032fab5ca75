"""The leaderboard: equal budgets, resumed runs and rows, its page and picture, on a tiny reader end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from nutgraf.benchmarks.leaderboard import Budget, one_of_each_method, train_all
from nutgraf.benchmarks.names import kind_of
from nutgraf.benchmarks.report.leaderboard import write_leaderboard
from nutgraf.benchmarks.rows import read_rows
from nutgraf.compressors import COMPRESSORS
from nutgraf.recipes.training.schema import load_recipe, recipe_names
from texts import write_people
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, zoo: ModuleType) -> Path:
    """Questions about who lives where, a tiny reader, and two recipes of two stages."""
    folder = tmp_path_factory.mktemp("leaderboard")
    write_people(folder / "qa_toy.jsonl")
    zoo.saved("llama", folder / "reader")
    stage = {"batch_size": 2, "lr": 1e-3, "objectives": {"lm": 1.0}, "mix": {"human": 1.0}}
    stages = [{"name": "one", "steps": 30, **stage}, {"name": "two", "steps": 10, **stage}]
    for name, compressor in (
        ("slots", {"method": "icae", "mem_size": 8, "r": 2}),
        ("pairs", {"method": "beacon", "r": 2}),
    ):
        recipe = {"name": name, "kind": "compressor", "reader": "tiny", "compressor": compressor, "stages": stages}
        recipe["data"] = {"dir": str(folder), "questions": ["qa_toy.jsonl"]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def command(folder: Path, runs: Path, *more: str) -> list[str]:
    names = [f"--recipe={folder / name}.yaml" for name in ("slots", "pairs")]
    options = ["--reader", str(folder / "reader"), "--eval", str(folder / "qa_toy.jsonl"), "--runs", str(runs)]
    options += [
        "--compressor",
        "kv-match:probes=4,repair=none",
        "--ratio",
        "2",
        "--ratio",
        "4",
        "--max-new-tokens",
        "2",
    ]
    return ["bench", "leaderboard", *names, *options, *more]


def test_a_budget_keeps_the_proportions_of_stages(folder: Path) -> None:
    recipe = load_recipe(folder / "slots.yaml")
    assert Budget(steps=4).divide(recipe, []) == [3, 1]
    assert Budget(steps=1).divide(recipe, []) == [1, 1]
    # 30 steps of 1 s and 10 steps of 3 s take a minute
    assert Budget(minutes=2).divide(recipe, [1.0, 3.0]) == [60, 20]
    for wrong in ({}, {"minutes": 1.0, "steps": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match="budget"):
            Budget(**wrong)


@pytest.mark.slow
def test_every_trained_method_has_one_recipe() -> None:
    names = one_of_each_method()
    recipes = {name: load_recipe(name) for name in recipe_names()}
    methods = [recipes[name].compressor["method"] for name in names]
    assert len(set(methods)) == len(methods)
    trained = {recipe.compressor["method"] for recipe in recipes.values() if recipe.kind == "compressor"}
    assert set(methods) == trained <= set(COMPRESSORS)
    assert "icae" in names


@pytest.mark.slow
def test_from_the_command_to_the_page(folder: Path, tmp_path: Path) -> None:
    from nutgraf.cli import app

    done = CliRunner().invoke(app, command(folder, tmp_path, "--steps", "4"))
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "leaderboard.jsonl")
    lines = {(row["half"], row["method"], row.get("ratio_asked"), row.get("budget_of")) for row in rows}
    assert len(lines) == len(rows) == 2 * (2 + 2 + 2 + 2 * 2)
    for half in ("tune", "report"):
        assert {(half, "full", None, None), (half, "none", None, None), (half, "icae", 4.0, None)} <= lines
        assert (half, "truncate", 2.0, "kv-match:probes=4,repair=none") in lines
    for row in rows:
        if row["method"] in ("icae", "beacon"):
            assert row["train_steps"] == 4
            assert row["train_seconds"] > 0
            assert row["bytes_per_passage"] > 0
            assert row["recipe"] in ("slots", "pairs")
    page = (tmp_path / "leaderboard.md").read_text()
    assert "4 optimiser steps" in page
    assert page.count("Activation Beacon") == 4
    assert page.count("| ICAE |") == 4
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/log.jsonl")}
    assert len(before) == 2
    again = CliRunner().invoke(app, command(folder, tmp_path, "--steps", "4"))
    assert again.exit_code == 0, again.output
    assert read_rows(tmp_path / "leaderboard.jsonl") == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = CliRunner().invoke(app, command(folder, tmp_path, "--steps", "5"))
    assert other.exit_code == 2
    assert "another leaderboard" in " ".join(other.output.split())


@pytest.mark.slow
def test_minutes_are_turned_into_steps_once(folder: Path, tmp_path: Path, zoo: ModuleType) -> None:
    reader, said = zoo.reader(), list[str]()
    go = [folder / "slots.yaml", tmp_path / "missing.yaml"], [], reader, Budget(minutes=0.02), tmp_path / "runs"
    assert train_all(*go, max_minutes=0, say=said.append) is None
    budget = json.loads((tmp_path / "runs" / "slots" / "budget.json").read_text())
    (entry,) = train_all(*go, say=said.append)
    assert entry.facts["train_steps"] == sum(budget["stages"])
    assert entry.name == "icae"
    assert not (tmp_path / "runs" / "slots" / "probe").exists()
    assert any("missing.yaml is left out" in line for line in said)
    with pytest.raises(ValueError, match="No recipe of the leaderboard can be trained"):
        train_all([tmp_path / "missing.yaml"], [], reader, Budget(steps=1), tmp_path / "none", say=said.append)


@pytest.mark.slow
def test_a_recipe_that_diverges_is_left_out_and_not_tried_again(folder: Path, tmp_path: Path, zoo: ModuleType) -> None:
    said = list[str]()
    bad = yaml.safe_load((folder / "slots.yaml").read_text())
    bad["stages"][0] |= {"lr": 1e38, "schedule": "constant", "warmup": 0.0, "log_every": 1}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    go = [tmp_path / "bad.yaml", folder / "pairs.yaml"], [], zoo.reader(), Budget(steps=8), tmp_path
    assert [entry.name for entry in train_all(*go, say=said.append)] == ["beacon"]
    assert [entry.name for entry in train_all(*go, say=said.append)] == ["beacon"]
    assert sum("is left out" in line for line in said) == 2
    assert sum("of 2: " in line and "bad" in line for line in said) == 1


@pytest.mark.slow
def test_the_page_ranks_and_the_picture_shows_shares(tmp_path: Path) -> None:
    def row(method: str, scores: list[float], **more: object) -> dict:
        about = {"f1": sum(scores) / len(scores)} | {
            "suite": "quality",
            "half": "report",
            "dataset": "qa_toy",
            "questions": "q",
            "reader": "r",
            "n": len(scores),
        }
        return (
            about
            | {"method": method, "f1_each": scores, "reader_tokens": 9.0, "ratio": 4.0, "interface": "text"}
            | more
        )

    rows = [
        row("full", [1.0] * 9 + [0.0], ratio=1.0, bytes_per_passage=500),
        row("none", [0.0] * 9 + [1.0], ratio=0.0),
        row("icae", [1.0, 1.0] + [0.0] * 8, ratio_asked=4.0, bytes_per_passage=9e4, train_steps=7, train_seconds=120.0),
        row("gist", [1.0] * 6 + [0.0] * 4, ratio_asked=4.0, bytes_per_passage=9e5, reader_tuned=True),
        row("xrag", [1.0] * 3 + [0.0] * 7, ratio=122.5, ratio_asked=None, bytes_per_passage=2e3),
    ]
    page, picture = write_leaderboard(tmp_path, rows, 15.0, None)
    text = page.read_text()
    assert "15 minutes" in text
    assert text.index("gist tokens") < text.index("ICAE") < text.index("Ratio of its own") < text.index("xRAG")
    (line,) = [line for line in text.splitlines() if line.startswith("| ICAE")]
    assert "2.0 min | 7 |" in line
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {kind_of(row) for row in rows} == {"fixed", "text"}
