"""Maps the `kind` of a recipe to its training task."""

from __future__ import annotations

from ..training.run import TrainingTask
from ..training.schema import Recipe


def make_task(recipe: Recipe) -> TrainingTask:
    """The task that a recipe's `kind` asks for."""
    if recipe.kind == "reader":
        from ..reader.task import ReaderTask

        return ReaderTask(recipe)
    if recipe.kind == "tokens":
        from .tokens import TokenTask

        return TokenTask(recipe)
    from .compressor import CompressorTask

    return CompressorTask(recipe)
