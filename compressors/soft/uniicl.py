"""UniICL: the frozen reader reads a passage and one vector, repeated; its states there, through one matrix, are the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora_twin import Twin, Untuned
from ..reader.ranking import nearest_passages
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import MemoryTokenCompressor, probe, random_token_rows
from ..slots.projector import check_width, matching_factor, scaled_identity
from ..slots.question import QuerySettings
from ..slots.segments import Segment, SegmentSettings


@dataclass
class UniICLConfig(SegmentSettings, QuerySettings, CompressorConfig):
    """Settings of UniICL."""

    method: ClassVar[str] = "uniicl"
    title: ClassVar[str] = "UniICL"

    ratio: float | None = setting(12.0, "compression ratio if none is asked for", kw_only=True)
    segment_tokens: int | None = setting(512, "longest segment (the paper's window)", kw_only=True)
    memory_tokens: int = setting(256, "the most slots of a segment")

    def __post_init__(self) -> None:
        check_counts(self, {"memory_tokens": 1})
        self.check_segments()
        self.check_query()


@register_compressor
class UniICLCompressor(MemoryTokenCompressor):
    """UniICL (arXiv 2405.17062): one vector and one matrix train, beside a frozen reader.

    The reader reads ``[BOS][segment][M]...[M]``, with one slot per ``ratio`` tokens. Its last hidden states (after the final
    norm) at the vectors M, through one linear layer, are the slots, and the same reader reads them. The least that a method
    with memory tokens can train.

    Training: first ``lm``, then ``lm`` with the objective ``contrast`` at weight 1: mean slots then also tell which passage
    helps with a question, so that one stored passage serves selection (`rank`) and reading.

    Beyond the paper: M starts as the embedding of a random token (the paper: a rare one), the linear layer as the factor that
    brings slots to the norm of the reader's embeddings, and BOS opens every segment.

    Attributes:
        encoder: the reader itself.
        memory: ``[1, width]``: M.
        linear: ``[n, width] -> [n, width]``.

    Raises:
        ValueError: if the reader's hidden states and embeddings differ in width, or it has too few positions.
    """

    config_class = UniICLConfig
    interface: ClassVar[Interface] = "embeds"
    config: UniICLConfig
    encoder: Twin

    def __init__(self, config: UniICLConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        self.encoder = Untuned(reader.model)
        self.memory = nn.Parameter(random_token_rows(reader, 1))
        with torch.no_grad():
            sample = probe(reader.vocab_size, self.longest_segment(config.ratio), 4, self.opening)
            found = self.states_at_memory([sample])
        check_width(found, reader, "UniICL needs both alike")
        self.linear = scaled_identity(matching_factor(found, reader), reader)

    @property
    def most_slots(self) -> int:
        """``memory_tokens``: M is repeated so often at most."""
        return self.config.memory_tokens

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Projected states at the vectors M."""
        weight = self.linear.weight
        found = self.linear(self.states_at_memory(segments).to(weight.device, weight.dtype))
        return found.split([segment.slots for segment in segments])

    def rank(self, query: str, texts: Sequence[str]) -> list[int]:
        """Indices of passages, the nearest to the question first by `nearest_passages`; empty ones come last.

        Raises:
            ValueError: if the question has no tokens.
        """
        asked, *passages = self.compress([query, *texts])
        full = [i for i, passage in enumerate(passages) if passage.slots]
        order = nearest_passages(asked, [passages[i] for i in full])
        return [*(full[i] for i in order), *(i for i, passage in enumerate(passages) if not passage.slots)]
