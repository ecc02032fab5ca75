"""Trains compressor recipes within a time budget and scores them: ``python -m nutgraf.benchmarks.gpu_training --help``.

For a machine that is lent for minutes, such as one GPU. Each recipe gets the same share of the time. A short stretch measures
steps per second; then every stage is lengthened or shortened alike, so that the rates fall when the time ends. Every minute
the run is checkpointed and the compressor written to the output folder: whenever the program is stopped, the last minute is
lost at most.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..compressors import Reader
from ..console import friendly_errors
from ..recipes.data.records import load_records
from ..recipes.tasks.compressor import CompressorTask
from ..recipes.tasks.evaluation import compressed_scores, fixed_scores
from ..recipes.training.checkpoints import CheckpointStore, Progress
from ..recipes.training.schema import Recipe, load_recipe
from ..recipes.training.trainer import run_recipe
from .rows import append_rows, provenance

MINUTE = 60.0
PROBE = 0.08  # share of the time that measures the speed


def train(recipe: Recipe, task: CompressorTask, work: Path, out: Path, end: float) -> int:
    """Trains until the clock (`time.monotonic`) shows `end`; the compressor is in the folder `out` after every minute.

    Returns:
        The number of steps that were planned.
    """
    begin, left = time.monotonic(), end - time.monotonic()
    run_recipe(recipe, task, work / "probe", resume=False, max_minutes=PROBE * left / 60)
    progress = Progress.read(CheckpointStore(work / "probe" / "checkpoints").all()[-1])
    done = progress.step + sum(stage.steps for stage in recipe.stages[: progress.stage])
    rate = done / (time.monotonic() - begin)  # the start included: every minute begins with one
    scale = rate * (end - time.monotonic()) / sum(stage.steps for stage in recipe.stages)
    every = max(1, round(rate * MINUTE))
    stages = [
        s.model_copy(update={"steps": max(1, round(scale * s.steps)), "save_every": every}) for s in recipe.stages
    ]
    recipe = recipe.model_copy(update={"stages": stages})
    resume = False
    while True:
        left = max(0.0, end - time.monotonic())
        made = run_recipe(recipe, task, work / "run", resume=resume, max_minutes=min(left, MINUTE) / 60)
        task.save(out)
        if made == work / "run" / recipe.output.folder or time.monotonic() >= end:
            return sum(stage.steps for stage in stages)
        resume = True


def score(
    task: CompressorTask,
    files: list[str],
    ratios: list[float],
    limit: int,
    about: dict[str, object],
    rows: Path,
    end: float,
) -> None:
    """Appends a row for each file and ratio, on the tune half, until the clock shows `end`; one at least."""
    compressor = task.compressor.eval()
    for file in files:
        found = load_records([file], task.data.dir, "tune")
        found = found[:: max(1, len(found) // limit)][:limit]
        fixed = fixed_scores(compressor.base_reader, found)
        if compressor.reader is not compressor.base_reader:  # a tuned reader may read text better, too
            tuned = fixed_scores(compressor.reader, found)
            about = about | {f"{name}_tuned": value for name, value in tuned.items()}
        for ratio in ratios:
            scores = compressed_scores(compressor, found, ratio, fixed=fixed)
            row = {
                "suite": "training",
                "test": "scores",
                "dataset": file.split(".")[0],
                "half": "tune",
                "n": len(found),
            }
            row |= {"method": compressor.config.method, "ratio_asked": ratio, **about, **scores}
            append_rows(rows, [row | provenance(task.reader, task.recipe.seed, compressor)])
            if time.monotonic() > end:
                return


def main(
    recipes: Annotated[list[str], typer.Argument(help="Names or files of recipes.")],
    data: Annotated[Path, typer.Option(help="Folder of the data files.")],
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl and one folder per compressor.")],
    work: Annotated[Path, typer.Option(help="Folder for logs and checkpoints.")] = Path("build/gpu/work"),
    seconds: Annotated[float, typer.Option(help="Time for everything, after the start of Python.")] = 480.0,
    scoring: Annotated[float, typer.Option(help="Seconds of each recipe's time that its scores may take.")] = 45.0,
    limit: Annotated[int, typer.Option(help="Questions of each set.")] = 64,
    ratio: Annotated[list[float] | None, typer.Option(help="Ratios to score at; default 2, 4, 8, 16.")] = None,
    dev: Annotated[list[str] | None, typer.Option(help="Question files to score on; default SQuAD and NQ.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Settings of all recipes, such as stages.*.batch_size=64.")
    ] = None,
) -> None:
    """Train recipes and score them on tune halves within a time budget."""
    start = time.monotonic()
    with friendly_errors():
        readers: dict[str, Reader] = {}
        for number, name in enumerate(recipes, 1):
            end = start + seconds * number / len(recipes)
            recipe = load_recipe(name, [f"data.dir={data}", "stages.*.eval_every=null", *(settings or [])])
            if recipe.kind != "compressor":
                raise ValueError(f"{name} trains a {recipe.kind}; give recipes of compressors.")
            key = str(recipe.reader)
            task = CompressorTask(recipe, readers.get(key))
            readers[key] = task.reader
            steps = train(recipe, task, work / recipe.name, out / recipe.name, end - scoring)
            about = {"recipe": recipe.name, "steps": steps, "seconds": round(time.monotonic() - start, 1)}
            files = dev or ["qa_dev_squad.jsonl.xz", "qa_dev_nq.jsonl.xz"]
            score(task, files, ratio or [2.0, 4.0, 8.0, 16.0], limit, about, out / "rows.jsonl", end)


if __name__ == "__main__":
    typer.run(main)
