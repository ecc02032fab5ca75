"""The training task of every soft compressor, whatever its method.

A batch is texts to compress and prompts that read them. The texts are compressed once; every prompt is read by the frozen
reader with the compressed passages in it (student) and, where the objective is distillation, with their texts (teacher);
the reader's hidden states at the target positions go to the objectives of the stage.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import pretrained
from ..compressors import CompressedPassage, Reader, SoftCompressor, make_compressor
from ..compressors.matching import SlotMatchingLoss
from ..compressors.objectives import AutoencodingLoss, KLDistillationLoss, LanguageModelingLoss
from ..compressors.packing import pack, pass_positions
from .compressor_eval import compressed_scores
from .compressor_items import NOT_READ, CompressorData, CompressorItems, Item, ItemMaker, Reading, draw_ratio
from .corpus import Record
from .records import Material, load_articles, load_records
from .schema import Recipe, Stage, validate

MATCH_SAMPLE = 2000  # passages on which the rarity of tokens is counted
POSITIONS = 8192  # that one forward pass of the reader may take, padding counted


@dataclass(frozen=True)
class CompressorBatch:
    """Texts to compress and who reads them.

    Attributes:
        texts: passages; `queries` the question of each for a query-aware compressor.
        ratio: compression ratio of the whole batch, None for the compressor's own.
        readings, contexts: each reading and the indices into `texts` of its passages.
        targets: each reading's target ids.
        key: seeds what a method draws for the batch.
    """

    texts: list[str]
    queries: list[str | None] | None
    ratio: float | None
    readings: list[Reading]
    contexts: list[list[int]]
    targets: list[list[int]]
    key: str = ""

    def count(self, objective: str) -> int:
        """Target tokens that an objective is taken on."""
        return sum(len(t) for t, reading in zip(self.targets, self.readings) if objective in reading.objectives)


class CompressorModule(nn.Module):
    """A soft compressor with the objectives of a stage: `forward(batch)` gives the weighted loss.

    Its parameters are the compressor's alone; the reader as given is frozen, and stays in eval mode.
    """

    accepts_loss_kwargs = True

    def __init__(self, compressor: SoftCompressor) -> None:
        super().__init__()
        self.compressor: SoftCompressor = compressor
        self.weights: dict[str, float] = {}
        self.losses: dict[str, Any] = {}
        self.matching: SlotMatchingLoss | None = None

    def set_objectives(self, stage: Stage) -> None:
        """Take the objectives, their weights, temperature and top-k from a stage."""
        head = self.compressor.reader.head
        self.weights = {name: weight for name, weight in stage.objectives.items() if weight}
        if "segments" in self.weights and "segments" not in self.compressor.own_objectives():
            raise ValueError(
                f"Stage {stage.name!r} asks for the objective segments, which the method "
                f"{self.compressor.config.method!r} does not have; give it no weight, or train an autocompressor."
            )
        self.losses = {
            "ae": AutoencodingLoss(head),
            "lm": LanguageModelingLoss(head),
            "kl": KLDistillationLoss(
                head, stage.temperature, stage.teacher_top_k, teacher_head=self.compressor.base_reader.head
            ),
        }

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the encoder's activations in the backward pass, where the method can."""
        able: list[Any] = [m for m in self.compressor.modules() if hasattr(m, "gradient_checkpointing_enable")]
        if not able:
            name = type(self.compressor).__name__
            raise ValueError(f"{name} has no encoder that can checkpoint gradients; set gradient_checkpointing: false.")
        able[0].gradient_checkpointing_enable(**settings)

    def forward(self, batch: CompressorBatch, num_items_in_batch: dict[str, int] | None = None) -> dict[str, Any]:
        """The weighted loss of a batch.

        Args:
            num_items_in_batch: target tokens of each objective over all that is accumulated; default: this batch's.

        Returns:
            `loss`, the plain means `loss/<objective>`, `ratio` (source tokens per slot) and `tokens` (of the passages and
            targets).
        """
        passages = self.compressor.encode(batch.texts, batch.queries, batch.ratio) if batch.texts else []
        counts = {name: batch.count(name) for name in self.weights}
        divisors = num_items_in_batch or counts
        total = sum((t.sum() * 0.0 for p in passages if (t := _some_tensor(p)) is not None), torch.zeros(()))
        sums: dict[str, Tensor] = {}
        read = [i for i, reading in enumerate(batch.readings) if reading.kind not in NOT_READ]
        for group in self._pack([self._positions(batch, i, passages) for i in read]):
            for name, value in self._objectives(batch, [read[g] for g in group], passages).items():
                sums[name] = sums[name] + value if name in sums else value
        if self.matching is not None and (matched := [i for i, r in enumerate(batch.readings) if r.kind == "match"]):
            which = [j for i in matched for j in batch.contexts[i]]
            loss, slots = self.matching([passages[j] for j in which], [batch.targets[i] for i in matched])
            # A mean over slots, weighed by target tokens like the others: the divisor takes them out again.
            sums["match"] = loss / max(1, slots) * counts["match"]
        if documents := [reading.target for reading in batch.readings if reading.kind == "documents"]:
            for name, objective in self.compressor.own_objectives().items():
                if name in self.weights:
                    sums[name], _ = objective(documents, random.Random(f"{batch.key}/{name}"), batch.ratio)
        out: dict[str, Any] = {}
        for name, value in sums.items():
            total = total.to(value.device) + self.weights[name] * value / max(1, divisors[name])
            out[f"loss/{name}"] = value.detach() / max(1, counts[name])
        sources = sum(p.source_tokens for p in passages)
        if passages:
            out["ratio"] = sources / max(1, sum(p.slots for p in passages))
        out["tokens"] = sources + sum(map(len, batch.targets))
        return {"loss": total, **out}

    def _pack(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Prompts of like length together."""
        return pack(lengths, POSITIONS, pass_positions(self.compressor.base_reader.device))

    def _positions(self, batch: CompressorBatch, index: int, passages: Sequence[CompressedPassage]) -> int:
        """About how many positions a reading takes."""
        slots = sum(passages[i].slots for i in batch.contexts[index])
        return slots + len(batch.targets[index]) + len(batch.readings[index].question) // 3 + 16

    def _objectives(
        self, batch: CompressorBatch, chosen: Sequence[int], passages: Sequence[CompressedPassage]
    ) -> dict[str, Tensor]:
        """The sums of the objectives over some readings."""
        reader = self.compressor.reader
        prompts = [batch.readings[i].prompt([passages[j] for j in batch.contexts[i]]) for i in chosen]
        found = reader.target_hidden(prompts, [batch.targets[i] for i in chosen])
        sums: dict[str, Tensor] = {}
        for name in self.weights:
            flags = [name in batch.readings[i].objectives for i in chosen]
            if name not in self.losses or not any(flags):
                continue
            rows = torch.tensor(flags, device=found.rows.device)[found.rows]
            hidden = found.hidden[rows]
            other = found.ids[rows] if name != "kl" else self._teacher(batch, [i for i, f in zip(chosen, flags) if f])
            sums[name] = self.losses[name](hidden, other, num_items=1)
        return sums

    @torch.no_grad()
    def _teacher(self, batch: CompressorBatch, chosen: Sequence[int]) -> Tensor:
        """Hidden states ``[N, d]`` of the untuned reader with the passages as text, in the order of `chosen`."""
        reader = self.compressor.base_reader
        lengths = [sum(len(batch.texts[j]) for j in batch.contexts[i]) // 3 + len(batch.targets[i]) for i in chosen]
        parts: dict[int, Tensor] = {}
        for group in self._pack(lengths):
            which = [chosen[g] for g in group]
            prompts = [batch.readings[i].prompt([batch.texts[j] for j in batch.contexts[i]]) for i in which]
            targets = [batch.targets[i] for i in which]
            hidden = reader.target_hidden(prompts, targets).hidden
            parts.update(zip(which, hidden.split([len(target) for target in targets])))
        return torch.cat([parts[i] for i in chosen])


class CompressorTask:
    """A compressor recipe as a task for `run_recipe`.

    Args:
        recipe: of kind `compressor`.
        reader: the reader to train for, in place of the recipe's own (for instance one that is already loaded).

    Raises:
        ValueError: if the recipe's reader, data, method or settings cannot be used.
    """

    def __init__(self, recipe: Recipe, reader: Reader | None = None) -> None:
        if recipe.kind != "compressor" or recipe.compressor is None:
            raise ValueError(f"The recipe {recipe.name!r} trains a {recipe.kind}; a compressor recipe is needed here.")
        if recipe.output.dtype is not None:
            raise ValueError("A compressor is stored in the precision it was trained in: remove output.dtype.")
        self.data = validate(CompressorData, recipe.data, recipe.name, "data")
        self.recipe = recipe
        self.reader = reader or Reader.from_pretrained(find_reader(str(recipe.reader)))
        torch.manual_seed(recipe.seed)
        settings = dict(recipe.compressor)
        compressor = make_compressor(settings.pop("method"), self.reader, **settings)
        if not isinstance(compressor, SoftCompressor):
            raise ValueError(f"{type(compressor).__name__} selects text and has nothing to train with a reader.")
        self.compressor = compressor
        self.module = CompressorModule(compressor)
        self._matching: SlotMatchingLoss | None = None
        self._material: Material | None = None
        self._dev: list[Record] | None = None

    @property
    def material(self) -> Material:
        """The training data, read at first use; question files only if a stage asks questions by people."""
        if self._material is None:
            data = self.data
            human = data.mismatch > 0 or any(
                stage.mix.get("human") or stage.mix.get("match") for stage in self.recipe.stages
            )
            self._material = Material(
                load_records(data.questions, data.dir) if human else [],
                load_articles(data.texts, data.dir, data.documents),
                data.max_chars,
                data.max_answer_words,
                data.verbatim,
                data.shares,
            )
        return self._material

    def dataset(self, stage: Stage) -> CompressorItems:
        """The stage's items."""
        return CompressorItems(ItemMaker(self.material, self.data, stage).make, self.recipe.seed, stage)

    def collator(self, stage: Stage) -> Callable[[list[Item]], dict[str, Any]]:
        """Puts items into a `CompressorBatch` and counts the target tokens of each objective."""

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

    @property
    def matching(self) -> SlotMatchingLoss:
        """The `match` objective, its token statistics taken from `MATCH_SAMPLE` passages drawn from the material."""
        if self._matching is None:
            rng = random.Random(f"{self.recipe.seed}/match")
            draw = ItemMaker.draw_passage
            texts = [draw(self.material, rng) for _ in range(MATCH_SAMPLE)]
            counts = torch.zeros(self.reader.vocab_size)
            for ids in self.reader.tokenize_batch(texts):
                counts[torch.tensor(sorted(set(ids)))] += 1
            self._matching = SlotMatchingLoss(self.compressor.reader, counts, len(texts))
        return self._matching

    def begin_stage(self, stage: Stage) -> None:
        """Freeze all but the stage's `trainable`: `all`, or names of parts such as `projector`, or patterns."""
        self.module.set_objectives(stage)
        self.module.matching = self.matching if stage.objectives.get("match") else None
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

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """F1 on `data.dev` with the passages compressed, with those of other questions, as text, and without any."""
        if not self.data.dev:
            raise ValueError(f"Stage {stage.name!r} sets eval_every, which needs data.dev: a question file.")
        if self._dev is None:
            records = load_records([self.data.dev], self.data.dir, self.data.dev_half)
            self._dev = records[:: max(1, len(records) // self.data.dev_limit)][: self.data.dev_limit]
        return compressed_scores(self.compressor, self._dev)

    def save(self, folder: Path) -> None:
        """Write the compressor."""
        self.compressor.save_pretrained(folder)


def _some_tensor(passage: CompressedPassage) -> Tensor | None:
    """A tensor that hangs on the compressor's parameters, so that a batch without targets still has a gradient."""
    return passage.keys[0] if passage.keys else passage.embeds


def find_reader(name: str) -> str:
    """The folder of a shipped reader, or `name` itself: a folder or a hub id."""
    if "/" in name or Path(name).exists():
        return name
    return pretrained(name)
