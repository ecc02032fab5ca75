"""The module that the trainer optimises: a compressor and the objectives of a stage."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...compressors import CompressedPassage, Reader, SoftCompressor
from ...compressors.objectives.registry import OBJECTIVES, Scored, Setup
from ...compressors.objectives.teacher import TeacherLogits
from ...compressors.reader.reader import Targets
from ...compressors.reader.shared import target_hidden
from ..data.templates import SEPARATOR
from ..training.schema import Stage
from .items import NOT_READ, Reading
from .teacher_cache import TeacherCache

POSITIONS = 8192  # positions per forward pass of the reader, padding included


@dataclass(frozen=True)
class CompressorBatch:
    """Texts to compress and the readings over them.

    Attributes:
        texts: passages; `queries` holds the question of each for a query-aware compressor.
        ratio: compression ratio of the batch; None: the compressor's own.
        readings, contexts: readings, and for each the indices into `texts` of its passages.
        targets: target ids of each reading.
        key: seed of the random draws for the batch.
    """

    texts: list[str]
    queries: list[str | None] | None
    ratio: float | None
    readings: list[Reading]
    contexts: list[list[int]]
    targets: list[list[int]]
    key: str = ""

    def count(self, objective: str) -> int:
        """Number of target tokens of an objective."""
        return sum(len(t) for t, reading in zip(self.targets, self.readings) if objective in reading.objectives)


class CompressorModule(nn.Module):
    """A soft compressor with the objectives of a stage; `forward(batch)` computes the weighted loss.

    Its parameters are the compressor's and those of objectives that train a decoder of their own (`Objective.trains`), which
    are made once, for all stages, and not saved. The original reader is frozen and stays in eval mode.

    Args:
        compressor: the compressor.
        objectives: names of the objectives of all stages.
    """

    accepts_loss_kwargs = True

    def __init__(self, compressor: SoftCompressor, objectives: Sequence[str] = ()) -> None:
        super().__init__()
        self.compressor: SoftCompressor = compressor
        own = [name for name in dict.fromkeys(objectives) if name in OBJECTIVES and OBJECTIVES[name].trains]
        self.decoders = nn.ModuleDict({name: cast(Any, OBJECTIVES[name].create(Setup(compressor))) for name in own})
        self.weights: dict[str, float] = {}
        self.losses: dict[str, Any] = {}
        self.temperature = 1.0
        self.teacher_cache: TeacherCache | None = None

    def set_objectives(self, stage: Stage, draw: Callable[[str, int], list[str]]) -> None:
        """Makes the stage's objectives and opens the teacher's cache; `draw(name, n)` draws passages for their statistics."""
        self.weights = {name: weight for name, weight in stage.objectives.items() if weight}
        own = type(self.compressor).own_objectives()
        if unknown := [name for name in self.weights if name not in OBJECTIVES and name not in own]:
            raise ValueError(
                f"Stage {stage.name!r} asks for the objective {unknown[0]}, which the method "
                f"{self.compressor.config.method!r} does not have; give it no weight, or train a method that has it."
            )
        setup = Setup(self.compressor, stage.temperature, stage.teacher_top_k, stage.reverse_kl, draw)
        self.losses = {
            name: self.decoders[name] if name in self.decoders else OBJECTIVES[name].create(setup)
            for name in self.weights
            if name in OBJECTIVES
        }
        for name, decoder in self.decoders.items():
            decoder.requires_grad_(name in self.losses)
        self.temperature = stage.temperature
        self.teacher_cache = None
        if stage.teacher_cache is not None and stage.teacher_top_k is not None:
            self.teacher_cache = TeacherCache(
                stage.teacher_cache,
                teacher=self.compressor.base_reader.fingerprint,
                top_k=stage.teacher_top_k,
                temperature=stage.temperature,
            )

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Recomputes the encoder's activations in the backward pass."""
        able: list[Any] = [m for m in self.compressor.modules() if hasattr(m, "gradient_checkpointing_enable")]
        if not able:
            name = type(self.compressor).__name__
            raise ValueError(f"{name} has no encoder that can checkpoint gradients; set gradient_checkpointing: false.")
        able[0].gradient_checkpointing_enable(**settings)

    def forward(self, batch: CompressorBatch, num_items_in_batch: dict[str, int] | None = None) -> dict[str, Any]:
        """Computes the weighted loss of a batch.

        Args:
            num_items_in_batch: target tokens per objective over all accumulated batches; default: this batch's.

        Returns:
            `loss`, the unweighted means `loss/<objective>`, `ratio` (source tokens per slot) and `tokens` (of passages and
            targets).
        """
        passages = self.compressor.encode(batch.texts, batch.queries, batch.ratio) if batch.texts else []
        counts = {name: batch.count(name) for name in self.weights}
        divisors = num_items_in_batch or counts
        total = sum((t.sum() * 0.0 for p in passages if (t := _some_tensor(p)) is not None), torch.zeros(()))
        read = [i for i, reading in enumerate(batch.readings) if reading.kind not in NOT_READ]
        sums = self._objectives(batch, read, passages) if read else {}
        for name in self.weights:
            unread = [i for i, r in enumerate(batch.readings) if r.kind in NOT_READ and name in r.objectives]
            if not unread:
                continue
            if name in self.losses:
                scored = Scored(
                    [batch.targets[i] for i in unread],
                    passages=[passages[j] for i in unread for j in batch.contexts[i]],
                    sizes=[len(batch.contexts[i]) for i in unread],
                    questions=[batch.readings[i].question for i in unread],
                )
                sums[name] = self.losses[name].total(scored)
            else:
                own = type(self.compressor).own_objectives()[name]
                texts, rng = [batch.readings[i].target for i in unread], random.Random(f"{batch.key}/{name}")
                sums[name], _ = own(self.compressor, texts, rng, batch.ratio)
        out: dict[str, Any] = {}
        for name, value in sums.items():
            total = total.to(value.device) + self.weights[name] * value / max(1, divisors[name])
            out[f"loss/{name}"] = value.detach() / max(1, counts[name])
        sources = sum(p.source_tokens for p in passages)
        if passages:
            out["ratio"] = sources / max(1, sum(p.slots for p in passages))
        out["tokens"] = sources + sum(map(len, batch.targets))
        return {"loss": total, **out}

    def _objectives(
        self, batch: CompressorBatch, chosen: Sequence[int], passages: Sequence[CompressedPassage]
    ) -> dict[str, Tensor]:
        """Sums of the objectives over the chosen readings."""
        prompts = [batch.readings[i].prompt([passages[j] for j in batch.contexts[i]]) for i in chosen]
        found = self._hidden(self.compressor.reader, batch, chosen, prompts)
        sums: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            flags = [name in batch.readings[i].objectives for i in chosen]
            if not any(flags):
                continue
            rows = torch.tensor(flags, device=found.rows.device)[found.rows]
            which = [i for i, flag in zip(chosen, flags) if flag]
            targets, teacher = [batch.targets[i] for i in which], self.teacher(batch, which) if loss.teacher else None
            blind = torch.cat(self.teacher_hidden(batch, which, blind=True)) if loss.blind else None
            sums[name] = loss.total(Scored(targets, found.hidden[rows], found.ids[rows], teacher, blind))
        return sums

    def teacher(self, batch: CompressorBatch, chosen: Sequence[int]) -> Tensor | TeacherLogits:
        """Predictions of the untuned reader with the passages as text: hidden states ``[N, d]``, or logits of the cache."""
        cache, reader = self.teacher_cache, self.compressor.base_reader
        if cache is None:
            return torch.cat(self.teacher_hidden(batch, chosen))
        kind = reader.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else reader.dtype
        prompts = ["".join(map(str, self._teacher_prompt(batch, i))) for i in chosen]
        keys = [cache.key(prompt, batch.targets[i], str(dtype)) for prompt, i in zip(prompts, chosen)]
        found = cache.get(keys)
        if missing := [n for n, entry in enumerate(found) if entry is None]:
            hidden = self.teacher_hidden(batch, [chosen[n] for n in missing])
            made = TeacherLogits.of(torch.cat(hidden), reader.head, cache.top_k, self.temperature)
            for n, end in zip(missing, torch.tensor([len(states) for states in hidden]).cumsum(0).tolist()):
                found[n] = entry = made[end - len(batch.targets[chosen[n]]) : end]
                cache.put(keys[n], entry)
        return TeacherLogits.join([entry.to(reader.device) for entry in found if entry is not None])

    def _teacher_prompt(self, batch: CompressorBatch, index: int, blind: bool = False) -> Any:
        texts = [batch.texts[j] for j in batch.contexts[index]]
        prompt = batch.readings[index].prompt([""] if blind else texts)
        return prompt if any(prompt) else [SEPARATOR]

    @torch.no_grad()
    def teacher_hidden(self, batch: CompressorBatch, chosen: Sequence[int], blind: bool = False) -> list[Tensor]:
        """Hidden states ``[target tokens, d]`` of the untuned reader with the passages as text, or without, per reading."""
        prompts = [self._teacher_prompt(batch, i, blind) for i in chosen]
        found = self._hidden(self.compressor.base_reader, batch, chosen, prompts)
        return list(found.hidden.split([len(batch.targets[i]) for i in chosen]))

    def _hidden(self, reader: Reader, batch: CompressorBatch, chosen: Sequence[int], prompts: Sequence[Any]) -> Targets:
        """Hidden states at the targets of some readings; what those of one item and format have in common is read once."""
        groups = [(*batch.contexts[i], batch.readings[i].kind) for i in chosen]
        return target_hidden(reader, prompts, [batch.targets[i] for i in chosen], groups, POSITIONS)


def _some_tensor(passage: CompressedPassage) -> Tensor | None:
    """A tensor that depends on the compressor's parameters, so that a batch without targets has a gradient."""
    return passage.keys[0] if passage.keys else passage.embeds
