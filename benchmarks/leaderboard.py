"""The leaderboard: recipes trained on one reader, each for the same budget, and measured beside methods without training.

Every part is resumed: a finished run is not trained again, and a line that the rows hold is not measured again.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compressors import Compressor, Reader, load_compressor
from ..compressors.core.files import write_atomically
from ..recipes.data.corpus import Record
from ..recipes.sweep import Cell, train_cell, training_figures
from ..recipes.tasks.compressor import CompressorTask
from ..recipes.training.schema import Recipe, load_recipe, recipe_names
from ..recipes.training.trainer import run_recipe
from .methods import Compressed, EqualBudget, FullText, Method, NoContext
from .quality.quality import Line, Settings, evaluate, questions_hash, readable
from .quality.remaining import holds
from .rows import Row

RATIOS = (2.0, 4.0, 8.0, 16.0)
PROBE = 4  # steps of each stage that are timed for a budget in minutes
Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """What every recipe may spend on training: minutes on this machine, or optimiser steps.

    The steps of a recipe's stages keep their proportions. Minutes become steps by a few timed steps of each stage, so that
    every schedule ends with the budget.
    """

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("Give every recipe the same budget: --minutes or --steps, one of them.")
        if not (self.minutes or self.steps or 0) > 0:
            raise ValueError(f"A budget must be above 0, got {self.minutes or self.steps}.")

    def divide(self, recipe: Recipe, seconds: Sequence[float]) -> list[int]:
        """Steps of each stage, at least one; ``seconds`` are those of a step of each stage."""
        planned = [stage.steps for stage in recipe.stages]
        if self.steps is not None:
            factor = self.steps / sum(planned)
        else:
            factor = 60 * (self.minutes or 0.0) / sum(n * s for n, s in zip(planned, seconds, strict=True))
        return [max(1, round(n * factor)) for n in planned]


@dataclass(frozen=True)
class Entry:
    """A trained recipe: the name of its lines, its compressor, and facts about its training for the rows."""

    name: str
    compressor: Compressor
    facts: Row


def one_of_each_method() -> list[str]:
    """The compressor recipe with the shortest name for each method."""
    found: dict[str, str] = {}
    for name in sorted(recipe_names(), key=lambda name: (len(name), name)):
        recipe = load_recipe(name)
        if recipe.kind == "compressor" and recipe.compressor is not None:
            found.setdefault(recipe.compressor["method"], name)
    return sorted(found.values())


def train_all(
    names: Sequence[str],
    overrides: Sequence[str],
    reader: Reader,
    budget: Budget,
    folder: Path,
    *,
    max_minutes: float | None = None,
    say: Say = print,
) -> list[Entry] | None:
    """Trains each recipe, or finds it trained; None if `max_minutes` or a signal stopped it.

    A recipe that this reader or these data cannot train, or whose loss became NaN or infinite, is left out, and said to be.

    Args:
        names: recipes, by name or path.
        overrides: settings of every recipe.
        reader: the reader.
        budget: of each recipe.
        folder: has a folder for each.
        max_minutes: of all training in this call.
        say: prints a line.

    Raises:
        ValueError: if no recipe can be trained, or the folder holds runs of another budget, reader or other settings.
    """
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    done: list[tuple[Recipe, Path]] = []
    why = ""
    for number, name in enumerate(names, 1):
        place = folder / Path(name).stem
        if (place / "diverged.txt").is_file():
            say(f"{name} is left out: {(place / 'diverged.txt').read_text(encoding='utf-8')}")
            continue
        say(f"Recipe {number} of {len(names)}: {name}")
        try:
            recipe = planned(name, overrides, reader, budget, place)
            left = None if deadline is None else max(0.0, (deadline - time.monotonic()) / 60)
            if train_cell(Cell({}, recipe), reader, place, left) is None:
                say(f"Stopped in {name}; the same command goes on from there.")
                return None
        except FloatingPointError as error:
            write_atomically(place / "diverged.txt", str(error).encode())
            say(f"{name} is left out: {error}")
        except OtherRunsError:
            raise
        except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = f"{name}: {error}"
            say(f"{name} is left out: {error}")
        else:
            done.append((recipe, place))
    if not done:
        raise ValueError(f"No recipe of the leaderboard can be trained. The last one, {why or 'which diverged'}")
    methods = Counter(recipe.compressor["method"] for recipe, _ in done if recipe.compressor)
    return [entry(recipe, place, reader, methods) for recipe, place in done]


class OtherRunsError(ValueError):
    """The folder holds runs that another command made."""


def planned(name: str, overrides: Sequence[str], reader: Reader, budget: Budget, place: Path) -> Recipe:
    """The recipe with as many steps as the budget allows; written to ``budget.json``, so that a resumed run has the same."""
    recipe, file = load_recipe(name, overrides), place / "budget.json"
    about = {"minutes": budget.minutes, "steps": budget.steps, "recipe": Cell({}, recipe).key(reader)}
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if different := [key for key, value in about.items() if found.get(key) != value]:
            raise OtherRunsError(
                f"{place} holds a run of another leaderboard: {different[0]} is {found.get(different[0])!r} there and "
                f"{about[different[0]]!r} here; choose another --runs folder, or the budget, reader and settings of that one."
            )
        steps: list[int] = found["stages"]
    else:
        seconds = [] if budget.minutes is None else step_seconds(name, overrides, reader, place / "probe")
        steps = budget.divide(recipe, seconds)
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**about, "stages": steps}).encode())
    return load_recipe(name, [*overrides, *(f"stages.{i}.steps={n}" for i, n in enumerate(steps))])


def step_seconds(name: str, overrides: Sequence[str], reader: Reader, place: Path) -> list[float]:
    """Seconds of a step of each stage: of a few steps after the first, which prepares data."""
    recipe = load_recipe(name, [*overrides, f"stages.*.steps={PROBE}", "stages.*.log_every=1"])
    shutil.rmtree(place, ignore_errors=True)
    run_recipe(recipe, CompressorTask(recipe, reader), place)
    log = [json.loads(line) for line in (place / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(place)
    times: dict[int, list[float]] = {}
    for row in log:
        if "seconds" in row:
            times.setdefault(row["stage_index"], []).append(row["seconds"])
    return [max((times[i][-1] - times[i][0]) / (PROBE - 1), 1e-3) for i in range(len(recipe.stages))]


def entry(recipe: Recipe, place: Path, reader: Reader, methods: Counter[str]) -> Entry:
    """A finished run; lines are called by the method, or by the recipe if several have that method."""
    compressor = load_compressor(place / recipe.output.folder, reader)
    name = compressor.config.method if methods[compressor.config.method] == 1 else recipe.name
    facts = {"recipe": recipe.name, "train_steps": sum(stage.steps for stage in recipe.stages)}
    return Entry(name + "-query" * compressor.query_aware, compressor, facts | training_figures(place))


def renewed(lines: Sequence[Compressed]) -> list[Compressed]:
    """The same lines without the passages that they have compressed, which take memory."""
    found: list[Compressed] = []
    for line in lines:
        together = next((new.together for new in found if new.compressor is line.compressor), [])
        found.append(Compressed(line.compressor, line.ratio, line.name, line.query_aware, together=together))
        together.append(found[-1])
    return found


def groups(entries: Sequence[Entry], beside: Sequence[Compressed], ratios: Sequence[float], seed: int) -> Iterator[Any]:
    """Lines that are measured together, with facts for their rows: those beside with truncation, then each entry's."""
    truncated = [EqualBudget("truncate", line, seed) for line in beside if line.compressor is beside[0].compressor]
    yield [*beside, *truncated], {}
    for made in entries:
        fixed = made.compressor.config.cost in ("none", "vector")  # as many slots at any ratio
        together: list[Compressed] = []
        for ratio in [None] if fixed else ratios:
            aware = made.compressor.query_aware
            together.append(Compressed(made.compressor, ratio, made.name, aware, together=together))
        yield together, made.facts


def measure_all(
    reader: Reader,
    entries: Sequence[Entry],
    beside: Sequence[Compressed],
    records: Sequence[Record],
    settings: Settings,
    ratios: Sequence[float],
    have: Sequence[Row],
    keep: Callable[[Row], None],
) -> None:
    """Measures the lines over some questions that `have` does not hold; `keep` gets each row as soon as it is made."""
    questions = questions_hash(readable(reader, records, settings.max_new_tokens))
    have = [row for row in have if row.get("questions") == questions]
    known: list[Line] = []
    for lines, facts in groups(entries, renewed(beside), ratios, settings.seed):
        todo: list[Method] = [line for line in lines if not holds(have, line, reader, settings)]
        fixed: list[Method] = [FullText(), NoContext()]
        if not todo and (known or all(holds(have, line, reader, settings) for line in fixed)):
            continue
        if not known:

            def first(line: Line) -> None:
                if not any(row["method"] == line.method for row in have):
                    keep(line.row)

            known = evaluate(reader, fixed, records, settings, first)
        evaluate(reader, todo, records, settings, lambda line, facts=facts: keep(line.row | facts), known)  # type: ignore[misc]
