"""The documentation names what exists: imports, commands, recipes and methods; its Python runs and the site builds."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo
from nutgraf.compressors import COMPRESSORS, SoftCompressor, make_compressor
from nutgraf.compressors.objectives.registry import OBJECTIVES, targets_of
from nutgraf.recipes.training.schema import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_BY_NAME = {str(page.relative_to(ROOT)): page for page in PAGES}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language ("": none), indentation removed."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), re.S | re.M)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands() -> list[str]:
    """Every `nutgraf ...` line of the pages' blocks, and those inline in text."""
    fenced = [line for page in PAGES for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line for line in fenced if line.startswith("nutgraf ")})


@pytest.mark.parametrize("name", PAGES_BY_NAME)
def test_imports_exist(name):
    for block in blocks(PAGES_BY_NAME[name], "py(?:thon)?"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "nutgraf":
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name}: from {node.module} import {alias.name}"


@pytest.fixture(scope="module")
def command_line() -> dict[str, Any]:
    """Every command by its path."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return dict(importlib.import_module("commands").walk())
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize("line", commands())
def test_commands_and_their_options_exist(line, command_line):
    words = shlex.split(line, comments=True)
    path = words.pop(0)
    while hasattr(command_line[path], "commands"):
        path = f"{path} {words.pop(0)}"
        assert path in command_line, f"there is no command {path!r}"
    command = command_line[path]
    known = {flag for option in command.params for flag in [*option.opts, *option.secondary_opts]}
    assert {word for word in words if word.startswith("-")} - known <= {"--help"}


@pytest.mark.slow
def test_quoted_errors_exist():
    files = [f for folder in ("compressors", "adapters", "recipes") for f in (ROOT / folder).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    raised = "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    quoted = re.findall(r"^> (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    for piece in {piece.strip(" ,.:;") for line in quoted for piece in line.split("...")}:
        assert piece in raised, piece


def test_every_objective_is_described():
    described = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "objectives.md").read_text(), re.M)
    own = {name for cls in COMPRESSORS.values() if issubclass(cls, SoftCompressor) for name in cls.own_objectives()}
    assert set(described) == set(OBJECTIVES) | own


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("nutgraf train ")])
def test_recipes_and_their_overrides_exist(line):
    words = shlex.split(line, comments=True)[2:]
    load_recipe(words[0], [word for word in words if "=" in word])


def test_every_method_has_a_page_with_its_settings():
    named = [m for page in PAGES for m in re.findall(r"^<!-- settings: (\S+) -->$", page.read_text(), re.M)]
    folders = ("soft", "kv", "text")  # subclasses for published checkpoints live in importers
    assert sorted(named) == sorted(m for m, cls in COMPRESSORS.items() if cls.__module__.split(".")[2] in folders)


@pytest.fixture
def contributed(monkeypatch) -> Iterator[None]:
    """The examples of CONTRIBUTING.md, run as modules of the package."""
    before = dict(COMPRESSORS), dict(OBJECTIVES)
    for package, code in zip(("soft", "objectives"), blocks(ROOT / "CONTRIBUTING.md", "py"), strict=True):
        module = types.ModuleType(f"nutgraf.compressors.{package}.example")
        module.__package__ = f"nutgraf.compressors.{package}"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, module.__name__, "exec"), module.__dict__)
    yield
    for registry, names in zip((COMPRESSORS, OBJECTIVES), before):
        for name in set(registry) - set(names):
            del registry[name]


def test_the_examples_of_contributing_work(contributed):
    compressor = make_compressor("example", zoo.reader("llama"), memory_tokens=4)
    passages = compressor.compress(["A passage of several words. " * 10, "", "Short."], ratio=4)
    assert [p.slots for p in passages] == [-(-p.source_tokens // 4) for p in passages]
    assert targets_of("my-objective") == {"answer"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in PAGES_BY_NAME if n.startswith("docs") and blocks(PAGES_BY_NAME[n], "python")]
)
def test_python_runs(name):
    exec(compile("\n".join(blocks(PAGES_BY_NAME[name], "python")), name, "exec"), {})


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outside = {
        url
        for path in (tmp_path / "site").rglob("*.html")
        for url in re.findall(
            r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href)="(https?://[^"]+)', path.read_text()
        )
    }
    assert not outside, "pages must need no network"


def test_joined_passages_have_the_numbers_of_their_rows():
    page = (ROOT / "docs" / "methods" / "kv-match.md").read_text().partition("## Several passages")[2]
    rows = (ROOT / "benchmarks" / "results" / "kv_joined.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, rows) if row["n"] == 40]
    assert len(rows) == 6
    for row in rows:
        share = f"{100 * row['recovered_share']:.0f} %"
        if 0 < row["recovered_share"] < 1:
            share += f" ({100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f})"
        kl = "0" if row["method"] == "full" else f"{row['kl_to_full']:.2f}"
        cells = [f"{row['reader_tokens']:.0f}", f"{100 * row['f1']:.1f}", share, kl, f"{row['nll']:.1f}"]
        assert f"| {' | '.join(cells)} |" in page


def test_the_scores_that_were_tried_have_the_numbers_of_their_rows():
    page = (ROOT / "docs" / "methods" / "kv-match.md").read_text()
    shown = re.findall(r"^\| [^|]+ \| ([^|]*\)) \| ([^|]*\)) \|$", page.partition("| score | at 8x |")[2], re.M)
    rows = (ROOT / "benchmarks" / "results" / "kv_scores.jsonl").read_text().splitlines()
    changes: dict[float, set[str]] = {8.0: set(), 16.0: set()}
    for row in map(json.loads, rows):
        change, low, high = (row[f"nll_change{end}"] for end in ("", "_low", "_high"))
        changes[row["ratio_asked"]].add(f"{change:+.2f} ({low:+.2f} to {high:+.2f})".replace("-0.00 (", "0.00 ("))
    assert len(shown) >= 12
    assert {at_8 for at_8, _ in shown} <= changes[8.0]
    assert {at_16 for _, at_16 in shown} <= changes[16.0]
