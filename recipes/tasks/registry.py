"""Maps the `kind` of a recipe to its training task."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of recipe.

    Attributes:
        module, task: where the class of its task is; it takes the recipe.
        sections: keys that a recipe of this kind must give.
        objectives: whether every stage needs an objective.
    """

    module: str
    task: str
    sections: tuple[str, ...]
    objectives: bool = False


_RECIPES = __name__.rsplit(".", 2)[0]
KINDS = {
    "compressor": Kind(f"{_RECIPES}.tasks.compressor", "CompressorTask", ("reader", "compressor"), objectives=True),
    "tokens": Kind(f"{_RECIPES}.tasks.tokens", "TokenTask", ("reader", "compressor")),
    "sentences": Kind(f"{_RECIPES}.tasks.pruning", "SentenceTask", ("reader", "compressor")),
    "rewards": Kind(f"{_RECIPES}.tasks.rewards", "RewardTask", ("reader", "compressor")),
    "inversion": Kind(f"{_RECIPES}.tasks.inversion", "InversionTask", ("reader", "model")),
    "reader": Kind(f"{_RECIPES}.reader.task", "ReaderTask", ("model",)),
}


def make_task(recipe: Any) -> Any:
    """Makes the `TrainingTask` of a `Recipe`."""
    kind = KINDS[recipe.kind]
    return getattr(importlib.import_module(kind.module), kind.task)(recipe)
