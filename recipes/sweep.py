"""Sweeps: trains and evaluates a recipe once for every combination of settings.

A cell is one combination. Its folder is named by its settings and the hash of everything that determines its weights; a sweep
that is run again skips finished cells and resumes the interrupted one.

Example:
    >>> fixed, grid = parse_grid(["data.dir=corpus", "stages.*.lr=1e-3,2e-3", "seed=0,1"])
    >>> [cell.settings for cell in make_cells("icae", fixed, grid)][0]
    {'stages.*.lr': '1e-3', 'seed': '0'}
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compressors import Compressor, Reader, load_compressor
from ..compressors.core.textfiles import check_strings
from .data.corpus import Record
from .data.records import load_records
from .tasks.compressor import CompressorTask
from .tasks.evaluation import compressed_scores, fixed_scores
from .training.checkpoints import CheckpointStore
from .training.schema import Recipe, load_recipe
from .training.trainer import run_recipe

Row = dict[str, Any]
_PAIRS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Cell:
    """One combination of a sweep: its settings and its recipe."""

    settings: dict[str, str]
    recipe: Recipe

    def key(self, reader: Reader) -> str:
        """Hash of what determines the weights: the recipe without paths and intervals, and the reader."""
        parts = json.dumps([self.recipe.identity(), reader.fingerprint], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:12]

    def folder(self, reader: Reader) -> str:
        """Name of its folder: shortened settings, and the key."""
        said = "_".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items())
        return f"{re.sub(r'[^A-Za-z0-9=._-]+', '-', said)[:80]}-{self.key(reader)}".lstrip(".-")


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of every cell: `limit` questions of each file, evenly spread, at each ratio.

    Attributes:
        files: question files, as paths or as names in the recipe's `data.dir`.
        half: half of a file; None: both.
        ratios: compression ratios; None: the compressor's own.
    """

    files: tuple[str, ...]
    half: str | None = "tune"
    limit: int = 200
    ratios: tuple[float | None, ...] = (None,)
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        check_strings("files", self.files, "question files")

    def records(self, file: str, folder: str | None) -> list[Record]:
        """Questions of one file. Raises ``ValueError`` if there are none."""
        path = Path(file)
        found = load_records([path.name], path.parent, self.half) if path.is_file() else None
        found = load_records([file], folder, self.half) if found is None else found
        if not found:
            raise ValueError(f"{file} holds no questions of the half {self.half!r}; choose another --half or file.")
        return found[:: max(1, len(found) // self.limit)][: self.limit]


def parse_grid(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Splits overrides into those with one value and those with several, `key=v1,v2`; ValueError for a malformed one."""
    fixed: list[str] = []
    grid: dict[str, list[str]] = {}
    for argument in check_strings("arguments", arguments, "key=value settings"):
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"{argument!r} is not of the form key=value or key=value,value.")
        values = split_values(text)
        if len(values) > 1 and "" in values:
            raise ValueError(f"{argument!r} has an empty value; write null for none.")
        if key in grid:
            raise ValueError(f"{key!r} stands twice in the sweep; give all its values at once: {key}=v1,v2.")
        if len(values) == 1:
            fixed.append(argument)
        else:
            grid[key] = values
    return fixed, grid


def split_values(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes: `[1, 2],3` gives `[1, 2]` and `3`."""
    parts, closing, quote = [""], "", ""
    for character in text:
        if character == "," and not closing and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _PAIRS:
            closing = _PAIRS[character] + closing
        elif closing.startswith(character):
            closing = closing[1:]
        parts[-1] += character
    return [part.strip() for part in parts]


def make_cells(recipe: str | Path, fixed: Sequence[str], grid: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Every combination of the grid's values; the last key varies fastest. ValueError for an invalid recipe."""
    cells = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values))
        loaded = load_recipe(recipe, [*fixed, *(f"{key}={value}" for key, value in settings.items())])
        if loaded.kind != "compressor":
            raise ValueError(f"A sweep trains compressors; the recipe {loaded.name!r} trains a {loaded.kind}.")
        cells.append(Cell(settings, loaded))
    return cells


def run_sweep(
    cells: Sequence[Cell],
    out: str | Path,
    evaluation: Evaluation,
    write: Callable[[list[Row]], None],
    *,
    have: Sequence[Row] = (),
    about: Callable[[Reader, int, Compressor | None], Row] | None = None,
    readers: Mapping[str, Reader] | None = None,
    max_minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Trains and evaluates each cell.

    Args:
        out: folder of the cells' folders. A finished cell keeps its compressor and log, not its checkpoints.
        write: called with the rows of a cell as soon as it is measured.
        have: rows of earlier sweeps, which are not measured again; a cell with all rows is not trained.
        about: provenance of a row, from the reader, the seed and the compressor.
        readers: loaded readers by their names in recipes.
        max_minutes: stop after this many minutes; the same sweep resumes from there.
        say: prints a line.

    Returns:
        Rows of all measured cells, including `have`. F1 lies in [0, 1]. A cell whose loss became NaN or infinite has one row,
        with `diverged` instead of scores.
    """
    loaded = dict(readers or {})
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    known = {_identity(row): row for row in have if row.get("suite") == "sweep"}
    asked: dict[str, list[Record]] = {}
    fixed: dict[tuple[str, str], dict[str, float]] = {}
    rows: list[Row] = []
    for number, cell in enumerate(cells, 1):
        name = str(cell.recipe.reader)
        reader = loaded.get(name) or loaded.setdefault(name, Reader.from_pretrained(name))
        key = cell.key(reader)
        wanted = [(file, ratio) for file in evaluation.files for ratio in evaluation.ratios]
        lines = {place: _line(cell, key, place, evaluation) for place in wanted}
        failed = known.get((key, *[None] * 5))
        done = [failed] if failed else [known[i] for line in lines.values() if (i := _identity(line)) in known]
        rows += done
        missing = [] if failed else [place for place, line in lines.items() if _identity(line) not in known]
        title = f"Cell {number} of {len(cells)}: {' '.join(f'{k}={v}' for k, v in cell.settings.items())}"
        if not missing:
            say(f"{title}: measured before")
            continue
        say(title)
        left = None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)
        folder = Path(out) / cell.folder(reader)
        origin = about or (lambda reader, seed, compressor: {"seed": seed})
        try:
            final = train_cell(cell, reader, folder, left)
        except FloatingPointError as error:
            say(str(error))
            row = {**_head(cell, key), "diverged": str(error), **origin(reader, cell.recipe.seed, None)}
            write([row])
            rows.append(row)
            continue
        if final is None:
            say(f"Stopped in cell {number}; the same command goes on from there.")
            return rows
        compressor = load_compressor(final, reader)
        made = []
        for file, ratio in missing:
            if file not in asked:
                asked[file] = evaluation.records(file, cell.recipe.data.get("dir"))
            records, same = asked[file], (file, reader.fingerprint)
            if same not in fixed:
                fixed[same] = fixed_scores(reader, records, evaluation.max_new_tokens)
            scores = compressed_scores(compressor, records, ratio, evaluation.max_new_tokens, fixed[same])
            row = {**lines[file, ratio], "n": len(records), **_figures(scores), **training_figures(folder)}
            made.append({**row, **origin(reader, cell.recipe.seed, compressor)})
        write(made)
        rows += made
        known |= {_identity(row): row for row in made}
    return rows


def train_cell(cell: Cell, reader: Reader, folder: Path, max_minutes: float | None) -> Path | None:
    """Folder of the cell's compressor, trained if missing; None if the run was stopped.

    Raises:
        FloatingPointError: if the loss became NaN or infinite.
    """
    final = folder / cell.recipe.output.folder
    if final.is_dir():
        return final
    if max_minutes == 0:
        return None
    result = run_recipe(cell.recipe, CompressorTask(cell.recipe, reader), folder, max_minutes=max_minutes)
    if result != final:
        return None
    CheckpointStore(folder / "checkpoints").clear()  # the finished compressor is all that is needed now
    return final


def _head(cell: Cell, key: str) -> Row:
    """Fields that all rows of a cell share."""
    recipe, method = cell.recipe, (cell.recipe.compressor or {}).get("method")
    steps = sum(stage.steps for stage in recipe.stages)
    about: Row = {"suite": "sweep", "recipe": recipe.name, "method": method}
    return {**about, "settings": cell.settings, "cell": key, "steps": steps}


def _line(cell: Cell, key: str, place: tuple[str, float | None], evaluation: Evaluation) -> Row:
    """The part of a row that identifies the measurement."""
    file, ratio = place
    asked = ratio if ratio is not None else (cell.recipe.compressor or {}).get("ratio")
    named: Row = {"dataset": Path(file).name.split(".")[0], "half": evaluation.half, "limit": evaluation.limit}
    return {**_head(cell, key), **named, "ratio_asked": asked, "max_new_tokens": evaluation.max_new_tokens}


def _identity(row: Row) -> tuple[Any, ...]:
    """Key of a measurement."""
    names = ("cell", "dataset", "half", "limit", "ratio_asked", "max_new_tokens")
    return tuple(row.get(name) for name in names)


def _figures(scores: Mapping[str, float]) -> Row:
    """Scores for results files: F1 in [0, 1], and the recovered share of the gain from passages."""
    found = {name: value / 100 if name.startswith("f1") else value for name, value in scores.items()}
    gained = found["f1_full"] - found["f1_none"]
    return {**found, "recovered_share": (found["f1"] - found["f1_none"]) / gained if gained > 0 else None}


def training_figures(folder: Path) -> Row:
    """Last values of the run's log."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last: Row = next((row for row in reversed(log) if "loss" in row), {})
    return {"train_loss": last.get("loss"), "train_tokens": last.get("tokens"), "train_seconds": last.get("seconds")}


def best_first(rows: Collection[Row]) -> list[Row]:
    """Rows by dataset and ratio, best F1 first; diverged ones last."""
    return sorted(
        rows, key=lambda row: (str(row.get("dataset", "~")), row.get("ratio_asked") or 0.0, -row.get("f1", 0.0))
    )
