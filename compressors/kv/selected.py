"""Base class of trained methods that keep the keys and values of all layers at chosen tokens, at their own positions."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.batching import SoftBatch, SoftSequence, soft_batches
from ..core.config import CompressorConfig, check_counts, setting
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin
from ..slots.scorer import TokenScorer
from ..slots.segments import Segment, SegmentSettings
from .encode import KVSlots, cached_layers
from .ragged import RaggedSegmentCompressor, RaggedSlots


@dataclass
class SelectedConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings shared by methods that keep chosen tokens."""

    segment_tokens: int = setting(1024, "longest segment", kw_only=True)
    scorer_layers: int = setting(3, "layers of the reader whose states the scorer reads")

    def __post_init__(self) -> None:
        check_counts(self, {"segment_tokens": 1, "scorer_layers": 2})
        self.check_segments()
        self.check_lora()


class SelectedTokenCompressor(RaggedSegmentCompressor):
    """Scores the tokens of a segment, reads it with LoRA, and keeps keys and values at the best tokens.

    The same tokens are kept in every head, and they stay at their positions. A method sets
    ``encoder`` and ``scorer`` and implements `choose`; `routing` and `finish` may be overridden.

    Attributes:
        encoder: the reader's `LoRATwin`.
        scorer: scores the tokens.

    Raises:
        ValueError: if the reader's keys cannot move, its attention cannot take a bias, or its layers differ in shape.
    """

    encoder: LoRATwin
    scorer: TokenScorer

    @abstractmethod
    def choose(self, scores: Tensor, slots: int) -> Tensor:
        """``[slots]`` indices of the tokens to keep, in order, given ``[tokens]`` scores."""

    def routing(
        self, batch: SoftBatch, chosen: Sequence[Tensor], segments: Sequence[Segment]
    ) -> AbstractContextManager:
        """Context in which the encoder runs over a batch."""
        return contextlib.nullcontext()

    def finish(self, slots: RaggedSlots, scores: Tensor) -> RaggedSlots:
        """Lets the ``[slots]`` scores take part, so that they get a gradient."""
        return slots

    def encode_segments(self, segments: list[Segment]) -> list[RaggedSlots]:
        """Keys and values at the chosen tokens."""
        reader = self.base_reader
        scores = self.scorer(segments, self.batch_positions)
        chosen = [self.choose(found, segment.slots) for found, segment in zip(scores, segments)]
        nothing = torch.zeros(0, reader.width)
        sequences = [SoftSequence([*s.front, *s.ids], [], nothing) for s in segments]
        made: dict[int, RaggedSlots] = {}
        for batch in soft_batches(sequences, reader.embed, reader.device, budget=self.batch_positions):
            with self.routing(batch, chosen, segments):
                layers = cached_layers(self.encoder.decoder, batch.embeds, batch.mask, batch.positions)
            for row, i in enumerate(batch.which):
                found = KVSlots.at(layers, batch.positions, row, (chosen[i] + len(segments[i].front)).tolist())
                slots = RaggedSlots(found.keys, found.values, found.positions, tokens=len(segments[i].ids))
                made[i] = self.finish(slots, scores[i][chosen[i]])
        return [made[i] for i in range(len(segments))]
