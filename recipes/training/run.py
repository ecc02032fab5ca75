"""One training run: its folder, log and resume checks."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.utils.data import Dataset

from .checkpoints import CheckpointStore, Progress
from .progress import RunBar, RunLog, StopSignals
from .schema import Recipe, Stage, dump_recipe


class TrainingTask(Protocol):
    """What a recipe trains.

    `module(**batch)` returns a dict with `loss` (a scalar mean over the batch) and detached values to log: `loss/ae`,
    `copy/accuracy`, ...; `tokens` (a count) is summed and reported as a speed. A module with `accepts_loss_kwargs = True`,
    whose collator gives `num_items` (a count, or a dict of counts per objective), gets their totals over accumulation steps
    and devices as the keyword `num_items_in_batch` and returns sum / total, so that accumulated gradients equal those of one
    large batch.

    Optional methods: `evaluate(stage) -> dict[str, float]`, logged as `eval/<name>`; `flush()`, called before each
    checkpoint to write cached results; `running(autocast)`, a context manager around a stage's steps.
    """

    @property
    def module(self) -> nn.Module:
        """The module that trains."""

    def dataset(self, stage: Stage) -> Dataset[Any]:
        """Map-style dataset; item i depends only on the recipe's seed, the stage and i."""

    def collator(self, stage: Stage) -> Callable[[list[Any]], dict[str, Any]]:
        """Turns items into a batch; random draws are seeded by the items."""

    def begin_stage(self, stage: Stage) -> None:
        """Sets `requires_grad` from the stage."""

    def save(self, folder: Path) -> None:
        """Writes the finished artefact into an empty folder."""


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Holds the lock of a run's folder; ValueError if another process trains there.

    The lock belongs to the process and ends with it, however that ends; its data loading processes do not inherit it.
    """
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(
                f"Another process trains in {out}; wait for it, stop it, or choose another output folder."
            ) from None
        yield


class Run:
    """State that the stages of one run share: folder, log, progress bar and stop requests."""

    def __init__(self, recipe: Recipe, task: TrainingTask, out: Path, max_minutes: float | None) -> None:
        self.recipe, self.task, self.out = recipe, task, out
        self.store = CheckpointStore(out / "checkpoints")
        self.log = RunLog(out / "log.jsonl")
        self.main = int(os.environ.get("RANK", "0")) == 0
        self.bar = RunBar(sum(stage.steps for stage in recipe.stages), recipe.name, enabled=self.main)
        self.signals = StopSignals()
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.minutes = max_minutes
        self.stopped: str | None = None
        self.final = self.out / recipe.output.folder

    def steps_before(self, index: int) -> int:
        """Optimiser steps of the stages before stage `index`."""
        return sum(stage.steps for stage in self.recipe.stages[:index])

    def stop_reason(self) -> str | None:
        """Why the run should stop now, or None."""
        if self.signals.received:
            return f"{self.signals.received} was received"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return f"the {self.minutes:g} minutes are over"
        return None

    def prepare(self, resume: bool) -> tuple[Path | None, Progress]:
        """Sets up the folder; returns the checkpoint to resume from, if any, and its progress."""
        self.store.root.mkdir(parents=True, exist_ok=True)
        latest = self.store.latest() if resume else None
        progress = Progress.read(latest) if latest else Progress()
        if latest:
            _check_same(progress.recipe, self.recipe.identity(), self.out)
        if self.main:
            if not resume:
                self.store.clear()
            self.store.clean()
            self.log.cut(progress.log_bytes)
            (self.out / "recipe.yaml").write_text(dump_recipe(self.recipe), encoding="utf-8")
        return latest, progress


def _check_same(saved: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    """Refuses to resume with another recipe; names the first setting that differs."""
    if difference := _difference(saved, wanted):
        raise ValueError(
            f"{out} holds checkpoints of another recipe: {difference}. Choose another output folder, or start over "
            "with resume=False (--no-resume), which discards them."
        )


def _difference(one: Any, other: Any, where: str = "") -> str | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if found := _difference(one.get(key), other.get(key), f"{where}.{key}".lstrip(".")):
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next((d for i, (a, b) in enumerate(zip(one, other)) if (d := _difference(a, b, f"{where}.{i}"))), None)
    return None if one == other else f"{where} is {one!r} there and {other!r} here"
