"""RMT: the tuned reader reads a passage's segments in turn and carries a few memory vectors along; they are the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.batching import SoftSequence, run_sequences
from ..core.config import CompressorConfig, check_counts, setting
from ..core.passage import Interface
from ..encoders.lora import LoRASettings
from ..encoders.lora_twin import LoRATwin
from ..encoders.tuned_reader import AdaptedReader
from ..reader.reader import Reader
from ..registry import register_compressor
from ..slots.memory_tokens import probe, random_token_rows
from ..slots.projector import check_width, learned_scale, matching_factor, scaled
from ..slots.segments import Segment, SegmentCompressor, SegmentSettings, equal_lengths, in_turn, room_for_tokens


@dataclass
class RMTConfig(SegmentSettings, LoRASettings, CompressorConfig):
    """Settings of the recurrent memory transformer."""

    method: ClassVar[str] = "rmt"
    title: ClassVar[str] = "RMT"

    segment_tokens: int | None = setting(256, "tokens read between two updates of the memory", kw_only=True)
    memory_tokens: int = setting(64, "memory vectors: the most slots of one memory")
    adapt_reader: bool = setting(True, "the tuned model also reads the slots (the paper); false: the plain reader does")

    def __post_init__(self) -> None:
        check_counts(self, {"memory_tokens": 1})
        self.check_segments()
        self.check_lora()


@dataclass
class Turn(Segment):
    """A segment of a recurrence.

    Attributes:
        first, last: whether it begins or ends one.
    """

    first: bool = False
    last: bool = False


@register_compressor
class RMTCompressor(SegmentCompressor):
    """Recurrent memory transformer (RMT, arXiv 2207.06881) as a passage compressor.

    The tuned model reads the segments of a passage in turn as ``[BOS][memory][segment][memory]``. Its last hidden states (after
    the final norm) at the second memory are the memory of the next segment. The memory after the last segment is what the
    passage becomes. Training is back-propagation through the segments.

    Differences from the paper: LoRA instead of full tuning; the reader gets the last memory only, as slots in any prompt; the
    memory has ``ceil(L / ratio)`` vectors, and a passage that would need more than ``memory_tokens`` is cut into stretches
    with a memory each; states are scaled to the reader's embeddings.

    Attributes:
        encoder: the reader's `LoRATwin`.
        memory: ``[memory_tokens, width]`` initial memory.
        log_scale: logarithm of the output factor.

    Raises:
        ValueError: if the reader's hidden states and embeddings differ in width, or it has too few positions.
    """

    config_class = RMTConfig
    interface: ClassVar[Interface] = "embeds"
    config: RMTConfig

    def __init__(self, config: RMTConfig, reader: Reader) -> None:
        super().__init__(config, reader)
        longest = self.longest_segment(config.ratio)
        self.encoder = LoRATwin(reader.model, **config.lora)
        if config.adapt_reader:
            self.adapt_reader(AdaptedReader(reader, self.encoder))
        self.memory = nn.Parameter(random_token_rows(reader, config.memory_tokens))
        self.log_scale: nn.Parameter | None = None
        sample = probe(reader.vocab_size, longest, min(8, config.memory_tokens), self.opening)
        with torch.no_grad():
            (found,) = self.read([sample], [self.memory[: sample.slots]])
        check_width(found, reader, "RMT needs both alike")
        self.log_scale = learned_scale(matching_factor(found, reader), reader)

    @property
    def most_slots(self) -> int:
        """Memory vectors."""
        return self.config.memory_tokens

    def longest_segment(self, ratio: float | None, question_tokens: int = 0) -> int | None:
        """Tokens between two updates; both memories take positions."""
        memory, limit = 2 * self.config.memory_tokens, self.max_positions
        room = room_for_tokens(limit, self.base_reader.name, len(self.opening), question_tokens, memory)
        return min((n for n in (room, self.config.segment_tokens) if n is not None), default=None)

    def segments_of(
        self, ids: list[int], question: list[int], source_tokens: int, ratio: float | None, number: int
    ) -> list[Segment]:
        """The segments of passage ``number``; those of one recurrence have the same slots."""
        found: list[Segment] = []
        start, most = 0, self.config.memory_tokens
        stretch = len(ids) if ratio is None else max(int(most * ratio + 1e-6), 1)
        longest = self.longest_segment(ratio) or max(len(ids), 1)
        for whole in equal_lengths(len(ids), stretch):
            slots, parts = self.slots_of(whole, ratio), equal_lengths(whole, longest)
            for i, n in enumerate(parts):
                part = ids[start : start + n]
                found.append(Turn(part, slots, self.opening, number, first=i == 0, last=i + 1 == len(parts)))
                start += n
        return found

    def encode_segments(self, segments: list[Segment]) -> Sequence[Tensor]:
        """Memories: all first segments are read in one pass, then all second ones, and so on."""
        memory: dict[int, Tensor] = {}
        made: dict[int, Tensor] = {}
        place = {id(segment): i for i, segment in enumerate(segments)}
        for group in in_turn(segments):
            before = [self.memory[: s.slots] if _first(s) else memory[s.passage] for s in group]
            for segment, after in zip(group, self.read(group, before)):
                memory[segment.passage] = after
                made[place[id(segment)]] = after if _last(segment) else after[:0]
        return [made[i] for i in range(len(segments))]

    def read(self, segments: Sequence[Segment], memories: Sequence[Tensor]) -> list[Tensor]:
        """``[slots, width]`` per segment: the memory after it."""
        reader, sequences = self.base_reader, []
        for segment, rows in zip(segments, memories):
            first, n = len(segment.front), len(rows)
            ids = [*segment.front, *[0] * n, *segment.ids, *[0] * n]
            places = [*range(first, first + n), *range(len(ids) - n, len(ids))]
            sequences.append(SoftSequence(ids, places, torch.cat([rows, rows])))
        states = run_sequences(self.encoder, sequences, reader.embed, reader.device, self.batch_positions)
        return [scaled(row[len(row) - len(m) :], self.log_scale) for row, m in zip(states, memories)]


def _first(segment: Segment) -> bool:
    return not isinstance(segment, Turn) or segment.first


def _last(segment: Segment) -> bool:
    return not isinstance(segment, Turn) or segment.last
