"""Training task of soft compressors.

A batch is texts to compress and prompts that read them. The texts are compressed once. The frozen reader reads every prompt
with the compressed passages (student) and, for distillation, with their texts (teacher). Its hidden states at the target
positions go to the objectives of the stage.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ...compressors import Reader, SoftCompressor, load_compressor, make_compressor
from ...compressors.encoders.lora_twin import Twin
from ..data.corpus import Record
from ..data.records import Material, load_articles, load_records
from ..training.schema import Recipe, Stage, validate
from .evaluation import compressed_scores, fixed_scores
from .items import FROM_QUESTIONS, CompressorData, CompressorItems, Item, ItemMaker, Reading, draw_ratio
from .module import CompressorBatch, CompressorModule


class CompressorTask:
    """Task of a compressor recipe, for `run_recipe`.

    Args:
        recipe: of kind `compressor`.
        reader: the reader to train for; default: the recipe's own.

    Raises:
        ValueError: if the recipe's reader, data, method or settings cannot be used.
    """

    def __init__(self, recipe: Recipe, reader: Reader | None = None) -> None:
        if recipe.kind != "compressor" or recipe.compressor is None:
            raise ValueError(f"The recipe {recipe.name!r} trains a {recipe.kind}; a compressor recipe is needed here.")
        self.data = validate(CompressorData, recipe.data, recipe.name, "data")
        self.recipe = recipe
        self.reader = reader or Reader.from_pretrained(str(recipe.reader))
        torch.manual_seed(recipe.seed)
        settings = dict(recipe.compressor)
        if isinstance(settings.get("tagger"), str):
            settings["tagger"] = load_compressor(settings["tagger"], self.reader)
        compressor = make_compressor(settings.pop("method"), self.reader, **settings)
        if not isinstance(compressor, SoftCompressor):
            raise ValueError(f"{type(compressor).__name__} selects text and has nothing to train with a reader.")
        if self.data.query_aware and not compressor.query_aware:
            raise ValueError(
                "data.query_aware needs a compressor that reads questions: set compressor.query_aware=true."
            )
        self.data = self.data.model_copy(update={"query_aware": compressor.query_aware})
        self.compressor = compressor
        self.module = CompressorModule(compressor, [name for stage in recipe.stages for name in stage.objectives])
        self._material: Material | None = None
        self._dev: list[Record] | None = None
        self._fixed: dict[str, float] = {}

    @property
    def material(self) -> Material:
        """Training data, read at first use; question files only if a stage uses them."""
        if self._material is None:
            data = self.data
            human = any(stage.mix.get(kind) for stage in self.recipe.stages for kind in FROM_QUESTIONS)
            self._material = Material(
                load_records(data.questions, data.dir) if human else [],
                load_articles(data.texts, data.dir, data.documents),
                data.max_chars,
                data.max_answer_words,
                shares=data.shares,
            )
        return self._material

    def dataset(self, stage: Stage) -> CompressorItems:
        """The stage's items."""
        return CompressorItems(ItemMaker(self.material, self.data, stage).make, self.recipe.seed, stage)

    def collator(self, stage: Stage) -> Callable[[list[Item]], dict[str, Any]]:
        """Collates items into a `CompressorBatch` and counts the target tokens of each objective."""

        def collate(items: list[Item]) -> dict[str, Any]:
            texts: list[str] = []
            queries: list[str | None] = []
            readings: list[Reading] = []
            contexts: list[list[int]] = []
            for item in items:
                for reading in item.readings:
                    contexts.append(list(range(len(texts), len(texts) + len(item.passages))))
                    readings.append(reading.behind_kv() if self.compressor.interface == "kv" else reading)
                texts += item.passages
                queries += [item.readings[0].question or None] * len(item.passages)
            ids = self.reader.tokenize_batch([reading.target for reading in readings])
            eos = [] if self.reader.eos_id is None else [self.reader.eos_id]
            targets = [[*t, *eos] if reading.eos else t for t, reading in zip(ids, readings)]
            batch = CompressorBatch(
                texts,
                queries if self.data.query_aware else None,
                draw_ratio(stage.ratios, items[0].key),
                readings,
                contexts,
                targets,
                items[0].key,
            )
            return {"batch": batch, "num_items": {name: batch.count(name) for name, w in stage.objectives.items() if w}}

        return collate

    def _draw(self, name: str, n: int) -> list[str]:
        rng = random.Random(f"{self.recipe.seed}/{name}")
        return [ItemMaker.draw_passage(self.material, rng) for _ in range(n)]

    def begin_stage(self, stage: Stage) -> None:
        """Freezes all but the stage's `trainable`: `all`, names of parts such as `projector`, or patterns."""
        self.module.set_objectives(stage, self._draw)
        wanted = [stage.trainable] if isinstance(stage.trainable, str) else stage.trainable
        state = self.compressor.trainable_state()
        matched: set[str] = set()
        self.compressor.requires_grad_(False)
        for name, tensor in state.items():
            parts = name.replace("/", ".").split(".")
            if hits := {w for w in wanted if w == "all" or w in parts or fnmatch(name, w)}:
                matched |= hits
                tensor.requires_grad_(True)
        if missing := [w for w in wanted if w not in matched]:
            parts = sorted({name.split(".")[0] for name in state})
            raise ValueError(f"Stage {stage.name!r}: nothing called {missing[0]!r} to train; there are all, {parts}.")

    @contextlib.contextmanager
    def running(self, autocast: bool) -> Iterator[None]:
        """Within it, models use the attention that trains fastest here.

        On a CPU under bfloat16 autocast that is plain matrix products: torch's fused attention takes two to six times as long
        on rows of a few hundred tokens.
        """
        models: list[Any] = [self.compressor.base_reader.model]
        models += [module.decoder for module in self.compressor.modules() if isinstance(module, Twin)]
        fused = [m for m in models if m.config._attn_implementation == "sdpa" and m._can_set_attn_implementation()]
        plain = autocast and self.reader.device.type == "cpu"
        try:
            for model in fused if plain else ():
                model.set_attn_implementation("eager")
            yield
        finally:
            for model in fused:
                model.set_attn_implementation("sdpa")

    def flush(self) -> None:
        """Writes pending entries of the teacher's cache."""
        if self.module.teacher_cache is not None:
            self.module.teacher_cache.flush()

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """F1 on `data.dev` with passages compressed, those of other questions, as text, and without passages."""
        if not self.data.dev:
            raise ValueError(f"Stage {stage.name!r} sets eval_every, which needs data.dev: a question file.")
        if self._dev is None:
            self._dev = self.data.thinned(load_records([self.data.dev], self.data.dir, self.data.dev_half))
            self._fixed = fixed_scores(self.compressor.base_reader, self._dev)
        return compressed_scores(self.compressor, self._dev, fixed=self._fixed)

    def save(self, folder: Path) -> None:
        """Writes the compressor."""
        self.compressor.save_pretrained(folder, dtype=self.recipe.output.torch_dtype)
