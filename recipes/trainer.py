"""The one trainer: runs the stages of a recipe over a task, and picks up exactly where a run was cut off.

A task says what is trained and on what (`TrainingTask`); a recipe says how long, how fast and with which objectives.
A run lives in one folder: `recipe.yaml`, `log.jsonl` (one line a log step), `checkpoints/` and, when it is done, the
artefact. On CPU a run that was killed at any moment and resumed gives the same log and the same weights, bit for bit,
as one that never stopped.

Example:
    >>> recipe = load_recipe("xrag", ["data.dir=corpus"])
    >>> folder = run_recipe(recipe, make_task(recipe), Path("runs/xrag"))
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.utils.data import Dataset

from .checkpoints import CheckpointStore, Progress, replacing_folder
from .progress import RunBar, RunLog, StopSignals
from .schema import Recipe, Stage, dump_recipe
from .stage_trainer import StageTrainer, load_trained


class TrainingTask(Protocol):
    """What a recipe trains.

    `module(**batch)` returns a dict with `loss` (a scalar; a mean over the batch) and, detached, whatever is to be
    logged: `loss/ae`, `copy/accuracy`, ...; `tokens` (a count) is added up and reported as a speed. A module with
    `accepts_loss_kwargs = True`, whose collator gives `num_items` (a count, or a dict of counts by objective), gets
    their totals over accumulation steps and devices as the keyword `num_items_in_batch` and returns sum / total: then
    accumulating gradients equals one large batch exactly. A task may also have
    `evaluate(stage) -> dict[str, float]`; its results are logged as `eval/<name>`. And `flush()`, called before each
    checkpoint, to write what it keeps in memory and would rather not make again.
    """

    @property
    def module(self) -> nn.Module:
        """What trains and whatever it needs to run."""

    def dataset(self, stage: Stage) -> Dataset[Any]:
        """Map-style; item i depends only on the recipe's seed, the stage and i. See `Items`."""

    def collator(self, stage: Stage) -> Callable[[list[Any]], dict[str, Any]]:
        """Turns items into a batch, using no random generator but ones seeded by the items."""

    def begin_stage(self, stage: Stage) -> None:
        """Choose what trains (`requires_grad`), from the stage alone."""

    def save(self, folder: Path) -> None:
        """Write the finished artefact into an empty folder."""


def make_task(recipe: Recipe) -> TrainingTask:
    """The task that a recipe's `kind` asks for."""
    if recipe.kind == "reader":
        from .reader_task import ReaderTask

        return ReaderTask(recipe)
    if recipe.kind == "tokens":
        from .token_task import TokenTask

        return TokenTask(recipe)
    from .compressor_task import CompressorTask

    return CompressorTask(recipe)


class Items(Dataset[Any]):
    """An endless dataset: item i is `make(i)`."""

    def __init__(self, make: Callable[[int], Any], length: int = 2**40) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Run:
    """What the stages of one run share: its folder, its log, its bar, and the wish to stop."""

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

    @property
    def final(self) -> Path:
        """Where the finished artefact goes."""
        return self.out / self.recipe.output.folder

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
        """Set up the folder; returns the checkpoint to go on from (None: begin) and where it stands."""
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


def run_recipe(
    recipe: Recipe, task: TrainingTask, out: Path, *, resume: bool = True, max_minutes: float | None = None
) -> Path:
    """Train the stages of `recipe` over `task` in the folder `out`.

    Args:
        resume: go on from the newest checkpoint in `out`; False discards the checkpoints and the log found there.
        max_minutes: stop cleanly, with a checkpoint, after this many minutes.

    Returns:
        The folder of the finished artefact; or, when a signal or `max_minutes` stopped the run, of its last checkpoint.

    Raises:
        ValueError: if `out` holds the checkpoints of a different recipe.
        FloatingPointError: if the loss stops being a number.
    """
    run = Run(recipe, task, Path(out), max_minutes)
    latest, progress = run.prepare(resume)
    with run.signals, run.bar:
        if latest:
            run.bar.say(f"Going on from {latest}.")
        if latest and progress.done:
            load_trained(task.module, latest)
            if progress.stage + 1 == len(recipe.stages) and run.final.is_dir():
                return run.final
            progress = _next_stage(progress)
            latest = None
        for index in range(progress.stage, len(recipe.stages)):
            progress.stage = index
            _run_stage(run, index, progress, latest)
            latest = None
            if run.stopped:
                last = run.store.latest()
                run.bar.say(f"Stopped, as {run.stopped}. Saved {last}; the same command goes on from there.")
                return last or run.out
            progress = _next_stage(progress)
        if run.main:
            with replacing_folder(run.final) as folder:
                task.save(folder)
        run.bar.say(f"Done: {run.final}")
    return run.final


def _run_stage(run: Run, index: int, progress: Progress, checkpoint: Path | None) -> None:
    stage = run.recipe.stages[index]
    run.task.begin_stage(stage)
    _set_gradient_checkpointing(run.task.module, stage)
    if not any(parameter.requires_grad for parameter in run.task.module.parameters()):
        raise ValueError(f"Stage {stage.name!r} trains nothing: trainable={stage.trainable!r} freezes every parameter.")
    trainer = StageTrainer(run, index, progress)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _set_gradient_checkpointing(module: nn.Module, stage: Stage) -> None:
    switch = getattr(module, "gradient_checkpointing_enable", None)
    if stage.gradient_checkpointing:
        if switch is None:
            raise ValueError(f"Stage {stage.name!r} asks for gradient_checkpointing, which its task cannot do.")
        switch(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif (off := getattr(module, "gradient_checkpointing_disable", None)) is not None:
        off()


def _next_stage(progress: Progress) -> Progress:
    return Progress(
        stage=progress.stage + 1, tokens=progress.tokens, seconds=progress.seconds, trained=progress.trained
    )


def _check_same(saved: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    """Refuse to mix two recipes in one run, naming the first setting that differs."""
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
