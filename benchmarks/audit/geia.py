"""GEIA (arXiv 2305.03010): a decoder that was trained on public text writes the passage from what is stored of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ...compressors import CompressedPassage, Reader
from ...recipes.tasks.inversion import InversionDecoder, InversionTask
from ...recipes.training.checkpoints import CheckpointStore, Progress
from ...recipes.training.schema import load_recipe
from ...recipes.training.trainer import run_recipe
from ..rows import Row
from .attacker import Attacker, Stolen, register_attacker
from .targets import Target

LONGEST = 192  # tokens written from a retrieval vector, whose passage's length is unknown


@register_attacker
class GEIA(Attacker):
    """The reader with LoRA reads slots, keys and values as the reader does, and vectors through a linear map.

    Args:
        reader: the reader.
        decoder: a trained decoder; without one the attacker cannot attack.
        training: what rows say of its training.
    """

    name: ClassVar[str] = "geia"
    title: ClassVar[str] = "trained decoder"
    of_one_target: ClassVar[bool] = True

    def __init__(self, reader: Reader, decoder: InversionDecoder | None = None, training: Row | None = None) -> None:
        super().__init__(reader)
        self.decoder, self.about = decoder, training or {}

    @classmethod
    def reads(cls, stolen: Stolen) -> bool:
        return not isinstance(stolen, CompressedPassage) or stolen.interface != "text"

    def attack(self, stolen: Sequence[Stolen]) -> list[str]:
        """Raises ValueError without a trained decoder."""
        if self.decoder is None:
            raise ValueError("GEIA needs a trained decoder: give --budget MINUTES to train one, or --decoder FOLDER.")
        longest = [one.source_tokens + 8 if isinstance(one, CompressedPassage) else LONGEST for one in stolen]
        return self.decoder.write(stolen, longest)


def train(
    target: Target, reader: Reader, public: Path, documents: int, minutes: float, folder: Path, questions: bool = False
) -> GEIA:
    """Train an attacker of a target for some minutes, or continue its training.

    Args:
        target: a compressor's passages or an embedder's vectors.
        reader: the reader.
        public: text file to learn from, and at most so many documents of it; with `questions` a question file.
        minutes: of training, in this call.
        folder: of all attackers' runs; each target has its own within it.

    Raises:
        ValueError: if it is not known what made the target's passages.
    """
    if target.victim is None:
        raise ValueError(
            "An attacker of a store is trained for the compressor that filled it: audit that with --budget first, then the "
            "store with --decoder FOLDER."
        )
    source = "embedder" if target.interface == "vector" else "compressor"
    given = {
        f"model.{source}": target.name,
        "model.embedder" if source == "compressor" else "model.compressor": "null",
        "data.texts": "[]" if questions else f"['{public.name}']",
        "data.questions": f"['{public.name}']" if questions else "[]",
        "data.dir": str(public.parent),
        "data.documents": documents,
        "reader": reader.name,
    }
    if target.ratio is not None:
        given["model.ratio"] = target.ratio
    recipe = load_recipe("inversion", [f"{key}={value}" for key, value in given.items()])
    task = InversionTask(recipe, reader, target.victim)
    run = folder / re.sub(r"[^A-Za-z0-9_.@-]", "_", _run_name(target, questions))
    run_recipe(recipe, task, run, max_minutes=minutes)
    task.module.save_pretrained(run / "decoder")
    latest = CheckpointStore(run / "checkpoints").latest()
    progress = Progress() if latest is None else Progress.read(latest)
    about: Row = {"training_minutes": progress.seconds / 60, "training_steps": progress.step}
    return GEIA(reader, task.module, about | {"training_tokens": progress.tokens})


def _run_name(target: Target, questions: bool) -> str:
    return target.name + (f"@{target.ratio:g}x" if target.ratio else "") + ("-questions" if questions else "")


def trained(target: Target, reader: Reader, folders: Sequence[str]) -> GEIA | None:
    """The attacker among some folders that was trained for the target; None if there is none."""
    for folder in folders:
        decoder = InversionDecoder.from_pretrained(folder, reader)
        if (decoder.victim, decoder.settings.ratio) == (target.made_by, target.ratio):
            return GEIA(reader, decoder)
    return None
