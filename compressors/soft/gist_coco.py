"""Gist-COCO: the reader plus LoRA reads question and passage; gists of the passage and of the question are the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import run_sequences
from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import CompressedPassage, Interface
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import memory_sequences, probe, random_token_rows
from ..slots.projector import check_width, learned_scale, matching_factor, scaled
from ..slots.question import QuerySettings
from ..slots.segments import Segment, SegmentCompressor, SegmentSettings
from ..slots.verbalise import nearest_tokens


@dataclass
class GistCOCOConfig(SegmentSettings, LoRASettings, QuerySettings, CompressorConfig):
    """Settings of Gist-COCO."""

    method: ClassVar[str] = "gist-coco"
    title: ClassVar[str] = "Gist-COCO"

    segment_tokens: int | None = setting(300, "longest segment (the paper's longest passage)", kw_only=True)
    query_aware: bool = setting(True, "read the question before the passage, as the paper does", kw_only=True)
    passage_gists: int = setting(96, "the most passage gists of a segment (the paper: 10 of each kind)")
    question_gists: int = setting(10, "the most question gists of a segment; never more than passage gists")

    def __post_init__(self) -> None:
        check_counts(self, {"passage_gists": 1, "question_gists": 1})
        self.check_segments()
        self.check_lora()
        self.check_query()


@register_compressor
class GistCOCOCompressor(SegmentCompressor):
    """Gist-COCO (arXiv 2402.16058) on a decoder-only reader.

    The reader plus LoRA reads ``[BOS][question][segment][passage gists][question gists]``. Its last hidden states (after the
    final norm) at the gists are the slots. The plain reader reads them, and a passage is compressed for each question.

    Training: the objective ``kl`` alone, with the answer's tokens as positions.

    A decoder-only reader makes it differ from the paper, where a copy of FLAN-T5's encoder makes gists that the decoder attends
    to: LoRA replaces the copy; gists follow the text that they sum up, as attention is causal; they enter the reader as
    embeddings; and the question stands in the reader's prompt in training too. The number of slots follows the passage's
    length; half of them at most are question gists, where the paper has 10 of each.

    Attributes:
        encoder: the reader's `LoRATwin`.
        passage_memory, question_memory: ``[n, width]`` embeddings of the two kinds of gists.
        log_scale: logarithm of the output factor.

    Raises:
        ValueError: if the reader's hidden states and embeddings differ in width, or it has too few positions.
    """

    config_class = GistCOCOConfig
    interface: ClassVar[Interface] = "embeds"
    config: GistCOCOConfig

    def __init__(self, config: GistCOCOConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        longest = self.longest_segment(config.ratio)
        self.encoder = LoRATwin(reader.model, **config.lora)
        self.passage_memory = nn.Parameter(random_token_rows(reader, config.passage_gists))
        self.question_memory = nn.Parameter(random_token_rows(reader, config.question_gists))
        self.log_scale: nn.Parameter | None = None
        with torch.no_grad():
            (found,) = self.encode_segments([probe(reader.vocab_size, longest, 8, self.opening)])
        check_width(found, reader, "Gist-COCO needs both alike")
        self.log_scale = learned_scale(matching_factor(found, reader), reader)

    @property
    def most_slots(self) -> int:
        """Gists of both kinds."""
        return self.config.passage_gists + min(self.config.question_gists, self.config.passage_gists)

    def gists(self, slots: int) -> Tensor:
        """``[slots, width]`` embeddings: passage gists, then question gists, which are half of them at most."""
        asked = max(min(self.config.question_gists, slots // 2), slots - self.config.passage_gists)
        return torch.cat([self.passage_memory[: slots - asked], self.question_memory[:asked]])

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Scaled states at the gists."""
        reader = self.base_reader
        sequences = memory_sequences(segments, [self.gists(segment.slots) for segment in segments], "append")
        states = run_sequences(self.encoder, sequences, reader.embed, reader.device, self.batch_positions)
        return [scaled(found[len(found) - s.slots :], self.log_scale) for found, s in zip(states, segments)]

    def verbalise(self, passage: CompressedPassage, top: int = 5) -> list[list[str]]:
        """The ``top`` tokens nearest to each slot, the nearest first; a view for people, not for another reader."""
        return nearest_tokens(self.base_reader, passage, top)
