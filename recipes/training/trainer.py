"""Runs the stages of a recipe over a task, and resumes exactly where a run stopped.

A task defines what is trained on which data (`TrainingTask`); a recipe defines steps, rates and objectives. A run has one
folder: `recipe.yaml`, `log.jsonl`, `checkpoints/` and finally the artefact. On CPU, a run that was killed and resumed gives
the same log and weights, bit for bit, as an uninterrupted one.

Example:
    >>> recipe = load_recipe("xrag", ["data.dir=corpus"])
    >>> folder = run_recipe(recipe, make_task(recipe), Path("runs/xrag"))
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from torch import nn

from .checkpoints import Progress, replacing_folder
from .run import Run, TrainingTask, only_run
from .schema import Recipe, Stage
from .stage import StageTrainer, load_trained


def run_recipe(
    recipe: Recipe, task: TrainingTask, out: Path, *, resume: bool = True, max_minutes: float | None = None
) -> Path:
    """Trains the stages of `recipe` over `task` in the folder `out`.

    Args:
        resume: continue from the newest checkpoint in `out`; False discards its checkpoints and log.
        max_minutes: stop with a checkpoint after this many minutes.

    Returns:
        Folder of the finished artefact, or of the last checkpoint if a signal or `max_minutes` stopped the run.

    Raises:
        ValueError: if `out` holds the checkpoints of a different recipe, or another process trains there.
        FloatingPointError: if the loss becomes NaN or infinite.
    """
    run = Run(recipe, task, Path(out), max_minutes)
    with only_run(run.out) if run.main else contextlib.nullcontext():
        return _run(run, resume)


def _run(run: Run, resume: bool) -> Path:
    recipe, task = run.recipe, run.task
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
    running = getattr(run.task, "running", None)
    with contextlib.nullcontext() if running is None else running(trainer.autocast):
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
